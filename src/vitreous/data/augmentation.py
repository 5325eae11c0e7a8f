"""Augmentation of training images by a text: "crop", timm's "rand-m9-mstd0.5-inc1"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torchvision import transforms

from vitreous.base.errors import SettingError
from vitreous.data.preprocess import Preprocess

AUGMENTATIONS = ("none", "flip", "pad", "crop")
AUTO_AUGMENT = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}


def training_transform(preprocess: Preprocess, aug: str | None = None) -> Callable:
    """The transform from PIL image to augmented tensor (C, H, W).

    aug: as in `TrainSettings`; None and "none" give the preparation itself. Draws from the
    global states of torch, Python and NumPy.
    """
    if aug in (None, "none"):
        return preprocess
    height, width = preprocess.input_size[1:]
    if aug in ("flip", "pad"):
        steps = [transforms.RandomHorizontalFlip()]
        if aug == "pad":
            steps = [transforms.RandomCrop((height, width), padding=(width // 8, height // 8)), *steps]
            steps += [transforms.RandomRotation(15, transforms.InterpolationMode.BILINEAR)]
        *resize, to_tensor, normalize = preprocess.transform.transforms
        return transforms.Compose([*resize, *steps, to_tensor, normalize])
    training = create_transform(
        preprocess.input_size,
        is_training=True,
        auto_augment=None if aug == "crop" else aug,
        color_jitter=0.0,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
    )
    replace_posterize(training)
    return training


def replace_posterize(training: transforms.Compose) -> None:
    """Put `posterized` in the place of timm's posterize in every policy of a transform.

    timm's may ask for no bit at all, which Pillow 13 refuses and older releases turned black.
    """
    for step in training.transforms:
        for chain in getattr(step, "policy", [getattr(step, "ops", [])]):
            for op in chain:
                if op.aug_fn is auto_augment.posterize:
                    op.aug_fn = posterized


def posterized(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize, of at least one bit."""
    return auto_augment.posterize(image, max(bits, 1))


def check_augmentation(aug: str) -> None:
    """Raise SettingError unless `training_transform` takes the text."""
    if aug in AUGMENTATIONS:
        return
    try:
        policy = AUTO_AUGMENT.get(aug.partition("-")[0], auto_augment_transform)(aug, {})
    except (AssertionError, ValueError, KeyError, IndexError):
        policy = None
    if policy is None:
        raise SettingError(
            f"Found --aug {aug}. Expected {', '.join(AUGMENTATIONS)}, or timm's auto-augment text, which starts with "
            "rand, augmix, original or v0. Write for example rand-m9-mstd0.5-inc1."
        )
