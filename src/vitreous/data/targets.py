"""Targets of samples: a class, a set of classes, a mask, a picture, or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitreous.base.errors import DataError

Indices = Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class Target(ABC):
    """The targets of n samples, in the order of the samples.

    values: one entry per sample, an array or a sequence. noun: the target of one sample,
    in the words of errors.
    """

    values: Any
    noun: ClassVar[str]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Any:
        """The target of sample i."""
        return self.values[i]

    def strata(self) -> np.ndarray:
        """(n,) int64 strata, each of which balancing and holding out divide alike."""
        return np.zeros(len(self), np.int64)

    def subset(self, indices: Indices) -> Target:
        """The targets of these samples, in this order."""
        return type(self)(self.values[indices])

    @abstractmethod
    def take(self, indices: Indices) -> Tensor:
        """The targets of a batch of samples as one tensor, the batch first."""

    def class_text(self, i: int, classes: Sequence[str]) -> str:
        """The class of sample i by name, several joined by +; empty where there is none."""
        return ""

    def record(self, i: int) -> str:
        """Sample i's target as text of a table; empty for a mask or a picture."""
        return ""

    def content(self) -> bytes:
        """All values one after the other, for a digest."""
        return b"".join(np.asarray(value).tobytes() for value in self.values)


@dataclass(frozen=True, eq=False)
class ClassIndex(Target):
    """One class per sample. values: (n,) int64, the number of the class."""

    values: np.ndarray
    noun = "one class"

    def __post_init__(self):
        object.__setattr__(self, "values", np.asarray(self.values, np.int64))

    def __getitem__(self, i: int) -> int:
        return int(self.values[i])

    def strata(self) -> np.ndarray:
        return self.values

    def take(self, indices: Indices) -> Tensor:
        """(B,) int64."""
        return torch.from_numpy(self.values[indices])

    def class_text(self, i: int, classes: Sequence[str]) -> str:
        return classes[self.values[i]]

    def record(self, i: int) -> str:
        return str(self.values[i])


@dataclass(frozen=True, eq=False)
class ClassSet(Target):
    """Any number of classes per sample.

    values: (n, classes) float32, 1 present, 0 absent, NaN not known.
    Raises DataError for another shape or other values.
    """

    values: np.ndarray
    noun = "a set of classes"

    def __post_init__(self):
        values = np.asarray(self.values, np.float32)
        if values.ndim != 2 or not values.shape[1] or not np.isin(values[~np.isnan(values)], (0, 1)).all():
            raise DataError(
                f"Found a class set of shape {values.shape}. Expected a matrix (samples, classes) of 1 (present), 0 (absent) "
                "and NaN (not known). Check the label columns."
            )
        object.__setattr__(self, "values", values)

    def strata(self) -> np.ndarray:
        """The rarest class that a sample has; the number of classes for samples that have none.

        So each class, the rare ones first, is divided in the same share. Source of the idea:
        Sechidis, Tsoumakas, Vlahavas 2011, "On the Stratification of Multi-label Data".
        """
        present = self.values == 1  # (n, classes)
        order = np.argsort(present.sum(0), kind="stable")  # classes, the rarest first
        return np.where(present.any(1), order[present[:, order].argmax(1)], self.values.shape[1]).astype(np.int64)

    def take(self, indices: Indices) -> Tensor:
        """(B, classes) float32."""
        return torch.from_numpy(self.values[indices])

    def class_text(self, i: int, classes: Sequence[str]) -> str:
        return "+".join(name for name, value in zip(classes, self.values[i], strict=True) if value == 1)

    def record(self, i: int) -> str:
        """ "1 0 nan": one number for each class."""
        return " ".join(f"{value:g}" for value in self.values[i])


@dataclass(frozen=True, eq=False)
class Mask(Target):
    """A class for each pixel.

    values: n arrays (H, W) of class numbers, or a sequence that reads one when indexed.
    """

    values: Sequence[np.ndarray]
    noun = "a mask of classes"

    def subset(self, indices: Indices) -> Mask:
        return Mask([self.values[i] for i in indices])

    def take(self, indices: Indices) -> Tensor:
        """(B, H, W) int64; the masks must be of one size."""
        return torch.from_numpy(np.array([self.values[i] for i in indices], np.int64))


@dataclass(frozen=True, eq=False)
class Picture(Target):
    """Another picture for each sample.

    values: n arrays (H, W, C) uint8, or a sequence that reads one when indexed.
    """

    values: Sequence[np.ndarray]
    noun = "a second picture"

    def subset(self, indices: Indices) -> Picture:
        return Picture([self.values[i] for i in indices])

    def take(self, indices: Indices) -> Tensor:
        """(B, C, H, W) float32 of [0, 1]; the pictures must be of one size."""
        pictures = [torch.from_numpy(np.array(self.values[i])).movedim(-1, 0).float() / 255 for i in indices]
        return torch.stack(pictures) if pictures else torch.empty(0)


class NoTarget(Target):
    """Samples without targets.

    values: (n, 0) float32, so that a batch of them has the batch's length and no number.
    """

    noun = "no target"

    def __init__(self, count: int):
        object.__setattr__(self, "values", np.empty((count, 0), np.float32))

    def subset(self, indices: Indices) -> NoTarget:
        return NoTarget(len(np.asarray(indices)))

    def take(self, indices: Indices) -> Tensor:
        """(B, 0) float32."""
        return torch.from_numpy(self.values[indices])
