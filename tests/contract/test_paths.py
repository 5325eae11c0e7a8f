"""Laws about the ways by which timm reaches its blocks: on none of them may a model run without its graft."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from contract.hosts import (
    CLASSES,
    PRIMARY,
    ROTARY,
    anatomy,
    build,
    features_change,
    folder,
    grafted,
    images,
    per_place,
    refused,
)
from vitreous import check, graft, grafts, new_parameters, parse, ungraft
from vitreous.base.errors import GraftError, MaskError, NotReached
from vitreous.hosts.stream_ends import StreamEnd
from vitreous.layers.stream import Stream


def first_layer(model: nn.Module) -> int:
    """The first block that a graft touches."""
    paths = [change.path.split(".") for record in grafts(model) for change in record.changes]
    return min((int(path[1]) for path in paths if path[0] == "blocks"), default=0)


def walked(model: nn.Module, x: Tensor, **arguments) -> list[Tensor]:
    """By hand, one block after the other: the tokens behind each block, and last those behind the norm."""
    x, outputs = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))), []
    for block in model.blocks:
        x = block(x, **arguments)
        outputs.append(x.tokens() if isinstance(x, Stream) else x)
    return [*outputs, model.norm(x)]


def unless_refused(model: nn.Module, x: Tensor, **mask) -> Tensor | None:
    """The features under a mask, or None if the model says by name that it cannot have it."""
    try:
        return model.forward_features(x, **mask)
    except MaskError as error:
        if next(iter(mask)) in str(error):
            return None
        raise


def test_intermediates(text, host):
    """Both formats: shaped as the host's, equal to them before the graft, and the final features are the features."""
    plain, model = build(host), grafted(text, host)
    per = per_place(model)
    for options in ({"output_fmt": "NCHW"}, {"output_fmt": "NLC"}, {"output_fmt": "NLC", "norm": True}):
        _, there = plain.forward_intermediates(images(), **options)
        final, here = model.forward_intermediates(images(), **options)
        assert torch.equal(final, model.forward_features(images()))
        assert [y.shape for y in here] == [torch.cat([y] * per, dim=-2).shape for y in there]
        assert all(torch.equal(here[i], there[i]) for i in range(first_layer(model)))
        assert torch.equal(here[-1], there[-1]) != features_change(text)


def test_intermediates_are_what_the_blocks_hand_on(text, host):
    if host in ROTARY:
        return  # Eva has one path only, which `test_intermediates` compares with forward_features
    model = grafted(text, host)
    *blocks, final = walked(model, images())
    prefix = model.num_prefix_tokens
    features, taken = model.forward_intermediates(images(), output_fmt="NLC", return_prefix_tokens=prefix > 0)
    for block, y in zip(blocks, taken, strict=True):
        patches, first = y if prefix else (y, block[:, :0])
        assert torch.equal(torch.cat([first, patches], dim=1), block)
    assert torch.equal(features, final)
    assert torch.equal(model.forward_features(images()), final)


def test_intermediate_options(text):
    model = grafted(text)
    _, every = model.forward_intermediates(images())
    few = model.forward_intermediates(images(), indices=[0, 2], stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(few, (every[0], every[2]), strict=True))
    named = model.forward_intermediates(images(), indices=2, output_dict=True, return_prefix_tokens=True)
    assert torch.equal(named["image_features"], model.forward_features(images()))
    assert all(torch.equal(a, b) for a, b in zip(named["image_intermediates"], every[-2:], strict=True))
    assert [y.shape for y in named["image_intermediates_prefix"]] == [(3, model.num_prefix_tokens, 32)] * 2
    normed = model.get_intermediate_layers(images(), n=1, norm=True)[0]
    assert torch.equal(normed, model.forward_features(images())[:, model.num_prefix_tokens :])


def test_masks(text, host):
    """A mask that hides nothing changes nothing; causal attention is right block by block; or MaskError by name."""
    model, x = grafted(text, host), images()
    n = model.forward_features(x).shape[1]
    for mask in (torch.ones(n, n, dtype=torch.bool), torch.zeros(n, n)):
        masked = unless_refused(model, x, attn_mask=mask)
        if masked is not None:
            torch.testing.assert_close(masked, model.forward_features(x), atol=1e-5, rtol=1e-5)
    causal = unless_refused(model, x, is_causal=True)
    if causal is None:
        return
    assert not torch.allclose(causal, model.forward_features(x), atol=1e-3)
    plain = build(host).forward_features(x, is_causal=True)
    same = causal.shape == plain.shape and torch.allclose(causal, plain, atol=1e-3)
    assert same != features_change(text)
    if host not in ROTARY:
        assert torch.equal(causal, walked(model, x, is_causal=True)[-1])
    lower = torch.ones(n, n, dtype=torch.bool).tril()
    torch.testing.assert_close(model.forward_features(x, attn_mask=lower), causal, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing(text, host):
    """Outputs and all gradients are those without it."""
    outcomes = []
    for enable in (False, True):
        model = grafted(text, host).train()
        model.set_grad_checkpointing(enable)
        check(model, images())
        with torch.random.fork_rng():
            torch.manual_seed(3)
            logits = model(images())
        logits.square().sum().backward()
        outcomes.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    (plain, gradients), (logits, others) = outcomes
    assert torch.equal(logits, plain)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients if gradients[name] is not None)
    assert [name for name in gradients if gradients[name] is None] == [name for name in others if others[name] is None]


