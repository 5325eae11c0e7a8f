"""Places, offsets and distances of grids of one, two and three dimensions, against loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vitreous.layers.geometry import centre_prior, offsets, places, squared_distances


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2), (1, 1)])
def test_against_loops(grid):
    at = list(itertools.product(*(range(n) for n in grid)))  # raster order
    assert places(grid).tolist() == [list(place) for place in at]
    for (i, a), (j, b) in itertools.product(enumerate(at), repeat=2):
        assert offsets(grid)[i, j].tolist() == [y - x for x, y in zip(a, b, strict=True)]
        assert squared_distances(grid)[i, j] == sum((y - x) ** 2 for x, y in zip(a, b, strict=True))


def test_an_empty_axis_has_no_places():
    assert places((0, 4)).shape == (0, 2)
    assert squared_distances((0, 4)).dtype == torch.int64


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize(("sigma", "at"), [(0.25, None), (0.1, 0.3)])
def test_centre_prior_is_a_gaussian_of_a_share_of_each_side(grid, sigma, at):
    centre = [0.5 if at is None else at + 0.1 * axis for axis in range(len(grid))]
    found = centre_prior(grid, sigma, None if at is None else centre)
    for value, place in zip(found, itertools.product(*(range(n) for n in grid)), strict=True):
        square = sum(((i + 0.5) / n - middle) ** 2 for i, n, middle in zip(place, grid, centre, strict=True))
        assert math.isclose(value, math.exp(-square / (2 * sigma**2)), rel_tol=1e-12)
    assert centre_prior((3, 3))[4] == 1
