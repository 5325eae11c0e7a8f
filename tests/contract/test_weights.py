"""Laws about weights: what a graft adds, what it leaves alone, what trains, and what comes back."""

from __future__ import annotations

import copy

import pytest
import torch

from contract.hosts import CLASSES, PRIMARY, anatomy, build, fit, grafted, images, loss, per_place, stem
from vitreous import check, graft, grafts, new_parameters, no_weight_decay, parse, ungraft
from vitreous.mechanism import mechanism_class

pytestmark = pytest.mark.usefixtures("random_state_untouched")


def test_output_is_finite_and_has_the_hosts_shape(text, host):
    model = check(grafted(text, host), images())
    with torch.no_grad():
        features, logits = model.forward_features(images()), model(images())
    plain = build(host).forward_features(images())
    patches = plain.shape[1] - model.num_prefix_tokens
    assert features.shape == (3, plain.shape[1] + (per_place(model) - 1) * patches, plain.shape[2])
    assert logits.shape == (3, CLASSES)
    assert features.isfinite().all()
    assert logits.isfinite().all()


def test_every_new_parameter_learns(text, host):
    """A gradient from the first step on, and not zero after at most two steps (a gate may have to open first)."""
    model = grafted(text, host)
    learning = new_parameters(model)
    reached = set()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, images(4, seed=step)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learning.values())
        reached |= {name for name, p in learning.items() if p.grad.any()}
        optimizer.step()
    assert reached == set(learning)


def test_a_plain_checkpoint_loads(text, host):
    """The host's keys are all there, and loading its checkpoint misses exactly what the graft added."""
    plain, model = build(host), grafted(text, host)
    weights = plain.state_dict()
    if not parse(text).keeps_weights:
        return
    assert set(weights) <= set(model.state_dict())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) == set(model.state_dict()) - set(weights)
    assert {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()} == set(
        new_parameters(model)
    )


def test_removal_gives_back_the_same_objects(text, host):
    model = build(host)
    before, logits = anatomy(model), model(images())
    removal = ungraft(graft(model, text))
    assert anatomy(model) == before
    assert removal.mechanisms == (parse(text),)
    assert removal.changed == ()
    assert grafts(model) == []
    assert torch.equal(model(images()), logits)


def test_training_new_parameters_leaves_the_host_as_it_was(text, host):
    model = build(host)
    logits = model(images())
    graft(model, text)
    new = new_parameters(model)
    values = {name: p.detach().clone() for name, p in new.items()}
    fit(model, new.values(), steps=3)
    assert not any(torch.equal(p, values[name]) for name, p in new.items())
    assert ungraft(model).changed == ()
    assert torch.equal(model(images()), logits)


def test_training_everything_is_kept_and_reported(text, host):
    model = grafted(text, host)
    fit(model, model.parameters())
    new = new_parameters(model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if name not in new}
    start = dict(build(host).named_parameters())
    removal = ungraft(model)
    now = dict(model.named_parameters())
    assert set(now) == set(start)
    if parse(text).keeps_weights:
        assert all(torch.equal(now[name], value) for name, value in trained.items())
        assert set(removal.changed) == {name for name, value in trained.items() if not torch.equal(value, start[name])}
        assert removal.changed


def test_weights_load_into_a_rebuilt_model(text, host):
    model = grafted(text, host)
    fit(model, model.parameters())
    rebuilt = graft(build(host), *(record.mechanism.text() for record in grafts(model)))
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(images()), model(images()))


def test_exact_at_init_means_exact(text, host):
    """And a mechanism that changes the output says that, too."""
    assert torch.equal(grafted(text, host)(images()), build(host)(images())) == parse(text).exact_at_init


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion_reaches_everything(text, dtype):
    """Graft and conversion commute (but for roundings, if new values are made of the host's); displaced modules follow."""
    before, after = grafted(text).to(dtype), graft(build(PRIMARY).to(dtype), text)
    x = images().to(dtype)
    assert {t.dtype for t in (*after.parameters(), *after.buffers()) if t.is_floating_point()} == {dtype}
    assert before(x).dtype == dtype
    rounding = 0 if parse(text).keeps_weights else 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(before(x), after(x), atol=rounding, rtol=rounding)
    ungraft(before)
    assert torch.equal(before(x), build(PRIMARY).to(dtype)(x))


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


def test_grafting_twice_from_one_text_is_the_same(text):
    """The start of new parameters comes from the mechanism's own seed."""
    first, second = grafted(text).state_dict(), grafted(text).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == second.keys()


def test_a_mechanism_is_a_setting_not_a_model(text):
    """`changes` reads the model and writes nothing; one mechanism can serve several models."""
    mechanism, model = parse(text), build(PRIMARY)
    before = anatomy(model, records=True), copy.deepcopy(model.state_dict())
    assert mechanism.changes(model)
    assert anatomy(model, records=True) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    first, second = graft(build(PRIMARY), mechanism), graft(build(PRIMARY), mechanism)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
