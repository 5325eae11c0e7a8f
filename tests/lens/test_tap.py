"""The tap: fused route, hygiene, names, checks, refusals, memory, grafted models."""

from __future__ import annotations

import gc
import math
import resource
import subprocess
import sys
import threading
import weakref
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import vitreous
from vitreous import SPC, SVDA, EViT, ExtraTokens, GaussianMask, TokenMerging
from vitreous.base.errors import DataError, HostError, NotReached
from vitreous.lens.tap import Layouts, capture_pass, trace, watch
from vitreous.lens.tap.attention_call import Arrangement
from vitreous.lens.tap.capture import Capture

HEADS, WIDTH, TOKENS, BATCH = 4, 8, 16, 3


class Net(nn.Module):
    """Patches of 4 x 4, one attention `attend(self, q, k, v)` of (B, H, N, K) each -> (B, H, N, Kv), and a head."""

    def __init__(self, attend, heads=HEADS):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.qkv = nn.Conv2d(3, HEADS * WIDTH, 4, 4), nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.head, self.attend, self.heads = nn.Linear(HEADS * WIDTH, 5), attend, heads

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.given = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        z = self.out = self.attend(self, q, k, v)
        return self.head(z.transpose(1, 2).flatten(2).mean(1))


class Wrapped(nn.Module):
    """Patches as tokens (B, 16, 32) into `inner`."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.inner = nn.Conv2d(3, HEADS * WIDTH, 4, 4), inner

    def forward(self, images):
        return self.inner(self.patches(images).flatten(2).transpose(1, 2))


def vit(**settings):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": HEADS, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes | settings).eval()


def images(batch=BATCH, size=16):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def plain(q, k, scale=None, mask=None):
    """softmax(q k^T scale + mask) in float64, term by term."""
    scores = torch.einsum("...nk,...mk->...nm", q.double(), k.double()) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    e = (scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0)).exp()
    return (e / e.sum(-1, keepdim=True)).nan_to_num()


def seen(model, x=None, **given):
    """The pass, and for each call (name, number, route), its map, and copies of some of its fields."""
    calls = []

    def see(call):
        copies = {side: getattr(call, side).clone() for side in ("q", "k", "v", "output") if getattr(call, side) is not None}
        fields = {name: getattr(call, name) for name in ("route", "kind", "error", "layout", "assignment", "inserted", "scale")}
        calls.append({"key": (call.name, call.call_index), "map": call.map(), **copies, **fields})

    return watch(model, images() if x is None else x, see, **given), calls


def stance():
    """What the compiler was told to do, as it says itself."""
    return str(torch._dynamo.eval_frame._stance)


def residue(model):
    """What a tap has to leave as it was: hooks of all modules, the compiler's stance, modes, training flags, random state."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    kinds += ("_forward_hooks_always_called",)
    hooks = [[list(getattr(module, kind)) for kind in kinds] for module in model.modules()]
    training = [module.training for module in model.modules()]
    return hooks, stance(), _get_current_function_mode_stack(), training, torch.get_rng_state().tolist()


# --- fused route ------------------------------------------------------------------------------------------------------


def sdpa(**given):
    return lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, **given)


TRIANGLE = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
BIAS = torch.randn(1, HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2))
HOLES = torch.rand(BATCH, 1, 1, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.7
EMPTY = TRIANGLE.clone().index_fill(0, torch.tensor([5]), False)
MINUS = torch.zeros(TOKENS, TOKENS).masked_fill(~EMPTY, -math.inf)


@pytest.mark.parametrize(
    ("given", "mask"),
    [
        ({}, None),
        ({"scale": 0.3}, None),
        ({"is_causal": True}, TRIANGLE),
        ({"attn_mask": TRIANGLE}, TRIANGLE),
        ({"attn_mask": BIAS}, BIAS),
        ({"attn_mask": HOLES}, HOLES),
        ({"attn_mask": EMPTY}, EMPTY),
        ({"attn_mask": MINUS}, EMPTY),
    ],
    ids=["plain", "scale", "causal", "bool", "float", "keys per image", "row masked in full", "the same with -inf"],
)
def test_fused_maps_equal_the_formula(given, mask):
    net = Net(lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, **limited(given, len(q)))).eval()
    with torch.no_grad():
        before = net(images())
    found, (call,) = seen(net)
    q, k, v = net.given
    assert torch.equal(found.output, before)
    assert (call["route"], call["kind"], found.refused) == ("fused", "token", [])
    torch.testing.assert_close(call["map"][:, 0].double(), plain(q, k, given.get("scale"), mask), atol=1e-6, rtol=1e-5)
    for name, expected in (("q", q), ("k", k), ("v", v), ("output", net.out)):
        assert torch.equal(call[name][:, 0], expected), name
    assert call["error"] < 1e-6


