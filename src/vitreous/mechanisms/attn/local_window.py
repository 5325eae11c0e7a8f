"""Local windows: each patch attends to the k x k patches around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.attention import Attention
from vitreous.layers.geometry import offsets
from vitreous.layers.stream import PLAIN, TokenState, check_places, present_pairs
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class LocalWindow(Mechanism):
    """Each patch attends to the k x k patches around it, as a convolution sees them.

        A_ij = softmax over j in window(i) of q_i k_j / sqrt(K)
        window(i): |y_i - y_j| and |x_i - x_j| at most d (k - 1) / 2, both multiples of d

    border=zero: cells of the window outside the image are keys with score 0 and value 0, as in a
    padded convolution; c_i of them are one key with score log c_i.

    Paper: Zhang, Wang, Bian, Xiong 2023, arXiv 2310.04134 (MSA-Conv, the operator of TiC).
    Differs: only the attention of the operator; its closing sum and convolution are left to the
        block. Class, register and inserted tokens, which the operator does not have, see everything
        and are seen by everything. A merged token weighs another by the share of pairs of their
        places that see each other. border=masked is ours.
    At start: changes the output, unless the windows cover the grid: k >= 2 max(H, W) - 1 is the
        host exactly.
    Cost: no parameters; a mask (N, N) per block. The fused kernel computes what is masked, too.
    Settings: layers (0-based; default all). window: k, odd. dilation: d, patches from one cell of a
        window to the next. border: masked = outside the image there is nothing; zero = as released,
        patches at the border attend to cells outside, too.
    Raises: HostError where attention or patch embedding is not timm's plain one; MaskError where
        tokens have no places.
    """

    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2310.04134"
    requires: ClassVar[tuple[str, ...]] = ("attention", "halves", "stream", "grid")
    examples: ClassVar[tuple[str, ...]] = ("local_window:window=3,dilation=2,border=zero,layers=1+3",)

    layers: tuple[int, ...] | None = None
    window: int = 3
    dilation: int = 1
    border: Literal["masked", "zero"] = "masked"

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1 or self.window % 2 == 0:
            raise SettingError(
                f"Found window={self.window}. Expected an odd number, so that a window has a centre. Give 3, 5, 7 or more."
            )
        if self.dilation < 1:
            raise SettingError(f"Found dilation={self.dilation}. Expected 1 or more patches. Give such a distance.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        changes = slots.open_stream(model, self.name)
        for i in slots.layer_indices(model, self.layers):
            new = WindowAttention.of(slots.plain_attention(model, i, self.name))
            new.window, new.dilation, new.border = self.window, self.dilation, self.border
            changes[f"blocks.{i}.attn"] = new
        return changes


class WindowAttention(Attention):
    """The host's attention, where patches see the window around them alone."""

    window: int
    dilation: int
    border: str

    def biases(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState = PLAIN) -> tuple[Tensor | None, ...]:
        check_places(state, q.shape[2], "local_window")
        if self.border == "masked" and self.dilation == 1 and self.window >= 2 * max(state.grid) - 1:
            return (None,)
        shares = present_pairs(self.visible(q, state)[None, None], state, 1.0)  # (B or 1, 1, n, n)
        return (shares.log().to(q.dtype),)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, state: TokenState = PLAIN) -> Tensor:
        if self.border == "zero":
            k, v = (F.pad(rows, (0, 0, 0, 1)) for rows in (k, v))
            outside = self.outside(q, state).log().to(q.dtype)  # (B or 1, 1, n, 1)
            mask = torch.cat([mask, outside.expand(*mask.shape[:-1], 1)], dim=-1)
        return super().weigh(q, k, v, mask, is_causal, state)

    def visible(self, q: Tensor, state: TokenState) -> Tensor:
        """1 where patch i sees patch j, else 0, (P, P).

        Of several tokens per place, all see all in their window.
        """
        inside = windows(state.grid, self.window, self.dilation).repeat(state.groups, state.groups)
        return inside.to(q.device, torch.promote_types(q.dtype, torch.float32))

    def outside(self, q: Tensor, state: TokenState) -> Tensor:
        """How many cells of each token's window lie outside the image, (B or 1, 1, n, 1).

        The mean over the places of a merged token.
        """
        cells = state.groups * self.window ** len(state.grid)
        count = F.pad(cells - self.visible(q, state).sum(1), (state.prefix, 0))[None, :, None]
        if state.assignment is not None:
            count = state.assignment.gather(count)
        return F.pad(count, (0, 0, 0, state.inserted))[:, None]


def windows(grid: Sequence[int], size: int, dilation: int = 1) -> Tensor:
    """Whether place j is a cell of the window around place i, (P, P) bool.

    size: cells along each axis, dilation apart.
    """
    apart = offsets(grid).abs()
    return ((apart <= dilation * (size // 2)) & (apart % dilation == 0)).all(-1)
