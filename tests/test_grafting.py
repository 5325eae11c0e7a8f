"""graft, ungraft, check, with mechanisms from elsewhere that use the seams which the shipped ones leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from contract.hosts import PRIMARY, anatomy, build, fit, grafted, images
from vitreous import Mechanism, check, graft, grafts, new_parameters, no_weight_decay, slots, ungraft
from vitreous.base.errors import GraftError, HostError, MaskError, NotReached
from vitreous.layers.stream import Assignment, TokenState, reduce, split, to_grid


class Elsewhere(Mechanism):
    """A mechanism from outside the catalogue, made of a function."""

    def __init__(self, change: Callable[[nn.Module], dict], **tags):
        self.__dict__.update(change=change, **tags)

    def changes(self, model):
        return self.change(model)


def at(path: str, value: object) -> Elsewhere:
    return Elsewhere(lambda model: {path: value})


# -- values other than adopted modules ---------------------------------------------------------------------------------


def test_an_attribute_is_exchanged_and_comes_back():
    model = build("class_map")
    before, logits = anatomy(model), model(images())
    check(graft(model, at("pool_include_prefix", True), at("blocks.1.attn.scale", 0.5)), images())
    assert model.pool_include_prefix is True
    assert not torch.equal(model(images()), logits)
    ungraft(model, all=True)
    assert (model.pool_include_prefix, model.blocks[1].attn.scale) == (False, 16**-0.5)
    assert anatomy(model) == before
    assert torch.equal(model(images()), logits)


class Mean(nn.Module):
    """(B, N, D) -> (B, D), with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.mean(1)


def test_none_becomes_a_module_and_none_again():
    model = build("plain")
    before, logits = anatomy(model), model(images())
    check(graft(model, at("attn_pool", Mean())), images())
    torch.testing.assert_close(model(images()), model.head(model.forward_features(images())[:, 1:].mean(1)))
    assert list(new_parameters(model)) == ["attn_pool.weight"]
    ungraft(model)
    assert model.attn_pool is None
    assert "attn_pool" not in model._modules
    assert anatomy(model) == before
    assert torch.equal(model(images()), logits)


def test_a_module_becomes_none_and_comes_back_in_its_place():
    model = build("class_map")
    before, logits = anatomy(model), model(images())
    check(graft(model, Elsewhere(lambda model: {"attn_pool": None, "global_pool": "avg"})), images())
    assert not any(name.startswith("attn_pool") for name in model.state_dict())
    assert model(images()).shape == (3, 5)
    ungraft(model)
    assert anatomy(model) == before  # the order of parameters, too
    assert torch.equal(model(images()), logits)


def test_a_parameter_comes_and_goes():
    model = build("test_vit2")
    before = anatomy(model)
    graft(model, Elsewhere(lambda model: {"cls_token": nn.Parameter(torch.zeros(1, 1, 64)), "num_prefix_tokens": 2}))
    graft(model, Elsewhere(lambda model: {"reg_token": None, "num_prefix_tokens": 1}))
    assert list(new_parameters(model)) == ["cls_token"]
    assert model(images()).shape == (3, 5)
    ungraft(model, all=True)
    assert anatomy(model) == before


def test_a_lost_head_is_noticed():
    """`reset_classifier(n, "token")` deletes what stands at `attn_pool`."""
    model = graft(build("class_map"), at("attn_pool", Mean()))
    model.reset_classifier(5, "token")
    with pytest.raises(NotReached, match="attn_pool was replaced"):
        check(model, images())
    with pytest.raises(GraftError, match="attn_pool no longer holds"):
        ungraft(model)