def limited(given, batch):
    """Settings for a batch: a mask that has one row per image is cut to it."""
    return {key: value[:batch] if key == "attn_mask" and len(value) == BATCH else value for key, value in given.items()}


def test_causal_attention_of_fewer_queries_is_aligned_top_left():
    net = Net(lambda net, q, k, v: F.scaled_dot_product_attention(q[:, :, :5], k, v, is_causal=True))
    _, (call,) = seen(net)
    q, k, _ = net.given
    torch.testing.assert_close(call["map"][:, 0].double(), plain(q[:, :, :5], k, mask=TRIANGLE[:5]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_fewer_key_heads_serve_several_query_heads(groups):
    given = {"enable_gqa": True} if groups > 1 else {}
    net = Net(lambda net, q, k, v: F.scaled_dot_product_attention(q, k[:, :groups], v[:, :groups], **given))
    _, (call,) = seen(net)
    q, k, v = net.given
    wide_k, wide_v = (torch.repeat_interleave(x[:, :groups], HEADS // groups, dim=1) for x in (k, v))
    torch.testing.assert_close(call["map"][:, 0].double(), plain(q, wide_k), atol=1e-6, rtol=1e-5)
    assert torch.equal(call["k"][:, 0], wide_k)
    assert torch.equal(call["v"][:, 0], wide_v)


def test_heads_folded_into_the_batch_come_apart():
    def folded(net, q, k, v):
        return F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view_as(v)

    net = Net(folded)
    _, (call,) = seen(net)
    assert call["map"].shape == (BATCH, 1, HEADS, TOKENS, TOKENS)
    torch.testing.assert_close(call["map"][:, 0].double(), plain(*net.given[:2]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("inside", ["batch", "batch and heads", "axis"])
def test_windows_are_told_from_heads(inside, written):
    """Two windows, the upper and the lower half of the image, as an axis of its own (5-D) or within the batch."""

    def windows(net, q, k, v):
        q, k, v = (x.unflatten(2, (2, -1)) for x in (q, k, v))  # (B, H, W, n, K)
        if inside != "axis":
            q, k, v = (x.transpose(1, 2).flatten(0, 1 if inside == "batch" else 2) for x in (q, k, v))
        z = (q @ k.mT * WIDTH**-0.5).softmax(-1) @ v if written else F.scaled_dot_product_attention(q, k, v)
        return (z if inside == "axis" else z.view(-1, 2, HEADS, *z.shape[-2:]).transpose(1, 2)).flatten(2, 3)

    net = Net(windows)
    _, (call,) = seen(net)
    q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in net.given)
    assert torch.equal(call["q"], q)
    assert torch.equal(call["k"], k)
    assert torch.equal(call["v"], v)
    torch.testing.assert_close(call["map"].double(), plain(q, k), atol=1e-6, rtol=1e-5)
    assert (call["layout"].windows, call["layout"].heads, call["layout"].grid) == (2, HEADS, (4, 4))


@pytest.mark.parametrize("written", [False, True])
def test_queries_may_share_a_place(written):
    def first(net, q, k, v):
        q = q[:, :, :1].expand(-1, -1, 3, -1)
        return (q @ k.mT).softmax(-1) @ v if written else F.scaled_dot_product_attention(q, k, v)

    _, (call,) = seen(Net(first))
    assert torch.allclose(call["layout"].queries, torch.tensor([2.0, 2.0], dtype=torch.float64).expand(1, 3, 2), atol=1e-3)
    assert call["layout"].key_grid == (4, 4)


def test_a_planted_map_is_found_at_its_places():
    """Every query looks at the patch one row below, and nowhere else; softmax and fused route, one image and several."""
    below = torch.eye(TOKENS).roll(4, dims=1)  # row n: one at n + 4

    def planted(net, q, k, v):
        k = (0 * k[..., :1] + torch.eye(TOKENS)) * 60
        q = 0 * q[..., :1] + below
        if net.written:
            return (q @ k.mT).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    net = Net(planted)
    for net.written in (False, True):
        for batch in (1, 2):
            _, (call,) = seen(net, images(batch))
            layout = call["layout"]
            torch.testing.assert_close(call["map"], below.expand_as(call["map"]), atol=1e-6, rtol=0)
            moved = call["map"].double() @ layout.keys - layout.queries
            assert torch.allclose(moved[..., :12, :], torch.tensor([4.0, 0.0], dtype=torch.float64), atol=1e-3)


# --- PyTorch's own attention modules ----------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, need_weights, **settings):
        super().__init__()
        self.attention, self.need = nn.MultiheadAttention(HEADS * WIDTH, HEADS, **settings), need_weights
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x):
        x = x if self.attention.batch_first else x.transpose(0, 1)
        z, self.weights = self.attention(x, x, x, need_weights=self.need, average_attn_weights=False)
        return z


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_on_both_routes(need_weights, batch_first):
    model = Wrapped(SelfAttention(need_weights, batch_first=batch_first))
    with torch.no_grad():
        before = model.eval()(images())
    found, (call,) = seen(model)
    assert call["key"] == ("inner.attention", 0)
    assert call["route"] == ("softmax" if need_weights else "fused")
    assert call["layout"].heads == HEADS
    with torch.no_grad():
        model.inner.need = True
        model(images())
    torch.testing.assert_close(call["map"][:, 0], model.inner.weights, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.output, before, atol=1e-6, rtol=1e-5)  # the fast path rounds otherwise


def test_the_fast_path_of_the_encoder_cannot_hide_its_maps():
    layer = nn.TransformerEncoderLayer(HEADS * WIDTH, HEADS, 64, batch_first=True)
    model = Wrapped(nn.TransformerEncoder(layer, 2)).eval()
    with torch.no_grad():
        before = model(images())
    found, calls = seen(model)
    assert [call["key"][0] for call in calls] == ["inner.layers.0.self_attn", "inner.layers.1.self_attn"]
    torch.testing.assert_close(found.output, before, atol=1e-5, rtol=1e-5)


def test_cross_attention_of_latent_queries():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True)
            self.query = nn.Parameter(torch.randn(1, 2, HEADS * WIDTH))

        def forward(self, x):
            return self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0]

    _, (call,) = seen(Wrapped(Pool()))
    assert call["map"].shape == (BATCH, 1, HEADS, 2, TOKENS)
    assert (call["layout"].grid, call["layout"].key_grid, call["layout"].prefix) == (None, (4, 4), 2)


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_both_settings_of_timms_switch_show_the_same(fused):
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        before = model(images())
    found, calls = seen(model)
    assert torch.equal(found.output, before)
    assert [call["key"] for call in calls] == [(f"blocks.{i}.attn", 0) for i in range(3)]
    assert {call["route"] for call in calls} == {"fused" if fused else "softmax"}
    for call, block in zip(calls, model.blocks, strict=True):
        block.attn.fused_attn = True
        assert call["layout"].prefix == 1
        assert call["layout"].grid == (4, 4)
    for call, other in zip(calls, seen(model)[1], strict=True):
        torch.testing.assert_close(call["map"], other["map"], atol=1e-6, rtol=1e-5)


def test_talking_heads_of_cait():
    torch.manual_seed(0)
    model = timm.create_model("cait_xxs24_224", img_size=64, depth=2, depth_token_only=1, embed_dim=32, num_heads=HEADS).eval()
    marks = []
    found = watch(model, images(2, 64), lambda call: marks.append((call.mixed, call.stochastic, call.route)))
    with torch.no_grad():
        assert torch.equal(found.output, model(images(2, 64)))
    assert marks == [(True, False, "softmax")] * 2 + [(False, True, "fused")]


def test_windows_of_swin_and_the_name_of_its_softmax():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval()
    found, calls = seen(model, images(2, 32))
    assert [call["key"][0] for call in calls] == [f"layers.{i}.blocks.{j}.attn" for i in range(2) for j in range(2)]
    assert [call["map"].shape[:3] for call in calls] == [(2, 16, 2), (2, 16, 2), (2, 4, 4), (2, 4, 4)]
    assert found.refused == []


@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "a part"])
def test_compiled_models_run_as_they_were_written(way):
    model = whole = vit()
    with torch.no_grad():
        before = model(images())
    if way == "torch.compile":
        whole = torch.compile(model, backend="eager")
    elif way == "model.compile":
        model.compile(backend="eager")
    else:
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    found, calls = seen(whole)
    assert torch.equal(found.output, before)
    assert [call["key"] for call in calls] == [(f"blocks.{i}.attn", 0) for i in range(3)]


