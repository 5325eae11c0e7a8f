"""A mixer in the place of attention, against sums written out, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contract.hosts import build
from vitreous.base.errors import MaskError
from vitreous.hosts.mixer import Mixer
from vitreous.layers.stream import PLAIN, Assignment, TokenState
from vitreous.testing.check import THREE_PARTS


class Sums(Mixer):
    """Each place gets the sum of the places before it in its row, itself included."""

    def mix(self, patches: Tensor) -> Tensor:
        return patches.cumsum(2)


def by_hand(places: Tensor, prefix: int, groups: int, grid: tuple[int, int]) -> Tensor:
    """What each of (N, D) places gets from `Sums`."""
    height, width = grid
    out = torch.zeros_like(places)
    for group in range(groups):
        for i in range(height):
            for j in range(width):
                for k in range(j + 1):
                    start = prefix + group * height * width + i * width
                    out[start + j] += places[start + k]
    return out


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_prefix_and_inserted_tokens_get_nothing_and_each_group_is_a_picture():
    x, state = random(2, 3 + 2 * 6 + 2, 4), TokenState(grid=(2, 3), prefix=3, groups=2, read_out=(True, False))
    out = Sums()(x, state=state)
    for i in range(2):
        expected = by_hand(x[i, :-2], 3, 2, (2, 3))
        torch.testing.assert_close(out[i], torch.cat([expected, torch.zeros(2, 4).double()]))


def test_a_grid_of_three_dimensions():
    x = random(2, 1 + 2 * 3 * 4, 5)
    out = Sums()(x, state=TokenState(grid=(2, 3, 4), prefix=1))
    torch.testing.assert_close(out[:, 1:], x[:, 1:].unflatten(1, (2, 3, 4)).cumsum(2).flatten(1, 3))


@pytest.mark.parametrize("soft", [False, True])
def test_a_merged_token_stands_at_all_its_places_and_gets_their_mean(soft):
    index = torch.tensor([[0, 1, 1, 2, 3, 3, 1], [0, 3, 2, 1, 1, 1, 1]])  # class token, then a grid of 2 x 3
    weights = torch.nn.functional.one_hot(index, 4).mT.double() * (random(2, 4, 7).abs() + 0.1 if soft else 1)
    assignment = Assignment(weights=weights) if soft else Assignment(index=index, tokens=4)
    sizes = torch.cat([weights.sum(2), torch.ones(2, 1)], dim=1)
    x = random(2, 5, 4)  # one inserted
    state = TokenState(grid=(2, 3), prefix=1, assignment=assignment, sizes=sizes, read_out=(True,))
    out = Sums()(x, attn_mask=sizes.log()[:, None, None], state=state)  # of sizes: it may not matter
    for i in range(2):
        mixed = by_hand(torch.stack([x[i, int(token)] for token in index[i]]), 1, 1, (2, 3))
        for token in range(4):
            places = [p for p in range(7) if index[i, p] == token]
            shares = weights[i, token, places] / weights[i, token, places].sum()
            torch.testing.assert_close(out[i, token], sum(s * mixed[p] for s, p in zip(shares, places, strict=True)))
        assert not out[i, 4].any()


class MeanOfAll(Mixer):
    """Each token gets the mean of all, inserted ones too."""

    mixes_inserted = True

    def mix_tokens(self, tokens: Tensor, state: TokenState) -> Tensor:
        return tokens.mean(1, keepdim=True) + 0 * tokens


@pytest.mark.parametrize("merged", [False, True])
def test_inserted_tokens_that_are_mixed(merged):
    """They count once each, beside every place of merged tokens, and get their share."""
    index = torch.tensor([[0, 1, 1, 2, 3, 3, 1], [0, 3, 2, 1, 1, 1, 1]])
    assignment = Assignment(index=index, tokens=4) if merged else None
    x = random(2, 4 + 2 if merged else 7 + 2, 4)
    state = TokenState(grid=(2, 3), prefix=1, assignment=assignment, read_out=(True, False))
    out = MeanOfAll()(x, state=state)
    for i in range(2):
        places = [x[i, int(token)] for token in index[i]] if merged else list(x[i, :7])
        torch.testing.assert_close(out[i], (sum([*places, *x[i, -2:]]) / 9).expand_as(x[i]))


GRID = TokenState(grid=(2, 3), prefix=1)
DROPPED = TokenState(grid=(2, 3), prefix=1, assignment=Assignment(index=torch.zeros(1, 7, dtype=int), dropped=True))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"state": GRID, "is_causal": True}, r"is_causal=True, but Sums has no scores"),
        ({"state": GRID, "attn_mask": torch.ones(7, 7)}, r"attn_mask of shape \(7, 7\), but Sums"),
        ({"state": PLAIN}, r"7 tokens whose places are not known"),
        ({"state": DROPPED}, r"some places have no token"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, found):
    with pytest.raises(MaskError, match=found) as caught:
        Sums()(random(1, 7, 4), **arguments)
    assert THREE_PARTS.match(str(caught.value))


def test_a_mixer_that_does_not_say_how():
    with pytest.raises(TypeError, match="Mixer does not say how it mixes: define mix"):
        Mixer()(random(1, 7, 4), state=GRID)


def test_hooks_and_mode_are_all_that_stays_of_the_attention():
    attention, seen = build("qk_norm").blocks[0].attn, []
    handle = attention.register_forward_hook(lambda *_: seen.append(1))
    attention.register_state_dict_post_hook(lambda module, *_: module.qkv)
    new = Sums.instead_of(attention)
    assert set(vars(new)) == set(vars(nn.Module()))
    assert not list(new.children())
    assert not new.training
    new(random(1, 7, 4), state=GRID)
    assert (seen, new.state_dict()) == ([1], {})
    handle.remove()
    new(random(1, 7, 4), state=GRID)
    assert seen == [1]
