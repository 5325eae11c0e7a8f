"""Laws about two mechanisms in one model: they stack, or refuse each other with a reason; last in, first out."""

from __future__ import annotations

import itertools

import pytest
import torch

from contract.hosts import PRIMARY, TEXTS, anatomy, build, fit, folder, grafted, images, refused, stem
from vitreous import check, graft, grafts, new_parameters, parse, ungraft
from vitreous.base.errors import VitreousError

PAIRS = list(itertools.product(TEXTS, repeat=2))
MUST_STACK = [
    ("svda", "spc"),
    ("svda", "extra_tokens:kind=register,tokens=2"),
    ("spc", "spc"),
    ("spc:after=2,ssva=true", "spc"),
    ("extra_tokens", "spc"),
    ("svda", "adaptformer"),
    ("spc", "adaptformer"),
    ("ggem", "adaptformer"),
    ("spc", "evit"),
    ("evit", "spc"),
    ("evit", "adaptformer"),
    ("adaptformer", "evit"),
    ("spc", "token_merging"),
]
ELSEWHERE = [pair for pair in PAIRS if folder(pair[0]) < folder(pair[1])]


def stacked(first: str, second: str, host: str = PRIMARY) -> torch.nn.Module | None:
    """Both, in this order; None if the second refuses in good order: with a reason, and the first untouched."""
    model = grafted(first, host)
    before = anatomy(model, records=True)
    try:
        return graft(model, second)
    except VitreousError as error:
        assert " Expected " in str(error)
        assert anatomy(model, records=True) == before
        return None


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair_stacks_or_refuses(first, second):
    """Removal in two steps gives back each stage, the same objects and the same numbers."""
    model = stacked(first, second)
    if model is None:
        assert folder(first) == folder(second) or stacked(second, first) is None
        return
    check(model, images())
    both = model(images())
    assert both.isfinite().all()
    alone = grafted(first)
    assert parse(second).exact_at_init or not torch.equal(both, alone(images()))
    assert ungraft(model).changed == ()
    check(model, images())
    assert torch.equal(model(images()), alone(images()))
    assert [record.mechanism for record in grafts(model)] == [parse(first)]


@pytest.mark.parametrize(("first", "second"), MUST_STACK)
@pytest.mark.parametrize("name", ["plain", "test_vit2", "test_vit3", "distilled", "res_post", PRIMARY])
def test_pairs_that_must_stack(first, second, name):
    if name in refused(first) | refused(second):
        return
    model = build(name)
    before, logits = anatomy(model), model(images())
    graft(model, first, second)
    check(model.train(), images())
    fit(model, new_parameters(model).values())
    check(model.eval(), images())
    removal = ungraft(model, all=True)
    assert removal.changed == ()
    assert removal.mechanisms == (parse(second), parse(first))
    assert anatomy(model) == before
    assert torch.equal(model(images()), logits)


@pytest.mark.parametrize(("first", "second"), ELSEWHERE)
def test_order_means_nothing_in_different_slots(first, second):
    here, there = stacked(first, second), stacked(second, first)
    assert (here is None) == (there is None)
    if here is None:
        return
    torch.testing.assert_close(here(images()), there(images()), atol=1e-5, rtol=1e-5)
    assert here.state_dict().keys() == there.state_dict().keys()
    there.load_state_dict(here.state_dict())


def test_what_is_in_can_be_put_in_again_or_is_refused(text):
    """Itself on itself is a pair like any other, with parameters of its own."""
    model = stacked(text, text)
    if model is None:
        return
    once = set(new_parameters(grafted(text)))
    assert len(new_parameters(model)) == 2 * len(once)
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


def test_training_two_leaves_each_others_parameters(text):
    """Removal of the later one keeps what the earlier one learned."""
    other = "extra_tokens:kind=register,tokens=2" if stem(text) != "extra_tokens" else "svda"
    model = stacked(text, other)
    fit(model, model.parameters())
    mine = {name for name in grafted(text).state_dict() if name not in build(PRIMARY).state_dict()}
    learned = {name: value.clone() for name, value in model.state_dict().items() if name in mine}
    ungraft(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in learned.items())
