"""SVD-ViT's tokens against what costs as much: do singular vectors of the patch features add anything as tokens?

    python benchmarks/svd_vit/run.py cutouts       16 arms, 10 seeds, a minute or two each on one core
    python benchmarks/svd_vit/run.py animals-last-5 --data DATA
                                                   16 arms, 3 seeds: the last five blocks of the real ViT-Tiny/16

On made scenes plain is stored with the study of SVDA, and SPC joins after block 3 of 4, the paper's place (one before the
last); what is compared with it joins there too, where the name says `late`.
One file per run in a folder of the data's name; the tables are made by `python benchmarks/study_tables.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from study import Arm, main  # noqa: E402

GATED = "spc:after=3,sign=squared,read=learned"
SCRATCH = {
    "cls-5": Arm(("extra_tokens",), what="four learned class tokens more, before the first block (the paper's CLS=5)"),
    "spc": Arm(("spc:after=3",), what="SPC as published: U^T X, four tokens"),
    "cls-5-late": Arm(("extra_tokens:after=3",), what="four learned class tokens more, where SPC's tokens join"),
    "gated": Arm((GATED,), what="learned tokens + gate * LN(sum_j u_ij^2 x_j), ours"),
    "gated-random": Arm((f"{GATED},basis=random",), what="the same along random directions"),
    "gated-mean": Arm((f"{GATED},basis=mean",), what="the same with the token mean"),
    "gated-calibrated": Arm(
        (f"{GATED},basis=calibrated",), what="the same with tokens pooled by the foreground direction, ours"
    ),
    "spc-calibrated": Arm(("spc:after=3,basis=calibrated",), what="tokens pooled by the foreground direction, without a gate"),
    "spc-squared": Arm(("spc:after=3,sign=squared",), what="SPC with squared loadings"),
    "spc-random": Arm(("spc:after=3,basis=random",), what="SPC's control: random directions"),
    "spc-trailing": Arm(("spc:after=3,basis=trailing",), what="SPC's control: trailing singular vectors"),
    "spc-mean": Arm(("spc:after=3,basis=mean",), what="SPC's control: the token mean"),
    "registers": Arm(("extra_tokens:kind=register",), what="four registers, before the first block"),
    "spc-ssva": Arm(("spc:after=3,ssva=true",), what="SPC with SSVA"),
    "spc-id-rsvd": Arm(("spc:after=3,sketch=8+1+true",), what="SPC with ID-RSVD, one power step"),
    "spc-all": Arm(("spc:after=3,ssva=true,sketch=8+1+true",), what="SPC with SSVA and ID-RSVD"),
}


def spc(after: int, more: str = "") -> tuple[str]:
    return (f"spc:after={after}{more}",)


OURS = ",sign=squared,read=learned"
LAST_5 = {
    "plain": Arm(what="one class token, the network as it is (the paper's CLS=1)"),
    "cls-5-late": Arm(("extra_tokens:after=8",), what="four learned class tokens more, behind the first block that learns"),
    "spc": Arm(spc(11), what="SPC as published, after block 11, its default place"),
    "gated": Arm(spc(11, OURS), what="learned tokens + gate * LN(sum_j u_ij^2 x_j), ours"),
    "gated-random": Arm(spc(11, f"{OURS},basis=random"), what="the same along random directions"),
    "gated-mean": Arm(spc(11, f"{OURS},basis=mean"), what="the same with the token mean"),
    "gated-calibrated": Arm(spc(11, f"{OURS},basis=calibrated"), what="the same, pooled by the foreground direction, ours"),
    "spc-9": Arm(spc(9), what="SPC after block 9"),
    "spc-12": Arm(spc(12), what="SPC after the last block"),
    "registers-late": Arm(("extra_tokens:after=8,kind=register",), what="four registers, behind the first block that learns"),
    "spc-random": Arm(spc(11, ",basis=random"), what="SPC's control: random directions"),
    "spc-trailing": Arm(spc(11, ",basis=trailing"), what="SPC's control: trailing singular vectors"),
    "spc-mean": Arm(spc(11, ",basis=mean"), what="SPC's control: the token mean"),
    "spc-ssva": Arm(spc(11, ",ssva=true"), what="SPC with SSVA"),
    "spc-id-rsvd": Arm(spc(11, ",sketch=8+1+true"), what="SPC with ID-RSVD, one power step"),
    "spc-all": Arm(spc(11, ",ssva=true,sketch=8+1+true"), what="SPC with SSVA and ID-RSVD"),
}
ARMS = {"cutouts": SCRATCH, "animals-last-5": LAST_5}

if __name__ == "__main__":
    main(HERE, ARMS, sys.argv[1:])
