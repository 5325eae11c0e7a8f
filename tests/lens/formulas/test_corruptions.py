"""Natural corruptions against the formulas of ImageNet-C, pixel by pixel."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch

from vitreous.base.errors import SettingError, UnknownName
from vitreous.lens.formulas.corruptions import CORRUPTIONS, corrupted


def generators(count=2):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def pixels(count=2, side=24):
    return torch.rand(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_is_the_value_of_hsv(severity):
    x, amount = pixels(1, 4), CORRUPTIONS["brightness"][1][severity - 1]
    x[0, :, 0, 0] = 0.0
    result = corrupted(x, "brightness", severity, generators(1))
    for row in range(4):
        for column in range(4):
            h, s, v = colorsys.rgb_to_hsv(*x[0, :, row, column].tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb(h, s, min(1.0, v + amount)), dtype=x.dtype)
            assert (result[0, :, row, column] - expected).abs().max() < 1e-12
    assert (result - x).abs().max() > 0.05


def test_contrast_and_blur_are_loops():
    x = pixels(1, 6)
    contrast, blur = (corrupted(x, kind, 2, generators(1)) for kind in ("contrast", "blur"))
    for c in range(3):
        mean = sum(x[0, c].flatten().tolist()) / 36
        for i in range(6):
            for j in range(6):
                assert abs(contrast[0, c, i, j] - (0.3 * (x[0, c, i, j] - mean) + mean)) < 1e-12
                weights = [[math.exp(-((i - a) ** 2 + (j - b) ** 2) / 8) for b in range(6)] for a in range(6)]
                total = sum(map(sum, weights))
                expected = sum(weights[a][b] * x[0, c, a, b] for a in range(6) for b in range(6)) / total
                assert abs(blur[0, c, i, j] - expected) < 1e-12


def test_what_is_drawn_has_its_mean_and_spread():
    grey = torch.full((1, 3, 128, 128), 0.5, dtype=torch.float64)
    noisy, counted, impulses = (corrupted(grey, kind, 1, generators(1)) for kind in ("noise", "shot", "impulse"))
    assert noisy.mean().sub(0.5).abs() < 0.002
    assert abs(noisy.std() - 0.08) < 0.002
    assert (counted * 60).round().sub(counted * 60).abs().max() < 1e-9  # whole photons
    assert abs(counted.std() - (0.5 / 60) ** 0.5) < 0.002
    for end in (0.0, 1.0):
        assert abs((impulses == end).double().mean() - 0.015) < 0.002
    assert ((impulses == 0.5) | (impulses == 0) | (impulses == 1)).all()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_stays_in_range_grows_and_leaves_batch_mates_alone(kind):
    x = 0.2 + 0.5 * pixels()
    weak, strong = (corrupted(x, kind, severity, generators()) for severity in (1, 5))
    for each in (weak, strong):
        assert each.min() >= 0
        assert each.max() <= 1
        assert each.shape == x.shape
    assert 0 < (weak - x).square().mean() < (strong - x).square().mean()
    alone = corrupted(x[1:], kind, 5, generators()[1:])
    torch.testing.assert_close(alone, strong[1:], atol=1e-12, rtol=0)


def test_bad_input():
    with pytest.raises(UnknownName, match="fog"):
        corrupted(pixels(), "fog", 1, generators())
    for severity in (0, 6):
        with pytest.raises(SettingError, match=rf"Found severity={severity}\. Expected 1 \(weak\) to 5"):
            corrupted(pixels(), "noise", severity, generators())
