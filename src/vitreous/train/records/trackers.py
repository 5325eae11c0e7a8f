"""Trackers: programs that get the numbers of every epoch.

metrics.jsonl is written beside them, always.

`--tracker tensorboard` needs the extra vitreous[tensorboard] and writes RUN/tensorboard. Anything
else that follows `Tracker` can be named as package.module.Class, on the command line alone: a run
folder never has code imported.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from vitreous.base.errors import SettingError, UnknownName, VitreousError, brief


class Tracker(Protocol):
    """What a tracker defines; it is made without arguments."""

    def start(self, folder: Path, record: dict[str, Any], epoch: int) -> None:
        """Before the first epoch, and, after `finish`, when the run returns to an earlier state.

        record: the run's run.json. epoch: the next one; discards logged epochs from this one on.
        """

    def log(self, epoch: int, values: dict[str, float]) -> None:
        """After each epoch: its numbers by name, such as "losses/total" and "tests/test/loss"."""

    def finish(self) -> None:
        """At the end, unless the process is killed, and before a return to an earlier state."""


class TensorBoard:
    """Event files for TensorBoard, which mark epochs that are done again as void."""

    def __init__(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise VitreousError(
                'Found no package tensorboard. Expected it, for --tracker tensorboard. pip install "vitreous[tensorboard]".'
            ) from error
        self.open = SummaryWriter

    def start(self, folder: Path, record: dict[str, Any], epoch: int) -> None:
        self.writer = self.open(str(folder / "tensorboard"), purge_step=epoch)
        self.writer.add_text("run", f"```json\n{json.dumps(record, indent=2)}\n```", epoch)

    def log(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard}


def check_tracker(name: str) -> None:
    """Raise UnknownName unless it is one of ours or a dotted name."""
    if name not in TRACKERS and "." not in name:
        raise UnknownName(name, "tracker", TRACKERS, hint="One of another package is named package.module.Class.")


def make(name: str) -> Tracker:
    """The tracker of that name.

    Raises SettingError if another package's cannot be imported or does not follow `Tracker`.
    """
    if name in TRACKERS:
        return TRACKERS[name]()
    module, _, cls = name.rpartition(".")
    try:
        tracker = getattr(importlib.import_module(module), cls)()
    except Exception as error:  # whatever its module and class may raise
        raise SettingError(
            f"Found --tracker {name}, which cannot be made ({brief(error)}). Expected package.module.Class of "
            "an installed package, made without arguments. Check the name."
        ) from error
    lacking = [method for method in ("start", "log", "finish") if not callable(getattr(tracker, method, None))]
    if lacking:
        raise SettingError(
            f"Found --tracker {name} without {', '.join(lacking)}. Expected start, log and finish, as in "
            "vitreous.train.records.trackers.Tracker. Add them."
        )
    return tracker


class Trackers:
    """The trackers of a run. One that fails is reported and dropped; the run goes on."""

    def __init__(self, names: Sequence[str]):
        self.trackers = {name: make(name) for name in names}
        self.say: Callable[[str], Any] = str
        self.folder: Path | None = None

    @contextmanager
    def of(self, folder: Path, epoch: int, say: Callable[[str], Any]) -> Iterator[None]:
        """While entered, sends the run in a folder to the trackers, from this epoch on.

        say: by which a failure is reported.
        """
        self.say, self.folder = say, folder
        self.begin(epoch)
        try:
            yield
        finally:
            self.call("finish")

    def begin(self, epoch: int) -> None:
        if self.trackers:
            record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            self.call("start", self.folder, record, epoch)

    def back_to(self, epoch: int) -> None:
        """Restart the trackers: this epoch and later ones are done again."""
        self.call("finish")
        self.begin(epoch)

    def log(self, metrics: dict[str, Any]) -> None:
        self.call("log", metrics["epoch"], flat(metrics))

    def call(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # whatever a service that is no part of the training may raise
                del self.trackers[name]
                self.say(f"The tracker {name} failed ({brief(error)}); it is told nothing more.")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in a nested record by path, such as {"losses/total": 1.2}."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and f"{prefix}{name}" != "epoch":
            numbers[f"{prefix}{name}"] = float(value)
    return numbers
