"""Perturb whole patches of images: natural corruptions, or an adversarial patch by PGD.

Gu, Tresp, Qin 2022, arXiv 2111.10659. The adversarial patch is not bounded but by the range of
pixels: what stands in the patch may become anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.base.errors import HostError, SettingError
from vitreous.lens.faithfulness import answer, has_classes
from vitreous.lens.faithfulness import pixels as pixels_of_patches
from vitreous.lens.formulas.corruptions import corrupted
from vitreous.models.classes import multi_label

ADVERSARIAL = "adversarial"
RANGE = 1e-3  # by which pixels may leave [0, 1] by rounding


@dataclass(frozen=True)
class Scale:
    """How a model takes pixels of [0, 1]: (pixel - mean) / std, per channel."""

    mean: Sequence[float]
    std: Sequence[float]

    def pixels(self, images: Tensor) -> Tensor:
        """Images (B, C, h, w) of a model as pixels of [0, 1].

        Raises SettingError where they are no such pixels.
        """
        pixels = images * images.new_tensor(self.std).view(-1, 1, 1) + images.new_tensor(self.mean).view(-1, 1, 1)
        low, high = pixels.min().item(), pixels.max().item()
        if low < -RANGE or high > 1 + RANGE:
            raise SettingError(
                f"Found pixels from {low:.3g} to {high:.3g} before normalisation. Expected 0 to 1. Give the mean and std by "
                "which the images were normalised."
            )
        return pixels.clamp(0, 1)

    def images(self, pixels: Tensor) -> Tensor:
        return (pixels - pixels.new_tensor(self.mean).view(-1, 1, 1)) / pixels.new_tensor(self.std).view(-1, 1, 1)


@dataclass(frozen=True)
class Perturbation:
    """What is done to a patch.

    kind: "adversarial", or one of `formulas.corruptions.CORRUPTIONS` with its severity. steps,
    step: of the attack, step in pixels of [0, 1]. seed: of what a corruption draws.
    """

    kind: str = ADVERSARIAL
    severity: int = 5
    steps: int = 20
    step: float = 0.1
    seed: int = 0

    def __call__(
        self, model: nn.Module, images: Tensor, classes: Tensor, where: Tensor, scale: Scale, first: int = 0
    ) -> Tensor:
        """Images (B, C, h, w) as the model takes them, changed inside the patch alone.

        where: (B, 1, h, w) bool, its pixels. classes: (B,), those that an attack leads away from.
        first: number of the first image, by which, with the seed, a corruption is drawn.
        """
        pixels = scale.pixels(images)
        if self.kind == ADVERSARIAL:
            changed = attacked(lambda x: losses(model, scale.images(x), classes), pixels, where, self.steps, self.step)
        else:
            generators = [generator(self.seed, first + i) for i in range(len(images))]
            changed = corrupted(pixels, self.kind, self.severity, generators)
        return torch.where(where, scale.images(changed), images)  # elsewhere no rounding either


def attacked(loss: Callable[[Tensor], Tensor], pixels: Tensor, where: Tensor, steps: int, step: float) -> Tensor:
    """Pixels (B, C, h, w) of [0, 1] with a higher loss, changed inside the patch alone.

        x <- clamp(x + step sign(d loss / d x), 0, 1)          from the image itself

    where: (B, 1, h, w) bool, the patch. loss: (B,) of pixels, each of its own image. Each image
    keeps the step of its highest loss, so that more steps never have a lower one.
    """
    x = best = pixels
    highest = pixels.new_full((len(pixels),), -torch.inf)
    for number in range(steps + 1):
        with torch.enable_grad():
            x = x.detach().requires_grad_(number < steps)
            value = loss(x)
        better = value.detach() > highest
        highest = torch.where(better, value.detach(), highest)
        best = torch.where(better[:, None, None, None], x.detach(), best)
        if number < steps:
            (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value))
            x = torch.where(where, (x.detach() + step * gradient.sign()).clamp(0, 1), pixels)
    return best


def losses(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy (B,) of the model's answers to images with classes (B,)."""
    return F.cross_entropy(logits_of(model, images), classes, reduction="none")


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, classes), float32 or wider. Raises HostError where the answer is none."""
    output = model(images)
    if not has_classes(model, output) or multi_label(model) or answer(output).shape[-1] < 2:
        raise HostError(
            f"Found an answer of {type(model).__name__} that is no choice of one class. Expected logits (B, classes) of two "
            "classes or more. Look at a model with such a classifier, or leave patch_perturbation out."
        )
    logits = answer(output)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# -- which patch -----------------------------------------------------------------------------------


def patch_pixels(corners: Tensor, size: int, grid: tuple[int, int], image: tuple[int, int]) -> Tensor:
    """Which pixels are in size x size patches at `corners`: (B, 1, h, w) bool.

    corners: (B, 2), row and column of the first patch on the grid. image: (h, w). Raises
    SettingError for patches that leave the grid.
    """
    rows, columns = grid
    last = corners.new_tensor([rows - size, columns - size])
    if size < 1 or bool((corners < 0).any() or (corners > last).any()):
        raise SettingError(
            f"Found size={size} at row and column {corners.tolist()[0]} of a grid of {rows} x {columns} patches. Expected "
            f"patches inside it, counted from 0. Give size=1 to {min(grid)} and a place where it fits."
        )
    inside = [
        (axis >= corner[:, None]) & (axis < corner[:, None] + size)
        for axis, corner in ((torch.arange(rows), corners[:, 0]), (torch.arange(columns), corners[:, 1]))
    ]
    return pixels_of_patches((inside[0][:, :, None] & inside[1][:, None]).flatten(1), grid, image)


def corners_of(place: str, size: int, grid: tuple[int, int], salience: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """(B, 2) row and column of the first patch.

    place: "centre", "random", or "salient", where salience is highest. salience: (B, rows, columns)
    of single patches; the mean over those that are taken counts.
    """
    free = torch.tensor([grid[0] - size + 1, grid[1] - size + 1])
    if size < 1 or bool((free < 1).any()):
        return torch.zeros(len(generators), 2, dtype=torch.long)  # refused where pixels are taken
    if place == "centre":
        return ((free - 1) // 2).expand(len(generators), 2)
    if place == "random":
        return torch.stack([(torch.rand(2, generator=g) * free).long() for g in generators])
    mean = F.avg_pool2d(salience[:, None].float().cpu(), size, stride=1).flatten(1)
    best = mean.argmax(1)
    return torch.stack([best // free[1], best % free[1]], dim=1)


def salience_of(model: nn.Module, images: Tensor, classes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean |d loss / d x| over the pixels of each patch, (B, rows, columns)."""
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(model, x, classes).sum(), x)
    return F.adaptive_avg_pool2d(gradient.abs().float(), grid).mean(1)


def generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of one image, by the seed and its number alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
