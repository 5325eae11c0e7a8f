"""Token state against loops: inserting, restoring, and back to the picture."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreous.layers.stream import (
    Stream,
    TokenState,
    follow,
    insert,
    opened,
    restore,
    split,
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
    state = TokenState(sizes=sizes, source=torch.zeros(2, 7, dtype=torch.long))
    more, after = insert(x, state, tokens(2, 2, seed=1), read_out=True)
    more, after = insert(more, after, tokens(2, 1, seed=2).double(), read_out=False)
    assert more.dtype == x.dtype
    assert after.read_out == (True, True, False)
    assert after.sizes.tolist() == [[2, 1, 1, 3, 1, 1, 1]] * 2
    assert after.source is state.source
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
    state = TokenState(source=source, read_out=(False,) * m)
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
        sizes = torch.ones(1, after + 1) if data.draw(st.booleans()) else None
        state = follow(state, torch.tensor([to]), sizes, dropped=-1 in to)
        walks = [-1 if place == -1 else to[place] for place in walks]
        assert state.sizes is sizes
        assert state.read_out == (True,)
    assert state.dropped or -1 not in walks
    assert state.source.tolist() == [walks]
    x = tokens(1, counts[-1] + 1)
    for place, restored in zip(walks, restore(x, state)[0][0], strict=True):
        assert torch.equal(restored, torch.zeros(3) if place == -1 else x[0, place])


def test_back_to_the_picture():
    """Two prefix tokens, a 2 x 3 grid, of which the patches 0 and 1, and 4 and 5, were merged; one inserted token."""
    source = torch.tensor([[0, 1, 2, 2, 3, 4, 5, 5]])
    state = TokenState(source=source, read_out=(True,))
    value = torch.arange(7.0)[None]  # prefix 0 1, patches 2 3 4 5, inserted 6
    assert to_grid(value, state, (2, 3), prefix=2).tolist() == [[[2, 2, 3], [4, 5, 5]]]
    channels = torch.stack([value, -value], dim=-1)
    assert to_grid(channels, state, (2, 3), prefix=2).shape == (1, 2, 3, 2)
    assert torch.equal(to_grid(channels, state, (2, 3), prefix=2)[..., 1], -to_grid(value, state, (2, 3), prefix=2))
    with pytest.raises(ValueError, match=r"7 patches do not fill a grid of 2 x 3.*Expected.*Take"):
        to_grid(value, state, (2, 3), prefix=1)
