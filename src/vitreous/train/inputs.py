"""From images to batches: what a network takes, timm's transforms that bring images there, and loaders."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from vitreous.data import ArraySet, ImageSet
from vitreous.errors import SettingError

AUGMENTATIONS = ("none", "flip", "pad", "crop")
AUTO_AUGMENT = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}


@dataclass(frozen=True)
class Inputs:
    """What a network takes, in timm's words: pixels of [0, 1] less `mean`, over `std`, per channel.

    input_size: (channels, height, width). crop_pct: share of a side that the centre crop keeps. crop_mode: timm's.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def config(self) -> dict[str, Any]:
        """As timm's `create_transform` and the `pretrained_cfg` of a config.json take it."""
        return asdict(self)


def transform(inputs: Inputs, aug: str | None = None) -> Callable:
    """PIL image to tensor (C, H, W). aug: None to test; else as in `TrainSettings`, none being the same as to test."""
    to_test = create_transform(**inputs.config(), is_training=False)
    if aug in (None, "none"):
        return to_test
    height, width = inputs.input_size[1:]
    if aug in ("flip", "pad"):
        steps = [transforms.RandomHorizontalFlip()]
        if aug == "pad":
            steps = [transforms.RandomCrop((height, width), padding=(width // 8, height // 8)), *steps]
            steps += [transforms.RandomRotation(15, transforms.InterpolationMode.BILINEAR)]
        *resize, to_tensor, normalize = to_test.transforms
        return transforms.Compose([*resize, *steps, to_tensor, normalize])
    return create_transform(
        inputs.input_size,
        is_training=True,
        auto_augment=None if aug == "crop" else aug,
        color_jitter=0.0,
        interpolation=inputs.interpolation,
        mean=inputs.mean,
        std=inputs.std,
    )


def check_augmentation(aug: str) -> None:
    """Raise SettingError unless `transform` knows the text."""
    if aug in AUGMENTATIONS:
        return
    try:
        known = AUTO_AUGMENT.get(aug.partition("-")[0], auto_augment_transform)(aug, {})
    except (AssertionError, ValueError, KeyError, IndexError):
        known = None
    if known is None:
        raise SettingError(
            f"Found --aug {aug}. Expected {', '.join(AUGMENTATIONS)}, or timm's auto-augment text, which starts with "
            "rand, augmix, original or v0. Write for example rand-m9-mstd0.5-inc1."
        )


class Batches(Dataset):
    """Images in memory that need no resizing, a whole batch normalised at once: indices to (B, C, H, W), labels (B).

    Pixel for pixel what `transform` gives one by one. flip: mirror half of them, drawn from `generator`.
    """

    def __init__(self, images: ArraySet, inputs: Inputs, flip: bool, generator: torch.Generator):
        self.pixels, self.labels = images.images, images.labels  # (n, H, W, C) uint8, (n,)
        self.mean, self.std = (torch.tensor(value).view(-1, 1, 1) for value in (inputs.mean, inputs.std))
        self.flip, self.generator = flip, generator

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = np.asarray(indices)
        x = torch.from_numpy(self.pixels[rows]).permute(0, 3, 1, 2).contiguous().float().div_(255)
        if self.flip:
            chosen = torch.rand(len(rows), generator=self.generator) < 0.5
            x[chosen] = x[chosen].flip(-1)
        return x.sub_(self.mean).div_(self.std), torch.from_numpy(self.labels[rows])


def loader(
    images: ImageSet,
    inputs: Inputs,
    batch_size: int,
    *,
    aug: str | None = None,
    shuffle: bool = False,
    even: bool = False,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader:
    """Batches of (B, C, H, W) float32 and labels (B) int64, in an order that `seed` draws if shuffled.

    even: leave out a last batch that is not full, and the odd image of a set smaller than a batch. Images in memory of
    the right size are not sent through workers.
    """
    generator = torch.Generator().manual_seed(seed)
    if even:
        batch_size = min(batch_size, len(images) - len(images) % 2)
    options: dict[str, Any] = {"batch_size": batch_size, "shuffle": shuffle, "generator": generator, "drop_last": even}
    if in_memory(images, inputs) and aug in (None, "none", "flip"):
        flips = torch.Generator().manual_seed(seed + 1)
        return DataLoader(Batches(images, inputs, aug == "flip", flips), collate_fn=as_it_is, **options)
    prepared = images.subset(np.arange(len(images)))
    prepared.transform = transform(inputs, aug)
    return DataLoader(
        prepared, num_workers=workers, worker_init_fn=seed_worker, persistent_workers=workers > 0 and shuffle, **options
    )


def in_memory(images: ImageSet, inputs: Inputs) -> bool:
    """True if the pixels lie in memory in the very size that the network takes."""
    return isinstance(images, ArraySet) and images.images.shape[1:3] == inputs.input_size[1:] and inputs.crop_pct == 1.0


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def seed_worker(_: int) -> None:
    """Seed what timm's augmentations draw from, which torch leaves alone, by the worker's own torch seed."""
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
