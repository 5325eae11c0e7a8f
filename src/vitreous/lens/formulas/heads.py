"""What heads are like: attention by rings of neighbours, patterns of maps, divergence.

Maps are rows (..., P, P) between the P patches of a grid in raster order, and `beside` (..., P):
what each patch gives to tokens without a place (class token, registers), so that both sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitreous.layers.spectral import leading_subspace

AXES = 12  # leading axes of maps that clusters are found in
STEPS = 100  # of k-means, at most


def places(grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(row, column) of each patch, (P,) each."""
    number = torch.arange(math.prod(grid))
    return number // grid[1], number % grid[1]


def ring_index(grid: Sequence[int]) -> Tensor:
    """(P, P): in which ring around a patch another one lies.

    The larger of rows and columns between: ring 0 is the patch itself, ring 1 its 8 neighbours.
    """
    return torch.stack([(x[:, None] - x).abs() for x in places(grid)]).amax(0)


def middle_index(grid: Sequence[int]) -> Tensor:
    """(P,): in which ring around the middle of the grid a patch lies, 0 the innermost."""
    distances = [(2 * x - (n - 1)).abs() // 2 for x, n in zip(places(grid), grid, strict=True)]
    return torch.stack(distances).amax(0)


def ring_profile(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """Attention by ring (..., K): the mean over queries of what goes to each ring.

    rows (..., Q, P), index (Q, P) or (P,). weights (..., Q): how much each query counts; None: all
    alike. Together with what goes to no place it sums to 1.
    """
    weights = torch.ones_like(rows[..., 0]) if weights is None else weights
    share = rows * (weights / weights.sum(-1, keepdim=True).clamp(min=1e-30))[..., None]
    profile = share.new_zeros(*rows.shape[:-2], int(index.max()) + 1)
    return profile.index_add(-1, index.expand(rows.shape[-2:]).flatten().to(rows.device), share.flatten(-2))


def known_patterns(grid: Sequence[int], prefix: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (rows (P, P), beside (P,))} of patterns that heads are compared with.

    prefix: whether there are tokens without a place, which a head may look at alone.
    """
    ring, (row, column) = ring_index(grid), places(grid)
    marks = {
        "self": ring == 0,
        "ring": ring == 1,
        "row": row[:, None] == row,
        "column": column[:, None] == column,
        "global": ring >= 0,
    }
    beside = torch.zeros(len(ring))
    patterns = {name: (mark / mark.sum(-1, keepdim=True).clamp(min=1), beside) for name, mark in marks.items()}
    return patterns | ({"class": (torch.zeros(ring.shape), beside + 1)} if prefix else {})


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """How alike the rows of two maps (..., n, m) are, (...): the mean of sum sqrt(a b).

    1: equal distributions, 0: none of the mass at the same places (Bhattacharyya's coefficient).
    """
    return (a.clamp(min=0).sqrt() * b.clamp(min=0).sqrt()).sum(-1).mean(-1)


def binned(rows: Tensor, beside: Tensor, size: int) -> Tensor:
    """A map of fixed size (..., size, 1 + size): mean over queries, mass of keys, in bins.

    Bins are equal stretches of patches in raster order; the first column is `beside`.
    """
    patches, bins = rows.shape[-1], torch.arange(size, dtype=torch.float64) * rows.shape[-1] / size
    cell = torch.arange(patches, dtype=torch.float64)
    upper = torch.minimum(bins[:, None] + patches / size, cell + 1)
    overlap = (upper - torch.maximum(bins[:, None], cell)).clamp(min=0).to(rows)  # (size, P)
    mean = overlap / overlap.sum(-1, keepdim=True)
    return torch.cat([mean @ beside[..., None], mean @ rows @ overlap.mT], dim=-1)


def clusters(maps: Tensor, count: int) -> Tensor:
    """The number of the cluster of each of n maps (n, rows, columns), (n,): 0 is the largest.

    K-means on the leading principal axes of the square roots, whose squared distance is that of
    Hellinger. It starts from maps that are as far from each other as can be, so nothing is drawn;
    there are fewer clusters than `count` where maps do not differ.
    """
    x = maps.flatten(1).double().clamp(min=0).sqrt()
    x = x - x.mean(0)
    space = leading_subspace(x[None], max(1, min(AXES, len(x) - 1, x.shape[1])), method="exact")
    points = (space.U * space.S[:, None])[0]
    centres = points[points.norm(dim=1).argmax()][None]
    while len(centres) < min(count, len(points)):
        distance = torch.cdist(points, centres).amin(1)
        if float(distance.max()) <= 1e-6 * float(points.abs().max()):
            break
        centres = torch.cat([centres, points[distance.argmax()][None]])
    for _ in range(STEPS):
        labels = torch.cdist(points, centres).argmin(1)
        moved = [points[labels == i].mean(0) if (labels == i).any() else centre for i, centre in enumerate(centres)]
        before, centres = centres, torch.stack(moved)
        if torch.equal(before, centres):
            break
    order = torch.bincount(labels, minlength=len(centres)).argsort(descending=True, stable=True)
    return order.argsort()[labels]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions (..., C) in bits, (...): 0 to 1."""
    middle = (p + q) / 2
    bits = (torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q))
    return (sum(bits).sum(-1) / (2 * math.log(2))).clamp(0, 1)
