"""Tokens-to-token against its formulas as loops, the limit of many directions, and its neighbours in a model."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitreous import TokensToToken, check, graft, new_parameters, ungraft
from vitreous.base.errors import DataError, GraftError, SettingError
from vitreous.mechanisms.embed.tokens_to_token import (
    TokenBlock,
    TokenProjection,
    orthogonal_directions,
    performer,
    random_features,
    split,
)

SMALL = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
TEXT = "tokens_to_token:width=6,features=4"


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | {"reg_tokens": 1} | options).double().eval()


def pictures(height=16, width=24):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def drawn(*shape, seed=2):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_split_takes_overlapping_windows(stride):
    """Window (r, c) is centred on its stride x stride cell; channels first, then rows, then columns."""
    x = drawn(2, 3, 3 * stride, 2 * stride)
    tokens, side = split(x, stride), 2 * stride - 1
    assert tokens.shape == (2, 6, 3 * side**2)
    for r in range(3):
        for c in range(2):
            for channel in range(3):
                for i in range(side):
                    for j in range(side):
                        y, z = r * stride - stride // 2 + i, c * stride - stride // 2 + j
                        inside = 0 <= y < 3 * stride and 0 <= z < 2 * stride
                        expected = x[0, channel, y, z] if inside else 0.0
                        assert tokens[0, 2 * r + c, channel * side**2 + side * i + j] == expected


def test_performer_is_the_papers_formula():
    q, k, v, w = drawn(1, 5, 4), drawn(1, 5, 4, seed=3), drawn(1, 5, 4, seed=4), drawn(3, 4, seed=5)

    def phi(x):
        square = sum(value**2 for value in x)
        return [math.exp(sum(a * b for a, b in zip(row, x, strict=True)) - square / 2) / math.sqrt(3) for row in w.tolist()]

    queries, keys = ([phi(row) for row in x[0].tolist()] for x in (q, k))
    for n in range(5):
        weights = [sum(a * b for a, b in zip(queries[n], keys[m], strict=True)) for m in range(5)]
        expected = sum(weight * v[0, m] for m, weight in enumerate(weights)) / (sum(weights) + 1e-8)
        torch.testing.assert_close(performer(q, k, v, w)[0, n], expected, atol=1e-12, rtol=1e-12)


def test_many_directions_are_softmax_attention():
    """The mean of phi(q) phi(k) is exp(q k), so the performer tends to softmax(q k^T) v without a scale."""
    q, k, v = 0.5 * drawn(1, 6, 4), 0.5 * drawn(1, 6, 4, seed=3), drawn(1, 6, 4, seed=4)
    w = drawn(60_000, 4, seed=5)
    expected = (q @ k.mT).softmax(-1) @ v
    assert (performer(q, k, v, w) - expected).abs().max() < 0.02
    assert (performer(q, k, v, w[:4]) - expected).abs().max() > 0.1
    kernel = random_features(q, w) @ random_features(k, w).mT
    torch.testing.assert_close(kernel, (q @ k.mT).exp(), atol=0, rtol=0.05)


def test_directions_are_orthogonal_of_length_root_m_and_lean_nowhere():
    generator, like = torch.Generator().manual_seed(0), torch.empty(5, 9)
    draws = torch.stack([orthogonal_directions(like, generator) for _ in range(200)])
    torch.testing.assert_close(draws @ draws.mT, (5 * torch.eye(5)).expand(200, 5, 5), atol=1e-5, rtol=0)
    assert draws.mean((0, 1)).abs().max() < 0.1  # standard error 0.024


@pytest.mark.parametrize("kind", ["performer", "softmax"])
def test_block_is_the_formula(kind):
    block, x = TokenBlock(10, kind, 6, 4, 0.3, dtype=torch.float64).eval(), drawn(2, 5, 10)
    if kind == "performer":
        block.directions = drawn(4, 6)
    bias = 0 if block.kqv.bias is None else block.kqv.bias
    k, q, v = (nn.functional.layer_norm(x, (10,)) @ block.kqv.weight.T + bias).chunk(3, -1)
    z = performer(q, k, v, block.directions) if kind == "performer" else (q @ k.mT / math.sqrt(10)).softmax(-1) @ v
    y = v + z @ block.proj.weight.T + block.proj.bias
    expected = y + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(nn.functional.layer_norm(y, (6,)))))
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=1e-12)
    nn.init.zeros_(block.proj.weight)
    assert (block(x) - expected).abs().max() > 0.01  # attention takes part


def test_patches_of_a_host_are_those_of_the_steps():
    model, x = vit(), pictures()
    graft(model, TEXT)
    proj = model.patch_embed.proj
    assert proj.strides == (2, 2, 2)
    first = proj.steps[0](split(x, 2)).mT.unflatten(2, (8, 12))
    second = proj.steps[1](split(first, 2)).mT.unflatten(2, (4, 6))
    last = split(second, 2) @ proj.project.weight.T + proj.project.bias
    assert first.shape == (2, 6, 8, 12)
    torch.testing.assert_close(model.patch_embed(x), last, atol=1e-12, rtol=1e-12)


def test_numbers_on_the_papers_patches():
    """224 px: 3136, 784 and 196 tokens; on ViT-S/16 what the released module of 384 features has."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
    new = new_parameters(graft(model, TokensToToken()))
    steps = [(147, 64), (576, 64)]
    expected = sum(2 * c + 3 * 64 * (c + 1) + 64 * 65 + 2 * 64 + 2 * 64 * 65 for c, _ in steps) + 577 * 384
    assert sum(p.numel() for p in new.values()) == expected
    proj = TokenProjection(3, 8, width=4, features=2)
    counts = []
    for step in (*proj.steps, proj.project):
        step.register_forward_hook(lambda module, args, out: counts.append(out.shape[1]))
    assert proj(torch.zeros(1, 3, 224, 224)).shape == (1, 8, 14, 14)
    assert counts == [3136, 784, 196]


