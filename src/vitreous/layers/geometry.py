"""Places of a grid of any dimension, in raster order, and how they lie to each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def places(grid: Sequence[int]) -> Tensor:
    """Coordinates (P, dims) int64 of the P places of a grid, the last axis fastest.

    grid: (H, W), (T, H, W) or (D, H, W).
    """
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), dim=-1).flatten(0, -2)


def offsets(grid: Sequence[int]) -> Tensor:
    """offsets[i, j] = place j minus place i: (P, P, dims) int64, in patches."""
    at = places(grid)
    return at - at[:, None]


def squared_distances(grid: Sequence[int]) -> Tensor:
    """Squared Euclidean distances between the places: (P, P) int64, in patches."""
    return offsets(grid).square().sum(-1)


def centre_prior(grid: Sequence[int], sigma: float = 0.25, at: Sequence[float] | None = None) -> Tensor:
    """exp(-r^2 / (2 sigma^2)), (P,) float64, r from the image's centre.

    All sides count as one long: an ellipse if not square. at: another centre, (y, x), in sides.
    """
    centre = torch.tensor([0.5] * len(grid) if at is None else at, dtype=torch.float64)
    offset = (places(grid).double() + 0.5) / torch.tensor(grid, dtype=torch.float64) - centre
    return torch.exp(-offset.square().sum(-1) / (2 * sigma**2))