def test_a_module_called_twice_is_told_apart_by_number():
    model = vit(depth=1)
    block = model.blocks[0]
    model.blocks = nn.Sequential(block, block)
    ends = []
    _, calls = seen(model, on_output=lambda name, number, output: ends.append((name, number)))
    assert [call["key"] for call in calls] == [("blocks.0.attn", 0), ("blocks.0.attn", 1)]
    assert [end for end in ends if end[0] == "blocks.0"] == [("blocks.0", 0), ("blocks.0", 1)]
    assert ends[-1] == ("", 0)


def test_only_the_named_ends_are_told_of_and_nothing_else_changes():
    """Named are a leaf of PyTorch, which has hooks for that alone, and a block."""
    model, everything, named = vit(), [], []
    whole = seen(model, on_output=lambda *end: everything.append(end))[1]
    before = residue(model)
    few = seen(model, on_output=lambda *end: named.append(end), outputs={"blocks.1.attn.qkv", "blocks.0"})[1]
    assert residue(model) == before
    assert [end[:2] for end in named] == [("blocks.0", 0), ("blocks.1.attn.qkv", 0)]
    outputs = {end[:2]: end[2] for end in everything}
    assert {"", "blocks.0", "blocks.1.attn.qkv", "blocks.2.attn", "head"} <= {name for name, _ in outputs}
    for name, number, output in named:
        assert torch.equal(output, outputs[name, number])
    assert [call["key"] for call in few] == [call["key"] for call in whole]
    assert all(torch.equal(a["map"], b["map"]) for a, b in zip(few, whole, strict=True))


