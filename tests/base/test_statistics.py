"""Intervals against scipy's, and against resampling written as a loop."""

import numpy as np
import pytest
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
    value, low, high = statistics.paired(ours, theirs)
    assert value == pytest.approx(ours.mean() - theirs.mean())
    means = []
    for _ in range(4000):
        drawn = random.integers(0, 400, 400)
        means.append(ours[drawn].mean() - theirs[drawn].mean())
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)


def test_equal_answers_differ_by_nothing():
    right = np.array([True, False, True])
    assert statistics.paired(right, right) == (0, 0, 0)
