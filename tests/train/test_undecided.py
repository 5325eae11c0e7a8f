"""What an undecided difference takes: the numbers named would decide it, one fewer would not."""

import re

import pytest
from scipy import stats

from vitreous.base.metrics import CLASSIFICATION, Metric
from vitreous.train.study.undecided import round_up, seeds_needed, what_it_takes

ACCURACY = CLASSIFICATION[0]


def difference(by_seed, by_image, images=200):
    mean = sum(by_seed) / len(by_seed)
    return {"by_seed": by_seed, "mean": mean, "interval_by_image": by_image, "images": images}


@pytest.mark.parametrize(("spread", "level", "reach"), [(0.02, 0.95, 0.01), (0.02, 0.975, 0.013), (0.003, 0.95, 0.004)])
def test_the_fewest_seeds_are_scipys(spread, level, reach):
    seeds = seeds_needed(spread, level, reach, 2)
    half = [stats.t.ppf((1 + level) / 2, n - 1) * spread / n**0.5 for n in (seeds, max(seeds - 1, 2))]
    assert half[0] < reach
    assert half[1] >= reach or seeds == 2


def test_a_large_difference_of_few_seeds_and_images():
    text = what_it_takes(difference([0.01, 0.03, 0.05], [-0.01, 0.07]), ACCURACY, 0.95)
    seeds, images = map(
        int, re.search(r"(\d+) seeds and about (\d+) test images \(200 now\) would show: better", text).groups()
    )
    assert seeds == seeds_needed(0.02, 0.95, 0.03, 3)
    assert images == round_up(200 * (0.04 / 0.03) ** 2) == 360
    assert text.startswith("If the difference stays at +3.00 points, as scattered as here,")


def test_a_small_difference_comes_to_none():
    text = what_it_takes(difference([0.001, -0.001, 0.0], [-0.02, 0.02], images=1000), ACCURACY, 0.95)
    assert text.endswith("would show: no difference.")
    assert "about 4,000 test images (1,000 now)" in text


def test_of_two_seeds_a_third_is_asked_for_before_no_difference_is_said():
    text = what_it_takes(difference([0.0, 0.0], [-0.001, 0.001]), ACCURACY, 0.95)
    assert text == "If the difference stays at +0.00 points, as scattered as here, 3 seeds would show: no difference."


def test_one_seed_tells_nothing_of_seeds():
    assert "at least 3 seeds" in what_it_takes(difference([0.02], [-0.01, 0.05]), ACCURACY, 0.95)


def test_what_no_number_in_reach_decides():
    text = what_it_takes(difference([0.2, -0.18, 0.01], [-0.1, 0.12]), ACCURACY, 0.95)
    assert "100 seeds and 100 times the test images would not decide it" in text


def test_lower_may_be_better():
    error = Metric("error", "px", "lower", "error")
    text = what_it_takes(difference([-1.0, -3.0, -2.0], None), error, 0.95)
    assert text.startswith("If the difference stays at -2.0000 px,")
    assert text.endswith("would show: better.")
