"""Convolutions of pictures by their spectrum: circular (gates), and one-sided.

A picture is (B, *grid, C), its grid of any number of axes. A half spectrum (*half, C) is complex,
as `torch.fft.rfftn` gives it over the grid: the last axis of n places has n // 2 + 1 frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel times a spectrum: (B, *grid, C), (*half, C) complex -> (B, *grid, C).

    The circular convolution with `kernel_of(weight, grid)`. What of a weight no real kernel has
    (imaginary parts at frequency 0 and n / 2 of the last axis) counts for nothing.
    """
    axes = tuple(range(1, x.ndim - 1))
    return torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * weight, s=x.shape[1:-1], dim=axes)


def kernel_of(weight: Tensor, grid: Sequence[int]) -> Tensor:
    """The real kernel (*grid, C) of a half spectrum (*half, C), offset 0 in cell 0."""
    return torch.fft.irfftn(weight, s=tuple(grid), dim=tuple(range(len(grid))))


def resized(weight: Tensor, grid: Sequence[int], new: Sequence[int]) -> Tensor:
    """The half spectrum of the same kernel on another grid: (*half, C) -> (*new half, C).

    The kernel in patches stays as it is; offsets that the new grid has not got are cut off, those
    that the old one had not are 0. (To interpolate the spectrum instead would change the kernel.)
    """
    if tuple(grid) == tuple(new):
        return weight
    axes = tuple(range(len(grid)))
    centred = torch.fft.fftshift(kernel_of(weight, grid), dim=axes)  # offset 0 in cell n // 2
    margins: list[int] = []
    for old, size in zip(grid, new, strict=True):
        before = size // 2 - old // 2
        margins = [before, size - old - before, *margins]  # F.pad counts axes from the last; below 0 crops
    return torch.fft.rfftn(torch.fft.ifftshift(F.pad(centred, (0, 0, *margins)), dim=axes), dim=axes)


def radial_mean(response: Tensor, bins: int) -> Tensor:
    """Mean of (C, *grid) over all frequencies of one radius: (C, bins).

    response: frequency 0 in cell n // 2 of each axis, as `torch.fft.fftshift` puts it. The bins go
    from 0 to 0.5 cycles per place; frequencies beyond, in the corners, count for the last one. An
    empty bin has the value of the one before it.
    """
    axes = [torch.fft.fftshift(torch.fft.fftfreq(n)) for n in response.shape[1:]]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt().flatten()
    index = (radius * 2 * (bins - 1)).round().long().clamp(max=bins - 1).to(response.device)
    total = response.new_zeros(len(response), bins).index_add(1, index, response.flatten(1))
    count = response.new_zeros(bins).index_add(0, index, response.new_ones(len(index)))
    filled = torch.where(count > 0, torch.arange(bins, device=response.device), 0).cummax(0).values
    return (total / count.clamp(min=1))[:, filled]


def one_sided(x: Tensor, kernel: Tensor) -> Tensor:
    """y[i] = sum of kernel[a] x[i - a] over all offsets 0 <= a <= i.

    x, y (B, *grid, C), kernel (*grid, C). Offsets go down and to the right only, and nothing wraps:
    the spectra are of pictures with zeros to twice their size.
    """
    grid, axes = x.shape[1:-1], tuple(range(1, x.ndim - 1))
    double = tuple(2 * n for n in grid)
    spectrum = torch.fft.rfftn(kernel, s=double, dim=tuple(axis - 1 for axis in axes))
    y = torch.fft.irfftn(torch.fft.rfftn(x, s=double, dim=axes) * spectrum, s=double, dim=axes)
    return y[(slice(None), *(slice(n) for n in grid))]
