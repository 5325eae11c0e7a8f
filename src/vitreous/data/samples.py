"""Samples (images with targets), in memory or not, and a whole data set.

Also checks of its targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitreous.base.errors import DataError
from vitreous.data.quarantine import Quarantined
from vitreous.data.targets import ClassIndex, Indices, NoTarget, Target

Transform = Callable[[Image.Image], torch.Tensor]


class Samples(torch.utils.data.Dataset, ABC):
    """Images with their targets, in a fixed order. A kind of samples has `image`, `mask` and
    `subset`.

    target: what each image is learned with; a sequence of n class indices is a `ClassIndex`.
    channels: 1 (greyscale, PIL mode L) or 3 (RGB). transform: PIL image -> tensor, timm's
    convention; None hands out the PIL image. remarks: lines about the files, for people.
    """

    remarks: tuple[str, ...] = ()

    def __init__(self, target: Target | Indices, channels: int, transform: Transform | None = None):
        self.target = target if isinstance(target, Target) else ClassIndex(target)
        self.channels = channels
        self.transform = transform

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64 class indices; -1 for every image where the target is another."""
        return self.target.values if isinstance(self.target, ClassIndex) else np.full(len(self), -1)

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, i: int) -> tuple[torch.Tensor | Image.Image, Any]:
        image = self.image(i)
        return (image if self.transform is None else self.transform(image)), self.target[i]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor | Image.Image, Any]]:
        """A whole batch in one call, which torch's DataLoader prefers."""
        return [self[i] for i in indices]

    @abstractmethod
    def image(self, i: int) -> Image.Image | np.ndarray:
        """The image as it is stored, before any transform.

        A PIL picture, a clip (T, H, W, C) or a volume (D, H, W, C). Every source of today gives
        pictures.
        """

    def image_with_notes(self, i: int) -> tuple[Image.Image | np.ndarray, tuple[str, ...]]:
        """The image, and what was done to its file beside decoding, in words to count by."""
        return self.image(i), ()

    @abstractmethod
    def mask(self, i: int) -> np.ndarray | None:
        """The (height, width) bool foreground of `image(i)`; None where there is none to score
        against.
        """

    @abstractmethod
    def subset(self, indices: Indices) -> Samples:
        """The same kind of samples: those of these indices, in this order."""


class ArraySamples(Samples):
    """Images in memory: `images` (n, H, W, C) uint8.

    Where there are some, `masks` (n, H, W) bool.
    """

    def __init__(self, images: np.ndarray, target: Target | Indices, masks: np.ndarray | None = None):
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
            raise DataError(
                f"Found images of shape {images.shape} and type {images.dtype}; expected (n, height, width, 1 or 3) "
                "of type uint8. Convert the array before making samples of it."
            )
        if len(images) != len(target):
            raise DataError(
                f"Found {len(images)} images and {len(target)} labels; expected one label per image. "
                "Check that both come from the same split and that no file was cut short."
            )
        super().__init__(target, images.shape[3])
        self.images = images
        self.masks = masks

    def image(self, i: int) -> Image.Image:
        pixels = self.images[i]
        return Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)

    def mask(self, i: int) -> np.ndarray | None:
        return None if self.masks is None else self.masks[i]

    def subset(self, indices: Indices) -> ArraySamples:
        masks = None if self.masks is None else self.masks[indices]
        part = ArraySamples(self.images[indices], self.target.subset(indices), masks)
        part.transform = self.transform
        return part


@dataclass(frozen=True)
class Data:
    """A data set, ready to train on.

    tests: always has "test". classes: name of each class, empty where the target has none.
    image_size: (height, width) that a transform should bring the images to: the size asked for,
    else their own. mean, std: suggested normalisation of pixels in [0, 1], per channel.
    quarantined: images that cannot be read and are in none of the sets. remarks: lines about the
    files, for people.
    """

    name: str
    train: Samples
    tests: dict[str, Samples]
    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    quarantined: tuple[Quarantined, ...] = ()
    remarks: tuple[str, ...] = ()

    def limited(self, limit: int, seed: int = 0) -> Data:
        """The same data with at most `limit` training images, balanced over the strata of its
        target; the tests stay whole.
        """
        return replace(self, train=self.train.subset(balanced(self.train.target.strata(), limit, seed)))


def check_target(data: Data, wanted: type[Target], task: str) -> None:
    """Raise DataError unless every part of the data carries the target of a task.

    `NoTarget` takes any data. task: its text form, for the error.
    """
    for part, samples in {"train": data.train, **data.tests}.items():
        if wanted is not NoTarget and not isinstance(samples.target, wanted):
            raise DataError(
                f"Found {data.name!r}, whose {part} images have {samples.target.noun} each. Expected {wanted.noun}, which the "
                f"task {task} learns. Choose a task that fits, or other data."
            )


def balanced(strata: np.ndarray, limit: int, seed: int = 0) -> np.ndarray:
    """Indices of at most `limit` samples, as equal in number over the strata as these allow.

    Drawn by `seed`.

    strata: (n,) numbers, for a `ClassIndex` the classes. A smaller limit gives a part of what a
    larger one gives, so that learning curves are nested.
    """
    classes = np.unique(strata)
    if limit < len(classes):
        raise DataError(
            f"Found a limit of {limit} images; expected at least one for each of the {len(classes)} classes. "
            f"Ask for {len(classes)} or more."
        )
    order = np.random.default_rng(seed).permutation(len(strata))
    rank = np.empty(len(strata), np.int64)  # of a sample within its stratum, in drawn order
    for stratum in classes:
        members = order[strata[order] == stratum]
        rank[members] = np.arange(len(members))
    return order[np.argsort(rank[order], kind="stable")][:limit]


def pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of (n, H, W, C) uint8 pixels, exact.

    Pixels count as numbers in [0, 1].
    """
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[3])])  # (C, 256)
    share = counts / counts.sum(1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
    return tuple(mean.round(4).tolist()), tuple(np.maximum(std, 1e-3).round(4).tolist())
