"""Laws about weights: what a graft adds, what it leaves alone, what trains, and what comes back."""

from __future__ import annotations

import pytest
import torch

from contract.hosts import PRIMARY, build, grafted, images, stem
from vitreous import graft, new_parameters, no_weight_decay, parse, ungraft
from vitreous.mechanism import mechanism_class

pytestmark = pytest.mark.usefixtures("random_state_untouched")


def test_an_older_optimizer_still_holds_the_models_parameters(text):
    model = build(PRIMARY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graft(model, text)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if parse(text).keeps_weights:
        assert held == {id(p) for p in model.parameters()} - {id(p) for p in new_parameters(model).values()}


def test_loaded_weights_survive_removal(text):
    """`assign=True` swaps the tensor objects behind the graft's back."""
    if not parse(text).keeps_weights:
        return
    model, other = grafted(text), build(PRIMARY)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.mul_(1.1)
    weights = model.state_dict() | {k: v.clone() for k, v in other.state_dict().items()}
    new = set(new_parameters(model))
    model.load_state_dict(weights, assign=True)
    assert set(new_parameters(model)) == new
    removal = ungraft(model)
    assert set(removal.changed) == set(other.state_dict())
    assert torch.equal(model(images()), other(images()))


@pytest.fixture
def overwriting_conversion():
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_conversion_may_make_new_parameters(text, overwriting_conversion):
    """Under torch's flag `.to` puts new objects in place; the displaced modules get them on removal."""
    model = grafted(text)
    new = set(new_parameters(model))
    model.double()
    assert set(new_parameters(model)) == new
    ungraft(model)
    assert torch.equal(model(images().double()), build(PRIMARY).double()(images().double()))


def test_train_and_eval_reach_the_displaced_modules(text):
    model = grafted(text).train()
    ungraft(model)
    assert {module.training for module in model.modules()} == {True}


def test_what_must_not_decay_is_named(text):
    """Each word of `no_decay` names a parameter under some setting, and the host's own list stays."""
    model = grafted(text)
    assert build(PRIMARY).no_weight_decay() <= no_weight_decay(model)
    cls = mechanism_class(stem(text))
    brought = {name.rsplit(".", 1)[-1] for other in (stem(text), *cls.examples) for name in new_parameters(grafted(other))}
    assert set(cls.no_decay) <= brought
