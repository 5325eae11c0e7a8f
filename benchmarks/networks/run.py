"""Every network and token mixer of ours at one budget, beside a plain ViT with as many parameters.

    python benchmarks/networks/run.py cutouts-64       3 seeds, two to five minutes a run on one core
    python benchmarks/networks/speed.py                images per second of all of them, in turns

Made scenes of 64 pixels, the demo's recipe for all: it was tuned on a plain ViT, and none of the others got one of its own, so
a low number says what a network does under a ViT's recipe in five epochs, not what it can do. All have 135,000 to 166,000
parameters (the plain ViT 150,982) but for those whose row says why not. Widths were chosen for that number, before any run.
Mechanisms stand in the plain ViT without class token (`avg`), which is what they are compared with. One file per run; the
table is made by `python benchmarks/study_tables.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from study import Arm, main  # noqa: E402

AVG = ("global_pool=avg", "class_token=False")


def host(*grafts: str, what: str) -> Arm:
    """Mechanisms in the plain ViT that pools over its patches."""
    return Arm(grafts, AVG, what)


def network(name: str, arguments: str, what: str, *grafts: str) -> Arm:
    return Arm(grafts, tuple(arguments.split()), what, model=name)


FOUR = "num_heads=(1,2,4,4) depths=(1,1,1,1) mlp_ratios=(2,2,2,2)"
SWIN = "patch_size=4 embed_dim=20 depths=(1,1,2) num_heads=(1,2,4) window_size=4 mlp_ratio=2.0"
CVT = "embed_dims=(24,48,64) depths=(1,1,2) num_heads=(1,2,4) mlp_ratio=2.0"
PVT = f"embed_dims=(16,32,48,56) {FOUR}"
ISOTROPIC = "patch_size=8 num_heads=4 mlp_ratio=2.0"
COMMON = {
    "plain": Arm(what="ViT with a class token"),
    "avg": host(what="ViT that pools over its patches"),
    "svda": host("svda:scale=sqrt", what="SVDA, scale sqrt(K)"),
    "gaussian-mask": host("gaussian_mask:start=wide", what="Gaussian mixture mask"),
    "local-window": host("local_window:window=3", what="TiC: attention within 3 x 3 patches"),
    "polyline-mask": host("polyline_mask", what="PPMA's mask"),
    "sparsifiner": host("sparsifiner:phase=schedule", what="Sparsifiner: a quarter of the keys, after a tenth of the run"),
    "spectral-gate": host("spectral_gate:layers=0-1", what="SpectFormer's gate in the first half; 127,814 parameters"),
    "scattering": host("scattering:layers=0-1", what="SVT's mixer in the first half; 134,470 parameters"),
    "hyena": host("hyena:layers=0-1", what="Hyena N-D in the first half; 180,726 parameters"),
    "retention": host("retention", what="ViR in all blocks"),
    "linear-angular": host("linear_angular", what="ShiftAddViT's attention in all blocks"),
    "shift-linear": host("shift_linear", what="ShiftAddViT's shifts for all products; 281,926 parameters while it learns"),
    "strip-attention": host("strip_attention", what="S2AFormer's attention in all blocks; 135,238 parameters"),
    "frequency-split": host("frequency_split", what="convolutions and attention on parts of the channels, a prototype"),
    "t2t": network("t2t_vit_7", f"{ISOTROPIC} embed_dim=64 depth=3 token_width=32", "T2T-ViT"),
    "spectformer": network("spectformer_tiny", f"{ISOTROPIC} embed_dim=72 depth=4 spectral=2", "SpectFormer"),
    "spectformer-h": network(
        "spectformer_h_s", f"stem_width=16 embed_dims=(24,32,48,56) {FOUR} aux_head=False", "SpectFormer in stages"
    ),
    "svt": network("svt_h_s", f"stem_width=16 embed_dims=(24,32,48,56) {FOUR} aux_head=False", "SVT"),
    "cvt": network("cvt_13", CVT, "CvT"),
    "cvt-svda": network("cvt_13", CVT, "CvT with SVDA, scale sqrt(K)", "svda:scale=sqrt"),
    "ppma": network("ppma_t", f"embed_dims=(24,32,48,56) {FOUR} projection=448", "PPMA"),
    "sret": network(
        "sret_t",
        "img_size=64 embed_dims=(32,64) num_heads=(2,4) depths=(2,2) slices=(4,1) later_slices=(2,1) mlp_ratio=2.0",
        "SReT: two stages, each block twice",
    ),
    "spikformer": network("spikformer_8_384", "embed_dim=64 depth=3 num_heads=4 mlp_ratio=2.0", "Spikformer, 4 time steps"),
    "swin": network("swin_tiny_patch4_window7_224", SWIN, "timm's Swin"),
    "swin-svda": network("swin_tiny_patch4_window7_224", SWIN, "Swin with SVDA, scale sqrt(K)", "svda:scale=sqrt"),
    "pvt": network("pvt_v2_b0", PVT, "timm's PVTv2"),
    "pvt-svda": network("pvt_v2_b0", PVT, "PVTv2 with SVDA, scale sqrt(K)", "svda:scale=sqrt"),
    "cait": network("cait_xxs24_224", f"{ISOTROPIC} embed_dim=60 depth=3 depth_token_only=1", "timm's CaiT"),
    "crossvit": network(
        "crossvit_9_240",
        "img_scale=(1.0,0.5) patch_size=(8,8) embed_dim=(48,64) depth=((1,2,0),) num_heads=(4,4) mlp_ratio=(2,2,1)",
        "timm's CrossViT, two scales",
    ),
    "convnext": network("convnext_atto", "dims=(24,32,64,80) depths=(1,1,1,1)", "timm's ConvNeXt"),
}
ARMS = {"cutouts-64": COMMON}

if __name__ == "__main__":
    main(HERE, ARMS, sys.argv[1:])
