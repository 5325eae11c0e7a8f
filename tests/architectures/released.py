"""Weights by which a network of ours and the code of its authors can be compared without a download."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the authors' checkpoint, from its name there: the rule that the stored logits were made with.

    Variances are above 1, factors of norms near 1; matrices are large enough that each part moves the output, unless factors
    of residuals are parameters without the name of a weight, which are drawn near 0 (SReT).
    """
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        return 1 + 0.2 * r.abs()
    if last == "running_mean":
        return 0.1 * r
    if len([n for n in shape if n > 1]) > 1:
        return r * (1.0 if "dt_linear" in name else 0.06)
    return 1 + 0.1 * r if last in ("weight", "gamma") else 0.1 * r


def pictures(count: int, size: int) -> Tensor:
    """Those that the stored logits are of, (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
