"""SPC against the formula by scipy's SVD, the laws of permutation and rotation, the read-out, and every setting."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch.nn import functional as F

from vitreous import SPC, ExtraTokens, check, graft, ungraft
from vitreous.base.errors import HostError, SettingError
from vitreous.layers.stream import TokenState
from vitreous.mechanisms.tokens.spc import Components, learned_sketch, mixing

RANDOM = torch.Generator().manual_seed(0)


def vit(**kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **settings | kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def tokens(batch=2, count=17, width=24):
    """Token matrices with well separated singular values."""
    x = torch.randn(batch, count, width, dtype=torch.float64, generator=RANDOM)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u * (10.0 / 1.7 ** torch.arange(min(count, width))) @ vh


def made(x, **settings):
    return Components(SPC(**settings), x.shape[-1], (0, 1), False).double().spc_tokens(x)


def test_tokens_are_singular_values_times_right_vectors():
    """U^T X = S V^T (A.3), with scipy's SVD as the oracle; signs apart."""
    x = tokens()
    found = made(x)
    for b in range(2):
        _, s, vh = scipy.linalg.svd(x[b].numpy(), full_matrices=False)
        expected = s[:4, None] * vh[:4]
        signs = np.sign((found[b].numpy() * expected).sum(1, keepdims=True))
        assert np.abs(found[b].numpy() - signs * expected).max() < 1e-6


@pytest.mark.parametrize("sign", ["mean", "class", "sum"])
@pytest.mark.parametrize("rows", ["raw", "unit"])
def test_permuted_patches_give_the_same_tokens_and_rotated_features_rotated_ones(sign, rows):
    x = tokens()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16, generator=RANDOM)])
    rotation = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=RANDOM))[0]
    settings = {"sign": sign, "rows": rows, "sketch": (13, 4, False)}  # a sketch as wide as the tokens: exact
    found = made(x, **settings)
    assert (made(x[:, order], **settings) - found).abs().max() < 1e-9
    assert (made(x @ rotation, **settings) - found @ rotation).abs().max() < 1e-9


def test_signs_do_not_depend_on_the_sketch_or_on_the_sign_of_nothing():
    """Flipping all features flips the tokens with them: the weights of the tokens, U, stay."""
    x = tokens()
    assert (made(-x) + made(x)).abs().max() < 1e-9
    assert (made(x, sketch=(13, 0, False)) - made(x, sketch=(9, 6, False))).abs().max() < 1e-6


def test_after_the_last_block_equals_a_manual_computation():
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.blocks(model._pos_embed(model.patch_embed(images)))
    spatial = made(x)
    by_hand = model.norm(torch.cat([x[:, :1], spatial], dim=1)).mean(1)
    graft(model, SPC(after=3))
    assert (model(images) - model.head(by_hand)).abs().max() < 1e-9


def test_in_the_middle_equals_a_manual_computation():
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.blocks[0](model._pos_embed(model.patch_embed(images)))
    x = model.blocks[1:](torch.cat([x, made(x)], dim=1))
    x = model.norm(x)
    by_hand = model.head(torch.cat([x[:, :1], x[:, 17:]], dim=1).mean(1))
    graft(model, SPC(after=1))
    assert (model(images) - by_hand).abs().max() < 1e-9


def test_average_pooled_host_takes_the_mean_over_patches_and_spc_tokens():
    model = vit(global_pool="avg", fc_norm=False)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.blocks(model._pos_embed(model.patch_embed(images)))
    x = model.norm(torch.cat([x, made(x)], dim=1))
    by_hand = model.head(x[:, 1:].mean(1))
    graft(model, SPC(after=3))
    assert (model(images) - by_hand).abs().max() < 1e-9
    assert model.forward_features(images).shape == (2, 17, 24)


