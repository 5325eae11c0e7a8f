"""SVDA at the sizes it is timed at: the paper's formula in float64, gradients, both kernels, bf16, bad input, export."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from vitreous import SVDA, graft
from vitreous.layers.unit_norm import unit_rows_in_place
from vitreous.mechanisms.attn import svda
from vitreous.mechanisms.attn.svda import SpectralAttention

fused_attention = F.scaled_dot_product_attention

HOSTS = {"vit_tiny_patch16_224": (192, 3), "vit_small_patch16_224": (384, 6)}
TOKENS = (50, 145, 197)  # 145: where the CPU takes the product instead of the fused kernel, in training
EPS = torch.finfo(torch.float32).eps
timed = pytest.mark.parametrize(("host", "tokens"), [(host, tokens) for host in HOSTS for tokens in (50, 197)])
at_every_size = pytest.mark.parametrize(("host", "tokens"), [(host, tokens) for host in HOSTS for tokens in TOKENS])


@functools.lru_cache(maxsize=1)
def model_of(host: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(host, depth=1)
        with torch.no_grad():
            for parameter in model.parameters():  # weights of the size of trained ones, biases away from 0
                parameter.add_(0.05 * torch.randn_like(parameter))
    return graft(model, SVDA(scale="sqrt"))  # scores up to 8, so that attention is far from uniform


def attention_of(host: str) -> SpectralAttention:
    attention = model_of(host).blocks[0].attn
    attention.zero_grad()
    return attention


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(weights: SimpleNamespace, x: Tensor) -> Tensor:
    """The paper's attention (B.1) of one image x (N, D), head by head; zero rows stay zero."""
    heads, width = weights.sigma.shape
    parts = (x @ weights.qkv.T + weights.qkv_bias).unflatten(-1, (3, heads, width))
    out = []
    for h in range(heads):
        q, k, v = parts[:, 0, h], parts[:, 1, h], parts[:, 2, h]
        q, k = (row / row.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12) for row in (q, k))
        scores = weights.scale * (q @ torch.diag(weights.sigma[h]) @ k.T)
        odds = (scores - scores.amax(-1, keepdim=True)).exp()
        out.append(odds / odds.sum(-1, keepdim=True) @ v)
    return torch.cat(out, dim=-1) @ weights.proj.T + weights.proj_bias


def named(attention: SpectralAttention) -> dict[str, Tensor]:
    qkv, proj = attention.qkv, attention.proj
    return {"sigma": attention.sigma, "qkv": qkv.weight, "qkv_bias": qkv.bias, "proj": proj.weight, "proj_bias": proj.bias}


def wide(attention: SpectralAttention) -> SimpleNamespace:
    """The module's weights as leaves in float64."""
    leaves = {name: value.detach().double().requires_grad_() for name, value in named(attention).items()}
    return SimpleNamespace(**leaves, scale=attention.scale)