def test_what_is_replaced_follows_the_model_while_it_is_away():
    """No tensor is shared, so nothing but the removal can move it."""
    model, size = build("plain"), images().double()
    graft(model, at("blocks.2.mlp", nn.Linear(32, 32)))
    assert model.blocks[2].mlp.training is False  # the mode of what it displaced
    model.double().train()
    ungraft(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {module.training for module in model.modules()} == {True}
    assert torch.equal(model(size), build("plain").double()(size))


def test_new_modules_take_dtype_and_mode_from_what_they_displace():
    model = build("plain").bfloat16().train()
    model.blocks[2].eval()
    graft(model, at("blocks.2.mlp", nn.Linear(32, 32)), at("blocks.1.ls1", LayerScale(32)))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.blocks[1].ls1.training
    assert not model.blocks[2].mlp.training


@pytest.mark.parametrize("path", ["pool", "forward_head", "blocks.0.forward"])
def test_a_method_is_no_place(path):
    model = build("plain")
    before = anatomy(model, records=True)
    with pytest.raises(GraftError, match=r"is a method.*Expected a child module.*Use another slot"):
        graft(model, at(path, Mean()))
    assert anatomy(model, records=True) == before


@pytest.mark.parametrize("thing", [None, "vit", 7, [build], torch.zeros(2)])
def test_only_a_module_is_a_model(thing):
    for act in (lambda: graft(thing, "svda"), lambda: ungraft(thing), lambda: check(thing, images())):
        with pytest.raises(HostError, match=r"Found a .*Expected a torch\.nn\.Module\. Create"):
            act()


def test_a_model_without_memory_takes_a_graft():
    """On the meta device, where shapes and names are all there is."""
    with torch.device("meta"):
        empty = build(PRIMARY)
    graft(empty, "svda", "spc:after=2,ssva=true")
    full = graft(build(PRIMARY), "svda", "spc:after=2,ssva=true")
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in full.state_dict().items()}
    empty.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(empty.eval()(images()), full(images()))
    ungraft(empty, all=True)
    assert torch.equal(empty(images()), build(PRIMARY)(images()))


# -- reached or not ----------------------------------------------------------------------------------------------------


def test_a_projection_that_is_never_called():
    """EVA multiplies with `qkv.weight` itself, so a module put at `qkv` runs on timm's ViT only."""

    def changes(model):
        old = model.blocks[0].attn.qkv
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        new.load_state_dict(old.state_dict())
        return {"blocks.0.attn.qkv": new}

    check(graft(build("plain"), Elsewhere(changes)), images())
    with pytest.raises(NotReached, match=r"blocks\.0\.attn\.qkv was not called.*Expected.*Take the grafts out"):
        check(graft(build("eva"), Elsewhere(changes)), images())


def test_check_runs_the_path_that_is_set_and_leaves_no_trace():
    model = graft(build(PRIMARY), "svda", "spc").train()
    model.set_grad_checkpointing()
    before = anatomy(model), torch.get_rng_state()
    assert check(model, images()) is model
    assert anatomy(model) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


def test_hooks_are_gone_when_the_pass_fails():
    model = grafted("svda")
    with pytest.raises(AssertionError):
        check(model, images(size=33))
    assert not any(module._forward_hooks for module in model.modules())


def test_check_without_a_graft_is_a_forward():
    assert check(build("plain"), images())(images()).shape == (3, 5)


# -- what changed ------------------------------------------------------------------------------------------------------


def test_a_removal_names_what_changed():
    model = grafted("svda")
    assert str(ungraft(model)) == "Removed svda; the host's tensors are as they were."
    graft(model, "svda:layers=0")
    with torch.no_grad():
        model.head.bias[0] += 1e-6
        model.blocks[0].attn.qkv.weight[3, 4] *= -1
    removal = ungraft(model)
    assert removal.changed == ("blocks.0.attn.qkv.weight", "head.bias")
    assert "2 host tensors changed since: blocks.0.attn.qkv.weight, head.bias" in str(removal)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda w: w.copy_(w.flip(0)), id="order"),
        pytest.param(lambda w: w.neg_(), id="sign"),
        pytest.param(lambda w: w.add_(1.0), id="shift"),
        pytest.param(lambda w: w.mul_(2.0), id="factor"),
        pytest.param(lambda w: w[:2].neg_(), id="two signs"),
    ],
)
@pytest.mark.parametrize("name", ["pos_embed", "norm.bias", "blocks.3.mlp.fc1.weight"])
def test_no_change_hides(name, edit):
    """Also not one that keeps sums, or that happens to all numbers alike."""
    model = build("plain")
    with torch.no_grad():
        model.norm.bias.copy_(torch.arange(32.0))
        graft(model, "svda")
        edit(model.get_parameter(name)[0] if name == "pos_embed" else model.get_parameter(name))
    assert ungraft(model).changed == (name,)


