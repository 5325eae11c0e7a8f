"""Gaussian mixture mask: scores are multiplied by a learned function of the distance on the grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.attention import Attention
from vitreous.layers.geometry import squared_distances
from vitreous.layers.stream import PLAIN, TokenState, check_places, present_pairs
from vitreous.mechanism import Mechanism

EPS = 1e-5  # added to squared deviations, as in the authors' experiments


@dataclass(frozen=True, kw_only=True)
class GaussianMask(Mechanism):
    """Each head's scores are multiplied, before the softmax, by a mixture of Gaussians of the distance between patches.

        W_h[i, j] = sum_r alpha_hr exp(-dist(i, j)^2 / (2 (deviation_hr^2 + 1e-5)))      dist in patches, Euclidean
        A = softmax(W * (Q K^T / sqrt(K)))                                    alpha, deviation (H, R), static

    Paper: Li, Zhang 2023, arXiv 2309.05375 (RetNet viewed through convolution).
    Differs: rows and columns of class and register tokens, which the authors' model does not have, are 1; so are those of
        inserted tokens. A merged token has the mean of W over its places. Tokens of one place in several channels are at
        distance 0. The exponent is computed as written; a power of exp(-dist^2), as released, underflows on larger grids.
    At start: changes the output. start=paper may flip the sign of scores; start=wide comes near a pretrained host.
    Cost: no fused kernel: (B, H, N, N) is stored; 2 * H * R parameters per block.
    Settings: layers (0-based; default all). kernels: Gaussians per head, R, 1 or more. start: paper = deviation ~
        N(10, 10^2), alpha ~ N(0, 2^2); wide = alpha 1/R, deviations 1, 2, 4, ... times the grid's diagonal. seed: of it.
    Raises: HostError where attention or patch embedding is not timm's plain one; MaskError where tokens have no places.
    """

    paper: ClassVar[str] = "Li, Zhang 2023, arXiv 2309.05375"
    requires: ClassVar[tuple[str, ...]] = ("attention", "halves", "stream", "grid")
    no_decay: ClassVar[tuple[str, ...]] = ("alpha", "deviation")
    examples: ClassVar[tuple[str, ...]] = ("gaussian_mask:kernels=2,start=wide,layers=1+3",)

    layers: tuple[int, ...] | None = None
    kernels: int = 3
    start: Literal["paper", "wide"] = "paper"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.kernels < 1:
            raise SettingError(f"Found kernels={self.kernels}. Expected 1 or more Gaussians per head. Give such a number.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        changes = slots.open_stream(model, self.name)
        generator = torch.Generator().manual_seed(self.seed)
        for i in slots.layer_indices(model, self.layers):
            new = MaskedAttention.of(slots.plain_attention(model, i, self.name))
            new.initialise(self, generator, model.patch_embed.grid_size)
            changes[f"blocks.{i}.attn"] = new
        return changes


class MaskedAttention(Attention):
    """The host's attention with scores multiplied by the mask; alpha, deviation (H, R)."""

    def initialise(self, settings: GaussianMask, generator: torch.Generator, grid: tuple[int, int]) -> None:
        shape = self.num_heads, settings.kernels
        if settings.start == "paper":
            deviation = 10 + 10 * torch.randn(shape, generator=generator)
            alpha = 2 * torch.randn(shape, generator=generator)
        else:
            diagonal = torch.tensor(grid, dtype=torch.float32).norm()
            deviation = (diagonal * 2.0 ** torch.arange(settings.kernels)).expand(shape).clone()
            alpha = torch.full(shape, 1 / settings.kernels)
        self.alpha, self.deviation = nn.Parameter(alpha), nn.Parameter(deviation)

    def scores(self, q: Tensor, k: Tensor, state: TokenState = PLAIN) -> Tensor:
        return super().scores(q, k) * self.mask(q.shape[2], state).to(q.dtype)

    def mask(self, tokens: int, state: TokenState = PLAIN) -> Tensor:
        """The mask (H, n, n) of n tokens, or (B, H, n, n) where some were merged; float32 or wider."""
        check_places(state, tokens, "gaussian_mask")
        wide = torch.promote_types(self.alpha.dtype, torch.float32)
        with torch.autocast(self.alpha.device.type, enabled=False):
            squares = squared_distances(state.grid).to(self.alpha.device, wide)
            mask = mixture(squares, self.alpha.to(wide), self.deviation.to(wide)).repeat(1, state.groups, state.groups)
            return present_pairs(mask, state, 1.0)


def mixture(squares: Tensor, alpha: Tensor, deviation: Tensor) -> Tensor:
    """sum_r alpha_hr exp(-squares / (2 (deviation_hr^2 + eps))): squares (N, N), alpha and deviation (H, R) -> (H, N, N)."""
    rate = 1 / (2 * (deviation.square() + EPS))
    kernels = (-squares * rate[..., None, None]).exp()  # (H, R, N, N)
    return (alpha[..., None, None] * kernels).sum(1)