def test_calls_with_the_same_places_share_one_layout():
    layouts = trace(vit(), images())
    found = [layouts.calls[f"blocks.{i}.attn", 0].layout for i in range(3)]
    assert found[0] is not None
    assert found[1] is found[0]
    assert found[2] is found[0]
    assert found[0].keys is found[0].queries


def test_calls_with_other_places_do_not_share():
    """Between a plain block and the next, half the tokens are left out, and in the last two turned round."""
    model = vit(depth=4)
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0][:, :9],))
    model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    layouts = trace(model, images())
    first, half, turned, last = (layouts.calls[f"blocks.{i}.attn", 0].layout for i in range(4))
    assert first.queries.shape[1] == 17
    torch.testing.assert_close(half.queries, first.queries[:, :9], equal_nan=True)
    torch.testing.assert_close(turned.queries, half.queries.flip(1), equal_nan=True)
    assert last is turned
    assert turned is not half


def test_outputs_of_modules_and_their_layouts():
    model, outputs = vit(), {}
    layouts = trace(model, images())
    watch(model, images(), lambda call: None, layouts=layouts, on_output=lambda *end: outputs.setdefault(end[:2], end[2]))
    with torch.no_grad():
        expected = model.forward_features(images())
    torch.testing.assert_close(outputs["norm", 0], expected, atol=0, rtol=0)
    assert (layouts.outputs["blocks.1", 0].grid, layouts.outputs["blocks.1", 0].prefix) == ((4, 4), 1)
    assert layouts.outputs["patch_embed.proj", 0].grid == (4, 4)  # (1, D, h, w)
    assert ("head", 0) not in layouts.outputs


def test_batches_share_the_layouts_of_one_trace():
    model = vit()
    layouts = trace(model, images())
    together = seen(model, images(4), layouts=layouts)[1]
    apart = [seen(model, images(4)[i : i + 2], layouts=layouts)[1] for i in (0, 2)]
    for whole, *parts in zip(together, *apart, strict=True):
        torch.testing.assert_close(whole["map"], torch.cat([part["map"] for part in parts]), atol=1e-6, rtol=1e-5)


def test_half_precision_and_autocast_give_float32_rows():
    model = vit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, calls = seen(model)
    for call in calls:
        assert call["map"].dtype == torch.float32
        torch.testing.assert_close(call["map"].sum(-1), torch.ones(call["map"].shape[:-1]), atol=1e-5, rtol=0)
        assert call["error"] < 1e-2
    _, calls = seen(model.double(), images().double())
    assert all(call["map"].dtype == torch.float32 and call["error"] < 1e-6 for call in calls)


