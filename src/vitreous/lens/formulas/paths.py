"""A classifier's input as a sum of paths: what each adds, and how fine its map is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

QUARTER = 0.25  # cycles per patch: what repeats within four patches is fine


def contributions(head: Callable[[Tensor], Tensor], paths: Tensor) -> tuple[Tensor, Tensor]:
    """What each of P paths adds to C logits, (P, C), and the constant (C,).

    head: (P, N, D) -> (P, C), affine; it gives for the sum of the paths (P, N, D) the sum of what
    they add, plus the constant.
    """
    constant = head(torch.zeros_like(paths[:1]))
    return head(paths) - constant, constant[0]


def fine_share(maps: Tensor) -> Tensor:
    """The share of fine detail in maps (P, rows, columns, D), (P,): 0 to 1, NaN for even maps.

    Energy of the 2-D Fourier transform, summed over channels, at frequencies above a quarter cycle
    per patch (distance from the origin); the mean over patches does not count. Of white noise it is
    the share of such frequencies.
    """
    rows, columns = maps.shape[1:3]
    energy = torch.fft.fft2(maps, dim=(1, 2)).abs().square().sum(-1)  # (P, rows, columns)
    y, x = (torch.fft.fftfreq(n, dtype=maps.dtype, device=maps.device) for n in (rows, columns))
    radius = (y[:, None].square() + x.square()).sqrt()
    whole = (energy * (radius > 0)).sum((1, 2))
    return (energy * (radius > QUARTER)).sum((1, 2)) / whole.masked_fill(whole == 0, torch.nan)
