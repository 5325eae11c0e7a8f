"""`Task`: target, loss, metrics; `Objective`: the module that trains; `Dice`: its draws.

A task is one file of this folder: there is no registry to edit. docs/how-to/add-a-task.md makes
one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from vitreous.base.catalogue import Catalogue
from vitreous.base.errors import DataError
from vitreous.base.files import write
from vitreous.base.metrics import Metric
from vitreous.base.text_form import Settings
from vitreous.data import Data, Target

Batch = dict[str, Tensor]  # tensors by name, the images first in each: so a batch can be cut into parts
Outputs = dict[str, Tensor]  # of a test, by name, the images first in each
OBJECTIVE = "objective.safetensors"


@dataclass(frozen=True)
class Losses:
    """Losses of a step by name, scalars.

    means: over its images, the main one first. penalties: of weights, once a step.
    """

    means: dict[str, Tensor]
    penalties: dict[str, Tensor]

    @property
    def by_name(self) -> dict[str, Tensor]:
        return self.means | self.penalties

    @property
    def total(self) -> Tensor:
        """What the step lowers: their sum."""
        return sum(self.by_name.values())


class Dice:
    """Random numbers of one step: the same for an image on one process as on several.

    They are drawn for the whole batch of `count` images from a generator of their own, seeded by
    `key`; `rows` (B,) are the images of this process. A resumed run draws the same without saved
    state.
    """

    def __init__(self, key: tuple[int, ...], count: int, rows: np.ndarray, device: torch.device):
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(seed)
        self.count, self.rows, self.device = count, torch.from_numpy(rows), device

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) in [0, 1)."""
        return torch.rand((self.count, *shape), generator=self.generator)[self.rows].to(self.device)


@dataclass(frozen=True, kw_only=True)
class Task(Settings):
    """Base of all tasks: frozen, keyword-only dataclasses whose settings all have defaults.

    A setting called smoothing, mixup, cutmix or class_weights is also set by the flag of that name.

    paper: authors, year, arXiv id. target: the kind that each sample must have. metrics: of a test;
    the first one chooses the epoch that is kept. couples_images: the loss of a batch is not the
    mean of its images' losses, so that a batch may not be cut.
    """

    paper: ClassVar[str] = ""
    target: ClassVar[type[Target]]
    metrics: ClassVar[tuple[Metric, ...]]
    couples_images: ClassVar[bool] = False

    @property
    def pairs_images(self) -> bool:
        """Whether `draw` pairs images, the first with the last and so on inwards.

        Batches then have an even number of images.
        """
        return False

    def views(self, prepare: Callable) -> Callable:
        """The function from a training picture to a tensor, of one shape for all pictures.

        Several crops are stacked, (V, C, H, W). prepare: that of the run, with its augmentation; it
        draws from torch's, NumPy's and Python's global states, which training seeds for each
        picture. Test pictures are prepared as always.
        """
        return prepare

    def build(self, model: nn.Module, data: Data | None) -> Objective:
        """The objective that trains this model on these data; data is None for timing alone.

        Raises HostError or SettingError where model, data and settings do not fit together.
        """
        raise TypeError(f"{type(self).__name__} does not say what it trains: define build(self, model, data).")


class Objective(nn.Module, ABC):
    """A model and what training adds to it: a teacher, a decoder, a projector.

    model: the network that is read, saved and shipped. columns: of predictions.csv, after set and
    index. class_columns: those of them with numbers of classes, spaces between; the names of the
    classes are written beside them. fixed: children that follow from the settings, such as a frozen
    teacher: always in eval mode, not in the state of a run, whose run.json has their digest.
    shipped: children that `predict` needs beside the model, saved as objective.safetensors.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    class_columns: ClassVar[tuple[str, ...]] = ()
    fixed: tuple[str, ...] = ()
    shipped: tuple[str, ...] = ()

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        for name in self.fixed:
            self.get_submodule(name).eval()
        return self

    def learns(self) -> Iterable[str] | None:
        """Paths in the model that this task trains, such as blocks.0; None: those of --train."""
        return None

    def draw(self, images: Tensor, target: Tensor, dice: Dice) -> Batch:
        """The batch of a step with everything random that its loss depends on.

        Called once a step, before the batch is cut into parts.

        images: (B, C, H, W), or as `Task.views` makes them. target: (B, ...).
        """
        return {"images": images, "target": target}

    @abstractmethod
    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """{name: mean over the images of the batch}, the main one first; scalars.

        Training lowers their sum. Draws nothing but dropout. progress: of training, 0 to 1. Runs
        under autocast with --amp.
        """

    def after_update(self, updates: int) -> None:
        """Called after each update of the weights, `updates` so far: momentum teachers."""

    @abstractmethod
    def predict(self, batch: Batch) -> Outputs:
        """From "images" and "target" of a test batch: all that `score` and `rows` need."""

    @abstractmethod
    def score(self, outputs: Outputs) -> dict[str, float]:
        """{name of the metric: value} of a whole test set.

        The first metric is always there; others may be left out where the data have no labels.
        """

    def rows(self, outputs: Outputs) -> Iterator[tuple]:
        """The cells of `columns` for each image, in order."""
        return iter(())

    def by_class(self, outputs: Outputs) -> dict[str, Sequence[Any]]:
        """{column of classes.csv: a value for each class, None where there is none}."""
        return {}


TASKS = Catalogue("tasks", Task, "task")


def save_objective(objective: Objective, folder: Path) -> None:
    """Write the children that `predict` needs, if there are any, as objective.safetensors."""
    if tensors := shipped_tensors(objective):
        write(folder / OBJECTIVE, lambda path: safetensors.torch.save_file(tensors, path))


def load_objective(objective: Objective, folder: Path) -> None:
    """Fill the shipped children from a run folder. Raises DataError if they do not fit."""
    own = shipped_tensors(objective)
    tensors = safetensors.torch.load_file(folder / OBJECTIVE) if own else {}
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise DataError(
            f"Found other tensors in {folder / OBJECTIVE} than the task has. Expected {', '.join(sorted(own))}. Use the task "
            "and the settings in its run.json."
        )
    objective.load_state_dict(tensors, strict=False)


def shipped_tensors(objective: Objective) -> dict[str, Tensor]:
    state = objective.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if name.split(".")[0] in objective.shipped}
