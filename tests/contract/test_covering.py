"""The covering array covers: against the list of all pairs, with and without rows that are not allowed."""

from __future__ import annotations

import itertools
import random

import pytest

from contract.covering import covering_rows, pairs_of


def every_pair(factors, allowed):
    """By brute force, over the full product."""
    pairs = set()
    for row in itertools.product(*factors):
        if allowed(row):
            for i in range(len(row)):
                for j in range(i + 1, len(row)):
                    pairs.add((i, row[i], j, row[j]))
    return pairs


@pytest.mark.parametrize("seed", range(8))
def test_every_allowed_pair_and_no_other(seed):
    dice = random.Random(seed)
    factors = [range(dice.randint(1, 6)) for _ in range(dice.randint(2, 4))]
    refused = {(a, b) for a in factors[0] for b in factors[1] if dice.random() < 0.2}
    given = [tuple(dice.choice(values) for values in factors) for _ in range(seed)]

    def allowed(row):
        return (row[0], row[1]) not in refused and (len(row) < 3 or (row[1] + row[2]) % 5 != 4)

    given = [row for row in given if allowed(row)]
    rows = covering_rows(factors, allowed, given)
    assert all(map(allowed, rows))
    assert {pair for row in (*rows, *given) for pair in pairs_of(row)} == every_pair(factors, allowed)
    assert rows == covering_rows(factors, allowed, given)
    for i in range(len(rows)):  # each row was needed when it was taken
        before = {pair for row in (*rows[:i], *given) for pair in pairs_of(row)}
        assert not set(pairs_of(rows[i])) <= before


def test_it_is_small():
    """Never below the product of the two largest factors, and here no more than a tenth above it."""
    rows = covering_rows([range(20), range(12), range(3), range(3)])
    assert 240 <= len(rows) <= 264
    assert len(covering_rows([range(4)] * 4)) <= 22  # the best is 16; the full product 256


def test_given_rows_count():
    factors = [range(3), range(3)]
    assert covering_rows(factors, given=itertools.product(*factors)) == []
    assert covering_rows(factors, given=[(0, 0), (2, 1)]) == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 2)]
