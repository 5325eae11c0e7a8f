"""Can the bench be believed? Two identical models, and one comparison made twice.

    python benchmarks/bench_self/run.py         about 6 minutes on two cores

identical   deep copies of one ViT-Tiny/16, new ones in each of 20 runs: the ratio of their times is 1, and at least 19 runs
            must say "no difference"
twice       a ViT-Tiny/16 of ten blocks against one of twelve, in two runs of new copies: their intervals must overlap

The page of speeds shows every run as a row; summary.md says what came out. Finished runs are not done again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from speed_common import Results, arguments  # noqa: E402

from vitreous.bench.arms import Cell  # noqa: E402
from vitreous.bench.timing import ratio  # noqa: E402

RUNS, ROUNDS, LEAST = 20, 60, 19
SAME, TWICE = "Two identical models", "One comparison made twice"


def arms_of(ours: torch.nn.Module, base: torch.nn.Module, cell: Cell) -> dict[str, Callable[[], object]]:
    """New copies, so that every run finds its own place in memory."""
    return {"ours": cell.act(copy.deepcopy(ours)), "base": cell.act(copy.deepcopy(base))}


def main() -> None:
    options = arguments(__doc__)
    results = Results(HERE, options)
    torch.manual_seed(0)
    host = timm.create_model("vit_tiny_patch16_224")
    shallow = timm.create_model("vit_tiny_patch16_224", depth=10)
    for mode, batch, runs in (("inference", 4, range(RUNS // 2)), ("training", 1, range(RUNS // 2, RUNS))):
        cell = Cell(mode, batch, 224, device=options.device)
        for run in runs:
            results.row(SAME, f"run {run + 1}, {cell}", lambda cell=cell: arms_of(host, host, cell), count=ROUNDS)
    cell = Cell("inference", 4, 224, device=options.device)
    for run in ("first", "second"):
        results.row(TWICE, f"{run} time, {cell}", lambda: arms_of(shallow, host, cell), count=2 * ROUNDS)
    name = "summary.md" if options.device == "cpu" else "summary-cuda.md"
    (HERE / name).write_text(summary(results.rows))


def summary(rows: list[dict]) -> str:
    """What was asked, and what came out."""
    found = {(row["claim"], row["cell"]): ratio(row["seconds"]["ours"], row["seconds"]["base"]) for row in rows}
    same = [one for (claim, _), one in found.items() if claim == SAME]
    first, second = (one for (claim, _), one in found.items() if claim == TWICE)
    equal = sum(one.verdict == "no difference" for one in same)
    inside = sum(one.low <= 1 <= one.high for one in same)
    agree = first.low <= second.high and second.low <= first.high
    ratios = [f"{one.median:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in (first, second)]
    return (
        f'- Two identical models: "no difference" in {equal} of {len(same)} runs; at least {LEAST} were asked for. '
        f"The 95 % intervals cover 1 in {inside}.\n"
        f"- One comparison made twice: {ratios[0]} and {ratios[1]}: the intervals {'overlap' if agree else 'do not overlap'}.\n"
    )


if __name__ == "__main__":
    main()
