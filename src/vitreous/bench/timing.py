"""Time things against each other in turns, and say how sure the ratio is."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vitreous.errors import SettingError


@dataclass(frozen=True)
class Ratio:
    """A ratio of times: the median over pairs of rounds and its 95 % bootstrap interval, from so many rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> str:
        """In words: "no difference" if the interval covers 1, else "faster" (below 1) or "slower"."""
        return "faster" if self.high < 1 else "slower" if self.low > 1 else "no difference"


def rounds(
    arms: dict[str, Callable[[], object]],
    count: int,
    *,
    warmup: int = 3,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call of every arm in each of `count` rounds, {arm: (count,)}.

    Every second round runs its arms in the reverse order of the one before it, so that a drift of the machine weighs on all
    arms alike, and the order rotates from pair to pair, so that none always follows the same other. `warmup` rounds go
    before and are not kept. Garbage is collected between rounds, never in a call. On CUDA a call is timed by events, with
    nothing else in flight. progress(done, of) is called after every round.
    """
    names, seconds = list(arms), {name: [] for name in arms}
    timed = cuda_seconds if torch.device(device).type == "cuda" else cpu_seconds
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there before the rounds needs no second look: collecting between them costs nearly nothing
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


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of the arms in a round: a Williams square's rows, each followed by its reverse.

    Over the rows each arm takes each place equally often, and comes after each other arm equally often. Source: Williams
    1949, Aust. J. Sci. Res. A 2, 149.
    """
    k = len(names)
    first = [place // 2 if place % 2 == 0 else k - 1 - place // 2 for place in range(k)]  # 0, k - 1, 1, k - 2, ...
    row = [names[(place + number // 2) % k] for place in first]
    return row[::-1] if number % 2 else row


def cpu_seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def cuda_seconds(act: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    act()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def ratio(ours: Sequence[float], base: Sequence[float], draws: int = 2000, seed: int = 0) -> Ratio:
    """ours / base, paired round by round: seconds (n,) of both as `rounds` gives them, n at least 2.

    A round and the next, which ran in the reverse order, give one value (the geometric mean of their two ratios); the
    median over these values is drawn again `draws` times from runs of neighbouring values, since noise of a machine lasts
    longer than a round (circular block bootstrap, Politis and Romano 1992). Raises SettingError.
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
    run = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, count, (draws, math.ceil(count / run)))
    drawn = (starts[..., None] + np.arange(run)).reshape(draws, -1)[:, :count] % count
    medians = np.median(values[drawn], axis=1)
    return Ratio(*np.exp([np.median(values), *np.quantile(medians, [0.025, 0.975])]).tolist(), rounds=len(ours))
