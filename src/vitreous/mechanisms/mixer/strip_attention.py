"""Strip attention (S2AFormer): keys and values of a reduced grid, thin queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.mixer import Mixer
from vitreous.layers.stream import TokenState
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class StripAttention(Mechanism):
    """Attention with fewer keys and values, and with queries and keys of few channels.

        X' = conv(X), depth-wise, r x r with stride r
        Q = X W_Q, K = X' W_K (B, H, ., d),   V = X' W_V (B, H, ., D / H)     d much below D / H
        y = softmax(Q K^T / sqrt(d)) V W_O + b_O                   Q and K are thin strips

    Paper: Xu, Huang, Jia, Li, Gao, Qi 2025, arXiv 2505.22195 (S2AFormer). Its layer table could not
        be read: this is the generic form of its attention.
    Differs: class, register and inserted tokens are queries, keys and values as they are, not
        reduced. A grid that r does not divide is extended by its last row and column. The other
        parts of the paper's block are not here.
    At start: changes the output; the displaced attention's weights are not used (keeps_weights is
        False). The convolution starts as the mean of its patches.
    Cost: N (P + N / r^2) (d + D / H) multiply-adds per head in place of 2 N^2 D / H, P tokens of
        the prefix; parameters 2 D H d + 2 D^2 of the linears with 2 H d + 2 D biases, D r^2 of the
        convolution.
    Settings: layers (0-based; default all). heads (default: the host's). reduction: r, 1 or more.
        strip: d, channels of queries and keys per head, 1 or more. seed: of the weights,
        N(0, 0.02^2) cut at two standard deviations.
    Raises: HostError where the blocks cannot hand on a state; MaskError for masks and dropped
        tokens; SettingError.
    """

    paper: ClassVar[str] = "Xu et al. 2025, arXiv 2505.22195"
    requires: ClassVar[tuple[str, ...]] = ("stream", "grid", "halves")
    keeps_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("strip_attention:reduction=3,strip=1,heads=4,layers=1+3",)

    layers: tuple[int, ...] | None = None
    heads: int | None = None
    reduction: int = 2
    strip: int = 8
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("reduction", "strip"):
            if getattr(self, name) < 1:
                raise SettingError(f"Found {name}={getattr(self, name)}. Expected 1 or more. Give such a number.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        width, layers = slots.width(model), slots.layer_indices(model, self.layers)
        heads, generator = slots.heads_of_a_mixer(model, self.heads), torch.Generator().manual_seed(self.seed)

        def initialise(new: StripMixer, layer: int) -> None:
            new.initialise(self, width, heads, generator)

        return slots.put_mixers(model, layers, StripMixer, initialise, self.name)


class StripMixer(Mixer):
    """Softmax attention of all tokens to prefix, inserted tokens and the reduced grid."""

    mixes_inserted: ClassVar[bool] = True
    attends: ClassVar[bool] = True

    def initialise(self, settings: StripAttention, width: int, heads: int, generator: torch.Generator) -> None:
        self.num_heads, r = heads, settings.reduction
        strip = heads * settings.strip
        self.add_projections({"q_proj": strip, "k_proj": strip, "v_proj": width, "proj": width}, width, generator)
        self.reduce = skip_init(nn.Conv2d, width, width, r, stride=r, groups=width, bias=False)
        nn.init.constant_(self.reduce.weight, 1 / r**2)

    def mix_tokens(self, tokens: Tensor, state: TokenState) -> Tensor:
        x = self.reduced(tokens, state)
        q, k, v = (
            layer(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N or M, d or K)
            for layer, y in ((self.q_proj, tokens), (self.k_proj, x), (self.v_proj, x))
        )
        z = F.scaled_dot_product_attention(q, k, v)
        return self.proj(z.transpose(1, 2).flatten(2))

    def reduced(self, tokens: Tensor, state: TokenState) -> Tensor:
        """What keys and values are made of: tokens (B, N, D) -> (B, M, D).

        The prefix, the patches reduced, inserted tokens.
        """
        prefix, patches, inserted = tokens.tensor_split((state.prefix, tokens.shape[1] - state.inserted), dim=1)
        pictures = patches.reshape(-1, *state.grid, tokens.shape[-1]).movedim(-1, 1)  # (B * groups, D, H, W)
        r = self.reduce.stride[0]
        right, below = (-size % r for size in reversed(state.grid))
        y = self.reduce(F.pad(pictures, (0, right, 0, below), mode="replicate"))
        y = y.flatten(2).mT.reshape(patches.shape[0], -1, tokens.shape[-1])
        return torch.cat([prefix, y.to(tokens.dtype), inserted], dim=1)
