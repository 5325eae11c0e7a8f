"""The first level of the dual-tree complex wavelet transform, and its inverse.

Kingsbury 1999; filters near_sym_b of 13 and 19 taps. At level 1 nothing is decimated: symmetric
filters give a low-pass picture of the same size and three high-pass ones, of which each four
places become two complex numbers: six orientations at half the size.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

Taps = tuple[float, ...]


def symmetric(half: tuple[int, ...], divisor: int) -> Taps:
    """A filter from its taps between one end and the centre."""
    return tuple(tap / divisor for tap in (*half, *half[-2::-1]))


def alternating(taps: Taps) -> Taps:
    """Every second tap, counted from the centre, with the other sign."""
    centre = len(taps) // 2
    return tuple(-tap if (i - centre) % 2 else tap for i, tap in enumerate(taps))


LOW = symmetric((-9, 0, 114, -240, -247, 1520, 2844), 5120)
HIGH = symmetric((-81, 0, 1539, -2160, -8208, 27360, 63816, -59280, -343786, 641600), 1146880)
LOW_BACK, HIGH_BACK = alternating(HIGH), alternating(LOW)


def filter_matrix(taps: Taps, n: int, like: Tensor) -> Tensor:
    """(n, n): the product with a line of n values is its correlation with a filter.

    Beyond the ends the line is mirrored, the end value twice, as often as the filter reaches. A
    product with a matrix moves more numbers than a depthwise convolution would, and is faster.
    """
    reach = len(taps) // 2
    at = torch.arange(n, device=like.device)
    index = (at[:, None] + torch.arange(-reach, reach + 1, device=like.device)) % (2 * n)  # (n, taps)
    index = torch.minimum(index, 2 * n - 1 - index)
    values = torch.tensor(taps, device=like.device, dtype=like.dtype)
    return (values[:, None] * (index[..., None] == at)).sum(1)


def filtered(x: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Correlations along the height and along the width, each with its filter: (B, H, W, C)."""
    x = torch.einsum("ij,bjwc->biwc", filter_matrix(rows, x.shape[1], x), x)
    return torch.einsum("ij,bhjc->bhic", filter_matrix(columns, x.shape[2], x), x)


def analysis(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, C), both sides even -> low pass, real and imaginary part of the high pass.

    The low-pass picture is as large as x; the parts, (B, 6, H / 2, W / 2, C), are those of the six
    orientations.
    """
    first, second = [], []
    for rows, columns in ((HIGH, LOW), (HIGH, HIGH), (LOW, HIGH)):
        band = filtered(x, rows, columns) / sqrt(2)
        a, b, c, d = (band[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
        first.append((a - d, b + c))
        second.append((a + d, b - c))
    real, imaginary = (torch.stack(parts, dim=1) for parts in zip(*first, *reversed(second), strict=True))
    return filtered(x, LOW, LOW), real, imaginary


def synthesis(low: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """The inverse of `analysis`, exact up to rounding."""
    x = filtered(low, LOW_BACK, LOW_BACK)
    for i, (rows, columns) in enumerate(((HIGH_BACK, LOW_BACK), (HIGH_BACK, HIGH_BACK), (LOW_BACK, HIGH_BACK))):
        p, q, r, s = real[:, i], imaginary[:, i], real[:, 5 - i], imaginary[:, 5 - i]
        upper, lower = torch.stack([p + r, q + s], dim=3), torch.stack([q - s, r - p], dim=3)  # (B, H / 2, W / 2, 2, C)
        quads = torch.stack([upper, lower], dim=2) / sqrt(2)  # (B, H / 2, 2, W / 2, 2, C)
        x = x + filtered(quads.flatten(3, 4).flatten(1, 2), rows, columns)
    return x
