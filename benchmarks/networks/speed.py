"""Images per second of every network of the study, in turns: python benchmarks/networks/speed.py [--device cuda]

Batch 64 of 64 x 64 pixels, one pass without gradients and one training step, random weights, float32, one thread. Spiking and
shifting networks are timed as torch computes them, with ordinary products; their papers count on other hardware.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import study  # noqa: E402
from run import ARMS  # noqa: E402
from speed_common import Results, arguments  # noqa: E402

from vitreous.bench.arms import Arm, Cell  # noqa: E402
from vitreous.train.settings import TrainSettings  # noqa: E402

PROTOCOL = study.PROTOCOLS["cutouts-64"]


def acts(mode: str, device: str) -> dict[str, Callable[[], object]]:
    """{arm: one call}, all of them; the first two are what the row's ratio is of."""
    cell = Cell(mode, 64, 64, device=device)
    arms = {
        name: Arm(name, arm.model or TrainSettings.model, arm.graft, model_kwargs=tuple(study.arm_arguments(PROTOCOL, arm)))
        for name, arm in ARMS["cutouts-64"].items()
    }
    return {name: cell.act(arm.build(cell.size)) for name, arm in {"avg": arms["avg"], **arms}.items()}


def main() -> None:
    options = arguments(__doc__)
    results = Results(HERE, options, part="speed")
    for mode in ("inference", "training"):
        results.row(mode, "batch 64, 64 px", lambda mode=mode: acts(mode, options.device), count=40, warmup=2)


if __name__ == "__main__":
    main()