@pytest.fixture
def reentrant():
    timm.layers.set_reentrant_ckpt(True)
    yield
    timm.layers.set_reentrant_ckpt(False)


def test_reentrant_checkpointing_is_right_or_refused(text, reentrant):
    """It does not look inside a `Stream`, and would leave parameters without gradient."""
    if "stream" in parse(text).requires:
        with pytest.raises(GraftError, match="re-entrant"):
            grafted(text)
        return
    model = grafted(text).train()
    model.set_grad_checkpointing()
    x = images().requires_grad_()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in new_parameters(model).values())


def test_reentrant_checkpointing_switched_on_later_is_noticed(text):
    model = grafted(text)
    timm.layers.set_reentrant_ckpt(True)
    try:
        if isinstance(model.norm, StreamEnd):
            with pytest.raises(GraftError, match="re-entrant"):
                check(model, images())
        else:
            check(model, images())
    finally:
        timm.layers.set_reentrant_ckpt(False)


def test_slices(text):
    model = grafted(text)
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images()))))
    for k in (1, len(model.blocks)):
        out = model.blocks[:k](x)
        out = out.tokens() if isinstance(out, Stream) else out
        assert torch.equal(out, walked(model, images())[k - 1])


def test_pruning_is_noticed(text):
    """A cut model gives the features that it had; a graft that was cut away is reported, and removal refuses."""
    model = grafted(text)
    _, before = model.forward_intermediates(images())
    model.prune_intermediate_layers([1], prune_head=False)
    _, after = model.forward_intermediates(images())
    assert all(torch.equal(a, b) for a, b in zip(after, before[:2], strict=True))
    if folder(text) in ("head", "embed"):
        check(model, images())
        return
    with pytest.raises(NotReached, match="replaced after grafting"):
        check(model, images())
    structure = anatomy(model)
    with pytest.raises(GraftError, match="no longer holds"):
        ungraft(model)
    assert anatomy(model) == structure


def test_new_classes(text, host):
    model = grafted(text, host)
    model.reset_classifier(7)
    check(model, images())
    assert model(images()).shape == (3, 7)
    assert torch.equal(model.forward_head(model.forward_features(images())), model(images()))
    assert model.forward_head(model.forward_features(images()), pre_logits=True).shape == (3, model.num_features)
    ungraft(model)
    plain = build(host)
    plain.reset_classifier(7)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(images()), plain(images()))


@pytest.mark.parametrize(("start", "pool"), [("plain", "avg"), ("class_avg", "token"), ("class_map", "token")])
def test_new_pooling_is_right_or_noticed(text, start, pool):
    """`reset_classifier` can make the head read other tokens than those that the graft read into, or drop its pool."""
    if start in refused(text):
        return
    model = grafted(text, start)
    model.reset_classifier(CLASSES, pool)
    if folder(text) == "head":
        with pytest.raises(NotReached, match="attn_pool was replaced"):
            check(model, images())
        return
    if folder(text) != "tokens":
        check(model, images())
        return
    with pytest.raises(NotReached, match="head now reads"):
        check(model, images())
    model.reset_classifier(CLASSES, {"plain": "token", "class_avg": "avg", "class_map": "token"}[start])
    if start != "class_map":
        check(model, images())


def test_other_image_sizes(text):
    model, plain = grafted(text), build(PRIMARY)
    _, here = model.forward_intermediates(images(size=48))
    _, there = plain.forward_intermediates(images(size=48))
    assert [y.shape for y in here] == [torch.cat([y] * per_place(model), dim=-2).shape for y in there]
    model.set_input_size(48)
    plain.set_input_size(48)
    check(model, images(size=48))
    assert ungraft(model).changed == ("pos_embed",)
    assert torch.equal(model(images(size=48)), plain(images(size=48)))


def test_layer_groups(text, host):
    """Layer decay keeps every host parameter in its group; a new one joins the group of its block, once."""
    plain, model = build(host), grafted(text, host)
    groups = {p: i for i, names in group_parameters(model, model.group_matcher(), reverse=False).items() for p in names}
    before = {p: i for i, names in group_parameters(plain, plain.group_matcher(), reverse=False).items() for p in names}
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert parse(text).keeps_weights is False or all(groups[name] == before[name] for name in before)
    for name in new_parameters(model):
        if name.startswith("blocks."):
            assert groups[name] == before[next(p for p in before if p.startswith(".".join(name.split(".")[:2]) + "."))]
    decayed = [p for group in param_groups_layer_decay(model, layer_decay=0.5) for p in group["params"]]
    assert sorted(map(id, decayed)) == sorted(map(id, model.parameters()))


def test_the_users_hooks_live_on(text, host):
    """Hooks from before the graft fire while it is in and after it is out, and can be removed at any time."""
    model = build(host)
    layer = model.blocks[-1]
    places = {"block": layer, "attn": getattr(layer, "attn", None), "norm": model.norm}
    seen: list[str] = []
    handles = {
        name: module.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, module in places.items()
        if module is not None
    }

    def fired() -> set[str]:
        seen.clear()
        model(images())
        return set(seen)

    assert fired() == set(handles)
    graft(model, text)
    assert fired() == set(handles)
    handles.pop("block").remove()
    assert fired() == set(handles)
    ungraft(model)
    assert fired() == set(handles)
    handles.pop("norm").remove()
    assert fired() == set(handles)
