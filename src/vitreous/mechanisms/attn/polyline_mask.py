"""Polyline path masks: attention decays along rows and columns, as the patches there say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.base.errors import HostError, MaskError
from vitreous.hosts.attention import Attention
from vitreous.layers.polyline import PathRates, polyline
from vitreous.layers.stream import PLAIN, TokenState, check_places, present_pairs, restore
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class PolylineMask(Mechanism):
    """Attention between two patches decays along the two paths of one corner between them.

        A = (softmax(Q K^T / sqrt(K) + M) + softmax(Q K^T / sqrt(K) + M^T)) / 2
        M[(i, j), (k, l)] = sum of alpha(i, c) over columns c + sum of beta(r, l) over rows r,
            c from min(j, l) + 1 to max(j, l), r from min(i, k) + 1 to max(i, k)
        alpha_h, beta_h = -exp(a_h) softplus(W x_h + b_h)       W (2, K), shared by the heads

    M walks along the query's row, then along the key's column; M^T along the query's column first.
    x_h, K numbers: head h's part of the token that queries and keys are made of.

    Paper: Zhao, Xiao, Lin, Xie, Zhang, Meng 2025, arXiv 2506.15940 (the whole form, in the authors'
        code; the chunk form is in `architectures/ppma`).
    Differs: the mask alone, without rotary positions and the convolution of values. Rows and
        columns of class, register and inserted tokens, which the authors' model does not have,
        are 0. A merged token sets the rates of all its places, and has the mean of M over them.
        Tokens of one place in several channels have rates of their own.
    At start: changes the output a little: rates of 1e-3 to 1e-1 per step.
    Cost: no fused kernel: two maps and masks (B, H, N, N) are stored; 2 K + 2 H parameters per block.
    Settings: layers (0-based; default all). seed: of W, b and a.
    Raises: HostError where attention or patch embedding is not timm's plain one, or heads do not
        divide the width; MaskError where tokens have no places, or those of a volume.
    """

    paper: ClassVar[str] = "Zhao et al. 2025, arXiv 2506.15940"
    requires: ClassVar[tuple[str, ...]] = ("attention", "halves", "stream", "grid")
    no_decay: ClassVar[tuple[str, ...]] = ("rate_bias", "log_factor")
    examples: ClassVar[tuple[str, ...]] = ("polyline_mask:layers=1+3,seed=2",)

    layers: tuple[int, ...] | None = None
    seed: int = 0

    def changes(self, model: nn.Module) -> dict[str, Any]:
        changes = slots.open_stream(model, self.name)
        generator, width = torch.Generator().manual_seed(self.seed), slots.width(model)
        for i in slots.layer_indices(model, self.layers):
            new = PolylineAttention.of(slots.plain_attention(model, i, self.name))
            if width % new.num_heads:
                raise HostError(
                    f"Found tokens of width {width} and {new.num_heads} heads at blocks.{i}.attn. Expected heads that divide "
                    f"the width, since each head's part of a token sets its rates. Use another host for {self.name}."
                )
            new.rates = PathRates(width, new.num_heads, generator)
            changes[f"blocks.{i}.attn"] = new
        return changes


class PolylineAttention(Attention):
    """The host's attention under the two masks of polyline paths; the outcomes are averaged."""

    def biases(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState = PLAIN) -> tuple[Tensor | None, ...]:
        with torch.autocast(x.device.type, enabled=False):
            paths = present_pairs(polyline(*self.rates_of(x, state)), state, 0.0).to(q.dtype)
        return paths, paths.mT

    def written_out(self, q: Tensor) -> bool:
        """Always: torch has no fused kernel for a mask with gradients, and bits should agree."""
        return True

    def rates_of(self, x: Tensor, state: TokenState) -> Tensor:
        """Present tokens (B, n, D) -> rates along rows and columns, (2, B, H, G, h, w).

        In float32 or wider; G: tokens per place. A dropped place has the rates of a token of zeros.
        """
        check_places(state, x.shape[1], "polyline_mask")
        if len(state.grid) != 2:
            raise MaskError(
                f"Found tokens on a grid of {' x '.join(map(str, state.grid))}. Expected rows and columns, of which "
                "polyline paths are made. Take polyline_mask out (vitreous.ungraft)."
            )
        patches = restore(x, state)[0][:, state.prefix :]
        return self.rates(patches).unflatten(-1, (state.groups, *state.grid))
