"""`fold`: what can be written into the host's weights, what cannot, and what is left in the model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from contract.hosts import build, images
from contract.low_rank import LowRank
from vitreous import Mechanism, fold, graft, grafts
from vitreous.base.errors import GraftError
from vitreous.layers.linear import Linear, folds

OPEN = LowRank(start=0.5)


@pytest.mark.parametrize("host", ["plain", "eva", "grouped", "swin"])
def test_folded_equals_unfolded(host):
    """The adapters of a third party; EVA's attention, which was adopted to call its layer, is timm's again."""
    model = graft(build(host), OPEN)
    out = model(images())
    removal = fold(model)
    assert removal.mechanisms == (OPEN,)
    assert {type(m) for m in model.modules()} == {type(m) for m in build(host).modules()}
    assert set(removal.changed) == {n for n, p in build(host).named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert (build(host)(images()) - out).abs().max() > 0.1
    torch.testing.assert_close(model(images()), out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["shift_linear", "shift_linear:form=q"])
def test_weights_of_another_form_are_written_out(text):
    model = graft(build("plain"), text)
    out = model(images())
    assert fold(model).changed
    assert torch.equal(model(images()), out)


@pytest.mark.parametrize(
    ("text", "host", "named"),
    [
        ("svda", "swin", "SpectralLinear|Directions"),
        ("shift_linear:fixed_point=true", "plain", "ShiftedLinear"),
        ("adaptformer", "plain", "AdaptedBlock"),
        ("spc", "plain", "at "),
    ],
)
def test_what_no_weight_can_stand_for_is_refused_and_stays(text, host, named):
    model = graft(build(host), text)
    out = model(images())
    with pytest.raises(GraftError, match=rf"{text.partition(':')[0]}.* has a .*({named}).*Expected grafts of linear layers"):
        fold(model)
    assert len(grafts(model)) == 1
    assert torch.equal(model(images()), out)


def test_the_last_one_or_all():
    """A graft below stays in place and computes on; with all=True the first that cannot be folded stops it."""
    model = graft(build("plain"), "svda", OPEN)
    out = model(images())
    fold(model)
    assert [record.mechanism.name for record in grafts(model)] == ["svda"]
    torch.testing.assert_close(model(images()), out, atol=1e-4, rtol=1e-4)
    model = graft(build("plain"), LowRank(start=0.5, linears=("qkv",)), LowRank(start=0.5, linears=("fc1",)))
    out = model(images())
    assert len(fold(model, all=True).mechanisms) == 2
    torch.testing.assert_close(model(images()), out, atol=1e-4, rtol=1e-4)
    with pytest.raises(GraftError, match="This model has no graft"):
        fold(model)


def test_a_weight_that_stays_stays_and_a_new_one_is_frozen_as_before():
    model = build("plain").requires_grad_(False)
    weight = model.blocks[0].attn.qkv.weight
    assert fold(graft(model, LowRank())).changed == ()
    assert model.blocks[0].attn.qkv.weight is weight
    assert fold(graft(model, OPEN)).changed
    assert not model.blocks[0].attn.qkv.weight.requires_grad


class Louder(Linear):
    """Computes another weight than it says, by a thousandth of a thousandth."""

    def forward(self, x):
        return super().forward(x) * (1 + 1e-6)


def test_folds_is_measured():
    assert folds(Linear.of(nn.Linear(5, 3)))
    assert not folds(Louder.of(nn.Linear(5, 3)))


class OtherBias(Linear):
    """Ones where the layer has no bias, and none where it has one."""

    def effective_bias(self):
        return self.weight.new_ones(self.out_features) if self.bias is None else None


@dataclass(frozen=True, kw_only=True)
class Biases(Mechanism):
    """`OtherBias` in both layers of a test's model."""

    def changes(self, model):
        return {name: OtherBias.of(layer) for name, layer in model.named_children()}


def test_a_bias_may_come_and_go():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False)), torch.randn(2, 3)
    out = graft(model, Biases())(x)
    assert set(fold(model).changed) == {"0.bias", "1.bias"}
    assert model[0].bias is None
    assert torch.equal(model(x), out)
