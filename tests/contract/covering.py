"""Covering arrays of strength two: few rows in which any two values of two factors meet.

The full product of mechanisms, hosts, precisions and modes grows with the product of their numbers; a covering array grows
with the product of the two largest. Greedy and deterministic, after AETG (Cohen, Dalal, Fredman, Patton 1997).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

Row = tuple[Hashable, ...]
Pair = tuple[int, Hashable, int, Hashable]  # factor, value, later factor, value


def pairs_of(row: Row) -> Iterator[Pair]:
    for (i, a), (j, b) in itertools.combinations(enumerate(row), 2):
        yield i, a, j, b


def covering_rows(
    factors: Sequence[Sequence[Hashable]], allowed: Callable[[Row], bool] = lambda row: True, given: Iterable[Row] = ()
) -> list[Row]:
    """Rows with one value of each factor that hold, with the `given` ones, every pair of values of an allowed row.

    allowed: of a whole row. Each row is, among those that hold the first open pair, the one that holds most open pairs; among
    equals the one whose values were used least, then the first. So the order of the values decides, and nothing else.
    """
    used = {(i, value): 0 for i, values in enumerate(factors) for value in values}
    holding: dict[Pair, list[Row]] = {}  # the allowed rows that hold a pair
    for row in filter(allowed, itertools.product(*factors)):
        for pair in pairs_of(row):
            holding.setdefault(pair, []).append(row)
    taken, rows = list(given), []
    open_pairs = dict.fromkeys(holding)
    while open_pairs or taken:
        if taken:
            row = taken.pop()
        else:
            row = max(
                holding[next(iter(open_pairs))],
                key=lambda row: (sum(p in open_pairs for p in pairs_of(row)), -sum(used[one] for one in enumerate(row))),
            )
            rows.append(row)
        for one in enumerate(row):
            used[one] += 1
        for pair in pairs_of(row):
            open_pairs.pop(pair, None)
    return rows
