"""The host's patch embedding, which also says what grid the present images have.

A block sees tokens only, and with images of any size their number does not tell height from width.
"""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import PatchEmbed
from torch import Tensor

from vitreous.layers.adoption import adopt


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
