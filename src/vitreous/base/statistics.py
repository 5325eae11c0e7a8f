"""Intervals for what was counted on a test set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

NORMAL = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(correct: int, count: int) -> tuple[float, float]:
    """95 % score interval of a proportion, each end 0 to 1. Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209."""
    share, z = correct / count, NORMAL
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def of_mean(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of two or more independent values, in their unit."""
    n = len(values)
    half = student(n - 1, level) * statistics.stdev(values) / n**0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def student(freedom: int, level: float = 0.95) -> float:
    """The t for which Student's distribution has this probability, 0 to 1, between -t and t. freedom: its degrees, from 1.

    Source of the closed form: Abramowitz, Stegun 1964, 26.7.3 and 26.7.4.
    """

    def inside(angle: float) -> float:  # t = sqrt(freedom) tan(angle)
        term, total = 1.0 if freedom % 2 == 0 else math.cos(angle), 0.0
        for k in range(1 + freedom % 2, freedom, 2):
            total += term
            term *= math.cos(angle) ** 2 * k / (k + 1)
        area = math.sin(angle) * total
        return area if freedom % 2 == 0 else 2 / math.pi * (angle + area)

    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return freedom**0.5 * math.tan(low)


def paired(ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Difference of two accuracies on the same images, and its 95 % bootstrap interval: (difference, low, high).

    ours, theirs: (n,) bool, right or wrong, image by image; pairs are kept together.
    """
    return of_images(ours.astype(int) - theirs.astype(int), draws=draws, seed=seed)


def of_images(differences: np.ndarray, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of (n,) values, one for each image, and its bootstrap interval: (mean, low, high).

    Images are drawn with replacement; since there are few different values, that is a draw of how often each of them comes.
    """
    n, values = len(differences), np.unique(differences)
    shares = np.array([(differences == value).mean() for value in values])
    means = np.random.default_rng(seed).multinomial(n, shares, size=draws) @ values / n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(differences.mean()), float(low), float(high)
