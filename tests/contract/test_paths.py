"""Laws about the ways by which timm reaches its blocks: on none of them may a model run without its graft."""

from __future__ import annotations

from contextlib import suppress

import pytest
import timm.layers
import torch
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from contract.hosts import (
    CLASSES,
    PRIMARY,
    anatomy,
    build,
    folder,
    grafted,
    images,
    refused,
    refuses_sizes,
)
from vitreous import check, grafts, new_parameters, parse, ungraft
from vitreous.base.errors import GraftError, MaskError, NotReached
from vitreous.hosts.host import embed, host_of, run
from vitreous.hosts.stream_ends import StreamEnd
from vitreous.layers.stream import Stream


def walked(model: nn.Module, x: Tensor, **arguments) -> list[Tensor]:
    """One block after the other: the tokens behind each block, and last those behind the norm."""
    stream, outputs = embed(model, x), []
    for i in range(len(model.blocks)):
        stream = run(model, stream, i, i + 1, **arguments)
        outputs.append(stream.tokens())
    return [*outputs, model.norm(stream if isinstance(model.norm, StreamEnd) else stream.x)]


def test_intermediates_are_what_the_blocks_hand_on(text, host):
    """And causal attention, where it is taken, is that of the blocks."""
    model = grafted(text, host)
    *blocks, final = walked(model, images())
    prefix = model.num_prefix_tokens
    features, taken = model.forward_intermediates(images(), output_fmt="NLC", return_prefix_tokens=prefix > 0)
    for block, y in zip(blocks, taken, strict=True):
        patches, first = y if prefix else (y, block[:, :0])
        assert torch.equal(torch.cat([first, patches], dim=1), block)
    assert torch.equal(features, final)
    assert torch.equal(model.forward_features(images()), final)
    with suppress(MaskError):
        assert torch.equal(model.forward_features(images(), is_causal=True), walked(model, images(), is_causal=True)[-1])


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
    x, _ = host_of(model).family.begin(model, images())
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
    if not any(change.path.startswith("blocks.") for change in grafts(model)[0].changes):
        check(model, images())
        return
    with pytest.raises(NotReached, match="replaced after grafting"):
        check(model, images())
    structure = anatomy(model)
    with pytest.raises(GraftError, match="no longer holds"):
        ungraft(model)
    assert anatomy(model) == structure


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
    if refuses_sizes(text, model, images(size=48)):
        return
    _, here = model.forward_intermediates(images(size=48))
    _, there = plain.forward_intermediates(images(size=48))
    grid = model.patch_embed.dynamic_feat_size((48, 48))
    assert [y.shape for y in here] == [(*y.shape[:2], *grid) for y in there]
    own_positions = "pos_embed" in new_parameters(model)
    model.set_input_size(48)
    if own_positions:  # others took their place
        with pytest.raises(NotReached, match="replaced after grafting"):
            check(model, images(size=48))
        return
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
