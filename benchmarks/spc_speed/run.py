"""What do SVD-ViT's component tokens cost, against the plain ViT?

    python benchmarks/spc_speed/run.py            about 12 minutes on two cores; run it again to go on
    python benchmarks/spc_speed/run.py --only Ti  the small network alone
    python benchmarks/spc_speed/run.py --device cuda

`spc:components=8,tokens=4` after 11 blocks of ViT-B/16, and after 6 and 11 of ViT-Ti/16, with SSVA; ID-RSVD (a sketch that
learns, one power step). 224 pixels, batch 16, random weights, float32. A training step is forward, cross-entropy, backward
and AdamW. Limits are those of the plain host with 0.01 slack.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vitreous.bench.arms import Arm, Cell

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from speed_common import Results, arguments  # noqa: E402

BATCH = 16
SSVA, LEARNED = "spc:components=8,tokens=4,ssva=true,after={}", "spc:components=8,tokens=4,ssva=true,sketch=8+1+true,after={}"
REASON = (
    "Of ViT-Ti's 160 ms a pass, the step takes 4.1, of which 3.2 are the decomposition in many small operations, which a wider "
    "model dwarfs; four more tokens in six blocks take 3.2."
)
# name, timm's name, graft, limits of inference and of a training step, rounds of each
CELLS = (
    ("ViT-Ti/16, after 6", "vit_tiny_patch16_224", SSVA.format(6), 1.04, 1.06, 60, 60),
    ("ViT-Ti/16, after 11", "vit_tiny_patch16_224", SSVA.format(11), 1.04, 1.06, 60, 60),
    ("ViT-Ti/16, ID-RSVD after 11", "vit_tiny_patch16_224", LEARNED.format(11), 1.06, 1.06, 60, 60),
    ("ViT-B/16, after 11", "vit_base_patch16_224", SSVA.format(11), 1.02, 1.05, 40, 24),
)


def both(name: str, mechanism: str, cell: Cell) -> dict[str, Callable[[], object]]:
    """One pass without gradients, or one training step, of the grafted and the plain model."""
    return {arm.name: cell.act(arm.build(cell.size)) for arm in (Arm("spc", name, (mechanism,)), Arm("plain", name))}


def main() -> None:
    options = arguments(__doc__, only={"default": "", "help": "only cells whose name holds this"})
    results = Results(HERE, options)
    for cell, name, mechanism, infer, step, infer_rounds, step_rounds in CELLS:
        if options.only not in cell:
            continue
        for claim, mode, limit, count in (
            ("SPC inference", "inference", infer, infer_rounds),
            ("SPC training step", "training", step, step_rounds),
        ):
            build = partial(both, name, mechanism, Cell(mode, BATCH, 224, device=options.device))
            results.row(claim, f"{cell}, batch {BATCH}", build, count=count, limit=limit, slack=0.01, reason=REASON, warmup=2)


if __name__ == "__main__":
    main()
