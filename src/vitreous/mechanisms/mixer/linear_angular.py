"""Binary linear-angular attention (ShiftAddViT): queries and keys of zeros and ones."""

from __future__ import annotations

import math
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
from vitreous.layers.unit_norm import unit
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class LinearAngular(Mechanism):
    """Attention becomes a product of binary queries and keys, without a softmax.

        q, k <- q / |q|, k / |k|;   b(q) = 1[q > mean(q)]    mean over tokens and channels of a head
        y = v / 2 + b(q) (b(k)^T v) / pi,   y <- y / |y|        first K x K: linear in the tokens
        y <- y + conv(v), depth-wise over the tokens, then the projection
        db/dq = 1 for 0 < q < 1, else 0                         straight through

    Paper: You, Shi, Guo, Lin 2023, arXiv 2306.06446 (ShiftAddViT).
    Differs: the mean is of one image; the released code takes it over the whole batch, so that an
        image depends on its batch mates. Lengths below 1e-12 count as that much, where the release
        divides by 0. The convolution runs over the patches alone, in raster order, those of each
        channel apart; other tokens have none. No branch of sparse softmax.
    At start: changes the output; the displaced attention's weights are not used (keeps_weights is
        False).
    Cost: 2 N K^2 multiply-adds per head in place of 2 N^2 K; 4 D^2 + 4 D parameters and H * kernel
        of the convolution. Binary numbers are simulated in floating point.
    Settings: layers (0-based; default all). heads (default: the host's). kernel: patches that the
        convolution spans, odd. seed: of the weights, N(0, 0.02^2) cut at two standard deviations.
    Raises: HostError where the blocks cannot hand on a state; MaskError for masks and dropped
        tokens; SettingError.
    """

    paper: ClassVar[str] = "You et al. 2023, arXiv 2306.06446"
    requires: ClassVar[tuple[str, ...]] = ("stream", "grid", "halves")
    keeps_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("linear_angular:kernel=3,layers=1+3,heads=4",)

    layers: tuple[int, ...] | None = None
    heads: int | None = None
    kernel: int = 9
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise SettingError(f"Found kernel={self.kernel}. Expected an odd number of patches. Give one such as 9.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        width, layers = slots.width(model), slots.layer_indices(model, self.layers)
        heads, generator = slots.heads_of_a_mixer(model, self.heads), torch.Generator().manual_seed(self.seed)

        def initialise(new: LinearAngularMixer, layer: int) -> None:
            new.initialise(width, heads, self.kernel, generator)

        return slots.put_mixers(model, layers, LinearAngularMixer, initialise, self.name)


class LinearAngularMixer(Mixer):
    """Binary linear-angular attention over all tokens, and a convolution over the patches."""

    mixes_inserted: ClassVar[bool] = True

    def initialise(self, width: int, heads: int, kernel: int, generator: torch.Generator) -> None:
        self.num_heads = heads
        self.add_projections(dict.fromkeys(("q_proj", "k_proj", "v_proj", "proj"), width), width, generator)
        self.conv = skip_init(nn.Conv2d, heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False)
        nn.init.kaiming_uniform_(self.conv.weight, a=math.sqrt(5), generator=generator)

    def mix_tokens(self, tokens: Tensor, state: TokenState) -> Tensor:
        q, k, v = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, K)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        with torch.autocast(tokens.device.type, enabled=False):  # counts of tokens, and lengths
            y = unit(angular(binary(unit(q)), binary(unit(k)), v.to(torch.promote_types(v.dtype, torch.float32))))
        y = y.to(v.dtype) + self.local(v, state)
        return self.proj(y.transpose(1, 2).flatten(2))

    def local(self, v: Tensor, state: TokenState) -> Tensor:
        """The convolution over the patches of each picture: v (B, H, N, K) -> (B, H, N, K).

        0 for other tokens.
        """
        patches = v[:, :, state.prefix : v.shape[2] - state.inserted]
        pictures = patches.unflatten(2, (state.groups, -1)).transpose(1, 2)  # (B, G, H, N / G, K)
        y = self.conv(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]).transpose(1, 2).flatten(2, 3)
        return F.pad(y, (0, 0, state.prefix, state.inserted))


def binary(x: Tensor) -> Tensor:
    """1 where unit rows x (B, H, N, K) exceed their mean over N and K, else 0.

    The gradient is that of clamp(x, 0, 1).
    """
    hard, soft = (x > x.mean((-2, -1), keepdim=True)).to(x.dtype), x.clamp(0, 1)
    return hard + (soft - soft.detach())  # the difference is 0 to the bit


def angular(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """v / 2 + q (k^T v) / pi for q, k, v (B, H, N, K).

    Keys and values first, so that no (N, N) is formed.
    """
    return v / 2 + q @ (k.mT @ v) / math.pi
