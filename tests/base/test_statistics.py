"""Intervals against scipy's, and against resampling written as a loop."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from vitreous.base import statistics


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (7, 10), (10, 10), (1234, 1500)])
def test_wilson_is_scipys(correct, count):
    expected = stats.binomtest(correct, count).proportion_ci(method="wilson")
    assert statistics.wilson(correct, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 101])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_student_is_scipys(freedom, level):
    assert statistics.student(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_interval_of_a_mean_is_scipys():
    values = [0.71, 0.74, 0.69, 0.73]
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert statistics.of_mean(values) == pytest.approx(expected, rel=1e-9)


def test_paired_bootstrap_is_resampling_of_pairs():
    random = np.random.default_rng(1)
    ours, theirs = random.random(400) < 0.8, random.random(400) < 0.7
    value, low, high = statistics.paired(ours, theirs, draws=10_000, few_values=True)
    assert value == pytest.approx(ours.mean() - theirs.mean())
    means = []
    for _ in range(4000):
        drawn = random.integers(0, 400, 400)
        means.append(ours[drawn].mean() - theirs[drawn].mean())
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)


def test_equal_answers_differ_by_nothing():
    right = np.array([True, False, True])
    assert statistics.paired(right, right) == (0, 0, 0)


def test_interval_is_that_of_the_normal_distribution_for_many_images():
    values = np.random.default_rng(0).normal(3, 2, 400)
    mean, low, high = statistics.bootstrap(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    expected = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.1 * half)


def test_interval_leaves_out_what_is_missing(monkeypatch):
    values = np.random.default_rng(0).normal(size=(30, 2, 2))
    values[4, 0, 0] = values[7, 1] = np.nan
    mean, low, high = statistics.bootstrap(values)
    assert mean.shape == (2, 2)
    for at in itertools.product(range(2), range(2)):
        column = values[(slice(None), *at)]
        alone = statistics.bootstrap(column[~np.isnan(column)])
        assert (mean[at], low[at], high[at]) == pytest.approx(alone)
        assert statistics.bootstrap(torch.from_numpy(column)) == pytest.approx(alone)
    monkeypatch.setattr(statistics, "COUNTS", 100)  # drawn in blocks, to the same end
    np.testing.assert_allclose(statistics.bootstrap(values), (mean, low, high), rtol=1e-12)


def test_interval_of_next_to_nothing():
    assert np.isnan(statistics.bootstrap([])).all()
    assert np.isnan(statistics.bootstrap([np.nan, np.nan])).all()
    assert statistics.bootstrap([np.nan, 0.25]) == (0.25, 0.25, 0.25)


def test_paired_differences_are_narrower_than_the_values():
    random = np.random.default_rng(0)
    hard = random.normal(size=100)
    ours, theirs = hard + 0.1, hard + 0.01 * random.normal(size=100)
    difference, low, high = statistics.paired(ours, theirs)
    assert 0.09 < low < difference < high < 0.11
    low, high = statistics.bootstrap(ours)[1:]
    assert low < 0 < high


def test_drawing_how_often_a_value_comes_is_the_same_as_drawing_images():
    values = np.random.default_rng(2).integers(-1, 2, 300) / 2
    images = statistics.bootstrap(values, 0.9, draws=10_000)
    assert statistics.bootstrap(values, 0.9, draws=10_000, few_values=True) == pytest.approx(images, abs=0.005)
    assert images[2] - images[1] < np.subtract(*statistics.bootstrap(values, 0.99, draws=10_000)[:0:-1])


@pytest.mark.parametrize(
    ("intervals", "margin", "expected"),
    [
        ([(0.001, 0.02)], 0.01, "better"),
        ([(0.001, 0.02), (-0.001, 0.02)], 0.01, "undecided"),
        ([(-0.2, -0.1), (-0.3, -0.001)], 0.01, "worse"),
        ([(-0.01, 0.01), (-0.002, 0.004)], 0.01, "no difference"),
        ([(-0.01, 0.01), (-0.002, 0.004)], None, "undecided"),
        ([(-0.011, 0.01)], 0.01, "undecided"),
        ([], 0.01, "undecided"),
    ],
)
def test_one_rule_of_verdicts(intervals, margin, expected):
    assert statistics.verdict(intervals, margin) == expected
