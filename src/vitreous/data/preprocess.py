"""`Preprocess`: images resized, cropped and normalised for a model, and back to pictures.

Training without augmentation, looking, predicting and the check of an exported file all
prepare images here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn
from torchvision import transforms

from vitreous.base.errors import SettingError


@dataclass(frozen=True)
class Preprocess:
    """How images are prepared, in timm's terms.

    mean, std: per channel, subtracted from pixels of [0, 1], and divided by.
    input_size: (channels, height, width). crop_pct: share of a side that the centre crop keeps.
    crop_mode: timm's, "center", "squash" or "border".
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """From a `pretrained_cfg`: what it lacks is timm's default, other keys are not read."""
        resolved = resolve_data_config(pretrained_cfg=dict(config))
        values = {field.name: resolved[field.name] for field in fields(cls)}
        preprocess = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        return preprocess.of_channels(preprocess.input_size[0])

    @classmethod
    def of_model(cls, model: nn.Module) -> Preprocess | None:
        """From a timm model's `pretrained_cfg`, at the size it was built for; None without one."""
        model = getattr(model, "_orig_mod", model)  # inside torch.compile
        if not getattr(model, "pretrained_cfg", None):
            return None
        return cls.from_config({**model.pretrained_cfg, "input_size": get_model_input_config(model)["input_size"]})

    def of_channels(self, channels: int) -> Preprocess:
        """For so many channels; from colour to grey or back, mean and std are averaged."""
        mean, std = self.mean, self.std
        if len(mean) != channels and channels in (1, 3):
            mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
        return Preprocess((channels, *self.input_size[1:]), mean, std, self.interpolation, self.crop_pct, self.crop_mode)

    def changed(self, mean: Sequence[float] = (), std: Sequence[float] = (), interpolation: str | None = None) -> Preprocess:
        """With what is given in place of its own. Raises SettingError for what does not fit."""
        channels = self.input_size[0]
        for name, values in (("mean", mean), ("std", std)):
            if values and not (
                len(values) == channels and all(map(math.isfinite, values)) and (name == "mean" or min(values) > 0)
            ):
                raise SettingError(
                    f"Found --{name} {' '.join(map(str, values))}. Expected {channels} numbers, one per channel"
                    f"{', above 0' * (name == 'std')}. Give them in the scale of pixels of 0 to 1."
                )
        values = {"mean": tuple(mean), "std": tuple(std), "interpolation": interpolation}
        return replace(self, **{name: value for name, value in values.items() if value})

    def __str__(self) -> str:
        """As it is told to people."""
        numbers = [" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std)]
        height, width = self.input_size[1:]
        return f"{width} x {height} px, mean {numbers[0]}, std {numbers[1]}, {self.interpolation}, crop_pct {self.crop_pct:g}"

    def config(self) -> dict[str, Any]:
        """As timm's `create_transform` takes it and config.json's `pretrained_cfg` holds it."""
        return asdict(self)

    @cached_property
    def transform(self) -> transforms.Compose:
        """timm's transform for evaluation: PIL image of the right mode to tensor (C, H, W)."""
        return create_transform(**self.config(), is_training=False)

    @cached_property
    def geometry(self) -> transforms.Compose:
        """The steps of `transform` that move pixels: resizing and cropping."""
        return transforms.Compose([step for step in self.transform.transforms if moves_pixels(step)])

    @property
    def mode(self) -> str:
        """PIL's mode of the images that `transform` takes."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def __call__(self, image: Image.Image) -> Tensor:
        """A PIL image of any mode to a tensor (C, H, W)."""
        return self.transform(image if image.mode == self.mode else image.convert(self.mode))

    def normalize(self, pixels: np.ndarray) -> Tensor:
        """(B, H, W, C) uint8 of the model's size to (B, C, H, W), bit-equal to one by one."""
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return x.sub_(per_channel(self.mean)).div_(per_channel(self.std))

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) bool, resized and cropped as the pixels are."""
        return np.asarray(self.geometry(Image.fromarray(mask).convert("L"))) > 127

    def picture(self, x: Tensor) -> np.ndarray:
        """A prepared tensor (C, h, w) as a picture (h, w, 3) uint8."""
        return picture(x, self.mean, self.std)


def moves_pixels(step: Any) -> bool:
    """Whether a step of a transform moves pixels, so that a mask must follow."""
    return not isinstance(step, transforms.Normalize) and not type(step).__name__.endswith(("ToTensor", "ToNumpy"))


def per_channel(values: tuple[float, ...]) -> Tensor:
    """(C, 1, 1), to be broadcast over pixels."""
    return torch.tensor(values).view(-1, 1, 1)


def picture(x: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> np.ndarray:
    """(C, h, w) to (h, w, 3) uint8; without mean and std the values' range is black to white."""
    x = x.detach().cpu().float()
    if mean is not None and std is not None:
        x = x * per_channel(std) + per_channel(mean)
    else:
        x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
    if x.shape[0] != 3:
        x = x.mean(0, keepdim=True).expand(3, -1, -1)
    return (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
