"""Places, offsets and distances of grids of one, two and three dimensions, against loops."""

from __future__ import annotations

import itertools

import pytest
import torch

from vitreous.layers.geometry import offsets, places, squared_distances


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
