"""A mechanism with a penalty of activations, as a third party would write it: the size of the tokens behind some blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from vitreous import Mechanism, slots


class Size(nn.Module):
    """Hands on the mean square of the tokens, times a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x, state, qkv):
        return x, replace(state, terms=(*state.terms, ("size", self.weight * x.square().mean((1, 2)))))


@dataclass(frozen=True, kw_only=True)
class Sizes(Mechanism):
    """Keeps tokens small by a penalty."""

    paper: ClassVar[str] = "made for this test"
    requires: ClassVar[tuple[str, ...]] = ("stream",)
    exact_at_init: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    weight: float = 0.1

    def changes(self, model):
        return {
            path: change
            for i in slots.layer_indices(model, self.layers)
            for path, change in slots.add_step(model, i, "after", Size(self.weight)).items()
        }
