"""Confidence intervals: Wilson, Student, and the bootstrap over images.

The bootstrap takes values or paired differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

COUNTS = 4_000_000  # of the bootstrap in memory at a time
NORMAL = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(correct: int, count: int) -> tuple[float, float]:
    """95 % score interval of a proportion, each end 0 to 1.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209.
    """
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
    """The t for which Student's distribution has this probability, 0 to 1, between -t and t.

    freedom: its degrees, from 1.
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


def bootstrap(
    values: Any, level: float = 0.95, *, draws: int = 2000, seed: int = 0, few_values: bool = False
) -> tuple[Any, Any, Any]:
    """Mean over images and its percentile interval: (mean, low, high).

    Images without a value (NaN) are left out.

    values: (n,) gives three floats, (n, ...) three arrays (...): columns of the same images are
    drawn together. No image gives NaN; one image an interval of no width. few_values: for (n,) with
    few different values, of which it is drawn how often each comes; the same distribution in less
    time. Source: Efron 1979, Ann. Statist. 7, 1.
    """
    values = np.asarray(values, np.float64)
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    result = np.full((3, flat.shape[1]), np.nan)
    patterns, which = np.unique(~np.isnan(flat), axis=1, return_inverse=True)
    for number, valid in enumerate(patterns.T):
        n, columns = int(valid.sum()), which.ravel() == number
        if n:
            rows = flat[valid][:, columns]
            mean, shares = rows.mean(0), np.full(n, 1 / n)
            if few_values:
                rows, counts = np.unique(rows, axis=0, return_counts=True)
                shares = counts / n
            generator, block = np.random.default_rng(seed), max(1, COUNTS // len(rows))  # blocks give the same draws as one
            sizes = [min(block, draws - start) for start in range(0, draws, block)]
            means = np.concatenate([generator.multinomial(n, shares, size=size) @ rows / n for size in sizes])
            result[:, columns] = mean, *np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    if values.ndim == 1:
        return tuple(result[:, 0].tolist())
    return tuple(result.reshape(3, *values.shape[1:]))


def paired(ours: Any, theirs: Any, level: float = 0.95, **options: Any) -> tuple[Any, Any, Any]:
    """`bootstrap` of the differences image by image: (difference, low, high).

    It is above 0 where ours is the higher.

    ours, theirs: (n, ...) of the same images in the same order, numbers or right and wrong.
    options: of `bootstrap`.
    """
    return bootstrap(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64), level, **options)


MARGIN = 0.01  # a difference of at most one point, or of one percent of a ratio, is none that matters


def verdict(intervals: Sequence[Sequence[float]], margin: float | None = MARGIN) -> str:
    """What the intervals (low, high) of one difference come to.

    better, worse: all of them lie above 0, or below. no difference: all of them lie within the
    margin. undecided: neither, or there is none. margin None: no size is known below which nothing
    matters.
    """
    ends = np.array(list(intervals), np.float64).reshape(-1, 2)
    if len(ends) and (ends > 0).all():
        return "better"
    if len(ends) and (ends < 0).all():
        return "worse"
    return "no difference" if len(ends) and margin is not None and (abs(ends) <= margin).all() else "undecided"
