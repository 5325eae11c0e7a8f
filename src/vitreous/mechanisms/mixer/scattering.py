"""Scattering: a wavelet transform with learned gains in the place of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.mixer import Mixer, Quantity
from vitreous.layers.dtcwt import analysis, synthesis
from vitreous.mechanism import Mechanism

START = 0.02  # standard deviation of everything learned


@dataclass(frozen=True, kw_only=True)
class Scattering(Mechanism):
    """In early blocks the picture is mixed through its wavelets, which are weighed.

        low, high = DTCWT(x)                    low (H, W, D) real, high (6, H/2, W/2, D) complex
        y = inverse DTCWT(G * low, W2 r(W1 high + b1) + b2)     r: ReLU of real and imaginary part
        G (D, H, W) real; W1, W2 complex and block-diagonal over channels, one for all orientations

    Paper: Patro, Agneeswaran 2023, arXiv 2311.01310 (SVT), scatter network with Einstein blending
        of channels; the transform is Kingsbury's dual tree at its first level.
    Differs: class and register tokens get nothing from it. On another grid the gains G are
        interpolated (bicubic); sides of odd length are extended by their last row or column and cut
        back. The paper's variant that also blends tokens is not here: released code has it off.
    At start: changes the output; all that is learned ~ 0.02 N(0, 1), so the residual passes nearly
        alone.
    Cost: O(N sqrt N D) for the transforms; (N + 4 D / blocks + 4) D parameters per block.
    Settings: layers (0-based; default the first quarter, as in the paper's first stage, 3 of 16).
        blocks: on the diagonal of W1 and W2. seed: of the start.
    Raises: SettingError where blocks do not divide the width; HostError if the head reads class
        tokens that no block with attention is left for, or where the patch embedding is not timm's;
        GraftError where another graft holds the attention.
    """

    paper: ClassVar[str] = "Patro, Agneeswaran 2023, arXiv 2311.01310"
    requires: ClassVar[tuple[str, ...]] = ("stream", "grid", "halves")
    keeps_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("scattering:layers=1+2,blocks=2,seed=1",)

    layers: tuple[int, ...] | None = None
    blocks: int = 4
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.blocks < 1:
            raise SettingError(f"Found blocks={self.blocks}. Expected 1 or more. Give such a number.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        width = slots.width(model)
        if width % self.blocks:
            raise SettingError(
                f"Found blocks={self.blocks} for {width} channels. Expected a divisor of {width}. Give one, such as "
                f"{max(n for n in range(1, min(self.blocks, width) + 1) if width % n == 0)}."
            )
        first = range(max(1, slots.depth(model) // 4))
        layers = slots.layer_indices(model, first if self.layers is None else self.layers)
        generator = torch.Generator().manual_seed(self.seed)

        def initialise(new: Scatter, layer: int) -> None:
            new.initialise(model.patch_embed.grid_size, width, self.blocks, generator)

        return slots.put_mixers(model, layers, Scatter, initialise, self.name)


class Scatter(Mixer):
    """The mixer of one block.

    low (D, H, W), sides even: the gains of the low-pass picture. w1, w2 (2, blocks, C, C), b1, b2
    (2, blocks, C): real and imaginary part of the layers on the high-pass numbers, D = blocks * C.
    """

    quantities: ClassVar = Mixer.quantities | {
        "low_pass_gain": Quantity("Low-pass gain", explains="Factor on the smooth part of the picture, place by place.")
    }

    def initialise(self, grid: Sequence[int], width: int, blocks: int, generator: torch.Generator | None = None) -> None:
        """generator: None draws from torch's global state, as constructors of networks do."""
        part = width // blocks
        shapes = {
            "low": (width, *even_sides(grid)),
            **{name: (2, blocks, part, part) for name in ("w1", "w2")},
            **{name: (2, blocks, part) for name in ("b1", "b2")},
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(START * torch.randn(shape, generator=generator)))

    def mix(self, patches: Tensor) -> Tensor:
        height, width = patches.shape[1:3]
        with torch.autocast(patches.device.type, enabled=False):  # the authors compute in single precision
            x = even(patches.to(torch.promote_types(patches.dtype, torch.float32)))
            low, real, imaginary = analysis(x)
            real, imaginary = blended(real, imaginary, *(p.to(x.dtype) for p in (self.w1, self.b1, self.w2, self.b2)))
            return synthesis(low * self.gains(x), real, imaginary)[:, :height, :width]

    def gains(self, x: Tensor) -> Tensor:
        """G on the grid of x (B, H, W, D): (H, W, D)."""
        return interpolated(self.low.to(x.dtype), x.shape[1:3]).permute(1, 2, 0)

    @torch.no_grad()
    def reading(self) -> dict[str, Tensor]:
        """The gains G, (D, H, W)."""
        return {"low_pass_gain": self.low.detach()}

    def set_grid(self, grid: Sequence[int]) -> None:
        """Interpolate the gains, and store them for another grid."""
        self.low = nn.Parameter(interpolated(self.low.detach(), even_sides(grid)))


def even_sides(grid: Sequence[int]) -> tuple[int, ...]:
    return tuple(n + n % 2 for n in grid)


def interpolated(low: Tensor, size: Sequence[int]) -> Tensor:
    """Gains (D, H, W) on another grid, (D, *size)."""
    if low.shape[1:] == tuple(size):
        return low
    return F.interpolate(low[None], tuple(size), mode="bicubic", align_corners=False)[0]


def even(x: Tensor) -> Tensor:
    """(B, H, W, D) with the last row or column twice where their number is odd."""
    x = torch.cat([x, x[:, -1:]], dim=1) if x.shape[1] % 2 else x
    return torch.cat([x, x[:, :, -1:]], dim=2) if x.shape[2] % 2 else x


def blended(real: Tensor, imaginary: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """W2 r(W1 z + b1) + b2 for z = real + i imaginary, (..., D) each.

    r is the ReLU of either part. w1, w2 (2, blocks, C, C), from input to output channel, and b1,
    b2 (2, blocks, C) hold real and imaginary part.
    """
    real, imaginary = (z.unflatten(-1, w1.shape[1:3]) for z in (real, imaginary))
    real, imaginary = (z.relu() for z in block_diagonal(real, imaginary, w1, b1))
    real, imaginary = block_diagonal(real, imaginary, w2, b2)
    return real.flatten(-2), imaginary.flatten(-2)


def block_diagonal(real: Tensor, imaginary: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A complex linear layer of blocks: real and imaginary part, (..., blocks, C) each."""

    def product(z: Tensor, part: int) -> Tensor:
        return torch.einsum("...kc,kcd->...kd", z, weight[part])

    return (
        product(real, 0) - product(imaginary, 1) + bias[0],
        product(real, 1) + product(imaginary, 0) + bias[1],
    )
