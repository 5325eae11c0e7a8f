"""Convolutions by spectrum against loops; kernels that stay themselves on another grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from vitreous.layers.fourier import gate, kernel_of, one_sided, radial_mean, resized

GRIDS = [(4, 6), (5, 7), (4, 5), (1, 3), (2, 3, 4)]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(grid, channels=2):
    return torch.view_as_complex(drawn(*grid[:-1], grid[-1] // 2 + 1, channels, 2, seed=1))


def places(grid):
    return list(itertools.product(*map(range, grid)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_gate_is_a_circular_convolution(grid):
    """As loops over places; the weight is not one of a real kernel, which odd and even sizes treat differently."""
    x, weight = drawn(1, *grid, 2), spectrum(grid)
    kernel, expected = kernel_of(weight, grid), torch.zeros(1, *grid, 2, dtype=torch.float64)
    for i, j in itertools.product(places(grid), repeat=2):
        offset = tuple((a - b) % n for a, b, n in zip(i, j, grid, strict=True))
        expected[(0, *i)] += kernel[offset] * x[(0, *j)]
    torch.testing.assert_close(gate(x, weight), expected, atol=1e-13, rtol=1e-13)


def test_a_gate_of_ones_is_the_identity_and_energies_are_those_of_the_spectra():
    """Parseval: the energy of the outcome is that of the kernel's spectrum times the picture's, by the number of places."""
    x, weight = drawn(2, 5, 6, 2), spectrum((5, 6))
    torch.testing.assert_close(gate(x, torch.ones_like(weight)), x, atol=1e-14, rtol=1e-14)
    spectra = torch.fft.fftn(kernel_of(weight, (5, 6)), dim=(0, 1)) * torch.fft.fftn(x, dim=(1, 2))
    torch.testing.assert_close(gate(x, weight).square().sum(), spectra.abs().square().sum() / 30, atol=0, rtol=1e-12)
    phases = torch.fft.rfft2(kernel_of(weight, (5, 6)), dim=(0, 1))
    torch.testing.assert_close(gate(x, phases / phases.abs()).square().sum(), x.square().sum(), atol=0, rtol=1e-12)


def test_a_gate_moves_with_the_picture():
    x, weight = drawn(1, 5, 6, 2), spectrum((5, 6))
    moved = gate(x.roll((2, 3), dims=(1, 2)), weight)
    torch.testing.assert_close(moved, gate(x, weight).roll((2, 3), dims=(1, 2)), atol=1e-13, rtol=1e-13)
    assert not torch.allclose(moved, gate(x, weight))


@pytest.mark.parametrize(
    ("grid", "new"), [((5, 7), (8, 8)), ((4, 6), (7, 9)), ((4, 4), (8, 5)), ((3, 4, 5), (6, 5, 7))], ids=str
)
def test_the_kernel_stays_on_a_larger_grid_and_comes_back(grid, new):
    weight = torch.fft.rfftn(kernel_of(spectrum(grid), grid), dim=tuple(range(len(grid))))  # of a real kernel
    larger = resized(weight, grid, new)
    old, kernel = kernel_of(weight, grid), kernel_of(larger, new)
    ranges = [range(-(n // 2), (n + 1) // 2) for n in grid]
    for offset in itertools.product(*ranges):
        torch.testing.assert_close(kernel[offset], old[offset], atol=1e-14, rtol=1e-13)
        kernel[offset] = 0
    assert kernel.abs().max() < 1e-14  # and nothing else
    torch.testing.assert_close(resized(larger, new, grid), weight, atol=1e-13, rtol=1e-13)
    assert resized(weight, grid, grid) is weight


@pytest.mark.parametrize(("corners", "off"), [(True, (0.080, 0.094, 0.124)), (False, (0.070, 0.120, 0.168))])
def test_interpolating_the_spectrum_is_another_kernel(corners, off):
    """Bicubic over the half spectrum, as is usual for such weights, is 7 to 17 % off for a smooth blur, edge and corner."""
    grid, new = (14, 14), (20, 20)
    at = torch.fft.fftfreq(14, 1 / 14).double()
    blur = torch.exp(-(at[:, None].square() + at.square()) / 4)
    for kernel, expected in zip((blur, blur * at, blur * at * at[:, None]), off, strict=True):
        weight = torch.fft.rfft2(kernel[..., None], dim=(0, 1))
        parts = torch.view_as_real(weight).flatten(2).permute(2, 0, 1)[None]
        usual = F.interpolate(parts, (20, 11), mode="bicubic", align_corners=corners)[0].permute(1, 2, 0)
        usual = kernel_of(torch.complex(usual[..., :1], usual[..., 1:]), new)
        ours = kernel_of(resized(weight, grid, new), new)
        error = torch.linalg.vector_norm(usual - ours) / torch.linalg.vector_norm(ours)
        assert abs(error - expected) < 1e-3


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_one_sided_is_the_direct_sum(grid):
    x, kernel = drawn(1, *grid, 2), drawn(*grid, 2, seed=2)
    expected = torch.zeros_like(x)
    for i, a in itertools.product(places(grid), repeat=2):
        source = tuple(p - q for p, q in zip(i, a, strict=True))
        if min(source) >= 0:
            expected[(0, *i)] += kernel[a] * x[(0, *source)]
    torch.testing.assert_close(one_sided(x, kernel), expected, atol=1e-13, rtol=1e-13)


def test_radial_means():
    """On 6 x 6, 4 bins: radius 0; 1 (4 of them) and sqrt 2 (4); 2, sqrt 5 (8 more); 3 and all beyond."""
    axis = torch.tensor([-3.0, -2, -1, 0, 1, 2])
    radius = (axis[:, None].square() + axis.square()).sqrt()
    expected = [radius[radius.round().clamp(max=3) == r].mean().item() for r in range(4)]
    torch.testing.assert_close(radial_mean(radius[None], 4)[0], torch.tensor(expected))
    sparse = radial_mean(radius[None], 7)[0]  # half a step each: the first has no frequency of its own beside 0
    assert sparse[0] == sparse[1] == 0
    assert sparse[2] == 1
