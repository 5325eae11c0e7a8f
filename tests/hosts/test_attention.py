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
    if isinstance(attention, TimmAttention):
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

    def scores(self, q, k, *state):
        return 2 * super().scores(q, k, *state)


class Uniform(Attention):
    def normalize(self, scores):
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


@pytest.mark.parametrize("variant", ["plain", "no_bias", "own_head_width", "rope_split", "eva", "eva_bias_apart", "eva_split"])
def test_query_and_key_weights(variant):
    host = host_attention(variant)
    x = inputs(host)[0]
    q, k, _ = Attention.of(host).project(x)
    w_q, b_q, w_k, b_k = query_key_weights(host)
    for projected, weight, bias in ((q, w_q, b_q), (k, w_k, b_k)):
        ours = x @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(ours.unflatten(-1, (HEADS, -1)).transpose(1, 2), projected, atol=1e-5, rtol=1e-5)
