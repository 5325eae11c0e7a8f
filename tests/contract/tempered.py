"""A mechanism as a third party would write it, outside the package: one learned factor per head on the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from vitreous import Mechanism, slots
from vitreous.hosts.attention import Attention


class TemperedAttention(Attention):
    """Scores times a factor for each head."""

    def scores(self, *arguments):
        return super().scores(*arguments) * self.factor


@dataclass(frozen=True, kw_only=True)
class Tempered(Mechanism):
    """A learned factor on the attention scores of each head."""

    paper: ClassVar[str] = "made for this test"
    requires: ClassVar[tuple[str, ...]] = ("attention",)
    attention: ClassVar[type[Attention]] = TemperedAttention

    start: float = 1.5

    def changes(self, model):
        changes = {}
        for i in slots.layer_indices(model, None):
            new = self.attention.of(slots.plain_attention(model, i, "Tempered"))
            new.factor = nn.Parameter(torch.full((slots.heads(model), 1, 1), self.start))
            changes[f"blocks.{i}.attn"] = new
        return changes
