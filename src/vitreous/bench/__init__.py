"""Time, memory and arithmetic of models, compared in turns, with intervals.

run.py               `bench`: models in turns, cell by cell; its settings.py and options.py
arms.py              what is timed: a model as named, in one mode, on one batch
timing.py            rounds of calls in turns; ratios and medians with intervals
memory.py            peak memory
operation_count.py   arithmetic, counted
Names are imported when first used.
"""

from vitreous.base.after_import import late_names

__all__ = ["BenchSettings", "Operations", "Ratio", "bench", "interval", "operations", "ratio", "rounds"]
__getattr__ = late_names(
    __name__,
    {
        "vitreous.bench.operation_count": ("Operations", "operations"),
        "vitreous.bench.run": ("bench",),
        "vitreous.bench.settings": ("BenchSettings",),
        "vitreous.bench.timing": ("Ratio", "interval", "ratio", "rounds"),
    },
)