def test_every_part_moves_the_patches():
    model, x = graft(vit(), TEXT), pictures()
    for parameter in new_parameters(model).values():
        nn.init.normal_(parameter, std=0.5)
    before = model.patch_embed(x)
    for name, tensor in {**new_parameters(model), **dict(model.named_buffers())}.items():
        kept = tensor.detach().clone()
        tensor.data.zero_()
        change = (model.patch_embed(x) - before).abs().max()
        assert change > 1e-4, name
        tensor.data.copy_(kept)


@pytest.mark.parametrize("other", ["gaussian_mask", "svda", "spc:after=1", "evit:layers=0,keep=0.5", "token_merging:tokens=1"])
def test_stacks_in_both_orders(other):
    plain, answers = vit()(pictures()), []
    for order in ((TEXT, other), (other, TEXT)):
        model = check(graft(vit(), *order), pictures())
        answers.append(model(pictures()))
        ungraft(model, all=True)
        assert torch.equal(model(pictures()), plain)
    torch.testing.assert_close(*answers, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("order", [(TEXT, "channelvit"), ("channelvit", TEXT), (TEXT, TEXT)])
def test_patches_are_made_once(order):
    model = graft(vit(), order[0])
    before = model(pictures())
    with pytest.raises(GraftError, match=r"^patch_embed(\.proj)? .*would undo\. Expected .*Take"):
        graft(model, order[1])
    assert torch.equal(model(pictures()), before)


def test_other_sizes():
    model = graft(vit(dynamic_img_size=True), TEXT)
    assert model(pictures(40, 8)).isfinite().all()
    assert graft(vit(dynamic_img_size=True, dynamic_img_pad=True), TEXT)(pictures(13, 21)).isfinite().all()
    with pytest.raises(DataError, match=r"^Found images of 24 x 20 pixels\. Expected sides that are multiples of 8"):
        model.patch_embed.proj(pictures(20, 24))


def test_bad_settings():
    for settings in ({"width": 4}, {"features": 0}, {"dropout": 1.0}, {"strides": (0, 4)}, {"strides": ()}):
        with pytest.raises(SettingError, match=r"^Found .*Expected"):
            TokensToToken(**settings)
    with pytest.raises(SettingError, match=r"^Found strides=4\+2\+2 for patches of 8 x 8"):
        graft(vit(), "tokens_to_token:strides=4+2+2")
    with pytest.raises(SettingError, match=r"^Found patches of 6 x 6 pixels and no strides"):
        graft(vit(patch_size=6, img_size=24), TEXT)
    assert graft(vit(patch_size=6, img_size=24), f"{TEXT},strides=3+2")(pictures(24, 24)).isfinite().all()
