"""What a run consists of (`Session`) and how far it has come (`Progress`)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitreous.base.processes import ALONE, Team
from vitreous.data import Data, Samples
from vitreous.data.preprocess import Preprocess
from vitreous.grafting import new_parameters
from vitreous.tasks import Objective, Task
from vitreous.train.engine.loader import Loader
from vitreous.train.records.trackers import Trackers
from vitreous.train.settings import TrainSettings
from vitreous.train.updates import Update

SPANS = 20  # of an epoch, in which its loss is recorded


class Means:
    """Weighted means of scalars by name, added up without waiting for a device."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.weight = 0

    def add(self, values: dict[str, Tensor], weight: int = 1) -> None:
        self.weight += weight
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + weight * value.detach().double()

    def values(self) -> dict[str, float]:
        return {name: (total / self.weight).item() for name, total in self.sums.items()}


@dataclass
class Progress:
    """How far a run is, and the sums of the current epoch.

    updates: steps since the start, those left out included. epoch: from 1. step: batches of it that
    are done. seen: their images. seconds: the time they took. lr: the present learning rate, the
    highest of the groups. curve: the loss within the epoch, [last update, weighted sum, weight] of
    at most `SPANS` spans of equal length. left_out: numbers of the updates that failed before a
    return to a good state, and are not taken.
    """

    updates: int = 0
    epoch: int = 1
    step: int = 0
    seen: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    losses: Means = field(default_factory=Means)
    norms: Means = field(default_factory=Means)
    curve: list[list[float]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def add_to_curve(self, loss: float, weight: int, steps: int) -> None:
        """Add the loss of the present step, of so many in the epoch, before it is counted."""
        span, before = (step * SPANS // max(steps, SPANS) for step in (self.step, self.step - 1))
        if not self.curve or span > before:
            self.curve.append([0, 0.0, 0])
        _, total, count = self.curve[-1]
        self.curve[-1] = [self.updates + 1, total + weight * loss, count + weight]

    def next_epoch(self) -> Progress:
        return Progress(updates=self.updates, epoch=self.epoch + 1, left_out=self.left_out)


@dataclass
class Session:
    """Everything that a run needs, built by `prepare` before anything is written.

    sample: test images that are looked at after every epoch; None where attention cannot be read.
    calibration: training images, without augmentation, from which the model's foreground direction
    is found for that.
    recipe: the record of `TrainSettings.with_recipe`. whole: where weights are spread over
    processes, a copy to test, read and save, which `sharding.collect_weights` fills. step_module:
    what a step runs, joined with that of other processes. view_shape: of an image in training, (C,
    H, W) unless the task has views of its own.
    """

    settings: TrainSettings
    device: torch.device
    data: Data
    inputs: Preprocess
    task: Task
    objective: Objective
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    update: Update
    ema: ModelEmaV3 | None
    train: Loader
    tests: dict[str, Loader]
    calibration: Loader
    sample: Samples | None
    remarks: list[str]
    trackers: Trackers
    view_shape: tuple[int, ...]
    recipe: dict[str, Any] | None = None
    team: Team = ALONE
    whole: Objective | None = None
    step_module: nn.Module | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def model(self) -> nn.Module:
        """The model that learns."""
        return self.objective.model

    @property
    def tested(self) -> Objective:
        """The objective that is tested and whose model is read and saved, its weights whole."""
        return self.whole or self.averaged

    @property
    def averaged(self) -> Objective:
        """The moving average, if there is one, else the objective that learns; maybe spread."""
        return self.objective if self.ema is None else self.ema.module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by `own_name`: those of the model, then the objective's own."""
        return {own_name(name): parameter for name, parameter in self.objective.named_parameters()}

    @cached_property
    def learning(self) -> dict[str, nn.Parameter]:
        """Those of `parameters` that learn, which `prepare` has settled."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    @cached_property
    def watched(self) -> list[str]:
        """Names of the learning parameters of grafts, whose gradient norms are recorded."""
        return [name for name in new_parameters(self.model) if name in self.learning]

    @property
    def fraction_done(self) -> float:
        """0 before the first update, 1 after the last."""
        return self.progress.updates / (self.settings.epochs * len(self.train))

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp)


def own_name(name: str) -> str:
    """A parameter's or module's name for people: NAME in the model, else objective.NAME."""
    return name.removeprefix("model.") if name.startswith("model.") else f"objective.{name}"
