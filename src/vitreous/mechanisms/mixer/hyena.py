"""Hyena N-D: a gated long convolution, its kernel a function of the place, for attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.mixer import Mixer
from vitreous.layers.fourier import one_sided
from vitreous.mechanism import Mechanism

FEATURES = 3  # of a place on an axis: t, cos, -sin
FREQUENCY = 1e-4  # of cos and sin at the start, in turns over the axis
SLOW, FAST = 1.5, 0.3  # where on an axis (of length 1) the first and the last channel's window is 0.01


@dataclass(frozen=True, kw_only=True)
class Hyena(Mechanism):
    """Two gates around a convolution as long as the picture take the place of attention.

        x0, x1, v = DepthwiseConv3x3(W_u x + b_u)                              (H, W, D) each
        y = W_o (x0 * (k conv (v * x1) + d * v * x1)) + b_o                     d (D,)
        k[i, j] = MLP(z_i, z_j) exp(-|s| (t_i + t_j)) / (2 sqrt(H W))    t in [0, 1], s fixed

    Paper: Zimerman, Wolf 2023, arXiv 2309.13600 (Multi-Dimensional Hyena), order 2, kernels that
        are not products of one-dimensional ones.
    Differs: class and register tokens get nothing from it. The two sides of a picture may differ:
        the one table z of place features is resampled (linear) to each. start=even leaves out the
        division by 2 sqrt(H W), which makes the convolution next to nothing beside d * v at first.
        The four directions are blended without a bias. The learning rate of z (1e-5 in released
        code) is the run's.
    At start: changes the output.
    Cost: O(N log N) D, four times so for the four directions; 4 D^2 + (36 + width) D + about
        2 width^2 parameters per block.
    Settings: layers (0-based; default the first half and one, the paper's hybrid). directions: of
        the convolution: standard = down and to the right; seq = in blocks of even number the other
        way round; 4dir = all four ways, blended by 4 numbers; 4dirp = by a (D, 4 D) matrix. start:
        paper or even. width: hidden channels of the MLP. seed: of the weights.
    Raises: HostError if the head reads class tokens that no block with attention is left for, or
        where the patch embedding is not timm's; GraftError where another graft holds the attention;
        SettingError.
    """

    paper: ClassVar[str] = "Zimerman, Wolf 2023, arXiv 2309.13600"
    requires: ClassVar[tuple[str, ...]] = ("stream", "grid", "halves")
    keeps_weights: ClassVar[bool] = False
    no_decay: ClassVar[tuple[str, ...]] = ("z", "frequency", "skip")
    examples: ClassVar[tuple[str, ...]] = (
        "hyena:layers=1+2,directions=4dir,width=8,start=even",
        "hyena:directions=4dirp,width=8",
        "hyena:directions=standard,seed=1",
    )

    layers: tuple[int, ...] | None = None
    directions: Literal["standard", "seq", "4dir", "4dirp"] = "seq"
    start: Literal["paper", "even"] = "paper"
    width: int = 64
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.width < 1:
            raise SettingError(f"Found width={self.width}. Expected 1 or more. Give such a number of channels.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        depth = slots.depth(model)
        first = range(max(1, min(depth // 2 + 1, depth - 1)))
        layers = slots.layer_indices(model, first if self.layers is None else self.layers)
        generator = torch.Generator().manual_seed(self.seed)

        def initialise(new: HyenaMixer, layer: int) -> None:
            turned = self.directions == "seq" and layer % 2 == 0
            new.initialise(self, slots.width(model), model.patch_embed.grid_size, turned, generator)

        return slots.put_mixers(model, layers, HyenaMixer, initialise, self.name)


class HyenaMixer(Mixer):
    """The mixer of one block: `project` (D -> 3 D), `short` (3 x 3), `long`, `proj`.

    z (L, 3): features of L places on an axis. mlp: layers of the kernel's MLP; frequency (width,),
    within its sines, one for all layers. skip (D,): d. blend (4,) or (D, 4 D): of four directions.
    """

    def initialise(
        self, settings: Hyena, width: int, grid: Sequence[int], turned: bool, generator: torch.Generator | None = None
    ) -> None:
        """turned: the convolution goes up and to the left. generator: None is torch's own."""
        self.directions, self.turned, self.even = settings.directions, turned, settings.start == "even"
        hidden = settings.width
        self.project = started(skip_init(nn.Linear, width, 3 * width), generator)
        self.short = started(skip_init(nn.Conv2d, 3 * width, 3 * width, 3, padding=1, groups=3 * width), generator)
        sizes = (2 * FEATURES, hidden, hidden, hidden)
        layers = [skip_init(nn.Linear, a, b) for a, b in pairwise(sizes)]
        layers.append(skip_init(nn.Linear, hidden, width, bias=False))
        self.mlp = nn.ModuleList(started(layer, generator) for layer in layers)
        self.proj = started(skip_init(nn.Linear, width, width), generator)
        self.z = nn.Parameter(place_features(max(grid)))
        self.frequency = nn.Parameter(torch.ones(hidden))
        self.skip = nn.Parameter(torch.randn(width, generator=generator))
        if self.directions == "4dir":
            self.blend = nn.Parameter((2 * torch.rand(4, generator=generator) - 1) / 2)
        elif self.directions == "4dirp":
            self.blend = nn.Parameter((2 * torch.rand(width, 4 * width, generator=generator) - 1) / (4 * width) ** 0.5)

    def mix(self, patches: Tensor) -> Tensor:
        u = self.short(self.project(patches).movedim(-1, 1)).movedim(1, -1)
        x0, x1, v = u.chunk(3, dim=-1)
        with torch.autocast(patches.device.type, enabled=False):  # half precision has no such transform
            wide = torch.promote_types(u.dtype, torch.float32)
            v = (v * x1).to(wide)
            y = (self.long(v, self.kernel(v.shape[1:3], wide)) + self.skip.to(wide) * v) * x0.to(wide)
        return self.proj(y.to(u.dtype))

    def long(self, v: Tensor, kernel: Tensor) -> Tensor:
        """The convolution in the block's directions: v (B, H, W, D), kernel (H, W, D) -> as v."""
        if self.directions not in ("4dir", "4dirp"):
            axes = (1, 2) if self.turned else ()
            return one_sided(v.flip(axes), kernel).flip(axes)
        ways = [one_sided(v.flip(axes), kernel).flip(axes) for axes in ((), (1,), (2,), (1, 2))]
        blend = self.blend.to(v.dtype)
        if self.directions == "4dirp":
            return F.linear(torch.cat(ways, dim=-1), blend)
        return torch.stack(ways, dim=-1) @ blend

    def kernel(self, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
        """k (H, W, D) by the offset down and to the right, on any grid."""
        height, width = grid
        rows, columns = (resampled(self.z.to(dtype), n) for n in grid)
        h = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)  # (H, W, 6)
        for layer in self.mlp[:-1]:
            h = torch.sin(self.frequency.to(dtype) * layer(h.to(self.z.dtype)).to(dtype))
        k = self.mlp[-1](h.to(self.z.dtype)).to(dtype) * window(grid, self.skip.shape[0], h)
        return k if self.even else k / (2 * math.sqrt(height * width))

    @torch.no_grad()
    def reading(self) -> dict[str, Tensor]:
        """The kernel on the grid of z by offset, (D, 2 L - 1, 2 L - 1); of one direction."""
        side = self.z.shape[0]
        kernel = self.kernel((side, side), torch.promote_types(self.z.dtype, torch.float32)).movedim(-1, 0)
        kernel = F.pad(kernel, (side - 1, 0, side - 1, 0))
        return {"kernel": kernel.flip((1, 2)) if self.turned else kernel}


def started(layer: nn.Module, generator: torch.Generator | None) -> nn.Module:
    """torch's own start of a linear or convolutional layer, uniform in +-1 / sqrt(inputs)."""
    reach = layer.weight[0].numel() ** -0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-reach, reach, generator=generator)
    return layer


def place_features(n: int) -> Tensor:
    """(n, 3): t = 0 to 1, cos(w), -sin(w) of n places, with w next to 0 all along."""
    w = 2 * math.pi * FREQUENCY * torch.arange(n) / n
    return torch.stack([torch.linspace(0, 1, n), w.cos(), -w.sin()], dim=1)


def resampled(z: Tensor, n: int) -> Tensor:
    """Place features (L, 3) on an axis of n places, (n, 3), linear between them."""
    if z.shape[0] == n:
        return z
    return F.interpolate(z.T[None], n, mode="linear", align_corners=True)[0].T


def window(grid: Sequence[int], channels: int, like: Tensor) -> Tensor:
    """exp(-|s_c| (t_i + t_j)), (H, W, channels): 0.01 at 1.5 to 0.3 of an axis."""
    place = {"device": like.device, "dtype": like.dtype}
    rate = torch.linspace(math.log(100) / SLOW, math.log(100) / FAST, channels, **place)
    rows, columns = (torch.linspace(0, 1, n, **place) for n in grid)
    return torch.exp(-rate * (rows[:, None, None] + columns[:, None]))