# --- grafted models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mechanism",
    [EViT(layers="0+1"), TokenMerging(), SPC(), ExtraTokens(), SVDA(), GaussianMask()],
    ids=lambda mechanism: mechanism.name,
)
def test_grafted_models_say_which_token_speaks_for_which_place(mechanism):
    model = vit()
    vitreous.graft(model, mechanism)
    states = [None]
    handles = [b.register_forward_hook(lambda m, a, out: states.append(getattr(out, "state", None))) for b in model.blocks]
    with torch.no_grad():
        before = model.eval()(images())
    for handle in handles:
        handle.remove()
    found, calls = seen(model)
    assert torch.equal(found.output, before)
    blocks = [call for call in calls if call["key"][0].startswith("blocks")]
    assert len(blocks) == 3
    for call, state in zip(blocks, states, strict=False):
        assignment = None if state is None else state.assignment
        assert (call["assignment"] is None) == (assignment is None)
        assert assignment is None or torch.equal(call["assignment"].index, assignment.index)
        if mechanism.name != "extra_tokens":
            assert call["inserted"] == (0 if state is None else state.inserted)


def test_queries_are_those_that_enter_the_product():
    model = vit()
    vitreous.graft(model, SVDA())
    given = []
    attention = model.blocks[1].attn
    handle = attention.register_forward_hook(lambda m, args, kwargs, out: given.append((args, kwargs)), with_kwargs=True)
    _, calls = seen(model)
    handle.remove()
    with torch.no_grad():
        _, (q, k, _) = attention.attend(*given[-1][0], **given[-1][1])
    assert torch.equal(calls[1]["q"][:, 0], q)
    assert torch.equal(calls[1]["k"][:, 0], k)


# --- hygiene ----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind():
    model = vit(drop_rate=0.5)
    model.train()
    model.blocks[1].eval()
    fired = []
    model.blocks[0].register_forward_hook(lambda *_: fired.append(1))
    before = residue(model)
    seen(model)
    assert residue(model) == before
    assert len(fired) == 2  # the traced pass and this one


class Failing(nn.Module):
    def forward(self, x):
        raise ValueError("from the model")


def test_nothing_is_left_behind_after_an_error_in_the_model():
    model = vit().train()
    model.blocks[1].mlp = Failing()
    before = residue(model)
    with pytest.raises(ValueError, match="from the model"):
        seen(model)
    assert residue(model) == before


def test_nothing_is_left_behind_after_an_error_in_the_callback():
    model = vit().train()
    before = residue(model)

    def see(call):
        raise KeyError("from the callback")

    with pytest.raises(KeyError, match="from the callback"):
        watch(model, images(), see)
    assert residue(model) == before


def test_names_are_right_after_an_error_that_the_model_catches():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Sequential(Failing()), SelfAttention(False, batch_first=True)

        def forward(self, x):
            try:
                return self.first(x)
            except ValueError:
                return self.second(x)

    _, calls = seen(Wrapped(Careful()))
    assert [call["key"] for call in calls] == [("inner.second.attention", 0)]


