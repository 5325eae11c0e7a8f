"""GGeM against its formula as loops, its limits, and what reaches it on each kind of host."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva

from vitreous import SPC, ExtraTokens, GGeM, check, graft, new_parameters, ungraft
from vitreous.base.errors import GraftError, HostError, NotReached, SettingError
from vitreous.hosts.read_out import read_out
from vitreous.mechanisms.head.ggem import PowerMean, power_mean

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL | kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def images(count=2):
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pool(*exponents, prefix=0):
    return PowerMean(torch.tensor(exponents, dtype=torch.float64), prefix)


def by_loops(x, exponents):
    """x (N, D) as nested lists: per channel (mean of max(x, 1e-6)^p)^(1/p), p of the channel's group."""
    size = len(x[0]) // len(exponents)
    out = []
    for c in range(len(x[0])):
        p = exponents[c // size]
        out.append((sum(max(row[c], 1e-6) ** p for row in x) / len(x)) ** (1 / p))
    return torch.tensor(out, dtype=torch.float64)


def test_equals_the_formula():
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    exponents = (0.5, 1.0, 3.0, 7.5)
    expected = torch.stack([by_loops(image, exponents) for image in x.tolist()])
    assert (pool(*exponents)(x) - expected).abs().max() < 1e-12


def test_limits():
    """p = 1: the mean; p large: the maximum; p small: the geometric mean; one group: GeM; D groups: GeM per channel."""
    x = torch.rand(2, 9, 6, dtype=torch.float64) + 0.1
    assert torch.allclose(pool(1.0)(x), x.mean(1), rtol=1e-12)
    assert torch.allclose(pool(1e5)(x), x.amax(1), rtol=1e-4)
    assert torch.allclose(pool(0.01)(x), x.log().mean(1).exp(), rtol=0.01)
    assert torch.allclose(pool(4.0)(x), x.pow(4).mean(1).pow(0.25), rtol=1e-12)
    exponents = torch.linspace(0.5, 5, 6, dtype=torch.float64)
    assert torch.allclose(pool(*exponents)(x), torch.stack([pool(p)(x)[:, c] for c, p in enumerate(exponents)], 1), rtol=1e-12)


def test_laws():
    """Homogeneous, blind to the order of tokens, and monotone in p (the power-mean inequality)."""
    x = torch.rand(2, 9, 6, dtype=torch.float64) + 0.1
    made = pool(2.5, 0.7)
    assert torch.allclose(made(3.7 * x), 3.7 * made(x), rtol=1e-12)
    assert torch.allclose(made(x[:, torch.randperm(9)]), made(x), rtol=1e-12)
    means = torch.stack([pool(p)(x) for p in (0.05, 0.5, 1.0, 2.0, 5.0, 40.0)])
    assert (means.diff(dim=0) > 0).all()
    assert (means >= x.amin(1)).all()
    assert (means <= x.amax(1)).all()


def test_gradients():
    """Of features and exponents, against finite differences, with clamped features among them."""
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[1.5], [3.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, p: power_mean(x.unflatten(-1, (2, 2)), p), (x, p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_negative_and_extreme_features_stay_finite(dtype):
    """Clamped features count as 1e-6; where the plain formula overflows, x^p = 1e400, ours does not."""
    x = torch.tensor([[[-3.0, 1e4], [-1.0, 1e-4], [-2.0, 0.0]]], dtype=dtype, requires_grad=True)
    made = PowerMean(torch.tensor([100.0, 100.0]), 0)
    out = made(x)
    assert out.dtype == dtype
    assert math.isclose(out[0, 1].item(), 1e4 * 3**-0.01, rel_tol=0.01)
    assert 0 <= out[0, 0].item() <= 1.1e-6
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[..., 0].any()
    assert made.exponent.grad.isfinite().all()


def test_an_exponent_below_its_least_is_held():
    x = torch.rand(1, 5, 4, dtype=torch.float64)
    assert torch.equal(pool(-3.0)(x), pool(0.01)(x))


def test_brings_one_parameter_per_group():
    for groups, expected in ((None, 3), (1, 1), (24, 24)):
        new = new_parameters(graft(vit(), GGeM(groups=groups)))
        assert list(new) == ["attn_pool.exponent"]
        assert new["attn_pool.exponent"].tolist() == [3.0] * expected


HOSTS = {
    "class": vit,
    "registers": lambda: vit(reg_tokens=2),
    "mean": lambda: vit(global_pool="avg"),
    "maximum": lambda: vit(global_pool="max"),
    "no pooling": lambda: vit(global_pool=""),
    "no class token": lambda: vit(class_token=False, global_pool="avg"),
    "pools the prefix": lambda: vit(global_pool="avg", pool_include_prefix=True),
    "rotary": lambda: Eva(**SMALL, use_rot_pos_emb=True, num_reg_tokens=2).double().eval(),
    "rotary, class": lambda: Eva(**SMALL, global_pool="token").double().eval(),
}


@pytest.mark.parametrize("name", HOSTS)
def test_patches_alone_are_pooled_and_the_norm_stays_where_it_is(name):
    """norm, power mean of the patches, fc_norm, head: one of the two norms is the identity, as the host has it."""
    model, x = HOSTS[name](), images()
    before = model(x)
    prefix = model.num_prefix_tokens
    graft(model, GGeM(start=2.0))
    features = model.forward_features(x)
    patches = features[:, prefix:].clamp(min=1e-6)
    by_hand = model.head(model.fc_norm(patches.square().mean(1).sqrt()))
    assert (model(x) - by_hand).abs().max() < 1e-12
    assert (model.forward_head(features, pre_logits=True) - model.fc_norm(patches.square().mean(1).sqrt())).abs().max() < 1e-12
    ungraft(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("ggem_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"global_pool": "avg", "pool_include_prefix": True}])
def test_inserted_tokens_are_read_into_the_patches_in_either_order(options, ggem_first):
    """SPC's tokens move the patches by their share of the mean, behind `norm`, and GGeM pools what it then finds."""
    model, x, ggem, spc = vit(**options), images(), GGeM(start=2.0), SPC(after=2)
    before = graft(model, spc)(x)
    closing = model.norm.heads, model.norm.pooled
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda _m, _a, out: seen.append(out.x))
    model(x)
    handle.remove()
    if ggem_first:
        ungraft(model)
        graft(model, ggem, spc)
    else:
        graft(model, ggem)
    check(model, x)
    tokens = model.norm.host.forward(model.norm, seen[0])  # (B, 1 + 16 + 4, D)
    patches = read_out(tokens[:, :17], tokens[:, 17:], slice(1, None), pooled=True)[:, 1:].clamp(min=1e-6)
    by_hand = model.head(model.fc_norm(patches.square().mean(1).sqrt()))
    assert (model(x) - by_hand).abs().max() < 1e-12
    ungraft(model)
    if not ggem_first:
        assert (model.norm.heads, model.norm.pooled) == closing
        assert torch.equal(model(x), before)


def test_new_classes_keep_the_pool_and_a_change_of_pooling_is_noticed():
    model = graft(vit(), GGeM())
    model.reset_classifier(7)
    check(model.double(), images())
    model.reset_classifier(7, "token")
    with pytest.raises(NotReached, match="attn_pool was replaced after grafting"):
        check(model.double(), images())


def test_bad_input():
    for text, found in (({"groups": 5}, "groups=5 for features of width 24"), ({"groups": 48}, "groups=48")):
        with pytest.raises(SettingError, match=rf"Found {found}.*Expected a divisor.*1, 2, 3, 4, 6, 8, 12, 24\."):
            graft(vit(), GGeM(**text))
    for wrong in ({"groups": 0}, {"start": 0.0}, {"start": -1.0}, {"start": float("inf")}):
        with pytest.raises(SettingError, match=f"Found {next(iter(wrong))}=.* Expected .* Give such"):
            GGeM(**wrong)
    with pytest.raises(HostError, match=r"AttentionPoolLatent, a pool with weights.*reset_classifier\(classes, 'avg'\)"):
        graft(vit(global_pool="map"), GGeM())
    with pytest.raises(HostError, match="forward_head of its own, which never calls attn_pool"):
        graft(VisionTransformerDistilled(**SMALL), GGeM())
    model = graft(vit(), GGeM())
    with pytest.raises(GraftError, match=r"already holds PowerMean.*vitreous\.ungraft"):
        graft(model, GGeM(groups=1))


def test_the_advice_for_attention_pools_works():
    model = vit(global_pool="map")
    model.reset_classifier(5, "avg")
    check(graft(model.double(), GGeM(), ExtraTokens()), images())
    ungraft(model, all=True)
    assert model.attn_pool is None
