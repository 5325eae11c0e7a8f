"""Laws of a mechanism that merges or drops tokens (`Reducer`), checked in one host."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from vitreous.base.errors import SettingError
from vitreous.hosts.host import embed, run
from vitreous.hosts.token_counts import block_costs, measured_counts, multiply_adds
from vitreous.hosts.token_counts import whole as all_tokens
from vitreous.layers.stream import Stream, split
from vitreous.reducer import Reducer
from vitreous.slots import depth, prefix
from vitreous.testing.check import close, holds
from vitreous.testing.hosts import build, grafted, images


@torch.no_grad()
def streams(model: nn.Module) -> list[Stream]:
    """What each block hands on, with the tokens that the first one gets at the front."""
    found = [embed(model, images())]
    for i in range(depth(model)):
        found.append(run(model, found[-1], i, i + 1))
    return found


def reduced(model: nn.Module) -> Stream:
    """The last stream with merged or dropped tokens; a later block may have them back.

    Raises Broken if there is none.
    """
    found = [stream for stream in streams(model) if stream.state.assignment is not None]
    holds(bool(found), "no token was merged or dropped")
    return found[-1]


def limit(mechanism: Reducer) -> Reducer:
    """The same with the whole budget."""
    default = next(field.default for field in fields(mechanism) if field.name == mechanism.solves)
    return replace(mechanism, macs=1.0, **{mechanism.solves: default})


def token_counts_are_those_of_a_pass(mechanism: Reducer, host: str) -> None:
    """`token_counts` says how many tokens attention and MLP of each block get."""
    expected, found = mechanism.token_counts(build(host)), measured_counts(grafted(mechanism, host), images())
    holds(tuple(expected) == found, f"tokens {found} of a pass, and {tuple(expected)} by token_counts")


def budgets_are_kept(mechanism: Reducer, host: str) -> None:
    """A budget `macs` is kept, a greater one leaves no fewer tokens, and all of it leaves all."""
    model, before, whole, met = build(host), None, limit(mechanism), []
    for macs in (0.0625, 0.5, 0.7, 0.9):
        with suppress(SettingError):  # a budget that is too small, refused in words
            one = replace(whole, macs=macs)
            share, counts = one.share(model), one.token_counts(model)
            holds(share <= macs, f"a share of {share} with macs={macs}")
            fewer = before is not None and any(was.mlp > now.mlp for was, now in zip(before, counts, strict=True))
            holds(not fewer, f"tokens {counts} with macs={macs}, and {before} with a smaller budget")
            before = counts
            met.append(macs)
    costs, strongest = block_costs(model), whole.strengths(model)[1]
    least = multiply_adds(costs, whole.counts(model, strongest)) / multiply_adds(costs, all_tokens(model))
    holds(bool(met) or least > 0.9, f"no budget that can be met, where {least} of the host can be reached")
    holds(whole.share(model) == 1, f"a share of {whole.share(model)} with macs=1")


def whole_budget_is_the_host(mechanism: Reducer, host: str) -> None:
    """With macs=1 the output is the host's: bit for bit, or to rounding if weights are soft."""
    state = streams(grafted(mechanism, host))[-1].state
    soft = state.assignment is not None and state.assignment.weights is not None
    whole = limit(mechanism)
    holds(whole.exact_at_init or soft, "exact_at_init is not claimed for macs=1")
    close(grafted(whole, host)(images()), build(host)(images()), "the output with macs=1", 1e-4 if soft else 0.0)


def prefix_tokens_stay(mechanism: Reducer, host: str) -> None:
    """Class and register tokens stay at the front, each for its own place and for no other."""
    model = grafted(mechanism, host)
    for stream in streams(model):
        x, assignment, n = split(stream.x, stream.state)[0], stream.state.assignment, prefix(model)
        if assignment is None:
            continue
        weights = replace(assignment, tokens=x.shape[1]).as_weights(torch.float32) > 0  # (B, n, N)
        own = torch.eye(max(weights.shape[1:]), dtype=torch.bool)
        holds(bool((weights[:, :n] == own[:n, : weights.shape[2]]).all()), "a prefix token that stands for other places")
        holds(bool((weights[:, :, :n] == own[: weights.shape[1], :n]).all()), "a prefix place that other tokens stand for")


def places_come_back(mechanism: Reducer, host: str) -> None:
    """A picture that is constant over what was merged comes back; dropped places are 0."""
    if mechanism.exact_at_init:
        return
    stream = reduced(grafted(mechanism, host))
    present, assignment = split(stream.x, stream.state)[0], stream.state.assignment
    b, n = present.shape[:2]
    if assignment.weights is not None:  # what is mixed softly has in common that it is one picture
        holds(bool((assignment.weights >= 0).all()), "a negative weight")
        holds(assignment.weights.shape[1] == n, f"weights for {assignment.weights.shape[1]} of {n} tokens")
        picture = torch.ones(b, assignment.places, 2)
        there = assignment.weights.sum(1) > 0
    else:
        index = assignment.index
        holds(bool((index < n).all() and (index >= -1).all()), f"an index beyond the {n} tokens")
        there = index >= 0
        values = torch.randn(b, n, 2, generator=torch.Generator().manual_seed(4))
        picture = values.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 2))
    holds(assignment.dropped or bool(there.all()), "a place without a token, and dropped is False")
    close(assignment.restore(assignment.gather(picture)), picture * there[..., None], "the picture", 1e-5)


def sizes_count_places(mechanism: Reducer, host: str) -> None:
    """Every token stands for a place; hard sizes sum to the places that were not dropped."""
    if mechanism.exact_at_init:
        return
    stream = reduced(grafted(mechanism, host))
    present, assignment, sizes = split(stream.x, stream.state)[0], stream.state.assignment, stream.state.sizes
    n = present.shape[1]
    if assignment.weights is not None:
        holds(bool((assignment.weights.sum(2) > 0).all()), "a token that stands for no place")
        return
    holds(bool((assignment.counts(n) > 0).all()), "a token that stands for no place")
    if sizes is not None:
        total = (assignment.index >= 0).sum(1)
        close(sizes[:, :n].double().sum(1), total.double(), "sizes beside the places that have a token", 1e-5)


def merged_places_stay_together(mechanism: Reducer, host: str) -> None:
    """Reductions one after the other are their `then`: what has one token has one later."""
    found = [stream.state.assignment for stream in streams(grafted(mechanism, host))]
    hard = [assignment.index for assignment in found if assignment is not None and assignment.index is not None]
    for earlier, later in pairwise(hard):
        together = pairs(earlier) & ~pairs(later)
        holds(not together.any(), "places of one token that later have two")
        holds(bool((later[earlier < 0] < 0).all()), "a dropped place that has a token again")


def pairs(index: Tensor) -> Tensor:
    """(B, N, N) of index (B, N): whether two places have one token."""
    return index[:, :, None] == index[:, None]
