"""Timing in turns: orders that are fair, and intervals that hold the truth as often as they say."""

from __future__ import annotations

import gc
import itertools
import math
import platform
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from vitreous.base.errors import SettingError
from vitreous.bench import timing
from vitreous.bench.timing import ENOUGH, Ratio, interval, order, ratio, rounds


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_orders_are_fair(k):
    names = [f"arm {i}" for i in range(k)]
    rows = [order(names, number) for number in range(2 * k)]
    assert all(sorted(row) == names for row in rows)
    assert all(rows[i + 1] == rows[i][::-1] for i in range(0, 2 * k, 2))
    places = Counter((place, name) for row in rows for place, name in enumerate(row))
    follows = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert places == Counter({(place, name): 2 for place in range(k) for name in names})
    assert follows == Counter({pair: 2 for pair in itertools.permutations(names, 2)})


def test_every_arm_is_called_once_a_round_and_warm_up_is_not_kept():
    calls = []
    arms = {"slow": lambda: (calls.append("slow"), time.sleep(0.004)), "fast": lambda: calls.append("fast")}
    said = []
    seconds = rounds(arms, 5, warmup=2, progress=lambda done, of: said.append((done, of)))
    assert calls == ["slow", "fast", "fast", "slow"] * 3 + ["slow", "fast"]
    assert said == [(i, 7) for i in range(1, 8)]
    assert {name: len(times) for name, times in seconds.items()} == {"slow": 5, "fast": 5}
    assert min(seconds["slow"]) >= 0.004 > min(seconds["fast"]) > 0


def test_garbage_is_not_collected_in_a_call_and_does_not_pile_up():
    states, alive = [], []

    class Loop:
        def __init__(self):
            self.own = self

    def act():
        states.append(gc.isenabled())
        Loop()
        alive.append(sum(isinstance(thing, Loop) for thing in gc.get_objects()))

    assert gc.isenabled()
    rounds({"a": act}, 4)
    assert not any(states)
    assert max(alive) == 1
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rounds({"a": fails}, 1)
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)


