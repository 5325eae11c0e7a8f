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


def bank(pair: tuple[Taps, Taps], n: int, like: Tensor) -> Tensor:
    """(2, n, n): products with a line of n values are its correlations with two filters.

    Beyond the ends the line is mirrored, the end value twice, as often as the filter reaches. A
    product with a matrix moves more numbers than a convolution would, and is faster.
    """
    at = torch.arange(n, device=like.device)
    longest = max(map(len, pair))
    padded = [(0.0,) * ((longest - len(taps)) // 2) for taps in pair]
    values = [(*zeros, *taps, *zeros) for zeros, taps in zip(padded, pair, strict=True)]
    index = (at[:, None] + torch.arange(longest, device=like.device) - longest // 2) % (2 * n)  # (n, taps)
    hits = torch.minimum(index, 2 * n - 1 - index)[..., None] == at
    return torch.einsum("kt,itj->kij", torch.tensor(values, device=like.device, dtype=like.dtype), hits.to(like.dtype))


def bands(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, 2, 2, H, W, C): low and high pass along the height, along the width."""
    x = torch.einsum("kij,bjwc->bkiwc", bank((LOW, HIGH), x.shape[1], x), x)
    return torch.einsum("lij,bkhjc->bklhic", bank((LOW, HIGH), x.shape[3], x), x)


def analysis(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, C), both sides even -> low pass, real and imaginary part of the high pass.

    The low-pass picture is as large as x; the parts, (B, 6, H / 2, W / 2, C), are those of the six
    orientations.
    """
    parts = bands(x)
    high = torch.stack([parts[:, 1, 0], parts[:, 1, 1], parts[:, 0, 1]], dim=1) / sqrt(2)
    a, b, c, d = (high[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))  # (B, 3, H / 2, W / 2, C)
    real, imaginary = torch.cat([a - d, (a + d).flip(1)], dim=1), torch.cat([b + c, (b - c).flip(1)], dim=1)
    return parts[:, 0, 0], real, imaginary


def synthesis(low: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """The inverse of `analysis`, exact up to rounding."""
    p, q, r, s = real[:, :3], imaginary[:, :3], real[:, 3:].flip(1), imaginary[:, 3:].flip(1)
    upper, lower = torch.stack([p + r, q + s], dim=4), torch.stack([q - s, r - p], dim=4)  # (B, 3, H / 2, W / 2, 2, C)
    high = torch.stack([upper, lower], dim=3).flatten(4, 5).flatten(2, 3) / sqrt(2)  # (B, 3, H, W, C)
    parts = torch.stack([low, high[:, 2], high[:, 0], high[:, 1]], dim=1).unflatten(1, (2, 2))
    x = torch.einsum("lij,bklhjc->bkhic", bank((LOW_BACK, HIGH_BACK), low.shape[2], low), parts)
    return torch.einsum("kij,bkjwc->biwc", bank((LOW_BACK, HIGH_BACK), low.shape[1], low), x)
