"""Stopping early, and which epoch's weights a run keeps, by the lines of metrics.jsonl.

Without --patience it is the last epoch; with it, the first with the best value of the task's first
metric on the set that is watched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vitreous.base.metrics import Metric
from vitreous.data.holdout import HELD_OUT

Line = dict[str, Any]  # of metrics.jsonl


def watched(names: Iterable[str]) -> str:
    """The test set by which an epoch is chosen: the images held out, else val, else test."""
    there = set(names)
    return next(name for name in (HELD_OUT, "val", "test") if name in there)


def to_keep(lines: Sequence[Line], patience: int | None, metric: Metric) -> Line:
    """The epoch whose weights are kept, of one or more."""
    if patience is None:
        return lines[-1]
    name = watched(lines[0]["tests"])
    # `max` takes the first of equals, so that an equally good later epoch does not extend patience
    return max(lines, key=lambda line: metric.sign * line["tests"][name][metric.name])


def exhausted(lines: Sequence[Line], patience: int | None, metric: Metric) -> bool:
    """True if so many epochs have gone by without a better one."""
    return bool(lines) and patience is not None and lines[-1]["epoch"] - to_keep(lines, patience, metric)["epoch"] >= patience


def finished(lines: Sequence[Line], epochs: int, patience: int | None, metric: Metric) -> bool:
    """True if there is nothing left to train."""
    return bool(lines) and (lines[-1]["epoch"] >= epochs or exhausted(lines, patience, metric))


def why(lines: Sequence[Line], epochs: int, patience: int | None, metric: Metric) -> str:
    """What the numbers of a run stand for and why it stopped, for people."""
    if patience is None:
        return f"{metric.label.capitalize()} is of the last epoch; none was picked by its score."
    name, best = watched(lines[0]["tests"]), to_keep(lines, patience, metric)["epoch"]
    text = f"The model is of epoch {best}, the best on `{name}`, and so are its predictions."
    if exhausted(lines, patience, metric):
        last = lines[-1]["epoch"]
        text = f"Stopped after epoch {last} of {epochs}: no better {metric.label} on `{name}` for {patience} epochs. {text}"
    if name != "test":
        return f"{text} `test` had no part in the choice."
    return (
        f"{text} It was chosen by the very images that it is tested on, so its {metric.label} on them is flattered. "
        "--hold-out 0.1 chooses by images of the training set instead."
    )
