"""From images to batches: what a network takes, timm's transforms that bring images there, and loaders."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from vitreous.data import ArraySet, ImageSet
from vitreous.errors import SettingError

AUGMENTATIONS = ("none", "flip", "pad", "crop")
ORDER, FLIP, AUGMENT = range(3)  # what a draw is for: first part of its key
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


class Order(Sampler[tuple[int, np.ndarray]]):
    """Batches of one epoch as (epoch, indices), in an order that follows from (seed, epoch) alone.

    even: leave out a last batch that is not full, and the odd image of a set smaller than a batch. epoch, start: what the
    next iteration yields, and from which batch on; the batches before it are left out, the others stay what they are.
    """

    def __init__(self, count: int, batch_size: int, *, shuffle: bool = False, even: bool = False, seed: int = 0):
        self.batch_size = min(batch_size, count - count % 2) if even else batch_size
        self.count, self.shuffle, self.even, self.seed = count, shuffle, even, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.count // self.batch_size if self.even else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        drawn = np.random.default_rng((ORDER, self.seed, self.epoch))
        order = drawn.permutation(self.count) if self.shuffle else np.arange(self.count)
        firsts = range(self.start * self.batch_size, len(self) * self.batch_size, self.batch_size)
        return iter([(self.epoch, order[first : first + self.batch_size]) for first in firsts])


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Seed the global states that torchvision and timm draw from (torch's on the CPU, Python's, NumPy's) by the key alone.

    They are put back afterwards, so that nothing else depends on which process augments an image, or when.
    """
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    try:
        torch.default_generator.manual_seed(seeds[0])
        random.seed(seeds[1])
        np.random.seed(seeds[2])
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class Batches(Dataset):
    """Images in memory that need no resizing, a whole batch normalised at once: indices to (B, C, H, W), labels (B).

    Pixel for pixel what `transform` gives one by one. flip: mirror half of them, drawn by (seed, epoch, index).
    """

    def __init__(self, images: ArraySet, inputs: Inputs, flip: bool, seed: int):
        self.pixels, self.labels = images.images, images.labels  # (n, H, W, C) uint8, (n,)
        self.mean, self.std = (torch.tensor(value).view(-1, 1, 1) for value in (inputs.mean, inputs.std))
        self.flip, self.seed = flip, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, batch: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor]:
        epoch, rows = batch
        x = torch.from_numpy(self.pixels[rows]).permute(0, 3, 1, 2).contiguous().float().div_(255)
        if self.flip:
            chosen = torch.from_numpy(np.random.default_rng((FLIP, self.seed, epoch)).random(len(self))[rows] < 0.5)
            x[chosen] = x[chosen].flip(-1)
        return x.sub_(self.mean).div_(self.std), torch.from_numpy(self.labels[rows])


class Prepared(Dataset):
    """Images sent through a transform one by one, its randomness drawn by (seed, epoch, index)."""

    def __init__(self, images: ImageSet, change: Callable, seed: int):
        self.images, self.change, self.seed = images, change, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, batch: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor]:
        epoch, rows = batch
        return torch.stack([self.item(epoch, int(i)) for i in rows]), torch.from_numpy(self.images.labels[rows])

    def item(self, epoch: int, i: int) -> Tensor:
        image = self.images.image(i)
        with drawn_from(AUGMENT, self.seed, epoch, i):
            return self.change(image)


class Loader:
    """Batches of (B, C, H, W) float32 and labels (B) int64. Its length is that of a whole epoch.

    Each iteration is one of epoch 0, unless `set_epoch` said otherwise; what it yields follows from (seed, epoch), whatever
    the number of workers.
    """

    def __init__(self, images: Dataset, order: Order, workers: int):
        self.order = order
        self.batches = DataLoader(
            images,
            batch_sampler=order,
            collate_fn=as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0 and order.shuffle,
            generator=torch.Generator().manual_seed(order.seed),  # else each iteration would draw from the global one
        )

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Let iterations be of this epoch, and the next one begin at batch `start`; those before it are not decoded."""
        self.order.epoch, self.order.start = epoch, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.batches)
        self.order.start = 0
        return batches


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
) -> Loader:
    """Batches of the images, in an order that (seed, epoch) draws if shuffled; see `Order` for even, `Loader` for epochs.

    Images in memory of the right size are not sent through workers.
    """
    order = Order(len(images), batch_size, shuffle=shuffle, even=even, seed=seed)
    if in_memory(images, inputs) and aug in (None, "none", "flip"):
        return Loader(Batches(images, inputs, aug == "flip", seed), order, 0)
    return Loader(Prepared(images, transform(inputs, aug), seed), order, workers)


def in_memory(images: ImageSet, inputs: Inputs) -> bool:
    """True if the pixels lie in memory in the very size that the network takes."""
    return isinstance(images, ArraySet) and images.images.shape[1:3] == inputs.input_size[1:] and inputs.crop_pct == 1.0


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
