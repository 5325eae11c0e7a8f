"""Where the stream of tokens begins and ends: the host's patch embedding and its norm, both adopted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitreous.base.errors import GraftError
from vitreous.hosts.read_out import read_out
from vitreous.layers.adoption import adopt
from vitreous.layers.stream import Stream, restore


@dataclass
class Grid:
    """shape: (H, W) in patches, of one image (in one channel, where each has tokens of its own) in the present pass."""

    shape: tuple[int, int]


class Embed(PatchEmbed):
    """timm's patch embedding, the same bit for bit; `grid` is shared with the modules that need it further on."""

    grid: Grid

    @classmethod
    def of(cls, embed: PatchEmbed) -> Embed:
        """Adopt timm's patch embedding, or one of ours, whose `grid` others may already hold."""
        new = adopt(cls, embed)
        if not isinstance(embed, Embed):
            new.grid = Grid(embed.grid_size)
        return new

    def forward(self, x: Tensor) -> Tensor:
        self.grid.shape = PatchEmbed.dynamic_feat_size(self, x.shape[-2:])
        return super().forward(x)


class StreamEnd(nn.Module):
    """The host's `norm`, where the stream of tokens ends: restore every place, norm, read inserted tokens, let them leave.

    heads (start, stop): the tokens that the host's head reads; pooled: whether it pools over them (see `read_out`). Raises
    GraftError if it would pool over places whose tokens were dropped.
    """

    host: type[nn.Module]

    @classmethod
    def of(cls, norm: nn.Module, heads: tuple[int, int | None], pooled: bool) -> StreamEnd:
        new = adopt(cls, norm)
        new.host, new.heads, new.pooled = type(norm), heads, pooled
        return new

    def forward(self, x: Tensor | Stream) -> Tensor:
        if not isinstance(x, Stream):
            return self.host.forward(self, x)
        if x.state.dropped and self.pooled:
            raise GraftError(
                "The head pools over all patches, but some were dropped and nothing stands for them. Expected a head that "
                "reads class tokens. Merge or fuse tokens where they are dropped now, or use another pooling."
            )
        tokens, inserted = restore(x.x, x.state)
        tokens = self.host.forward(self, tokens)
        wanted = [i for i, read in enumerate(x.state.read_out) if read]
        if not wanted:
            return tokens
        if len(wanted) < inserted.shape[1]:
            inserted = torch.stack([inserted[:, i] for i in wanted], dim=1)
        return read_out(tokens, self.host.forward(self, inserted), slice(*self.heads), pooled=self.pooled)