def test_cuda_is_timed_by_events_with_nothing_in_flight(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            said.append(f"record on {stream}")

        def elapsed_time(self, end):
            return 12.5  # milliseconds

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda device: said.append(f"wait for {device}"))
    monkeypatch.setattr(timing.torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    seconds = rounds({"a": lambda: said.append("act")}, 1, warmup=0, device="cuda:1")
    assert seconds == {"a": [0.0125]}
    wait, record = "wait for cuda:1", "record on the stream of cuda:1"
    assert said == [wait, record, "act", record, wait]


def test_ratio_of_exact_times():
    base = [1.0, 2.0, 4.0, 3.0] * 4
    found = ratio([1.5 * x for x in base], base)
    assert (found.median, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert (found.rounds, found.verdict) == (16, "slower")
    assert ratio([1.5 * x for x in base[:15]], base[:15]).verdict == "too few rounds"
    assert ratio(base, [1.5 * x for x in base]).verdict == "faster"
    assert ratio(base, base).verdict == "no difference"


def test_a_drift_of_the_machine_cancels():
    """Two equal arms; every call takes 1 % longer than the one before it, whichever arm it is."""
    calls = [name for number in range(40) for name in order(["a", "b"], number)]
    times = {"a": [], "b": []}
    for i, name in enumerate(calls):
        times[name].append(1.01**i)
    found = ratio(times["a"], times["b"])
    assert found.median == pytest.approx(1, abs=1e-12)
    assert found.verdict == "no difference"


def test_ratio_against_the_formula_in_loops():
    generator = np.random.default_rng(3)
    ours, base = generator.lognormal(0, 0.1, (2, 21))
    pairs = []
    for i in range(0, 20, 2):
        pairs.append(math.sqrt(ours[i] / base[i] * ours[i + 1] / base[i + 1]))
    pairs.sort()
    assert ratio(ours, base).median == pytest.approx(math.sqrt(pairs[4] * pairs[5]))


@pytest.mark.parametrize(
    ("ours", "base", "said"),
    [([1, 2], [1, 2, 3], "2 and 3 times"), ([1], [1], "1 and 1 times"), ([1, 0], [1, 1], "not above 0")],
)
def test_times_that_do_not_fit(ours, base, said):
    with pytest.raises(SettingError, match=said):
        ratio(ours, base)


def test_a_difference_is_claimed_only_where_both_intervals_miss_one():
    assert Ratio(1.02, 1.01, 1.03, 60, (1.001, 1.04)).verdict == "slower"
    assert Ratio(1.02, 1.01, 1.03, 60, (0.999, 1.04)).verdict == "undecided"
    assert Ratio(1.0, 0.99, 1.01, 60, (0.981, 1.019)).verdict == "no difference"
    assert Ratio(0.98, 0.97, 0.99, 60, (0.96, 0.999)).verdict == "faster"


def test_an_undecided_ratio_says_how_many_rounds_would_decide_it():
    # half a width is 0.04; to leave out 1 it has to be 0.02, to lie within 2 % of it 0.019
    assert Ratio(1.02, 1.0, 1.04, 60, (0.98, 1.06)).rounds_to_decide == 240
    assert Ratio(1.001, 0.98, 1.02, 60, (0.961, 1.041)).rounds_to_decide == math.ceil(60 * (0.04 / 0.019) ** 2)
    assert Ratio(1.02, 1.0, 1.04, 60, (0.5, 1.5)).rounds_to_decide is None  # too many
    assert Ratio(1.02, 1.01, 1.03, 60, (1.001, 1.04)).rounds_to_decide is None  # decided


def correlated(generator, count: int, rho: float) -> np.ndarray:
    """Heavy-tailed noise around 0 (Student's t, 3 degrees), each value rho of the last one plus news."""
    values = [0.0]
    for news in generator.standard_t(3, count + 50):
        values.append(rho * values[-1] + news)
    return np.array(values[51:])


@pytest.mark.parametrize(("count", "rho", "least"), [(10, 0.0, 0.92), (30, 0.0, 0.92), (30, -0.3, 0.95), (60, 0.3, 0.87)])
def test_intervals_hold_the_truth_as_often_as_they_say(count, rho, least):
    """With independent noise 95 of 100; where noise lasts the interval is stretched, or it would be 85 at rho = 0.3."""
    generator = np.random.default_rng(7)
    found = np.array([interval(correlated(generator, count, rho), draws=500) for _ in range(400)])
    assert (np.abs(np.median(found[:, 0])) < 0.1).all()
    inside = ((found[:, 1] <= 0) & (found[:, 2] >= 0)).mean()
    surely = ((found[:, 3] <= 0) & (found[:, 4] >= 0)).mean()
    assert least <= inside <= 0.995
    assert surely > inside


@pytest.mark.parametrize(("rounds_", "most"), [(ENOUGH, 0.05), (60, 0.02)])
def test_equal_arms_are_seldom_called_different(rounds_, most):
    """With half as many rounds it would be one comparison in eight."""
    generator = np.random.default_rng(11)
    times = generator.lognormal(0, 0.1, (600, 2, rounds_))
    different = sum(ratio(*pair, draws=400).verdict in ("faster", "slower") for pair in times) / len(times)
    assert different <= most


def test_lasting_noise_widens_the_interval():
    generator = np.random.default_rng(1)
    values = np.sort(generator.normal(size=60))  # as correlated as can be
    mixed = generator.permutation(values)
    narrow, wide = interval(mixed), interval(values)
    assert wide[0] == narrow[0]
    assert wide[2] - wide[1] > 2 * (narrow[2] - narrow[1])


def test_interval_of_equal_values_has_no_width():
    assert interval([2.0, 2.0, 2.0]) == (2.0,) * 5
    assert interval([2.0]) == (2.0,) * 5


FAULTS = """
import resource, statistics, torch
from vitreous.bench.timing import rounds

faults = []

def act():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).add_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

rounds({"one": act}, 12)
print(statistics.median(faults[3:]) / (2**26 // resource.getpagesize()))  # small ones beside it may still split a block
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_rounds_find_the_memory_that_the_last_one_freed():
    """By default 64 MiB are given back when they are freed, and every page of the next ones is a fault.

    In a process of its own: glibc gives threads beside the main one, where tests may run, no such blocks to keep.
    """
    found = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout
    assert float(found) < 0.1
