"""What would decide an undecided difference: how many seeds and test images, in words.

An estimate from the runs there are: that the difference stays as large, seeds as far apart, and
the interval by image shrinks with the root of the number of images.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from vitreous.base.metrics import Metric
from vitreous.base.statistics import MARGIN, student

ENOUGH = 3  # seeds before "no difference" is said
MOST = 100  # seeds, and times the test images, beyond which nothing is promised


def what_it_takes(difference: dict[str, Any], metric: Metric, level: float) -> str:
    """A sentence on an undecided difference. level: of its intervals.

    difference: as `compare_arms.one_difference` returns it.
    """
    scores, images = difference["by_seed"], difference["images"]
    if len(scores) < 2:
        return f"One seed does not tell how far seeds differ: at least {ENOUGH} seeds are needed."
    size, spread = abs(difference["mean"]), statistics.stdev(scores)
    half = 0.0
    if ends := difference["interval_by_image"]:
        half = (ends[1] - ends[0]) / 2
    goals = [("better" if metric.sign * difference["mean"] > 0 else "worse", size, 2)]
    if metric.unit == "%":
        goals.append(("no difference", MARGIN - size, ENOUGH))
    plans = []
    for outcome, reach, least in goals:
        seeds = seeds_needed(spread, level, reach, max(len(scores), least))
        times = max(1.0, (half / reach) ** 2) if reach > 0 else math.inf
        if seeds is not None and times <= MOST:
            plans.append((seeds * times, outcome, seeds, times))
    unit = "points" if metric.unit == "%" else metric.unit
    stays = f"If the difference stays at {metric.number(difference['mean'], '+')} {unit}".rstrip() + ", as scattered as here,"
    if not plans:
        return f"{stays} {MOST} seeds and {MOST} times the test images would not decide it."
    _, outcome, seeds, times = min(plans)
    needs = [f"{seeds} seeds"] if seeds > len(scores) else []
    if times > 1:
        needs.append(f"about {round_up(images * times):,} test images ({images:,} now)")
    return f"{stays} {' and '.join(needs) or 'a few more seeds'} would show: {outcome}."


def seeds_needed(spread: float, level: float, reach: float, least: int) -> int | None:
    """The fewest seeds whose interval has a half width below `reach`; None beyond MOST.

    The interval is Student's. spread: standard deviation of differences over seeds.
    """
    enough = (n for n in range(least, MOST + 1) if student(n - 1, level) * spread / n**0.5 < reach)
    return next(enough, None)


def round_up(value: float) -> int:
    """A count with two leading digits, not below the value."""
    unit = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit
