"""The contract from outside: a mechanism of another package passes it, and a broken one fails under the right name."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import contract.tempered
from contract.tempered import Tempered, TemperedAttention
from vitreous.base.errors import HostError, SettingError, UnknownName, VitreousError
from vitreous.hosts.attention import masked
from vitreous.hosts.host import Host
from vitreous.layers.stream import PLAIN
from vitreous.lens.probe import PROBES
from vitreous.lens.probes.alignment import Alignment
from vitreous.tasks import TASKS
from vitreous.tasks.classification import Classification
from vitreous.testing import Check, ContractError, contract_checks, small_hosts
from vitreous.train.updates import UPDATES

KINDS = ("dinov2", "test_vit2", "dinov3", "diff_attention")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The same mechanism in a package that is not ours."""
    package = tmp_path / "somebodys_package"
    package.mkdir()
    shutil.copy(Path(contract.tempered.__file__), package / "__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("somebodys_package")
    del sys.modules["somebodys_package"]


def test_a_mechanism_of_another_package_passes(outside):
    checks = contract_checks(outside.Tempered(start=0.5), hosts=KINDS)
    for check in checks:
        check.run()
    assert [c.name for c in contract_checks("somebodys_package.Tempered:start=0.5", hosts=KINDS)] == [c.name for c in checks]
    names = {check.name for check in contract_checks(outside.Tempered())}
    assert names >= {"is_described", "refusal-diff_attention", "exports-dinov2"} | {
        f"masks-{host}" for host in ("eva", "plain")
    }
    assert len(names) == len(contract_checks(outside.Tempered()))


def test_small_hosts_run_and_are_the_same_at_every_call():
    for name, create in small_hosts().items():
        model = create()
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5), name
        assert not model.training
        assert all(torch.equal(value, again) for value, again in zip(model.parameters(), create().parameters(), strict=True))


@pytest.mark.parametrize("item", [7, None, nn.Identity()])
def test_anything_else_is_refused(item):
    with pytest.raises(SettingError, match=r"^Found .*Expected a mechanism.*\. Give"):
        contract_checks(item)


@pytest.mark.parametrize("text", ["svdaa", "check", "no_such_package.X", "pathlib.Path", "svda:sclae=one"])
def test_a_text_that_names_nothing(text):
    with pytest.raises(UnknownName):
        contract_checks(text)


def test_a_failed_check_says_what_and_where_in_three_parts():
    state = torch.get_rng_state()
    check = next(c for c in contract_checks(BROKEN["exact_at_init"]()) if c.name == "exact_at_init-plain")
    with pytest.raises(ContractError, match=r"^exact_at_init-plain does not hold for .* in the host plain: .*") as caught:
        check.run()
    assert " Expected: The grafted model equals the host" in str(caught.value)
    assert isinstance(caught.value, VitreousError)
    assert caught.value.__cause__ is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_check_of_a_law_of_ones_own():
    def is_small(item):
        """It is small."""
        raise ValueError("it is huge")

    with pytest.raises(
        ContractError, match=r"is_small does not hold for it: ValueError: it is huge\. Expected: It is small\. "
    ):
        Check(is_small, "it").run()


# -- tasks, updates and probes ----------------------------------------------------------------------------------------

ITEMS = [*TASKS.files, *UPDATES.files, *PROBES.files]


@pytest.mark.parametrize("name", ITEMS)
def test_shipped_items_pass(name):
    for check in contract_checks(name):
        check.run()


@dataclass(frozen=True, kw_only=True)
class Coupled(Classification):
    """Its loss is of the batch as a whole."""

    def build(self, model, data):
        objective = super().build(model, data)
        one_by_one = objective.losses
        objective.losses = lambda batch, progress: {"squared": one_by_one(batch, progress)["classification"] ** 2}
        return objective


@dataclass(frozen=True, kw_only=True)
class SaysSo(Coupled):
    """The same, declared."""

    couples_images = True


def broken_by(item) -> set[str]:
    names = set()
    for check in contract_checks(item):
        try:
            check.run()
        except ContractError:
            names.add(check.name)
    return names


def test_a_coupled_loss_has_to_be_declared():
    assert broken_by(Coupled()) == {"parts_add_up"}
    assert broken_by(SaysSo()) == set()


@dataclass(frozen=True, kw_only=True)
class OutOfBounds(Alignment):
    """Says that no cosine is below 1."""

    measures = tuple(replace(measure, low=1) for measure in Alignment.measures)


@dataclass(frozen=True, kw_only=True)
class Undeclared(Alignment):
    """Does not say what it measures."""

    measures = Alignment.measures[1:]


@pytest.mark.parametrize("probe", [OutOfBounds(), Undeclared()])
def test_a_probe_reads_what_it_says(probe):
    assert "readings_are_declared" in broken_by(probe)


# -- one mechanism broken in many ways, each under the name of the law that it breaks --------------------------------

BROKEN: dict[str, type[Tempered]] = {}


def breaks(law: str, **attributes):
    """Register a broken attention, in the mechanism that puts it in."""

    def register(attention: type[TemperedAttention]) -> type[TemperedAttention]:
        BROKEN[law] = dataclass(frozen=True, kw_only=True)(
            type("Wrong", (Tempered,), {"attention": attention, "__doc__": "Wrong.", **attributes})
        )
        return attention

    return register


@breaks("batch_mates_do_not_matter")
class MixesImages(TemperedAttention):
    def scores(self, *arguments):
        scores = super().scores(*arguments)
        return scores + scores.mean(0, keepdim=True)


@breaks("calls_agree")
class Counts(TemperedAttention):
    calls = 0

    def scores(self, *arguments):
        self.calls += 1
        return super().scores(*arguments) / self.calls


@breaks("gradient_checkpointing")
class CountsInTraining(TemperedAttention):
    calls = 0

    def scores(self, *arguments):
        self.calls += self.training
        return super().scores(*arguments) * (1 + self.calls)


@breaks("double_precision_agrees")
class Rounds(TemperedAttention):
    def scores(self, *arguments):
        scores = super().scores(*arguments)
        return scores if scores.dtype == torch.float64 else scores.bfloat16().to(scores)


@breaks("output_has_the_hosts_shape")
class Overflows(TemperedAttention):
    def scores(self, *arguments):
        return super().scores(*arguments) * torch.inf


@breaks("training_new_parameters_keeps_the_host")
class MovesTheHost(TemperedAttention):
    def scores(self, *arguments):
        self.proj.weight.data.mul_(1.01)
        return super().scores(*arguments)


@breaks("masks")
class ForgetsTheMask(TemperedAttention):
    def forward(self, x, *arguments, attn_mask=None, is_causal=False, **others):
        return super().forward(x, *arguments, **others)


@breaks("hidden_keys_give_zero")
class WritesItOut(TemperedAttention):
    def weigh(self, q, k, v, mask, is_causal, state=PLAIN):
        return masked(self.scores(q, k, state), mask, is_causal).softmax(-1) @ v


@breaks("ends_of_settings_stay_finite")
class HidesEveryKey(TemperedAttention):
    """Tokens see those that are nearer than the factor: with start=0 none, not even themselves."""

    def scores(self, *arguments):
        scores = super().scores(*arguments)
        at = torch.arange(scores.shape[-1])
        return scores.masked_fill((at - at[:, None]).abs() >= self.factor, -torch.inf)


@breaks("compiles")
class Decides(TemperedAttention):
    def scores(self, *arguments):
        scores = super().scores(*arguments)
        return scores + 1 if scores.max() > 3 else scores


@breaks("conversion_reaches_everything")
class HoldsATensor(TemperedAttention):
    weight = torch.ones(1, 1)

    def scores(self, *arguments):
        return super().scores(*arguments) * self.weight


@breaks("exact_at_init", exact_at_init=True)
class ClaimsTooMuch(TemperedAttention):
    pass


def breaking(law: str):
    """Register a mechanism whose `changes` are wrong."""

    def register(cls: type[Tempered]) -> type[Tempered]:
        BROKEN[law] = cls
        return cls

    return register


@breaking("changes_are_pure")
class WritesToTheModel(Tempered):
    """Wrong."""

    def changes(self, model):
        model.tempered = True
        return super().changes(model)


@breaking("removal_is_exact")
class ChangesAWeight(Tempered):
    """Wrong."""

    def changes(self, model):
        next(model.parameters()).data.add_(1)
        return super().changes(model)


@breaking("new_parameters_learn")
class ForgetsAParameter(Tempered):
    """Wrong."""

    def changes(self, model):
        changes = super().changes(model)
        changes["blocks.0.attn"].unused = nn.Parameter(torch.ones(3))
        return changes


@breaking("plain_checkpoint_loads")
class Renames(Tempered):
    """Wrong."""

    def changes(self, model):
        changes = super().changes(model)
        for new in changes.values():
            new.out = new._modules.pop("proj")
            new.__class__ = type("Renamed", (type(new),), {"proj": property(lambda self: self.out)})
        return changes


@breaking("grafting_is_repeatable")
class Draws(Tempered):
    """Wrong."""

    def changes(self, model):
        changes = super().changes(model)
        changes["blocks.0.attn"].factor.data.mul_(torch.rand(()))
        return changes


@breaking("copies_are_whole")
class HoldsAFunction(Tempered):
    """Wrong."""

    def changes(self, model):
        changes = super().changes(model)
        changes["blocks.0.attn"].reshape = lambda x: x
        return changes


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **others):
        return self.inner.forward(*arguments, **others)


@breaking("hooks_live_on")
class Wraps(Tempered):
    """Wrong."""

    def changes(self, model):
        return {path: Wrapper(new) for path, new in super().changes(model).items()}


@breaking("intermediates")
class SitsBehindTheBlocks(Tempered):
    """Wrong: it says in its changes that it stands in the blocks, and works behind them."""

    def changes(self, model):
        return {"norm": Doubled(), "blocks.0.drop_path1": nn.Identity()}


class Doubled(nn.LayerNorm):
    def __init__(self):
        super().__init__(32)

    def forward(self, x):
        return 2 * super().forward(x)


@breaking("is_described")
class SaysNothing(Tempered):
    pass


@pytest.mark.parametrize("law", BROKEN)
def test_what_is_broken_fails_under_its_name(law):
    checks = [c for c in contract_checks(BROKEN[law](), hosts=KINDS) if c.law.__name__ == law]
    assert checks
    with pytest.raises(ContractError, match=f"^{law}.* does not hold for "):
        checks[0].run()
    sound = [c for c in contract_checks(Tempered(), hosts=KINDS) if c.law.__name__ == law]
    sound[0].run()


class Unasked(Tempered):
    """Wrong where it should be refused."""

    def changes(self, model):
        return {"norm": Doubled()}


def refusing(error: Exception) -> Tempered:
    """One that raises this where it is refused."""

    class Refuses(Tempered):
        def changes(self, model):
            raise error

    return Refuses()


def refusal_of(mechanism: Tempered):
    return next(c for c in contract_checks(mechanism) if c.law.__name__ == "refusal")


def test_a_host_that_is_not_asked_is_noticed(monkeypatch):
    """`graft` asks the host before `changes`; here it does not, so that the law sees what it is there for."""
    check = refusal_of(Unasked())
    check.run()
    monkeypatch.setattr(Host, "require", lambda self, words, mechanism: None)
    with pytest.raises(ContractError, match=r"^refusal.* does not hold for "):
        check.run()


@pytest.mark.parametrize("error", [HostError("no."), VitreousError("Found a. Expected b. Do c."), ValueError("no")])
def test_a_refusal_has_three_parts_and_the_right_kind(error, monkeypatch):
    monkeypatch.setattr(Host, "require", lambda self, words, mechanism: None)
    with pytest.raises(ContractError):
        refusal_of(refusing(error)).run()
    refusal_of(refusing(HostError("Found a. Expected b. Do c."))).run()
