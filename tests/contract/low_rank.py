"""LoRA as a third party would write it on the linear slot: beside a weight the product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from vitreous import Mechanism, slots
from vitreous.layers.linear import Linear


class LowRankLinear(Linear):
    """W + B A, with A (rank, in) and B (out, rank)."""

    def initialise(self, settings, generator):
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.a = nn.Parameter(draw(settings.rank, self.in_features) / self.in_features**0.5)
        self.b = nn.Parameter(settings.start * draw(self.out_features, settings.rank))
        return self

    def effective_weight(self):
        return self.weight + self.b @ self.a

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x @ self.a.T @ self.b.T


@dataclass(frozen=True, kw_only=True)
class LowRank(Mechanism):
    """Adapters of low rank beside linear layers; at start their product is 0.

    start: standard deviation of the second factor, where it is not to begin with 0.
    """

    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    requires: ClassVar[tuple[str, ...]] = ("linear",)
    exact_at_init: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    linears: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")
    rank: int = 2
    start: float = 0.0
    seed: int = 0

    def changes(self, model):
        generator = torch.Generator().manual_seed(self.seed)

        def make(linear):
            return LowRankLinear.of(linear).initialise(self, generator)

        changes = {}
        for i in slots.layer_indices(model, self.layers):
            changes |= slots.adapt_linears(model, i, self.linears, make, "LowRank")
        return changes


def merged(model):
    """In place: each adapter added to the weight beside it, and set to zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.weight.copy_(module.effective_weight())
                module.b.zero_()
    return model
