"""Speed that can be believed: models timed in turns, ratios with intervals, operations counted by hand-checked formulas."""

from vitreous.bench.timing import Ratio, ratio, rounds

__all__ = ["Ratio", "ratio", "rounds"]
