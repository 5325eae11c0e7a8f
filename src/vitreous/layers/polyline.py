"""Polyline paths: decay along the row of one place and the column of another.

The rates are those of the places on the way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 1e-3, 1e-1  # the start of softplus(rate_bias), log-uniform
FACTORS = 1.0, 1.1  # the start of exp(log_factor), uniform


class PathRates(nn.Module):
    """Rates of decay per step along rows and columns, by head and place, at most 0.

        rate_h = -exp(log_factor_h) softplus(W x_h + rate_bias_h)

    x_h: head h's part of the token, K numbers. W (2, K), shared by the heads, whose number divides
    the width D. (B, N, D) -> (2, B, H, N), in float32 or wider: along rows, along columns.
    """

    def __init__(self, width: int, heads: int, generator: torch.Generator | None = None):
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(2, width // heads))
        self.rate_bias, self.log_factor = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The authors' start: steps of 1e-3 to 1e-1, the inverse softplus of which is the bias."""
        nn.init.trunc_normal_(self.weight, std=0.02, generator=generator)
        steps = self.rate_bias.uniform_(*map(math.log, STEPS), generator=generator).exp()
        self.rate_bias.copy_(steps + (-(-steps).expm1()).log())
        self.log_factor.uniform_(*FACTORS, generator=generator).log_()

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        # sums of many small rates lose too much in half precision
        with torch.autocast(x.device.type, enabled=False):
            weight, bias, factor = (p.to(wide) for p in (self.weight, self.rate_bias, self.log_factor))
            # einsum, since matmul multiplies in another order where tokens have gradients
            logits = torch.einsum("bnhk,rk->rbhn", x.to(wide).unflatten(-1, (self.heads, -1)), weight)
            return -factor.exp()[:, None] * F.softplus(logits + bias[:, None])


def line_sums(rates: Tensor) -> Tensor:
    """Sums of rates between two places j and l of a line, (..., L) -> (..., L, L).

    Over min(j, l) + 1 ... max(j, l): symmetric, 0 on the diagonal. rates: at most 0.
    """
    total = rates.cumsum(-1)
    return -(total[..., :, None] - total[..., None, :]).abs()


def polyline(rows: Tensor, columns: Tensor) -> Tensor:
    """Sums of rates from place (i, j) along its row to column l, and on to place (k, l).

    rows, columns: rates along either, (B, H, G, h, w) for G tokens per place -> (B, H, N, N) with
    N = G h w. The row's rates are those of the first token's group, the column's those of the
    second one's. The transpose walks the column first.
    """
    across = line_sums(rows)  # (B, H, G, i, j, l)
    down = line_sums(columns.mT).permute(0, 1, 4, 2, 5, 3)  # (B, H, i, G, k, l)
    paths = across[:, :, :, :, :, None, None] + down[:, :, None, :, None]  # (B, H, G, i, j, G, k, l)
    return paths.flatten(5).flatten(2, 4)
