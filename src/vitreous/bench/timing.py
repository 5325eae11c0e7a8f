"""Calls timed in turns: seconds per round, and their ratio with an interval."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from vitreous.base.errors import SettingError
from vitreous.base.statistics import verdict

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
SAME = 0.02  # of 1: a ratio nearer to it matters to nobody
MOST = 100  # times the rounds, beyond which nothing is promised
ENOUGH = 16  # rounds, eight pairs, which lie on one side of the true median in 1 of 128 cases


@dataclass(frozen=True)
class Ratio:
    """A ratio of times: median over pairs of rounds, and its 95 % bootstrap interval.

    surely: the 99 % interval. Of twenty comparisons of equal things one misses 1 by its 95 %
    interval, and a table has many rows: a difference is claimed only where this one misses it too.
    From fewer than ENOUGH rounds the intervals are too narrow, since a bootstrap knows nothing
    beyond the values it has.
    """

    median: float
    low: float
    high: float
    rounds: int
    surely: tuple[float, float]

    @property
    def verdict(self) -> str:
        """faster (below 1), slower, no difference (to SAME), undecided, or too few rounds."""
        if self.rounds < ENOUGH:
            return "too few rounds"
        words = {"better": "slower", "worse": "faster"}  # of a number above 0, and below
        found = verdict([np.array(self.surely) - 1], SAME)
        return words.get(found, found)

    @property
    def rounds_to_decide(self) -> int | None:
        """Rounds that would decide an undecided ratio; None if decided, or if too many.

        An estimate: that the median stays, and the interval shrinks with the root of the rounds.
        """
        if self.verdict != "undecided":
            return None
        half, size = (self.surely[1] - self.surely[0]) / 2, abs(self.median - 1)
        times = (half / max(size, SAME - size)) ** 2
        return max(math.ceil(self.rounds * times), self.rounds + ENOUGH) if times <= MOST else None


def rounds(
    arms: dict[str, Callable[[], object]],
    count: int,
    *,
    warmup: int = 3,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call of every arm in each of `count` rounds, {arm: (count,)}.

    Every second round runs its arms in the reverse order of the one before it (see `order`), so
    that a drift of the machine weighs on all arms alike. `warmup` rounds go before and are not
    kept. Garbage is collected between rounds, never in a call. From here on the process keeps the
    memory it frees (see `keep_freed_memory`). On CUDA a call is timed by events, with nothing else
    in flight. progress(done, of) is called after every round.
    """
    names, seconds = list(arms), {name: [] for name in arms}
    timed = partial(cuda_seconds, device) if torch.device(device).type == "cuda" else cpu_seconds
    keep_freed_memory()
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # collecting between the rounds then looks at what they made alone
    gc.disable()
    try:
        for number in range(-warmup, count):
            for name in order(names, number):
                passed = timed(arms[name])
                if number >= 0:
                    seconds[name].append(passed)
            gc.collect()
            if progress is not None:
                progress(number + 1 + warmup, count + warmup)
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    return seconds


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed, as a process with one model does sooner or later.

    Without glibc nothing happens. By default it gives the top of the heap back, and how often
    depends on the sizes that all arms ask for: among three variants of a ViT-Ti at batch 16 up to
    40,000 page faults a forward were found, a sixth of its time, and alone none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older versions take
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of the arms in a round: a row of a Williams square, every other time reversed.

    Over 2k rounds of k arms each arm takes each place equally often, and comes after each other arm
    equally often. Two arms go A B B A, so that within a pair of rounds each follows itself once:
    what is in the caches then helps both alike. Source: Williams 1949, Aust. J. Sci. Res. A 2, 149.
    """
    k = len(names)
    turn = number // 2 if k > 2 else 0
    first = [place // 2 if place % 2 == 0 else k - 1 - place // 2 for place in range(k)]  # 0, k - 1, 1, k - 2, ...
    row = [names[(place + turn) % k] for place in first]
    return row[::-1] if number % 2 else row


def cpu_seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def cuda_seconds(device: str | torch.device, act: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    start.record(stream)
    act()
    end.record(stream)
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def ratio(ours: Sequence[float], base: Sequence[float], draws: int = 2000, seed: int = 0) -> Ratio:
    """ours / base, paired round by round: seconds (n,) of both from `rounds`, n at least 2.

    A round and the next, which ran in the reverse order, give one value (the geometric mean of
    their two ratios), and `interval` the median over these values. Raises SettingError.
    """
    if len(ours) != len(base) or len(base) < 2:
        raise SettingError(
            f"Found {len(ours)} and {len(base)} times. Expected as many of both, at least two. Time more rounds."
        )
    ours, base = np.asarray(ours, np.float64), np.asarray(base, np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(base).all() and ours.min() > 0 and base.min() > 0):
        raise SettingError("Found a time that is not above 0. Expected seconds. Leave out what was not measured.")
    count = len(ours) // 2
    values = (np.log(ours) - np.log(base))[: 2 * count].reshape(count, 2).mean(1)  # (count,)
    median, low, high, *surely = np.exp(interval(values, draws, seed)).tolist()
    return Ratio(median, low, high, rounds=len(ours), surely=tuple(surely))


def interval(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, ...]:
    """Median of values (n,), its 95 % and its 99 % bootstrap interval: five numbers.

    The values come in the order in which they were measured. Values that follow each other may be
    alike, and then tell less than their number says. The intervals are stretched by the square root
    of 1 + 2 sum_k (1 - k / (K + 1)) r_k, if that is above 1, with r_k the correlation at lag k of
    the signs of value - median, K = n^(1/3): the factor by which the variance of a median grows
    (Bartlett's weights, Newey and West 1987).
    """
    values = np.asarray(values, np.float64)
    count, median = len(values), np.median(values)
    above = np.sign(values - median)
    lags = max(1, round(count ** (1 / 3)))
    alike = [(1 - k / (lags + 1)) * (above[:-k] @ above[k:]) / max(above @ above, 1) for k in range(1, lags + 1)]
    drawn = values[np.random.default_rng(seed).integers(0, count, (draws, count))]
    ends = np.quantile(np.median(drawn, axis=1), [0.025, 0.975, 0.005, 0.995])
    return (float(median), *(median + max(1.0, 1 + 2 * sum(alike)) ** 0.5 * (ends - median)).tolist())
