"""The first level of the dual-tree wavelet transform: the formula as loops, numbers of the usual package, and back."""

from __future__ import annotations

from itertools import product
from math import sqrt

import pytest
import torch

from vitreous.layers.dtcwt import HIGH, HIGH_BACK, LOW, LOW_BACK, analysis, bands, synthesis

SIZES = [(2, 2), (2, 4), (6, 4), (14, 14), (8, 22)]


def drawn(height, width, channels=2):
    return torch.randn(2, height, width, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mirrored(i, n):
    """The place beyond the end, with the end value twice, as often as it takes."""
    while not 0 <= i < n:
        i = -1 - i if i < 0 else 2 * n - 1 - i
    return i


def test_filters_are_symmetric_and_complement_each_other():
    for taps in (LOW, HIGH, LOW_BACK, HIGH_BACK):
        assert taps == taps[::-1]
    assert (len(LOW), len(HIGH)) == (13, 19)
    assert abs(sum(LOW) - 1) < 1e-15
    assert abs(sum(HIGH)) < 1e-15
    whole = torch.zeros(31, dtype=torch.float64)  # what goes through both branches comes out as it was
    for forth, back in ((LOW, LOW_BACK), (HIGH, HIGH_BACK)):
        for (i, a), (j, b) in product(enumerate(forth), enumerate(back)):
            whole[15 + i - len(forth) // 2 + j - len(back) // 2] += a * b
    assert (whole - torch.eye(31, dtype=torch.float64)[15]).abs().max() < 1e-15


@pytest.mark.parametrize("size", [(2, 4), (5, 3)], ids=str)
def test_filtering_is_the_formula_as_loops(size):
    """Also where the filter is far longer than the picture."""
    x, found = drawn(*size), bands(drawn(*size))
    for (k, rows), (m, columns) in product(enumerate((LOW, HIGH)), repeat=2):
        expected = torch.zeros_like(x)
        for y, u, i, j in product(range(size[0]), range(size[1]), range(len(rows)), range(len(columns))):
            place = mirrored(y + i - len(rows) // 2, size[0]), mirrored(u + j - len(columns) // 2, size[1])
            expected[:, y, u] += rows[i] * columns[j] * x[:, place[0], place[1]]
        torch.testing.assert_close(found[:, k, m], expected, atol=2e-15, rtol=1e-14)


def test_orientations_are_the_quads_of_the_bands():
    x = drawn(4, 6)
    low, real, imaginary = analysis(x)
    parts = {name: bands(x)[:, k, m] for name, (k, m) in {"lh": (1, 0), "hh": (1, 1), "hl": (0, 1)}.items()}
    assert torch.equal(low, bands(x)[:, 0, 0])
    order = [("lh", 1), ("hh", 1), ("hl", 1), ("hl", 2), ("hh", 2), ("lh", 2)]
    for k, (name, which) in enumerate(order):
        for y, u in product(range(2), range(3)):
            a, b = parts[name][:, 2 * y, 2 * u], parts[name][:, 2 * y, 2 * u + 1]
            c, d = parts[name][:, 2 * y + 1, 2 * u], parts[name][:, 2 * y + 1, 2 * u + 1]
            z = ((a - d) + 1j * (b + c)) / sqrt(2) if which == 1 else ((a + d) + 1j * (b - c)) / sqrt(2)
            torch.testing.assert_close(torch.complex(real, imaginary)[:, k, y, u], z, atol=1e-15, rtol=1e-14)


def test_numbers_of_the_usual_package():
    """x = sin(0.37 n), n = 0..63, as 8 x 8: low[0, :4], and the six orientations at (0, 0)."""
    low, real, imaginary = analysis(torch.sin(0.37 * torch.arange(64, dtype=torch.float64)).reshape(1, 8, 8, 1))
    expected = torch.tensor([0.06436368, 0.2302445, 0.41554411, 0.52477011], dtype=torch.float64)
    torch.testing.assert_close(low[0, 0, :4, 0], expected, atol=1e-8, rtol=0)
    orientations = [
        *((0.13481459, 0.20462962), (0.02826027, 0.05527949), (-0.02021381, 0.02035082)),
        *((-0.01721662, 0.02286403), (-0.06237398, -0.01127962), (-0.17392841, 0.00169245)),
    ]
    at_start = torch.stack([real[0, :, 0, 0, 0], imaginary[0, :, 0, 0, 0]], dim=1)
    torch.testing.assert_close(at_start, torch.tensor(orientations, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_there_and_back(size):
    x = drawn(*size)
    parts = analysis(x)
    assert parts[1].shape == parts[2].shape == (2, 6, size[0] // 2, size[1] // 2, 2)
    assert (synthesis(*parts) - x).abs().max() < 4e-15
    for i in range(3):  # every part is needed
        less = [torch.zeros_like(part) if i == j else part for j, part in enumerate(parts)]
        assert (synthesis(*less) - x).abs().max() > 1e-2
