"""Token matrices whose singular values and vectors are known, without a decomposition of the matrices themselves."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SPECTRA = {  # of the i-th singular value, i from 1: those that the speed benchmark states its angles for
    "fast": lambda i: torch.exp((1 - i) / 4),
    "1/i": lambda i: 1 / i,
    "1/sqrt(i)": lambda i: i**-0.5,
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(spectrum: str, count: int) -> Tensor:
    """The leading singular values (count,) of a spectrum."""
    return SPECTRA[spectrum](torch.arange(1, count + 1, dtype=torch.float64))


@functools.lru_cache(maxsize=8)
def rotation(n: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix (n, n), from the QR of a Gaussian one."""
    return torch.linalg.qr(noise(n, n, seed=1000 * seed + n))[0]


def planted(n: int, d: int, s: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x = U diag(s) V^T (n, d) with orthonormal columns U (n, r) and V (d, r), r = len(s); all float64."""
    u, v = rotation(n, seed)[:, : len(s)], rotation(d, seed + 1)[:, : len(s)]
    return (u * s) @ v.mT, u, v


def sine(found: Tensor, true: Tensor) -> Tensor:
    """Of the largest principal angle (B,) between the columns of found (B, N, R) and those of true, orthonormal ones."""
    q = torch.linalg.qr(found.double())[0]
    return torch.linalg.matrix_norm(q - true @ (true.mT @ q), ord=2)