def test_distilled_host_reads_into_both_of_its_tokens():
    torch.manual_seed(0)
    model = VisionTransformerDistilled(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    model = model.double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.norm(model.blocks(model._pos_embed(model.patch_embed(images))))
    graft(model, SPC(after=2))
    moved = model.forward_features(images) - x
    assert moved[:, 0].norm() > 0.1
    assert moved[:, 1].norm() > 0.1
    assert moved[:, 2:].abs().max() == 0


@pytest.mark.parametrize("after", [1, 2, 3])
def test_gated_starts_as_the_identity_and_learns(after):
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(images)
    graft(model, SPC(after=after, read="gated"))
    check(model, images)
    assert torch.equal(model(images), before)
    model(images).square().sum().backward()
    gate = model.blocks[after - 1].after[0].gate
    assert gate.shape == (4, 24)
    assert (gate.grad.abs().sum(1) > 0).all()
    gate.data.fill_(0.1)
    assert (model(images) - before).abs().max() > 1e-6


@pytest.mark.parametrize(("basis", "columns"), [("svd", slice(0, 4)), ("trailing", slice(-4, None))])
def test_squared_loadings_are_a_weighted_mean_without_a_sign(basis, columns):
    """t_i = sum_j u_ji^2 x_j, with scipy's SVD as the oracle, whose signs are other ones."""
    x = tokens()
    squared = made(x, sign="squared", basis=basis)
    for b in range(2):
        u = scipy.linalg.svd(x[b].numpy(), full_matrices=False)[0][:, columns]
        assert np.abs(squared[b].numpy() - (u**2).T @ x[b].numpy()).max() < 1e-6
    random = [made(values, sign="squared", basis="random") for values in (x, x + 1)]
    assert (random[1] - random[0] - 1).abs().max() < 1e-9  # the weights sum to 1


@pytest.mark.parametrize("sign", ["mean", "squared"])
def test_learned_tokens_start_as_extra_tokens_and_take_in_components_by_a_gate(sign):
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    graft(model, ExtraTokens(after=2))
    plain = model(images)
    ungraft(model)
    graft(model, SPC(after=2, sign=sign, read="learned"))
    step = model.blocks[1].after[0]
    assert torch.equal(model(images), plain)
    model(images).square().sum().backward()
    assert min(step.gate.grad.abs().max(), step.learned.grad.abs().max()) > 0
    torch.nn.init.normal_(step.gate, generator=torch.Generator().manual_seed(1))
    opened, gate, learned = model(images), step.gate.detach().clone(), step.learned.detach().clone()
    ungraft(model)
    x = model.blocks[:2](model._pos_embed(model.patch_embed(images)))
    content = made(x, sign=sign)
    content = (content - content.mean(-1, keepdim=True)) / (content.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = model.norm(model.blocks[2](torch.cat([x, learned + gate * content], dim=1)))
    by_hand = model.head(torch.cat([x[:, :1], x[:, 17:]], dim=1).mean(1))
    assert (opened - by_hand).abs().max() < 1e-9
    assert (opened - plain).abs().max() > 1e-3


def test_ssva_starts_as_the_leading_components_and_mixes():
    x = tokens()
    step = Components(SPC(ssva=True), 24, (0, 1), False).double()
    plain = made(x, tokens=8)[:, :4]
    assert (step.spc_tokens(x) - plain).abs().max() < 1e-9
    step.mix.data.fill_(0.7)
    weights = mixing(step.choice, step.mix, x[:, 0], 8)
    assert weights.shape == (2, 4, 8)
    assert (weights.sum(-1) - 1).abs().max() < 1e-12
    assert weights.min() >= 0
    logits = F.layer_norm(x[0, 0], (24,)) @ step.choice.weight.T + step.choice.bias
    share = logits.reshape(4, 8).exp() / logits.reshape(4, 8).exp().sum(1, keepdim=True)
    row = 0.3 * torch.eye(4, 8, dtype=torch.float64) + 0.7 * share
    assert (weights[0] - row).abs().max() < 1e-12


@pytest.mark.parametrize("power", [0, 1])
def test_learned_sketch_gets_a_gradient_that_more_power_steps_shrink(power):
    def gradient(steps):
        step = Components(SPC(sketch=(0, min(steps, 1), True)), 24, (0, 1), False).double()
        if steps > 1:
            object.__setattr__(step.settings, "sketch", (0, steps, True))
        x = torch.randn(2, 17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x = x / (1 + torch.arange(24)) ** 0.5
        step.spc_tokens(x).square().sum().backward()
        return step.sketch.weight.grad.norm()

    assert gradient(power) > 0
    assert gradient(6) < 0.2 * gradient(power)


def test_learned_sketch_is_made_of_the_images_own_tokens():
    x = tokens()
    step = Components(SPC(sketch=(4, 1, True)), 24, (0, 1), False).double()
    sketch = learned_sketch(x, step.sketch)
    assert sketch.shape == (2, 24, 8)
    order = torch.randperm(17, generator=RANDOM)
    assert (learned_sketch(x[:, order], step.sketch) - sketch).abs().max() < 1e-10
    normed = F.layer_norm(x[0], (24,)) @ step.sketch.weight.T
    share = normed.exp() / normed.exp().sum(0)
    assert (sketch[0] - x[0].T @ share).abs().max() < 1e-10


def test_gradient_detach_and_through():
    """detach: dT = U^T dX, exactly; through: what finite differences say."""
    x = tokens(batch=1).requires_grad_()
    weights = torch.randn(4, 24, dtype=torch.float64, generator=RANDOM)
    (made(x) * weights).sum().backward()
    step = Components(SPC(), 24, (0, 1), False)
    u = step.basis(x.detach())
    assert (x.grad - u @ weights).abs().max() < 1e-8

    y = tokens(batch=1).requires_grad_()
    settings = {"gradient": "through", "sketch": (13, 2, False)}
    (made(y, **settings) * weights).sum().backward()
    direction = torch.randn(y.shape, dtype=torch.float64, generator=RANDOM)
    with torch.no_grad():
        h = 1e-5
        ahead, behind = ((made(y + e * h * direction, **settings) * weights).sum() for e in (1, -1))
    assert torch.isclose((y.grad * direction).sum(), (ahead - behind) / (2 * h), rtol=1e-3)


@pytest.mark.parametrize("gradient", ["detach", "through"])
@pytest.mark.parametrize("sketch", [(8, 2, False), (8, 1, True)])
def test_degenerate_images_give_finite_tokens_and_gradients(gradient, sketch):
    step = Components(SPC(gradient=gradient, sketch=sketch), 24, (0, 1), False)
    x = torch.zeros(4, 17, 24)
    x[1] = 3.0  # constant
    x[2, :, :2] = torch.randn(17, 2, generator=RANDOM)  # rank 2
    x[3] = torch.eye(17, 24)  # all singular values alike
    x.requires_grad_()
    out = step.spc_tokens(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert out[0].abs().max() == 0


def test_controls():
    x = tokens()
    mean = made(x, basis="mean", tokens=3)
    assert torch.allclose(mean, x.mean(1, keepdim=True).expand(-1, 3, -1))
    random = Components(SPC(basis="random"), 24, (0, 1), False).basis(x)
    assert (random.transpose(1, 2) @ random - torch.eye(4)).abs().max() < 1e-9
    assert torch.equal(random[0], random[1])
    trailing = Components(SPC(basis="trailing"), 24, (0, 1), False).basis(x)
    last = [np.abs(scipy.linalg.svd(x[b].numpy(), full_matrices=False)[0][:, -4:]) for b in range(2)]
    assert np.abs(trailing.abs().numpy() - np.stack(last)).max() < 1e-2  # s is down to 2e-3 of 10 there
    assert (trailing.transpose(1, 2) @ trailing - torch.eye(4)).abs().max() < 1e-6


def test_inserted_tokens_are_no_part_of_a_later_decomposition():
    step = Components(SPC(), 24, (0, 1), False).double()
    x = tokens()
    once, state = step(x, TokenState(), None)
    twice, state = step(once, state, None)
    assert state.read_out == (True,) * 8
    assert (twice[:, 17:21] - twice[:, 21:]).abs().max() < 1e-12


def test_default_place_is_one_before_the_last_block():
    model = graft(vit(), SPC())
    assert hasattr(model.blocks[1], "after")
    assert not hasattr(model.blocks[2], "after")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in vit().parameters())


def test_bad_input():
    with pytest.raises(SettingError, match=r"tokens=9.*components=8"):
        SPC(ssva=True, tokens=9)
    with pytest.raises(SettingError, match="2 power steps"):
        SPC(sketch=(8, 2, True))
    with pytest.raises(SettingError, match=r"after=4.*1 to 3"):
        graft(vit(), SPC(after=4))
    with pytest.raises(HostError, match=r"no class token, which spc:sign=class reads.*such as .*sign=mean"):
        graft(vit(class_token=False, global_pool="avg"), SPC(sign="class"))
    with pytest.raises(HostError, match="global_pool='max'"):
        graft(vit(global_pool="max"), SPC())
    with pytest.raises(HostError, match="is a timm Eva"):
        graft(timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1), SPC())


def test_real_model_gated_spc_keeps_the_reference_logits(shared_data):
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:4]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(images)
        graft(model, SPC(read="gated"))
        assert torch.equal(model(images), before)
        ungraft(model)
        graft(model, SPC())
        assert not torch.equal(model(images), before)
        ungraft(model)
        assert torch.equal(model(images), before)