def truth(host: str, tokens: int, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Outputs (B, N, D) and input gradients of B = count images, and the weights' gradients."""
    weights = wide(attention_of(host))
    inputs, push = given(host, tokens)
    outs, grads = [], []
    for image in range(count):
        x = inputs[image].double().requires_grad_()
        out = formula(weights, x)
        (out * push[image].double()).sum().backward()
        outs.append(out.detach())
        grads.append(x.grad)
    return torch.stack(outs), torch.stack(grads), {name: w.grad for name, w in vars(weights).items() if name != "scale"}


@functools.lru_cache(maxsize=len(HOSTS) * len(TOKENS))
def truth16(host: str, tokens: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return truth(host, tokens, 16)


def given(host: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Inputs (64, N, D), and what the loss multiplies the outputs with."""
    width = HOSTS[host][0]
    return noise(64, tokens, width), noise(64, tokens, width, seed=1)


def near(found: Tensor, expected: Tensor, share: float) -> None:
    """The difference is at most a share of what is expected, in norm over all and, times four, in the largest entry."""
    difference = found.double() - expected
    assert difference.norm() <= share * expected.norm()
    assert difference.abs().max() <= 4 * share * expected.abs().max()


ROUNDING = 32 * EPS  # sums over up to 384 numbers, three deep; measured: up to 1.6e-6
LOW = 0.02  # five bf16 roundings of 2^-8; measured: 0.008


@pytest.mark.parametrize(
    ("host", "tokens", "count"), [(h, n, c) for h in HOSTS for n in TOKENS for c in (16, 64) if c == 16 or n != 145]
)
def test_outputs_and_gradients_are_those_of_the_formula(host, tokens, count):
    outs, grads, of_weights = truth16(host, tokens) if count == 16 else truth(host, tokens, count)
    attention, (x, push) = attention_of(host), given(host, tokens)
    with torch.no_grad():
        near(attention.eval()(x[:count]), outs[:count], ROUNDING)
    x = x[:count].requires_grad_()
    out = attention.train()(x)
    near(out, outs[:count], ROUNDING)
    (out * push[:count]).sum().backward()
    near(x.grad, grads[:count], ROUNDING)
    for name, parameter in named(attention).items():
        near(parameter.grad, of_weights[name], ROUNDING)


WAYS = {  # how the rows become unit ones, and which kernel follows
    "in place, fused": (False, False, True),
    "in place, written out": (False, True, True),
    "in plain operations, fused": (True, False, True),
    "in plain operations, written out": (True, True, True),
    "as the host asks, without a fused kernel": (False, False, False),
}


@pytest.mark.parametrize("way", WAYS)
@timed
def test_all_ways_are_the_formula(host, tokens, way, monkeypatch):
    hooked, written_out, fused = WAYS[way]
    outs, grads, of_weights = truth16(host, tokens)
    attention, (x, push) = attention_of(host).train(), given(host, tokens)
    monkeypatch.setattr(SpectralAttention, "written_out", lambda self, q: written_out)
    monkeypatch.setattr(attention, "fused_attn", fused)
    calls = []
    monkeypatch.setattr(svda, "unit_rows_in_place", lambda *given: calls.append(given) or unit_rows_in_place(*given))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append("fused") or fused_attention(*a, **k))
    handle = attention.qkv.register_forward_hook(lambda *_: None) if hooked else None  # whoever watches sees what qkv gave
    x = x[:16].requires_grad_()
    out = attention(x)
    if handle is not None:
        handle.remove()
    assert len(calls) == (not hooked) + (fused and not written_out)
    near(out, outs[:16], ROUNDING)
    (out * push[:16]).sum().backward()
    near(x.grad, grads[:16], ROUNDING)
    for name, parameter in named(attention).items():
        near(parameter.grad, of_weights[name], ROUNDING)


@timed
def test_bf16_autocast(host, tokens):
    outs, grads, of_weights = truth16(host, tokens)
    attention, (x, push) = attention_of(host).train(), given(host, tokens)
    x = x[:16].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(x)
        with torch.no_grad():
            near(attention.eval()(x), outs[:16], LOW)
    near(out, outs[:16], LOW)
    (out.float() * push[:16]).sum().backward()
    near(x.grad, grads[:16], LOW)
    for name, parameter in named(attention).items():
        near(parameter.grad, of_weights[name], LOW)


# --- degenerate input: a batch of eight ------------------------------------------------------------------------------


def scaled(attention: SpectralAttention, factor: float) -> SpectralAttention:
    """The same with queries and keys `factor` times as long, which the formula does not see."""
    longer = copy.deepcopy(attention)
    with torch.no_grad():
        for parameter in (longer.qkv.weight, longer.qkv.bias):
            parameter[: 2 * len(parameter) // 3] *= factor
    return longer


@pytest.mark.parametrize("learning", [False, True])
@at_every_size
def test_degenerate_images(host, tokens, learning):
    """Zero, constant, a few zero tokens and NaN beside sound images: each has the formula's outcome, whoever its mates are."""
    outs, _, _ = truth16(host, tokens)
    attention = copy.deepcopy(attention_of(host)).train(learning)
    weights, x = wide(attention), given(host, tokens)[0][:8].clone()
    x[1], x[2], x[3, ::3] = 0, 2.5, 0
    x[4, 7, 5] = float("nan")
    x.requires_grad_()
    with torch.set_grad_enabled(learning):
        out = attention(x)
    assert out[4].isnan().any()
    near(out[[0, 5, 6, 7]], outs[[0, 5, 6, 7]], ROUNDING)
    for image in (1, 2, 3):
        near(out[image], formula(weights, x[image].detach().double()).detach(), ROUNDING)
    if learning:
        out[[0, 1, 2, 3, 5, 6, 7]].square().sum().backward()
        assert x.grad[[0, 1, 2, 3, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("learning", [False, True])
@timed
def test_zero_queries_and_keys_attend_to_all_alike(host, tokens, learning):
    """Without biases, zero tokens make zero rows, and a head without queries has no preference: the mean over the values."""
    attention = copy.deepcopy(attention_of(host)).train(learning)
    width, heads = HOSTS[host]
    with torch.no_grad():
        attention.qkv.bias.zero_()
        attention.qkv.weight[: width // heads] = 0  # the first head's queries
    x = given(host, tokens)[0][:4].clone()
    x[1], x[2, 3] = 0, 0
    x.requires_grad_()
    with torch.set_grad_enabled(learning):
        out, (q, _, v) = attention.attend(x)
        bare = attention.merge(v.mean(2, keepdim=True).expand_as(v), x)
    assert q[:, 0].eq(0).all()
    near(out[1], bare[1].detach().double(), ROUNDING)  # all tokens are zero: nothing but the output's bias
    near(out[2, 3], bare[2, 3].detach().double(), ROUNDING)  # a zero token's own row of attention is uniform in every head
    for image in (0, 2, 3):
        near(out[image], formula(wide(attention), x[image].detach().double()).detach(), ROUNDING)
    if learning:
        out.square().sum().backward()
        assert x.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in named(attention).values())


@pytest.mark.parametrize("factor", [1e-9, 1e15])
@timed
def test_huge_and_tiny_rows(host, tokens, factor):
    outs, grads, _ = truth16(host, tokens)
    x, push = given(host, tokens)
    x = x[:2].requires_grad_()
    attention = scaled(attention_of(host), factor)
    out = attention(x)
    near(out, outs[:2], ROUNDING)
    (out * push[:2]).sum().backward()
    near(x.grad, grads[:2], ROUNDING)


# --- the whole model --------------------------------------------------------------------------------------------------


def test_exported_equals_eager():
    """At full size and depth, in batches of which none is the one it was exported with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = graft(timm.create_model("vit_tiny_patch16_224"), SVDA()).eval()
    images = noise(5, 3, 224, 224)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (images[:2],), dynamic_shapes=(batch,)).module()
    with torch.no_grad():
        for count in (3, 5):
            torch.testing.assert_close(program(images[:count]), model(images[:count]), atol=1e-4, rtol=0)
