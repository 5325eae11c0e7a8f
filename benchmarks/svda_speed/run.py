"""What SVDA costs against the same ViT with its fused attention: a training step, and inference.

    python benchmarks/svda_speed/run.py                      all cells on the CPU, about an hour on two cores
    python benchmarks/svda_speed/run.py --minutes 1          as much of it as fits; run it again to go on
    python benchmarks/svda_speed/run.py --device cuda --compile

ViT-Ti/16 and ViT-S/16 at 224 pixels, batch 16 and 64, random weights, float32. A training step is forward, cross-entropy,
SVDA's own penalties (as the paper trains; the plain arm has none), backward and AdamW. Rounds are paired and stored a few at
a time, so an interrupted run goes on.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vitreous.bench.arms import Arm, Cell

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from speed_common import Results, arguments  # noqa: E402

ROUNDS = 60
MODELS = {"ViT-Ti/16": "vit_tiny_patch16_224", "ViT-S/16": "vit_small_patch16_224"}
REASON = (
    "Unit rows are passes over memory of their own: in ViT-Ti at batch 16 they add 0.5 to 0.7 ms to the 5.6 ms of an attention "
    "forward, and more backwards. Products shrink with the square of the width, these with the width."
)
LIMITS = {"training": ("training step", 1.05), "inference": ("inference", 1.03)}


def both(name: str, cell: Cell) -> dict[str, Callable[[], object]]:
    """One training step, or one pass without gradients, of the grafted and the plain model."""
    return {arm.name: cell.act(arm.build(cell.size)) for arm in (Arm("svda", name, ("svda",)), Arm("plain", name))}


def main() -> None:
    options = arguments(
        __doc__,
        compile={"action": "store_true", "help": "both arms compiled; the limit is then 1.02"},
        minutes={"type": float, "default": float("inf"), "help": "stop after about so long"},
        cell={"default": "", "help": "only cells whose name holds this, such as 'Ti/16, batch 16'"},
    )
    part = "compiled" if options.compile else "result" if options.threads > 1 else "one-thread"
    results, end = Results(HERE, options, part=part), time.monotonic() + 60 * options.minutes
    for batch, model, mode in itertools.product((16, 64), MODELS, LIMITS):
        (work, limit), name = LIMITS[mode], f"{model}, batch {batch}"
        if options.cell not in f"{name}, {work}":
            continue
        cell = Cell(mode, batch, 224, device=options.device, compile=options.compile)
        limit = 1.02 if options.compile else limit
        for count in range(20, ROUNDS + 1, 20):
            if time.monotonic() > end:
                return
            built = partial(both, MODELS[model], cell)
            results.row(f"SVDA {work}", name, built, count=count, limit=limit, slack=0.01, reason=REASON, warmup=2)


if __name__ == "__main__":
    main()
