"""What each host offers, against what its model does; refusals in words; and the walk in pieces."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from contract.hosts import HOSTS, LACKING, PRIMARY, ROTARY, SMALL, TEXTS, build, grafted, images, refused, refuses_sizes
from vitreous import check, graft, slots
from vitreous.base.errors import HostError, SettingError, UnknownName
from vitreous.hosts.host import CAPABILITIES, embed, family_of, finish, host_of, run
from vitreous.hosts.token_counts import block_costs
from vitreous.layers.stream import TokenState, take

THREE_PARTS = re.compile(r"^\S.+?\. Expected .+?\. \S.+\.$", re.DOTALL)


def test_families():
    for name in HOSTS:
        assert family_of(build(name)).base is (Eva if name in ROTARY else VisionTransformer)
    for stranger in (nn.Linear(2, 2), timm.create_model("test_resnet")):
        assert family_of(stranger) is None
        with pytest.raises(HostError, match="Expected timm's VisionTransformer"):
            host_of(stranger)


@pytest.mark.parametrize("name", HOSTS)
def test_numbers_of_a_host(name):
    model = build(name)
    host = host_of(model)
    features = model.forward_features(images())
    assert host.prefix == features.shape[1] - 16
    assert host.blocks == tuple(f"blocks.{i}" for i in range(len(model.blocks)))
    assert [i for stage in host.stages for i in stage] == list(range(len(model.blocks)))
    for i, path in enumerate(host.blocks):
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{path}.")]
        assert list(host.linears(i).values()) == linears
        assert host.width(i) == features.shape[2]
        if "attention" in host.offers:
            attention = model.get_submodule(host.attention(i))
            assert host.heads(i) * attention.head_dim == host.width(i)


def test_the_table_of_the_contract_is_what_hosts_offer():
    assert set(LACKING) <= set(CAPABILITIES)
    for word, lacking in LACKING.items():
        for name in HOSTS:
            if name not in ROTARY or word not in ("class_head", "class_token"):  # no mechanism asks these for such alone
                assert (word in host_of(build(name)).offers) == (name not in lacking), (word, name)


def test_a_requirement_that_nobody_knows_is_not_passed_over():
    with pytest.raises(UnknownName, match="halfs"):
        host_of(build("plain")).require(["halfs"], "mine")


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_class_token(name):
    model = build(name)
    assert ("class_token" in host_of(model).offers) == any("cls_token" in key for key in model.state_dict())


@pytest.mark.parametrize("word", CAPABILITIES)
def test_each_sentence_says_what_was_found_what_was_expected_and_what_to_do(word):
    host = host_of(build("plain"))
    missing = type(host)(host.model, host.family)
    type(missing).offers, offers = property(lambda self: frozenset()), type(missing).offers
    try:
        with pytest.raises(HostError) as caught:
            missing.require([word], "svda:layers=0")
    finally:
        type(missing).offers = offers
    assert THREE_PARTS.match(str(caught.value)), str(caught.value)
    assert "{" not in str(caught.value)
    host.require(host.offers, "svda")


# -- the walk in pieces ----------------------------------------------------------------------------------------------


def walk(model: nn.Module, x: torch.Tensor, *splits: int) -> torch.Tensor:
    stream = embed(model, x)
    for start, stop in zip((0, *splits), (*splits, None), strict=True):
        stream = run(model, stream, start, stop)
    return finish(model, stream)


@pytest.mark.parametrize("name", HOSTS)
def test_the_walk_of_a_host_in_any_pieces_is_its_forward(name):
    model = build(name)
    for x in [images()] + ([images(size=48)] if name in ("dinov2", "dinov3") else []):
        expected = model(x)
        assert all(torch.equal(walk(model, x, i), expected) for i in range(len(model.blocks) + 1))
        assert torch.equal(walk(model, x, 1, 3), expected)


@pytest.mark.parametrize("text", TEXTS)
def test_the_walk_of_a_graft_in_any_pieces_is_its_forward(text):
    for name in {PRIMARY, "dinov3", "distilled", "test_vit2", "rope_mixed"} - refused(text):
        model = grafted(text, name)
        expected = model(images())
        assert all(torch.equal(walk(model, images(), i), expected) for i in range(len(model.blocks) + 1)), name
        check(model, images())
    if PRIMARY not in refused(text) and not refuses_sizes(text, grafted(text), images(size=48)):
        assert torch.equal(walk(grafted(text), images(size=48), 2), grafted(text)(images(size=48)))


@pytest.mark.parametrize("name", ["dinov2", "plain", "test_vit2", "eva", "dinov3", "rope_mixed"])
def test_patches_that_enter_are_those_kept_with_their_positions(name):
    """Keeping all in another order changes no feature; keeping some gives the blocks nothing of the others."""
    model, x = build(name), images(2)
    every, prefix = run(model, embed(model, x)), host_of(model).prefix
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    shuffled = run(model, embed(model, x, keep=order))
    torch.testing.assert_close(shuffled.x[:, prefix:], take(every.x[:, prefix:], order), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shuffled.tokens(), every.tokens(), atol=1e-4, rtol=1e-4)
    keep = order[:, :5]
    few, full = embed(model, x, keep=keep), embed(model, x)
    assert torch.equal(few.x[:, prefix:], take(full.x[:, prefix:], keep))
    assert few.state.grid == (4, 4)
    restored = run(model, few).tokens()
    gone = torch.ones(2, 16, dtype=torch.bool).scatter(1, keep, False)
    assert (restored[:, prefix:][gone] == 0).all()
    assert (restored[:, prefix:][~gone] != 0).any(-1).all()
    other = x.clone()
    dropped = int(order[0, -1])
    other[0, :, 8 * (dropped // 4) : 8 * (dropped // 4) + 8, 8 * (dropped % 4) : 8 * (dropped % 4) + 8] = 0
    assert torch.equal(run(model, embed(model, other, keep=keep)).x, run(model, few).x)


def test_keep_for_one_list_of_patches_is_refused():
    with pytest.raises(SettingError, match=r"keep of shape \(5,\)\. Expected \(3, n\)"):
        embed(build("plain"), images(), keep=torch.arange(5))


class Asking(nn.Module):
    """A step that adds the mean of the context."""

    def forward(self, x, state, qkv):
        return x + state.context.mean(1, keepdim=True), state


def test_context_reaches_steps():
    model, context = build("plain"), torch.randn(3, 7, 32)
    for path, value in slots.add_step(model, 1, "before", Asking()).items():
        model.set_submodule(path, value)
    stream = run(model, embed(model, images(), context=context), 0, 1)
    asked = run(model, stream, 1, 2)
    plain = build("plain").blocks[1](stream.x + context.mean(1, keepdim=True))
    assert torch.equal(asked.x, plain)
    assert asked.state.context is context


def test_the_state_of_a_model_without_grafts_says_the_grid():
    model = VisionTransformer(**SMALL | {"dynamic_img_size": True, "patch_drop_rate": 0.5})
    assert embed(model.eval(), images(size=48)).state == TokenState(grid=(6, 6), prefix=1)
    assert embed(model.train(), images(size=48)).state == TokenState(prefix=1)  # patches are dropped at random


def test_a_requirement_is_asked_before_anything_is_built():
    with pytest.raises(HostError, match=r"lays positions over a fixed list of tokens\. Expected timm's VisionTransformer"):
        graft(build("eva"), "spc:after=99")


def test_layers_of_a_grafted_step_are_not_the_hosts():
    """Neither those that an adapter finds by name, nor those that a budget of multiply-adds counts."""
    plain, model = build("plain"), graft(build("plain"), "stvit:tokens=4,after=2")
    assert any(isinstance(module, nn.Linear) for module in model.blocks[1].after.modules())
    assert [host_of(model).linears(i) for i in range(4)] == [host_of(plain).linears(i) for i in range(4)]
    assert block_costs(model) == block_costs(plain)
