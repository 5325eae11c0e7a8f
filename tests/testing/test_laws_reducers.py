"""The laws of reducers: what is sound passes, and each planted fault fails under the name of its law."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from vitreous import TokenMerging
from vitreous.hosts.token_counts import whole
from vitreous.mechanisms.tokens.token_merging import Merge
from vitreous.testing import ContractError, contract_checks
from vitreous.testing.contract import laws, laws_reducers

HOSTS = ("dinov2",)
BROKEN: dict[str, type[TokenMerging]] = {}


def breaking(law: str):
    """Register a reducer that breaks this law."""

    def register(cls: type[TokenMerging]) -> type[TokenMerging]:
        BROKEN[law] = dataclass(frozen=True, kw_only=True)(cls)
        return cls

    return register


class WithStep(TokenMerging):
    """Wrong in its step."""

    step = Merge

    def changes(self, model):
        changes = super().changes(model)
        for block in changes.values():
            for step in block.steps("between") if hasattr(block, "steps") else ():
                step.__class__ = self.step
        return changes


@breaking("token_counts_are_those_of_a_pass")
class SaysTheHosts(TokenMerging):
    """Wrong."""

    def counts(self, model, strength):
        return whole(model)


@breaking("budgets_are_kept")
class TakesAll(TokenMerging):
    """Wrong."""

    def strength(self, model):
        return 1


@breaking("whole_budget_is_the_host")
class AlwaysMerges(TokenMerging):
    """Wrong."""

    def strengths(self, model):
        return 1, 16

    def share(self, model):
        return 1.0


class MergesTheClassToken(Merge):
    def forward(self, x, state, qkv):
        self.prefix = 0
        return super().forward(x, state, qkv)


@breaking("prefix_tokens_stay")
class Careless(WithStep):
    """Wrong."""

    step = MergesTheClassToken


class LosesAPlace(Merge):
    def forward(self, x, state, qkv):
        x, state = super().forward(x, state, qkv)
        index = state.assignment.index.clone()
        index[:, -1] = -1
        return x, replace(state, assignment=replace(state.assignment, index=index))


@breaking("places_come_back")
class Loses(WithStep):
    """Wrong."""

    step = LosesAPlace


class CountsTwice(Merge):
    def forward(self, x, state, qkv):
        x, state = super().forward(x, state, qkv)
        return x, replace(state, sizes=2 * state.sizes)


@breaking("sizes_count_places")
class Doubles(WithStep):
    """Wrong."""

    step = CountsTwice


class Shuffles(Merge):
    def forward(self, x, state, qkv):
        x, state = super().forward(x, state, qkv)
        index = state.assignment.index.clone()
        index[:, 5:] = index[:, 5:].roll(1, dims=1)
        return x, replace(state, assignment=replace(state.assignment, index=index))


@breaking("merged_places_stay_together")
class Shuffling(WithStep):
    """Wrong."""

    step = Shuffles


def checks_of(mechanism, law):
    return [check for check in contract_checks(mechanism, hosts=HOSTS) if check.law.__name__ == law]


@pytest.mark.parametrize("law", [law.__name__ for law in laws(laws_reducers)])
def test_a_planted_fault_fails_under_its_name(law):
    with pytest.raises(ContractError, match=f"^{law}-dinov2 does not hold for "):
        checks_of(BROKEN[law](tokens=3), law)[0].run()
    checks_of(TokenMerging(tokens=3), law)[0].run()


def test_mechanisms_that_reduce_nothing_by_kind_have_no_such_laws():
    names = {check.law.__name__ for check in contract_checks("svda", hosts=HOSTS)}
    assert not names & {law.__name__ for law in laws(laws_reducers)}
