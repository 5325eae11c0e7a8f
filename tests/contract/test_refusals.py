"""Laws about refusals: which host and mechanism do not go together, that it is said well, and that nothing is touched."""

from __future__ import annotations

import re
from functools import partial

import pytest
import timm
import torch
from torch import nn

from contract.hosts import HOSTS, PRIMARY, TEXTS, anatomy, build, grafted, images, refused
from vitreous import check, graft, grafts, parse, ungraft
from vitreous.base.errors import GraftError, HostError, UnknownName, VitreousError
from vitreous.mechanism import Mechanism

THREE_PARTS = re.compile(r"^\S.+?\. Expected .+?\. \S.+\.$", re.DOTALL)  # found, expected, what to do


def assert_refused(model: nn.Module, text: str, *kinds: type[VitreousError]) -> str:
    """Grafting raises one of `kinds` in three parts and leaves the model as it was; returns the message."""
    before, weights = anatomy(model, records=True), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(kinds) as caught:
        graft(model, text)
    assert type(caught.value) in kinds
    assert THREE_PARTS.match(str(caught.value)), str(caught.value)
    assert anatomy(model, records=True) == before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    return str(caught.value)


REFUSALS = [(text, name) for text in TEXTS for name in HOSTS if name in refused(text)]


def test_no_refusal_beside_the_table(text):
    """The table in hosts.py is complete: whatever is not in it takes the graft."""
    for name in set(HOSTS) - refused(text):
        graft(build(name), text)


TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
STRANGERS = {
    "beit": partial(timm.create_model, "beit_base_patch16_224", **TINY | {"depth": 3}),
    "swin": partial(timm.create_model, "swin_tiny_patch4_window7_224", embed_dim=32, depths=(2, 1), num_heads=(2, 2)),
    "resnet": partial(timm.create_model, "test_resnet"),
    "naflex": partial(timm.create_model, "naflexvit_base_patch16_gap", **TINY | {"depth": 3}),
    "linear": partial(nn.Linear, 3, 3),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_other_models_are_refused(text, name):
    model = STRANGERS[name]()
    if name in ("swin", "naflex") and set(parse(text).requires) <= {"linear", "projections"}:
        graft(model, text)  # `tests/hosts/test_directions.py` has what holds there
        return
    message = assert_refused(model, text, HostError)
    assert type(model).__name__ in message


class OwnWalk(timm.models.vision_transformer.VisionTransformer):
    """A subclass with a walk over the blocks of its own."""

    def forward_features(self, x, attn_mask=None, is_causal=False):
        return self.norm(super().forward_features(x))


class OwnHead(timm.models.vision_transformer.VisionTransformer):
    """A subclass that leaves the walk alone."""

    def extra(self):
        return 1


def test_a_subclass_counts_as_long_as_it_leaves_the_walk_alone(text):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    assert "OwnWalk" in assert_refused(OwnWalk(**small), text, HostError)
    check(graft(OwnHead(**small), text), images())


def test_wrappers_are_refused_by_name(text):
    """A graft belongs into the bare model; the one inside a wrapper takes it."""
    torch.compiler.reset()
    wrappers = {
        "OptimizedModule": torch.compile(build(PRIMARY), backend="eager"),
        "DataParallel": nn.DataParallel(build(PRIMARY)),
        "ModelEmaV3": timm.utils.ModelEmaV3(build(PRIMARY)),
        "FeatureGetterNet": timm.create_model("test_vit", features_only=True),
    }
    for name, wrapper in wrappers.items():
        with pytest.raises(HostError, match=name) as caught:
            graft(wrapper, text)
        assert THREE_PARTS.match(str(caught.value))
        assert not any("grafts" in module.__dict__ for module in wrapper.modules())
        inner = next(child for child in wrapper.children())
        ungraft(graft(inner, text))
    for act in (ungraft, lambda model: check(model, images())):
        with pytest.raises(HostError, match="OptimizedModule"):
            act(wrappers["OptimizedModule"])


class Failing(Mechanism):
    """Fails: with an error of the given kind, after the mechanisms before it have been put in."""

    def changes(self, model):
        raise ZeroDivisionError


class HalfWay(Mechanism):
    """Fails while its second value is written: `pool` is a method."""

    def changes(self, model):
        return {"norm": nn.Identity(), "pool": nn.Identity()}


class Nowhere(Mechanism):
    """Names a place that is not there."""

    def changes(self, model):
        return {"norm": nn.Identity(), "blocks.99.attn": nn.Identity()}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        pytest.param(Failing(), ZeroDivisionError, id="changes"),
        pytest.param(HalfWay(), GraftError, id="put"),
        pytest.param(Nowhere(), HostError, id="path"),
        pytest.param("svdaa", UnknownName, id="name"),
        pytest.param(7, GraftError, id="type"),
    ],
)
def test_all_or_nothing(text, bad, error):
    """A mechanism in the middle that fails takes those before it along, and leaves earlier grafts in."""
    for start in (build(PRIMARY), grafted("svda:layers=3")):
        logits, there = start(images()), list(start.__dict__.get("grafts", []))
        before = anatomy(start, records=True)
        with pytest.raises(error):
            graft(start, "extra_tokens:kind=register", bad, text)
        assert anatomy(start, records=True) == before
        assert start.__dict__.get("grafts", []) == there
        assert torch.equal(start(images()), logits)


def test_a_replaced_module_is_not_overwritten(text):
    """Someone put another module where the graft's was: removal refuses and changes nothing."""
    model = grafted(text)
    path = grafts(model)[-1].changes[0].path
    own = model.get_submodule(path)
    model.set_submodule(path, nn.Identity())
    before = anatomy(model)
    with pytest.raises(GraftError, match=re.escape(path)) as caught:
        ungraft(model)
    assert THREE_PARTS.match(str(caught.value))
    assert anatomy(model) == before
    model.set_submodule(path, own)
    assert ungraft(model).changed == ()
    with pytest.raises(GraftError, match="no graft"):
        ungraft(model)
