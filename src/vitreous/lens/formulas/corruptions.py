"""Natural corruptions of images, formulas and severities of ImageNet-C.

Hendrycks and Dietterich 2019, arXiv 1903.12261. Pixels are (B, C, h, w) in [0, 1], as is what comes
out. What is drawn comes from one generator per image, so that batch mates do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitreous.base.errors import SettingError, UnknownName
from vitreous.lens.formulas.maps import gaussian

Generators = Sequence[torch.Generator]


def noise(pixels: Tensor, amount: float, generators: Generators) -> Tensor:
    """x + N(0, amount^2)."""
    return pixels + amount * drawn(pixels, torch.randn, generators)


def shot(pixels: Tensor, amount: float, generators: Generators) -> Tensor:
    """Poisson(amount x) / amount: photons that are counted, few of them."""
    counts = [torch.poisson(amount * x, generator=g) for x, g in zip(pixels.float().cpu(), generators, strict=True)]
    return torch.stack(counts).to(pixels) / amount


def impulse(pixels: Tensor, amount: float, generators: Generators) -> Tensor:
    """A share of the values becomes 0 or 1, as often the one as the other."""
    chance = drawn(pixels, torch.rand, generators)
    return torch.where(chance < amount / 2, 0.0, torch.where(chance < amount, 1.0, pixels))


def blur(pixels: Tensor, amount: float, generators: Generators) -> Tensor:
    """A Gaussian of standard deviation `amount` pixels; weights at the border sum to one."""
    down, across = (gaussian(side, amount).to(pixels) for side in pixels.shape[-2:])
    return down @ pixels @ across.mT


def contrast(pixels: Tensor, amount: float, generators: Generators) -> Tensor:
    """amount (x - mean) + mean, the mean of each channel over the image."""
    mean = pixels.mean((-2, -1), keepdim=True)
    return amount * (pixels - mean) + mean


def brightness(pixels: Tensor, amount: float, generators: Generators) -> Tensor:
    """The largest channel of a pixel grows by `amount`, the others in proportion.

    That is V + amount in HSV, 1 at most. Black becomes grey.
    """
    value = pixels.amax(1, keepdim=True)
    wanted = (value + amount).clamp(max=1)
    return torch.where(value > 0, pixels * wanted / value.clamp_min(1e-12), wanted)


Corruption = Callable[[Tensor, float, Generators], Tensor]
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {  # the formula, and its amount by severity
    "noise": (noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot": (shot, (60, 25, 12, 5, 3)),
    "impulse": (impulse, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "blur": (blur, (1, 2, 3, 4, 6)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
}


def corrupted(pixels: Tensor, kind: str, severity: int, generators: Generators) -> Tensor:
    """Images (B, C, h, w) of [0, 1] under a corruption of severity 1 to 5, clamped to [0, 1].

    generators: one per image. Raises UnknownName for a kind, SettingError for a severity.
    """
    if kind not in CORRUPTIONS:
        raise UnknownName(kind, "corruption", CORRUPTIONS)
    formula, amounts = CORRUPTIONS[kind]
    if severity not in range(1, len(amounts) + 1):
        raise SettingError(f"Found severity={severity}. Expected 1 (weak) to {len(amounts)}. Give such a whole number.")
    return formula(pixels, amounts[severity - 1], generators).clamp(0, 1)


def drawn(pixels: Tensor, draw: Callable[..., Tensor], generators: Generators) -> Tensor:
    """Random numbers for each image (B, C, h, w), from its own generator."""
    return torch.stack([draw(x.shape, generator=g) for x, g in zip(pixels, generators, strict=True)]).to(pixels)