def test_frozen_stays_frozen():
    model = build("plain")
    model.blocks[0].requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    graft(model, "svda", "spc:after=1,read=gated")
    assert all(p.requires_grad for p in new_parameters(model).values())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    ungraft(model, all=True)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen


def test_no_weight_decay_by_name():
    model = graft(build("plain"), "svda:layers=1,scale=learned", "extra_tokens")
    ours = {"blocks.1.attn.sigma", "blocks.1.attn.log_scale", "blocks.0.before.0.learned"}
    assert no_weight_decay(model) == model.no_weight_decay() | ours
    assert no_weight_decay(nn.Linear(2, 2)) == set()


def test_records_are_a_plain_list():
    model = graft(build("plain"), "svda", "spc")
    assert [str(record.mechanism) for record in grafts(model)] == ["svda", "spc"]
    assert not any("grafts" in name for name in model.state_dict())
    assert ungraft(model).mechanisms == (grafts(grafted("spc"))[0].mechanism,)
    assert [str(record.mechanism) for record in grafts(model)] == ["svda"]


# -- tokens that are merged or dropped ---------------------------------------------------------------------------------


class Reduce(nn.Module):
    """A step that merges the last `drop` patches into the first token, or drops them there (`weigh` = False)."""

    def __init__(self, drop: int, weigh: bool):
        super().__init__()
        self.drop, self.weigh = drop, weigh

    def forward(self, x: Tensor, state: TokenState, qkv) -> tuple[Tensor, TokenState]:
        original, _ = split(x, state)
        b, n = original.shape[:2]
        sizes = x.new_ones(b, x.shape[1]) if state.sizes is None else state.sizes
        sizes = sizes[:, :n]
        keep = n - self.drop
        if self.weigh:
            parts = torch.cat([original[:, :1], original[:, keep:]], dim=1)
            weights = torch.cat([sizes[:, :1], sizes[:, keep:]], dim=1)[..., None]
            mean = (parts * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
            original = torch.cat([mean, original[:, 1:]], dim=1)
            sizes = torch.cat([weights.sum(1), sizes[:, 1:]], dim=1)
        index = torch.arange(n).expand(b, n)
        step = Assignment(index=torch.where(index < keep, index, 0), tokens=keep)
        return reduce(x, state, step, sizes[:, :keep] if self.weigh else None, tokens=original[:, :keep])


def reducer(station: str, drop: int = 3, weigh: bool = True, layer: int = 1) -> Elsewhere:
    return Elsewhere(lambda model: slots.add_step(model, layer, station, Reduce(drop, weigh)))


@pytest.mark.parametrize("station", ["before", "between", "after"])
@pytest.mark.parametrize("weigh", [True, False], ids=["merge", "drop"])
@pytest.mark.parametrize("host", ["plain", "class_avg", "class_map_all", "distilled", "res_post", PRIMARY])
def test_fewer_tokens_keep_every_shape(station, weigh, host):
    plain, model = build(host), graft(build(host), reducer(station, weigh=weigh))
    before = anatomy(plain)
    check(model, images())
    final, here = model.forward_intermediates(images())
    _, there = plain.forward_intermediates(images())
    assert torch.equal(final, model.forward_features(images()))
    assert [y.shape for y in here] == [y.shape for y in there]
    assert torch.equal(here[0], there[0])
    assert not torch.equal(here[1], there[1])
    with pytest.raises(MaskError, match="merged or dropped"):
        model(images(), is_causal=True)
    model.train().set_grad_checkpointing()
    assert torch.equal(model(images()), model.eval()(images()))
    assert ungraft(model).changed == ()
    assert anatomy(plain) == before


@pytest.mark.parametrize("reduce", [reducer("before"), reducer("between"), reducer("after", weigh=False)])
@pytest.mark.parametrize("other", ["spc:after=2", "extra_tokens", "svda", "spc:after=3,read=gated"])
def test_fewer_tokens_and_other_mechanisms(reduce, other):
    """In either order: sizes, sources and inserted tokens live side by side."""
    first, second = graft(build("plain"), reduce, other), graft(build("plain"), other, reduce)
    for model in (first, second):
        check(model, images())
        assert model.forward_features(images()).shape == (3, 17, 32)
        assert ungraft(model, all=True).changed == ()
        assert torch.equal(model(images()), build("plain")(images()))


def test_check_knows_parts_that_later_grafts_displaced():
    """The reducer's attention is replaced in the block that SPC put in place of the reducer's."""
    model = check(graft(build("plain"), reducer("between"), "spc:after=2", "svda"), images())
    del model.blocks[1].between[0]
    with pytest.raises(NotReached, match=r"blocks\.1\.between\.0 was not called"):
        check(model, images())


def test_merging_equal_tokens_changes_nothing():
    """The stream of merged tokens computes what the host does on the duplicates, to the last layer and the pool."""
    plain, model = build("class_avg"), build("class_avg")
    twin = model.blocks[1].register_forward_pre_hook(copies)
    plain.blocks[1].register_forward_pre_hook(copies)
    graft(model, reducer("before"))
    torch.testing.assert_close(model(images()), plain(images()), atol=1e-5, rtol=1e-5)
    twin.remove()
    assert not torch.allclose(model(images()), plain(images()), atol=1e-3)


def copies(_module: nn.Module, args: tuple) -> tuple:
    """The last three patches become copies of the first token."""
    x = args[0]
    return (torch.cat([x[:, :-3], x[:, :1].expand(-1, 3, -1)], dim=1), *args[1:])


def test_an_average_over_merged_tokens_weighs_by_size():
    model = graft(build("test_vit4"), reducer("after", drop=5), reducer("between", drop=4, layer=3))
    stream = model.blocks(model._pos_embed(model.patch_embed(images())))
    sizes, prefix = stream.state.sizes, model.num_prefix_tokens
    assert sizes.sum(1).tolist() == [17.0] * 3
    counted = torch.stack([(stream.state.assignment.index[:, prefix:] == i).sum(1) for i in range(sizes.shape[1])], dim=1)
    normed = build("test_vit4").norm(stream.x)
    mean = (normed * counted[..., None]).sum(1) / 16
    torch.testing.assert_close(model.pool(model.forward_features(images())), mean, atol=1e-6, rtol=1e-5)
    picture = to_grid(stream.state.sizes, stream.state, (4, 4), prefix)
    assert picture.shape == (3, 4, 4)
    assert picture[0, -1, -1] == sizes[0, 0]


def test_training_through_fewer_tokens_reaches_every_parameter():
    model = graft(build("plain"), reducer("between"), "spc:after=3", "svda").train()
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    fit(model, model.parameters())
    assert set(ungraft(model, all=True).changed) <= {name for name, _ in build("plain").named_parameters()}


def test_hooks_on_attention_fire_where_the_halves_run_apart():
    """They see the host's output, a tensor."""
    model, seen = build("plain"), []
    handle = model.blocks[1].attn.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images())
    graft(model, reducer("between", drop=0))
    model(images())
    torch.testing.assert_close(seen[1], seen[0])
    handle.remove()
    model(images())
    assert len(seen) == 2


@pytest.mark.parametrize("host", ["parallel_scaling", "parallel_things", "diff_attention"])
def test_between_is_refused_where_the_halves_are_not_known(host):
    with pytest.raises(HostError, match=r"blocks\.1.*Expected one of.*\."):
        graft(build(host), reducer("between"))
