"""Stopping early, and which epoch's weights a run keeps. All of it follows from the lines of metrics.jsonl.

Without --patience it is the last epoch; with it, the first of those with the highest accuracy on the set that is watched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vitreous.data.holdout import HELD_OUT

Line = dict[str, Any]  # of metrics.jsonl


def watched(names: Iterable[str]) -> str:
    """The test set by which an epoch is chosen: the images held out, else val, else test."""
    there = set(names)
    return next(name for name in (HELD_OUT, "val", "test") if name in there)


def kept(lines: Sequence[Line], patience: int | None) -> Line:
    """The epoch whose weights are kept, of one or more."""
    if patience is None:
        return lines[-1]
    name = watched(lines[0]["tests"])
    return max(lines, key=lambda line: line["tests"][name]["accuracy"])  # the first of equals


def exhausted(lines: Sequence[Line], patience: int | None) -> bool:
    """True if so many epochs have gone by without a better one."""
    return bool(lines) and patience is not None and lines[-1]["epoch"] - kept(lines, patience)["epoch"] >= patience


def finished(lines: Sequence[Line], epochs: int, patience: int | None) -> bool:
    """True if there is nothing left to train."""
    return bool(lines) and (lines[-1]["epoch"] >= epochs or exhausted(lines, patience))


def why(lines: Sequence[Line], epochs: int, patience: int | None) -> str:
    """What the numbers of a run stand for and why it stopped, for people."""
    if patience is None:
        return "Accuracy is of the last epoch; none was picked by its score."
    name, best = watched(lines[0]["tests"]), kept(lines, patience)["epoch"]
    said = f"The model is of epoch {best}, the best on `{name}`, and so are its predictions."
    if exhausted(lines, patience):
        last = lines[-1]["epoch"]
        said = f"Stopped after epoch {last} of {epochs}: no better accuracy on `{name}` for {patience} epochs. {said}"
    if name != "test":
        return f"{said} `test` had no part in the choice."
    return (
        f"{said} It was chosen by the very images that it is tested on, so its accuracy on them is flattered. --hold-out 0.1 "
        "chooses by images of the training set instead."
    )
