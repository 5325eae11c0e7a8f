"""What yields images: one small interface, held in memory or read on demand, and the record of a whole data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from vitreous.base.errors import DataError
from vitreous.data.quarantine import Quarantined

Transform = Callable[[Image.Image], torch.Tensor]


class ImageSet(torch.utils.data.Dataset, ABC):
    """Labelled images in a fixed order. A kind of set says where a picture comes from: `image`, `mask` and `subset`.

    labels: (n,) int64 class indices. channels: 1 (greyscale, PIL mode L) or 3 (RGB). transform: PIL image -> tensor,
    timm's convention; None hands out the PIL image.
    """

    def __init__(self, labels: Sequence[int] | np.ndarray, channels: int, transform: Transform | None = None):
        self.labels = np.asarray(labels, np.int64)
        self.channels = channels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor | Image.Image, int]:
        image = self.image(i)
        return (image if self.transform is None else self.transform(image)), int(self.labels[i])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor | Image.Image, int]]:
        """A whole batch in one call, which torch's DataLoader prefers."""
        return [self[i] for i in indices]

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """The picture as it is stored, before any transform."""

    @abstractmethod
    def mask(self, i: int) -> np.ndarray | None:
        """The (height, width) bool foreground of `image(i)`; None where it is not known."""

    @abstractmethod
    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """The same kind of set with these items, in this order."""


class ArraySet(ImageSet):
    """Images in memory: `images` (n, H, W, C) uint8 and, where known, `masks` (n, H, W) bool."""

    def __init__(self, images: np.ndarray, labels: Sequence[int] | np.ndarray, masks: np.ndarray | None = None):
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
            raise DataError(
                f"Found images of shape {images.shape} and type {images.dtype}; expected (n, height, width, 1 or 3) "
                "of type uint8. Convert the array before making a set of it."
            )
        if len(images) != len(labels):
            raise DataError(
                f"Found {len(images)} images and {len(labels)} labels; expected one label per image. "
                "Check that both come from the same split and that no file was cut short."
            )
        super().__init__(labels, images.shape[3])
        self.images = images
        self.masks = masks

    def image(self, i: int) -> Image.Image:
        pixels = self.images[i]
        return Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)

    def mask(self, i: int) -> np.ndarray | None:
        return None if self.masks is None else self.masks[i]

    def subset(self, indices: Sequence[int] | np.ndarray) -> ArraySet:
        masks = None if self.masks is None else self.masks[indices]
        part = ArraySet(self.images[indices], self.labels[indices], masks)
        part.transform = self.transform
        return part


@dataclass(frozen=True)
class Data:
    """A data set, ready to train on.

    tests: always has "test". classes: name of each label. image_size: (height, width) that a transform should bring
    the images to: the size asked for, else their own. mean, std: suggested normalisation of pixels in [0, 1], per
    channel. quarantined: images that cannot be read and are in none of the sets. remarks: what to say of the files.
    """

    name: str
    train: ImageSet
    tests: dict[str, ImageSet]
    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    quarantined: tuple[Quarantined, ...] = ()
    remarks: tuple[str, ...] = ()

    def limited(self, limit: int, seed: int = 0) -> Data:
        """The same data with at most `limit` training images, balanced over the classes; the tests stay whole."""
        return replace(self, train=self.train.subset(balanced(self.train.labels, limit, seed)))


def balanced(labels: np.ndarray, limit: int, seed: int = 0) -> np.ndarray:
    """Indices of at most `limit` items, the classes as equal in number as the labels allow; drawn by `seed`.

    A smaller limit gives a part of what a larger one gives, so that learning curves are nested.
    """
    classes = np.unique(labels)
    if limit < len(classes):
        raise DataError(
            f"Found a limit of {limit} images; expected at least one for each of the {len(classes)} classes. "
            f"Ask for {len(classes)} or more."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), np.int64)  # the how-manieth of its class an item is, in drawn order
    for label in classes:
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    return order[np.argsort(turn[order], kind="stable")][:limit]


def pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of (n, H, W, C) uint8 pixels as numbers in [0, 1], exact."""
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[3])])  # (C, 256)
    share = counts / counts.sum(1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
    return tuple(mean.round(4).tolist()), tuple(np.maximum(std, 1e-3).round(4).tolist())
