"""Frequency split: convolutions on some channels, attention to a coarse picture on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.mixer import Mixer
from vitreous.mechanism import Mechanism

EPS = 1e-5  # of the batch norms


@dataclass(frozen=True, kw_only=True)
class FrequencySplit(Mechanism):
    """Some channels are mixed by small convolutions, others by attention to a smaller picture.

        x = [h; l] (channels);  h' = P_k(h);  l' = softmax(q pool_r(k)^T / sqrt(K)) pool_r(v);  y = P_1([h'; l'])
        P: parallel convolutions, each with a batch norm, summed; in eval mode one convolution with their joint kernel

    Paper: Tan, Geng, Xie 2023, arXiv 2311.05707 (FMViT). Nothing of it is public but the abstract.
    Differs: everything is our reading: which channels, which kernels and groups, no blocks of its own. It is an idea to
        try, not FMViT. Nothing forces a branch to a frequency; pooled keys and values hold none above the pool's.
    At start: changes the output (new weights).
    Cost: keys and values for N / r^2 places; batch norms, whose statistics are of the batch in training.
    Settings: layers (0-based; default the first third). high: share of channels for convolutions, 0 to 1 exclusive.
        kernel: of these, odd. groups: of grouped convolutions beside dense and depth-wise ones. reduction: r. heads: of
        the attention. seed: of all weights.
    Raises: HostError if the head reads class tokens that no block with attention is left for, or where the patch
        embedding is not timm's; GraftError where another graft holds the attention; SettingError.
    """

    paper: ClassVar[str] = "Tan, Geng, Xie 2023, arXiv 2311.05707"
    stage: ClassVar[str] = "prototype"
    requires: ClassVar[tuple[str, ...]] = ("stream", "grid", "halves")
    keeps_weights: ClassVar[bool] = False
    no_decay: ClassVar[tuple[str, ...]] = ("scale", "shift")
    examples: ClassVar[tuple[str, ...]] = ("frequency_split:layers=1+2,high=0.25,reduction=3,heads=3,groups=2",)

    layers: tuple[int, ...] | None = None
    high: float = 0.5
    kernel: int = 3
    groups: int = 4
    reduction: int = 2
    heads: int = 1
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.high < 1:
            raise SettingError(f"Found high={self.high}. Expected a share between 0 and 1. Give such a share.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise SettingError(f"Found kernel={self.kernel}. Expected an odd number. Give 1, 3, 5, ...")
        if min(self.groups, self.reduction, self.heads) < 1:
            raise SettingError(
                f"Found groups={self.groups}, reduction={self.reduction}, heads={self.heads}. Expected 1 or more each. Give "
                "such numbers."
            )

    def changes(self, model: nn.Module) -> dict[str, Any]:
        first = range(max(1, slots.depth(model) // 3))
        layers = slots.layer_indices(model, first if self.layers is None else self.layers)
        generator = torch.Generator().manual_seed(self.seed)

        def initialise(new: SplitMixer, layer: int) -> None:
            new.initialise(self, slots.width(model), generator)

        return slots.put_mixers(model, layers, SplitMixer, initialise, self.name)


class SplitMixer(Mixer):
    """The two branches and what joins them."""

    def initialise(self, settings: FrequencySplit, width: int, generator: torch.Generator) -> None:
        """Draw all weights. Raises SettingError where groups or heads do not divide the channels."""
        high = round(settings.high * width)
        low, groups = width - high, settings.groups
        if not high or not low or high % groups or width % groups or low % settings.heads:
            raise SettingError(
                f"Found {high} channels for convolutions and {low} for attention, groups={groups}, heads={settings.heads}. "
                "Expected groups that divide the first and the sum of both, and heads that divide the second. Give such."
            )
        self.reduction, self.heads, self.high = settings.reduction, settings.heads, high
        shapes = (settings.kernel, groups), (settings.kernel, high), (1, groups)
        self.local = ParallelConv(high, shapes, True, generator)
        self.q, self.kv = (skip_init(nn.Linear, low, parts * low, bias=False) for parts in (1, 2))
        for linear in (self.q, self.kv):
            nn.init.trunc_normal_(linear.weight, std=low**-0.5, generator=generator)
        self.join = ParallelConv(width, ((1, 1), (1, groups)), False, generator)

    def mix(self, patches: Tensor) -> Tensor:
        high, low = patches.split((self.high, patches.shape[-1] - self.high), dim=-1)
        high = self.local(high.permute(0, 3, 1, 2))
        low = self.attend(low).permute(0, 3, 1, 2)
        return self.join(torch.cat([high, low.to(high.dtype)], dim=1)).permute(0, 2, 3, 1)

    def attend(self, x: Tensor) -> Tensor:
        """Attention of all places to the means of r x r places: x (B, H, W, D) -> (B, H, W, D)."""
        q, k, v = (heads_first(part, self.heads) for part in (self.q(x), *self.kv(pooled(x, self.reduction)).chunk(2, -1)))
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, K)
        return y.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])


class ParallelConv(nn.Module):
    """Sum of convolutions of several sizes and groups, each behind its batch norm.

    (B, C, H, W) -> (B, C, H, W). In eval mode it runs as one convolution, whose kernel is computed
    from theirs (`folded`). No branch has a bias but its norm's.
    """

    def __init__(self, channels: int, shapes: Sequence[tuple[int, int]], identity: bool, generator: torch.Generator):
        """shapes: (size of the kernel, groups) of each; identity: a branch with the norm alone."""
        super().__init__()
        self.shapes, self.identity = tuple(shapes), identity
        for i, (size, groups) in enumerate(shapes):
            start = torch.randn((channels, channels // groups, size, size), generator=generator)
            self.register_parameter(f"weight_{i}", nn.Parameter(start * start[0].numel() ** -0.5))
        norms = len(shapes) + identity, channels  # a row for each branch
        self.scale, self.shift = nn.Parameter(torch.ones(norms)), nn.Parameter(torch.zeros(norms))
        self.register_buffer("mean", torch.zeros(norms))
        self.register_buffer("variance", torch.ones(norms))

    def weights(self) -> list[tuple[Tensor, int]]:
        """(kernel (C, C / groups, k, k), groups) of each branch.

        The identity is 1 x 1 and depth-wise.
        """
        weights = [(getattr(self, f"weight_{i}"), groups) for i, (_, groups) in enumerate(self.shapes)]
        channels = self.scale.shape[1]
        return weights + [(self.scale.new_ones(channels, 1, 1, 1), channels)] * self.identity

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.branches(x)
        kernel, bias, groups = self.folded()
        return F.conv2d(x, kernel.to(x.dtype), bias.to(x.dtype), padding=kernel.shape[-1] // 2, groups=groups)

    def branches(self, x: Tensor) -> Tensor:
        """The sum as it is written; in training it moves the running statistics."""
        outputs = [F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups) for weight, groups in self.weights()]
        norms = zip(self.mean, self.variance, self.scale, self.shift, strict=True)
        return sum(F.batch_norm(y, *norm, training=self.training, eps=EPS) for y, norm in zip(outputs, norms, strict=True))

    def folded(self) -> tuple[Tensor, Tensor, int]:
        """(kernel (C, C / groups, k, k), bias (C,), groups) of the one convolution.

        With running statistics.
        """
        size, groups = max(size for size, _ in self.shapes), min(groups for _, groups in self.shapes)
        factors = self.scale / (self.variance + EPS).sqrt()  # (branches, C)
        kernel = 0.0
        for (weight, own), factor in zip(self.weights(), factors, strict=True):
            margin = (size - weight.shape[-1]) // 2
            kernel = kernel + F.pad(factor[:, None, None, None] * in_fewer_groups(weight, own, groups), (margin,) * 4)
        return kernel, (self.shift - self.mean * factors).sum(0), groups


def in_fewer_groups(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """The same convolution written with fewer groups, which divide its own.

    weight (C', C / groups, k, k) -> (C', C / fewer, k, k), 0 between channels of different groups.
    """
    parts = weight.unflatten(0, (fewer, groups // fewer, -1))  # (fewer, parts, C' / groups, C / groups, k, k)
    apart = torch.eye(groups // fewer, dtype=weight.dtype, device=weight.device)
    return torch.einsum("fpoikl,pq->fpoqikl", parts, apart).flatten(3, 4).flatten(0, 2)


def pooled(x: Tensor, reduction: int) -> Tensor:
    """Means over r x r places, fewer at the far edges.

    x (B, H, W, D) -> (B, H / r, W / r, D), rounded up.
    """
    size = [min(reduction, side) for side in x.shape[1:3]]
    return F.avg_pool2d(x.permute(0, 3, 1, 2), size, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(B, H, W, D) -> (B, heads, N, D / heads)."""
    return x.flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
