"""Speed that can be believed.

run.py         `bench`: models in turns, cell by cell, into a folder; what it is told: settings.py
arms.py        what is timed: a model as named, in one mode, on one batch
timing.py      rounds of calls in turns; ratios and medians with intervals
memory.py      peak memory; operations.py: arithmetic, counted
"""

from vitreous.bench.operations import Operations, operations
from vitreous.bench.run import bench
from vitreous.bench.settings import BenchSettings
from vitreous.bench.timing import Ratio, interval, ratio, rounds

__all__ = ["BenchSettings", "Operations", "Ratio", "bench", "interval", "operations", "ratio", "rounds"]
