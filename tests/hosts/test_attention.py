"""Attention in four steps: bit-equal to every host's own, and each step open to be overridden."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, DiffAttention, LayerNorm
from timm.models.eva import EvaAttention
from torch import nn

from vitreous.hosts.attention import HOSTS, Attention, masked, query_key_weights
from vitreous.layers.linear import Linear
from vitreous.layers.stream import PLAIN as NO_STATE
from vitreous.layers.stream import TokenState

B, N, D, HEADS, PREFIX = 2, 9, 24, 3, 1
PLAIN = partial(TimmAttention, D, HEADS, norm_layer=LayerNorm)
ROPE = partial(AttentionRope, D, HEADS, norm_layer=LayerNorm, num_prefix_tokens=PREFIX)
EVA = partial(EvaAttention, D, HEADS, norm_layer=LayerNorm, num_prefix_tokens=PREFIX)

VARIANTS = {
    "plain": partial(PLAIN, qkv_bias=True),
    "no_bias": partial(PLAIN, qkv_bias=False, proj_bias=False),
    "qk_norm": partial(PLAIN, qkv_bias=True, qk_norm=True),
    "scale_norm": partial(PLAIN, qkv_bias=True, scale_norm=True),
    "gated": partial(PLAIN, qkv_bias=True, gated=True),
    "own_head_width": partial(PLAIN, attn_head_dim=10, dim_out=16),
    "rope": ROPE,
    "rope_split": partial(ROPE, qkv_fused=False),
    "rope_half": partial(ROPE, rotate_half=True, qk_norm=True, scale_norm=True, gated=True),
    "rope_grouped": partial(ROPE, qkv_fused=False, num_kv_heads=1, qk_norm=True),
    "eva": partial(EVA, scale_norm=False),
    "eva_bias_apart": partial(EVA, qkv_bias_separate=True),
    "eva_split": partial(EVA, qkv_fused=False, rotate_half=True),
    "eva_no_bias": partial(EVA, qkv_bias=False, qk_norm=True, gated=True),
}
FULL, LOWER = torch.ones(N, N, dtype=torch.bool), torch.ones(N, N, dtype=torch.bool).tril()
MASKS = {
    "none": {},
    "boolean": {"attn_mask": LOWER},
    "heads": {"attn_mask": LOWER.expand(B, 1, N, N)},
    "additive": {"attn_mask": torch.linspace(-2, 2, N * N).view(N, N)},
    "causal": {"is_causal": True},
}


def host_attention(variant: str, fused: bool = True, **options) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = VARIANTS[variant](**options)
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.normal_(std=0.3)
    attention.fused_attn = fused
    return attention.eval()


def inputs(attention: nn.Module) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, N, D, generator=generator)
    if getattr(attention, "host", type(attention)) is TimmAttention:
        return (x,)
    angle = torch.randn(N - PREFIX, attention.head_dim, generator=generator)
    return x, torch.cat([angle.sin(), angle.cos()], dim=-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_equals_the_host_bit_for_bit(variant, fused, mask):
    host = host_attention(variant, fused)
    ours, given = Attention.of(host), inputs(host)
    keywords = MASKS[mask] if len(given) == 1 else {"rope": given[1], **MASKS[mask]}
    assert torch.equal(ours(given[0], **keywords), host(given[0], **keywords))
    if mask == "none" and len(given) == 2:
        assert torch.equal(ours(given[0]), host(given[0]))  # without rope


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", ["plain", "rope_half", "eva"])
def test_dropout_draws_what_the_host_draws(variant, fused):
    host = host_attention(variant, fused, attn_drop=0.3, proj_drop=0.2).train()
    outputs = []
    for attention in (host, Attention.of(host)):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            outputs.append(attention(*inputs(host)))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], host.eval()(*inputs(host)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_and_names_are_the_hosts(variant):
    host = host_attention(variant)
    ours = Attention.of(host)
    assert list(ours.state_dict()) == list(host.state_dict())
    assert [id(p) for p in ours.parameters()] == [id(p) for p in host.parameters()]
    grads = []
    for attention in (host, ours):
        attention.zero_grad()
        attention(*inputs(host)).square().sum().backward()
        grads.append([p.grad.clone() for p in attention.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_attend_returns_is_what_was_scored(variant):
    """softmax(scale q k^T) v of the returned triple, merged, is the output."""
    host = host_attention(variant)
    ours = Attention.of(host)
    x, *rope = inputs(host)
    out, (q, k, v) = ours.attend(x, *rope)
    assert q.shape == k.shape == v.shape == (B, HEADS, N, host.head_dim)
    z = torch.einsum("bhij,bhjk->bhik", (host.scale * torch.einsum("bhik,bhjk->bhij", q, k)).softmax(-1), v)
    torch.testing.assert_close(ours.merge(z, x), out, atol=1e-5, rtol=1e-5)


def test_adopting_ours_again_keeps_the_host_class():
    host = host_attention("rope")
    assert Attention.of(Attention.of(host)).host is AttentionRope
    assert DiffAttention not in HOSTS


class Doubled(Attention):
    """Scores times two, so never by the fused kernel."""

    def scores(self, q, k, state=NO_STATE):
        return 2 * super().scores(q, k, state)


class Uniform(Attention):
    def normalize(self, scores, state=NO_STATE):
        return torch.where(scores.isneginf(), 0.0, 1.0) / (~scores.isneginf()).sum(-1, keepdim=True)


def test_an_override_is_used_whatever_the_kernel():
    host = host_attention("plain")
    doubled, uniform = Doubled.of(host), Uniform.of(host)
    assert not doubled.softmax_of_product
    assert not uniform.softmax_of_product
    assert Attention.of(host).softmax_of_product
    x = inputs(host)[0]
    sharper = host_attention("plain")
    with torch.no_grad():  # twice the queries give twice the scores
        sharper.qkv.weight[:D] *= 2
        sharper.qkv.bias[:D] *= 2
    torch.testing.assert_close(doubled(x), sharper(x), atol=1e-5, rtol=1e-5)
    _, (_, _, v) = uniform.attend(x, is_causal=True)
    mean = v.cumsum(2) / torch.arange(1, N + 1)[:, None]
    torch.testing.assert_close(uniform(x, is_causal=True), uniform.merge(mean, x), atol=1e-5, rtol=1e-5)


def test_masks_mean_the_same():
    scores = torch.randn(B, HEADS, N, N, generator=torch.Generator().manual_seed(2))
    minus = torch.zeros(N, N).masked_fill(~LOWER, float("-inf"))
    by_flag = masked(scores, None, True)
    assert torch.equal(by_flag, masked(scores, LOWER, False))
    assert torch.equal(by_flag, masked(scores, minus, False))
    assert torch.equal(masked(scores, FULL, False), scores)
    assert masked(scores, None, False) is scores


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cls", [Attention, Doubled, Uniform])
def test_a_query_whose_keys_are_all_hidden_gets_nothing(variant, cls):
    """As in the fused kernel: 0 before the merge, with finite gradients, whoever computes it."""
    ours = cls.of(host_attention(variant))
    mask = LOWER.clone()
    mask[4] = False
    for hiding in (mask, torch.zeros(N, N).masked_fill(~mask, float("-inf"))):
        outputs = []
        for fused in (True, False):
            ours.fused_attn = fused
            x, *rope = inputs(ours)
            out = ours(x.requires_grad_(), *rope, attn_mask=hiding)
            _, (_, _, v) = ours.attend(x, *rope)
            torch.testing.assert_close(out[:, 4], ours.merge(torch.zeros_like(v), x)[:, 4], atol=1e-6, rtol=1e-6)
            (gradient,) = torch.autograd.grad(out.sum(), x)
            assert gradient.isfinite().all()
            outputs += [(out, gradient)]
        for fused, written_out in zip(*outputs, strict=True):
            torch.testing.assert_close(fused, written_out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["plain", "no_bias", "own_head_width", "rope_split", "eva", "eva_bias_apart", "eva_split"])
def test_query_and_key_weights(variant):
    host = host_attention(variant)
    x = inputs(host)[0]
    q, k, _ = Attention.of(host).project(x)
    w_q, b_q, w_k, b_k = query_key_weights(host)
    for projected, weight, bias in ((q, w_q, b_q), (k, w_k, b_k)):
        ours = x @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(ours.unflatten(-1, (HEADS, -1)).transpose(1, 2), projected, atol=1e-5, rtol=1e-5)


# -- biases ------------------------------------------------------------------------------------------------------------


class Windowed(Attention):
    """-inf beyond two tokens, and a bias per head and image from the tokens themselves."""

    def biases(self, x, q, k, state=NO_STATE):
        at = torch.arange(N)
        near = torch.zeros(N, N).masked_fill((at - at[:, None]).abs() > 2, float("-inf"))
        return (near + x[:, None, :, :1] * torch.arange(1, HEADS + 1)[:, None, None],)


class Averaged(Attention):
    """Two biases, whose outcomes are averaged."""

    def biases(self, x, q, k, state=NO_STATE):
        return torch.zeros(N, N).masked_fill(~LOWER, float("-inf")), torch.zeros(N, N).masked_fill(LOWER.mT, -3.0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cls", [Windowed, Averaged])
@pytest.mark.parametrize("variant", ["plain", "eva"])
def test_a_bias_is_added_to_the_scores_and_keeps_the_fused_kernel(cls, variant, mask, monkeypatch):
    host = host_attention(variant)
    ours, (x, *rope) = cls.of(host), inputs(host)
    assert ours.softmax_of_product
    assert ours.wants_state
    q, k, v = ours.project(x)
    if rope:
        q, k = ours.rotate(q, rope[0]), ours.rotate(k, rope[0])
    total = 0
    biases = ours.biases(x, q, k)
    for bias in biases:
        scores = host.scale * torch.einsum("bhik,bhjk->bhij", q, k) + bias
        total = total + masked(scores, MASKS[mask].get("attn_mask"), "is_causal" in MASKS[mask]).softmax(-1) @ v
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or fused(*args, **kw)
    )
    keywords = MASKS[mask] | ({"rope": rope[0]} if rope else {})
    torch.testing.assert_close(ours(x, **keywords), ours.merge(total / len(biases), x), atol=1e-5, rtol=1e-5)
    assert len(calls) == len(biases)
    ours.fused_attn = False
    torch.testing.assert_close(ours(x, **keywords), ours.merge(total / len(biases), x), atol=1e-5, rtol=1e-5)


class Asking(Attention):
    """Every step is told the state."""

    def project(self, x, state=NO_STATE):
        self.told.append(state)
        return super().project(x, state)

    def biases(self, x, q, k, state=NO_STATE):
        self.told.append(state)
        return super().biases(x, q, k, state)

    def scores(self, q, k, state=NO_STATE):
        self.told.append(state)
        return super().scores(q, k, state)

    def normalize(self, scores, state=NO_STATE):
        self.told.append(state)
        return super().normalize(scores, state)

    def merge(self, z, x, state=NO_STATE):
        self.told.append(state)
        return super().merge(z, x, state)


def test_every_step_gets_the_state():
    host = host_attention("plain")
    ours, state, x = Asking.of(host), TokenState(read_out=(True,)), inputs(host)[0]
    ours.told = []
    torch.testing.assert_close(ours(x, state=state), host(x), atol=1e-6, rtol=1e-6)
    assert len(ours.told) == 5
    assert all(told is state for told in ours.told)
    assert not Attention.of(host).wants_state
    assert Uniform.of(host).wants_state


# -- adapters ----------------------------------------------------------------------------------------------------------


class LowRank(Linear):
    def initialise(self):
        generator = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(0.3 * torch.randn(2, self.in_features, generator=generator))
        self.up = nn.Parameter(0.3 * torch.randn(self.out_features, 2, generator=generator))
        return self

    def effective_weight(self):
        return self.weight + self.up @ self.down


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_in_any_linear_layer(variant):
    """Whatever linear layer an adapter stands in, our attention computes with the merged weight."""
    host = host_attention(variant)
    linears = {name for name, child in host.named_children() if isinstance(child, nn.Linear)}
    expected = {"qkv"} if host.qkv is not None else {"q_proj", "k_proj", "v_proj"}
    assert linears == expected | {"proj"} | ({"gate"} if host.gate is not None else set())
    for child in sorted(linears):
        merged, ours = host_attention(variant), Attention.of(host_attention(variant))
        setattr(ours, child, LowRank.of(getattr(ours, child)).initialise())
        with torch.no_grad():
            layer = getattr(merged, child)
            layer.weight.copy_(LowRank.of(layer).initialise().effective_weight())
        given = inputs(host)
        torch.testing.assert_close(ours(*given), merged(*given), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours(*given), host(*given), atol=1e-3)
        for found, wanted in zip(query_key_weights(ours), query_key_weights(merged), strict=True):
            assert (found is None) is (wanted is None)
            if found is not None:
                torch.testing.assert_close(found, wanted)


def test_the_hosts_eva_attention_is_taken_at_what_it_computes():
    """timm's class takes `qkv.weight` around an adapter, so that is what its queries are made with; ours calls `qkv`."""
    host = host_attention("eva")
    weight = host.qkv.weight
    host.qkv = LowRank.of(host.qkv).initialise()
    assert torch.equal(query_key_weights(host)[0], weight.chunk(3)[0])
    assert not torch.equal(query_key_weights(Attention.of(host))[0], weight.chunk(3)[0])
