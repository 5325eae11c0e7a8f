"""Token state against loops: inserting, restoring, and back to the picture."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreous.layers.stream import (
    Assignment,
    Stream,
    TokenState,
    insert,
    opened,
    present_pairs,
    reduce,
    restore,
    split,
    take_back,
    to_grid,
)


def tokens(b: int, n: int, d: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed))


def test_a_bare_tensor_is_plain():
    x = tokens(2, 5)
    same, state = opened(x)
    assert same is x
    assert state.plain
    assert state.inserted == 0
    assert opened(Stream(x, TokenState(read_out=(True,)))) == (x, TokenState(read_out=(True,)))
    with pytest.raises(FrozenInstanceError):
        state.read_out = (True,)


def test_inserted_tokens_stand_at_the_end_and_count_one():
    x, sizes = tokens(2, 4), torch.tensor([[2.0, 1, 1, 3]] * 2)
    state = TokenState(sizes=sizes, assignment=Assignment(torch.zeros(2, 7, dtype=torch.long)))
    more, after = insert(x, state, tokens(2, 2, seed=1), read_out=True)
    more, after = insert(more, after, tokens(2, 1, seed=2).double(), read_out=False)
    assert more.dtype == x.dtype
    assert after.read_out == (True, True, False)
    assert after.sizes.tolist() == [[2, 1, 1, 3, 1, 1, 1]] * 2
    assert after.assignment is state.assignment
    assert state.read_out == ()  # the earlier state is as it was
    present, inserted = split(more, after)
    assert torch.equal(present, x)
    assert torch.equal(inserted, torch.cat([tokens(2, 2, seed=1), tokens(2, 1, seed=2)], dim=1))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_restore_is_the_loop(data):
    b, n, places, m = (data.draw(st.integers(1, 4)) for _ in range(4))
    drawn = st.lists(st.integers(0, n - 1), min_size=b * places, max_size=b * places)
    source = torch.tensor(data.draw(drawn)).view(b, places)
    x = tokens(b, n + m)
    state = TokenState(assignment=Assignment(source), read_out=(False,) * m)
    restored, inserted = restore(x, state)
    for i in range(b):
        for place in range(places):
            assert torch.equal(restored[i, place], x[i, source[i, place]])
    assert torch.equal(inserted, x[:, n:])
    stream = Stream(x, state)
    assert stream.shape == (b, places, 3)
    assert torch.equal(stream[:, :1], restored[:, :1])
    assert torch.equal(stream.reshape(b, -1), restored.reshape(b, -1))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_places_follow_their_tokens_through_several_reductions(data):
    """Against a loop that walks every place through every step; a dropped one stays dropped, and reads as 0."""
    counts = [7, *sorted((data.draw(st.integers(1, 7)) for _ in range(3)), reverse=True)]
    state, walks = TokenState(read_out=(True,)), list(range(7))
    for before, after in itertools.pairwise(counts):
        to = data.draw(st.lists(st.integers(-1, after - 1), min_size=before, max_size=before))
        sizes = torch.ones(1, after) if data.draw(st.booleans()) else None
        step = Assignment(index=torch.tensor([to]), tokens=after, dropped=-1 in to)
        x, state = reduce(tokens(1, before + 1), state, step, sizes)
        walks = [-1 if place == -1 else to[place] for place in walks]
        assert x.shape == (1, after + 1, 3)
        assert (state.sizes is None) == (sizes is None)
        assert sizes is None or torch.equal(state.sizes, torch.ones(1, after + 1))
        assert state.read_out == (True,)
    assert state.dropped or -1 not in walks
    assert state.assignment.index.tolist() == [walks]
    x = tokens(1, counts[-1] + 1)
    for place, restored in zip(walks, restore(x, state)[0][0], strict=True):
        assert torch.equal(restored, torch.zeros(3) if place == -1 else x[0, place])


def test_back_to_the_picture():
    """Two prefix tokens, a 2 x 3 grid, of which the patches 0 and 1, and 4 and 5, were merged; one inserted token."""
    source = torch.tensor([[0, 1, 2, 2, 3, 4, 5, 5]])
    state = TokenState(assignment=Assignment(source), read_out=(True,))
    value = torch.arange(7.0)[None]  # prefix 0 1, patches 2 3 4 5, inserted 6
    assert to_grid(value, state, (2, 3), prefix=2).tolist() == [[[2, 2, 3], [4, 5, 5]]]
    channels = torch.stack([value, -value], dim=-1)
    assert to_grid(channels, state, (2, 3), prefix=2).shape == (1, 2, 3, 2)
    assert torch.equal(to_grid(channels, state, (2, 3), prefix=2)[..., 1], -to_grid(value, state, (2, 3), prefix=2))
    with pytest.raises(ValueError, match=r"7 patches do not fill a grid of 2 x 3.*Expected.*Take"):
        to_grid(value, state, (2, 3), prefix=1)


# -- assignments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_patches_that_stay_and_what_becomes_of_the_others(fused):
    step = Assignment.keeping(torch.tensor([[3, 0], [1, 2]]), 4, prefix=1, fused=fused)
    gone = 3 if fused else -1
    assert step.index.tolist() == [[0, 2, gone, gone, 1], [0, gone, 1, 2, gone]]
    assert (step.tokens, step.dropped) == (3 + fused, not fused)


def assignment(n: int, places: int, hard: bool, seed: int, images: int = 2) -> Assignment:
    """Of places to n tokens, each of which stands for one place at least; soft: each place gives to all tokens."""
    generator = torch.Generator().manual_seed(seed)
    if not hard:
        return Assignment(weights=0.1 + torch.rand(images, n, places, generator=generator).double())
    rows = [torch.cat([torch.arange(n), torch.randint(n, (places - n,), generator=generator)]) for _ in range(images)]
    return Assignment(index=torch.stack([row[torch.randperm(places, generator=generator)] for row in rows]), tokens=n)


def matrix(step: Assignment, over: str) -> torch.Tensor:
    """restore (B, N, n) and gather (B, n, N) as matrices, entry by entry."""
    weights = step.as_weights(torch.float64)
    return (weights / weights.sum(1, keepdim=True)).mT if over == "tokens" else weights / weights.sum(2, keepdim=True)


@pytest.mark.parametrize("hard", [True, False])
def test_restore_and_gather_are_normalized_over_tokens_and_over_places(hard):
    step, x, y = assignment(4, 9, hard, seed=1), tokens(2, 9).double(), tokens(2, 4).double()
    assert step.places == 9
    torch.testing.assert_close(step.restore(y), matrix(step, "tokens") @ y)
    torch.testing.assert_close(step.gather(x), matrix(step, "places") @ x)
    sizes = torch.randint(1, 5, (2, 9), generator=torch.Generator().manual_seed(2)).double()
    weighed = step.as_weights(torch.float64) * sizes[:, None]
    torch.testing.assert_close(step.gather(x, sizes), (weighed @ x) / weighed.sum(2, keepdim=True))


@pytest.mark.parametrize("hard", [True, False])
def test_places_share_what_their_token_has(hard):
    step, amounts = assignment(4, 9, hard, seed=1), tokens(2, 4).double().abs()
    shared = step.share(amounts)
    torch.testing.assert_close(shared, matrix(step, "places").mT @ amounts)
    torch.testing.assert_close(shared.sum(1), amounts.sum(1))
    torch.testing.assert_close(step.counts(4).double(), matrix(step, "tokens").sum(1))
    torch.testing.assert_close(step.at(slice(2, 5)).restore(amounts), step.restore(amounts)[:, 2:5])
    longer, more = step.extended(4, 2), torch.cat([amounts, tokens(2, 2).double()], dim=1)
    for way in ("share", "restore"):
        whole = getattr(step, way)(amounts)
        torch.testing.assert_close(getattr(longer, way)(more), torch.cat([whole, more[:, 4:]], dim=1))


def test_dropped_places_have_no_share():
    step = Assignment(torch.tensor([[0, -1, 1, 1, -1]]), tokens=3, dropped=True)  # the third token stands for no place
    assert step.counts(3).tolist() == [[1, 2, 0]]
    assert step.share(torch.tensor([[[3.0], [4.0], [5.0]]])).flatten().tolist() == [3, 0, 2, 2, 0]


def test_dropped_places_count_for_no_token_and_restore_to_zero():
    step, x = Assignment(torch.tensor([[0, -1, 1, 1, -1]]), tokens=2, dropped=True), tokens(1, 5)
    torch.testing.assert_close(step.gather(x), torch.stack([x[0, 0], (x[0, 2] + x[0, 3]) / 2])[None])
    assert step.restore(step.gather(x))[0, [1, 4]].eq(0).all()
    assert step.as_weights(torch.float32).sum() == 3
    none = Assignment(weights=torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))  # the second place gives nothing to anyone
    assert none.restore(tokens(1, 2))[0, 1].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.integers(1, 8), st.integers(0, 1000))
def test_what_is_constant_over_merged_places_comes_back(hard, n, seed):
    step = assignment(n, 9, hard, seed)
    x = step.restore(tokens(2, n, seed=seed).double()) if hard else tokens(2, 1, seed=seed).double().expand(-1, 9, -1)
    torch.testing.assert_close(step.restore(step.gather(x)), x)


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.booleans(), st.integers(0, 1000))
def test_two_reductions_are_their_then(first_hard, second_hard, seed):
    first, second = assignment(6, 9, first_hard, seed), assignment(3, 6, second_hard, seed + 1)
    both, x, y = first.then(second), tokens(2, 9).double(), tokens(2, 3).double()
    assert (both.weights is None) == (first_hard and second_hard)
    torch.testing.assert_close(both.restore(y), first.restore(second.restore(y)))
    if first_hard and second_hard:
        sizes = first.as_weights(torch.float64).sum(2)
        torch.testing.assert_close(both.gather(x), second.gather(first.gather(x), sizes))
        assert both.as_weights(torch.float64).sum() == 2 * 9  # of 2 images: sizes sum to the places


def test_patches_that_are_mixed_beside_a_prefix():
    weights = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1))
    mixed = Assignment.mixing(weights, 2).weights
    assert mixed.shape == (2, 5, 7)
    assert torch.equal(mixed[:, 2:, 2:], weights)
    assert mixed[0].tolist()[:2] == [[1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]]
    assert (mixed[:, 2:, :2] == 0).all()


@pytest.mark.parametrize("soft_first", [True, False])
def test_what_was_dropped_stays_known_behind_soft_weights(soft_first):
    """A head that pools over places would take the zeros of dropped ones for features, and is refused by `dropped`."""
    hard = Assignment(torch.tensor([[0, 1, -1, 0, 1, 2]]), tokens=3, dropped=True)
    soft = Assignment(weights=torch.full((1, 6, 9), 0.5)) if soft_first else Assignment(weights=torch.full((1, 2, 3), 0.5))
    both = soft.then(hard) if soft_first else hard.then(soft)
    assert both.dropped
    assert not soft.then(Assignment(weights=torch.ones(1, 2, soft.weights.shape[1]))).dropped


@pytest.mark.parametrize("hard", [True, False])
def test_reducing_gathers_by_size_and_leaves_inserted_tokens(hard):
    first, second = assignment(6, 9, True, 1), assignment(3, 6, hard, 2)
    x, sizes = tokens(2, 9 + 2), first.as_weights(torch.float32).sum(2)
    state = TokenState(grid=(3, 3), read_out=(True, False))
    y, state = reduce(x, state, first, sizes)
    torch.testing.assert_close(y[:, :6], first.gather(x[:, :9]))
    z, state = reduce(y, state, second, torch.ones(2, 3))
    torch.testing.assert_close(z[:, :3], second.gather(y[:, :6], sizes))
    assert torch.equal(z[:, 3:], x[:, 9:])
    assert state.sizes.tolist() == [[1] * 5] * 2
    assert to_grid(z, state, (3, 3), 0).shape == (2, 3, 3, 3)
    torch.testing.assert_close(restore(z, state)[0], first.restore(second.restore(z[:, :3])))


def test_what_was_put_aside_is_taken_back():
    """One reduction keeps its tokens, another and an insertion follow, and the first is undone; so is one around it."""
    x, sizes = tokens(2, 9 + 1), torch.arange(1.0, 7).expand(2, 6)
    start = TokenState(grid=(3, 3), read_out=(True,))
    outer, state = reduce(x, start, assignment(6, 9, True, 1), sizes, aside=True)
    y, middle = reduce(outer, state, assignment(4, 6, False, 2), aside=True)
    y, inner = reduce(y, middle, assignment(2, 4, True, 3))
    y, inner = insert(y, inner, tokens(2, 2), read_out=False)
    assert inner.aside.x is outer
    z, after = take_back(y, inner, 2 * outer[:, :6])
    assert torch.equal(z, torch.cat([2 * outer[:, :6], x[:, 9:], tokens(2, 2)], dim=1))
    assert after.assignment is state.assignment
    assert after.sizes.tolist() == [[1, 2, 3, 4, 5, 6, 1, 1, 1]] * 2
    assert after.read_out == (True, False, False)
    z, last = take_back(z, after, x[:, :9])
    assert (last.assignment, last.sizes, last.aside) == (None, None, None)
    assert torch.equal(z[:, :10], x)
    assert not TokenState(aside=Stream(x, start)).empty


def test_keeping_everything_changes_no_bit():
    step, x = Assignment(torch.arange(9).expand(2, 9), tokens=9), tokens(2, 9)
    y, state = reduce(x, TokenState(), step)
    assert torch.equal(y, x)
    assert torch.equal(restore(y, state)[0], x)
    again = step.then(assignment(4, 9, True, 3))
    assert torch.equal(again.index, assignment(4, 9, True, 3).index)


def test_pairs_of_a_merged_token_have_the_mean_of_its_places():
    values = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    source = torch.tensor([[0, 1, 2, 1, 3, 3], [0, 0, 3, 2, -1, 1]])
    result = Assignment(source, tokens=4).gather_pairs(values)
    for b, h, i, j in np.ndindex(2, 2, 4, 4):
        rows, columns = ([p for p in range(6) if source[b, p] == token] for token in (i, j))
        mean = sum(values[h, p, q] for p in rows for q in columns) / (len(rows) * len(columns))
        assert torch.isclose(result[b, h, i, j], mean)
    alone = Assignment(torch.arange(6)[None], tokens=6).gather_pairs(values)
    assert torch.equal(alone[0], values)
    assert torch.equal(alone, Assignment(weights=torch.eye(6)[None]).gather_pairs(values))


def test_edges_follow_the_tokens():
    graph = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1))
    step = Assignment(torch.tensor([[0, 1, 1, -1], [2, -1, 0, 1]]), dropped=True)
    state = TokenState(graph=graph)
    assert not state.empty
    first, second = reduce(torch.zeros(2, 4, 1), state, step)[1].graph
    assert torch.isclose(first[0, 1], graph[0, 0, 1:3].mean())
    assert torch.isclose(first[1, 1], graph[0, 1:3, 1:3].mean())
    kept = torch.tensor([2, 3, 0])
    torch.testing.assert_close(second, graph[1][kept][:, kept])


def test_pairs_with_tokens_that_have_no_place():
    pairs = present_pairs(torch.zeros(1, 3, 3), TokenState(grid=(1, 3), prefix=2, read_out=(True,)), 7.0)
    assert pairs.shape == (1, 6, 6)
    assert (pairs[:, 2:5, 2:5] == 0).all()
    assert (pairs == 7).sum() == 36 - 9