def test_the_random_state_is_as_before():
    class Random(nn.Module):
        def forward(self, x):
            return x + 0 * torch.rand(1)

    model = vit()
    model.norm = Random()
    before = torch.get_rng_state()
    seen(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fused", [True, False])
def test_no_tensor_of_an_attention_is_kept(fused, monkeypatch):
    """At each attention, what the one before was made of is gone; after the pass, all of it."""
    model, refs, alive = vit(), [], []
    for block in model.blocks:
        block.attn.fused_attn = fused
    take = Capture.attention

    def attention(self, running, raw):
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        refs.extend(weakref.ref(x) for x in (raw, raw.q[0], raw.k[0], raw.v, raw.output))
        take(self, running, raw)

    def see(call):
        refs.extend(weakref.ref(x) for x in (call, call.maps, call.q, call.k, call.v, call.output))
        refs.extend(weakref.ref(block) for _, block in call.rows())

    monkeypatch.setattr(Capture, "attention", attention)
    found = watch(model, images(), see)
    assert found.output.shape == (BATCH, 5)
    del found
    gc.collect()
    assert alive == [0, 0, 0]
    assert [ref for ref in refs if ref() is not None] == []


def test_rows_come_in_one_buffer():
    model, places = vit(), set()

    def see(call):
        for rows, block in call.rows(size=4):
            assert block.shape == (BATCH, 1, HEADS, rows.stop - rows.start, 17)
            places.add(block.untyped_storage().data_ptr())
        whole = call.map()
        torch.testing.assert_close(torch.cat([block.clone() for _, block in call.rows(size=5)], 3), whole, atol=1e-7, rtol=1e-5)

    watch(model, images(), see)
    assert len(places) == 1


def test_a_map_cannot_be_read_after_its_call():
    kept = []
    watch(vit(), images(), kept.append)
    with pytest.raises(HostError, match="after its call"):
        next(kept[0].rows())


def test_a_tap_within_a_tap_is_seen_once():
    """An outer tap sees the calls of the inner model, and none of the inner tap's own."""
    model, inner = vit(), []
    layouts = trace(model, images())

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            given = layouts if len(x) == BATCH else trace(self.model, x)
            return watch(self.model, x, lambda call: inner.append((call.name, call.map().sum())), layouts=given).output

    outer = Watching()
    _, calls = seen(outer, layouts=Layouts())
    assert [call["key"] for call in calls] == [(f"model.blocks.{i}.attn", 0) for i in range(3)]
    assert [name for name, _ in inner] == [f"blocks.{i}.attn" for i in range(3)]
    assert _get_current_function_mode_stack() == []


def test_another_pass_in_the_callback():
    model, other, names = vit(), vit(depth=1), []
    watch(model, images(), lambda call: names.append((call.name, len(seen(other, images(2))[1]), float(call.map().sum()))))
    assert [name[:2] for name in names] == [(f"blocks.{i}.attn", 1) for i in range(3)]
    assert all(math.isclose(total, BATCH * HEADS * 17, rel_tol=1e-5) for *_, total in names)


def test_the_same_model_in_a_second_thread_is_left_alone():
    model, names, outputs = vit(), [], []
    with torch.no_grad():
        expected = model(images(2))

    def see(call):
        names.append(call.name)
        with torch.no_grad():
            thread = threading.Thread(target=lambda: outputs.append(model(images(2)).detach()))
            thread.start()
            thread.join()

    watch(model, images(), see)
    assert names == [f"blocks.{i}.attn" for i in range(3)]
    assert all(torch.equal(output, expected) for output in outputs)
    assert len(outputs) == 3


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.device("cpu"), torch.enable_grad])
def test_contexts_around_the_pass(around):
    model = vit()
    with around():
        found, calls = seen(model)
    assert len(calls) == 3
    assert not found.output.requires_grad


def test_activation_checkpointing_shows_each_call_once():
    model = vit()
    model.set_grad_checkpointing()
    _, calls = seen(model)
    assert len(calls) == 3


def test_memory_stays_near_the_plain_pass_on_a_large_image():
    """A ViT-Tiny of two blocks at 1024 x 1024 (4,097 tokens): whole maps of one block would take 0.2 GiB and more."""
    script = f"""
import resource, sys, torch, timm
from vitreous.lens.tap import watch
torch.set_num_threads(1)
model = timm.create_model("vit_tiny_patch16_224", img_size=1024, depth=2).eval()
x = torch.randn(1, 3, 1024, 1024)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / {2**30 if sys.platform == "darwin" else 2**20}
with torch.no_grad():
    model(x)
before, total = peak(), []
watch(model, x, lambda call: total.extend(float(block.sum()) for _, block in call.rows()))
assert len(total) == 34 and abs(sum(total) - 2 * 3 * 4097) < 1, (len(total), sum(total))
print(peak() - before)
"""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.15, done.stdout  # GiB


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [torch.zeros(3, 8, 8), torch.zeros(0, 3, 8, 8), "cat.jpg"])
def test_images_have_a_batch_axis(given):
    with pytest.raises(DataError, match="Add the batch axis"):
        watch(vit(), given, print)


@pytest.mark.filterwarnings("ignore")
def test_scripted_modules_are_refused_before_anything_runs():
    model = vit()
    model.blocks[1].mlp = torch.jit.trace(model.blocks[1].mlp, torch.randn(1, 17, 32))
    before = residue(model)
    with pytest.raises(HostError, match=r"blocks\.1\.mlp is a TopLevelTracedModule"):
        seen(model)
    assert residue(model) == before


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_no_visible_call_made_are_refused():
    double = torch.jit.script(lambda_free_double)
    for detour in (double, lambda x: torch.from_numpy(x.numpy() * 2)):
        net = Net(sdpa())
        net.patches = nn.Sequential(net.patches, Detour(detour), nn.Identity())
        with pytest.raises(HostError, match="no visible call made"):
            seen(net)


def lambda_free_double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Detour(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return self.way(x) + 0


def test_tensors_that_a_model_keeps_are_no_orphans():
    constant = torch.randn(HEADS, 1, 1)  # of the code around it, out of reach

    class Caching(nn.Module):
        """A table made in an earlier pass and kept in a plain dict, as LeViT has it."""

        def __init__(self):
            super().__init__()
            self.tables = {"sizes": {16: torch.randn(1, TOKENS, 1)}}

        def forward(self, x):
            return x + self.tables["sizes"][16] + constant

    net = Net(sdpa())
    net.act = Caching()
    net.attend = lambda net, q, k, v: F.scaled_dot_product_attention(net.act(q), k, v)
    assert len(seen(net)[1]) == 1


def test_vmap_is_refused():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = vit()

        def forward(self, x):
            return torch.vmap(lambda image: self.model(image[None])[0])(x)

    with pytest.raises(HostError, match=r"torch\.vmap"):
        seen(Mapped())


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_is_refused_with_another_way():
    from torch.nn.attention.flex_attention import flex_attention

    with pytest.raises(HostError, match=r"flex_attention does not show .*set_attn_implementation\('sdpa'\)"):
        seen(Net(lambda net, q, k, v: flex_attention(q, k, v)))


@torch.library.custom_op("vitreous_test::attention", mutates_args=())
def foreign(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def test_kernels_of_other_packages_are_refused_by_name():
    with pytest.raises(HostError, match="vitreous_test::attention does not show"):
        seen(Net(lambda net, q, k, v: torch.ops.vitreous_test.attention(q, k, v)))
    found, calls = seen(Net(lambda net, q, k, v: F.scaled_dot_product_attention(q, k, foreign(q, k, v))))
    assert len(calls) == 1
    assert [refusal.reason for refusal in found.refused] == [
        "the kernel vitreous_test::attention does not show what it computes"
    ]


def test_a_pass_in_another_thread_is_refused():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = vit()

        def forward(self, x):
            out = []
            thread = threading.Thread(target=lambda: out.append(self.model(x)))
            thread.start()
            thread.join()
            return out[0]

    with pytest.raises(NotReached, match="No call of Elsewhere arrived"):
        seen(Elsewhere())


def test_dropout_that_eval_mode_does_not_stop_is_refused():
    with pytest.raises(HostError, match=r"dropout 0\.5 is on"):
        seen(Net(sdpa(dropout_p=0.5)))


def test_models_without_attention_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(HostError, match="Sequential showed no attention map, and no softmax"):
        seen(model)


def test_a_map_that_does_not_give_the_output_is_refused(monkeypatch):
    fused = capture_pass.fused_attention
    monkeypatch.setattr(capture_pass, "fused_attention", lambda *given: replace(fused(*given), scale=0.5))
    with pytest.raises(HostError, match="its map is off by"):
        seen(vit())


def test_a_batch_that_is_no_axis_is_refused():
    def packed(net, q, k, v):
        """All images in one long sequence."""
        q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).unflatten(2, (-1, TOKENS))[0].transpose(0, 1)

    assert len(seen(Net(packed), images(1))[1]) == 1
    with pytest.raises(HostError, match="is the batch of 3"):
        seen(Net(packed))


# --- leading axes -----------------------------------------------------------------------------------------------------


def test_an_arrangement_brings_factors_into_order():
    """One axis of batch, windows and heads, another of heads and windows: against an explicit loop."""
    arrangement = Arrangement((((2, "B"), (3, "W"), (2, "H")), ((2, "H"), (2, "W"))))
    x = torch.randn(12, 4, 5, 6)
    merged = arrangement.merge(x)
    assert arrangement.groups == (2, 6, 4)
    assert merged.shape == (2, 6, 4, 5, 6)
    for b in range(2):
        for w in range(3):
            for h in range(2):
                for other_h in range(2):
                    for other_w in range(2):
                        own = x[(b * 3 + w) * 2 + h, other_h * 2 + other_w]
                        assert torch.equal(merged[b, w * 2 + other_w, h * 2 + other_h], own)
