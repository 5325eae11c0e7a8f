"""Binary linear-angular attention against its sums as loops: threshold, straight-through gradient, order of products."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vitreous import LinearAngular, check, graft, new_parameters
from vitreous.base.errors import GraftError, SettingError
from vitreous.layers.stream import TokenState
from vitreous.layers.unit_norm import unit
from vitreous.mechanisms.mixer.linear_angular import angular, binary

SMALL = {"img_size": (12, 16), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | {"reg_tokens": 2} | options).double().eval()


def random(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixer(**settings):
    """A mixer of 24 channels with weights away from their small start, and a state of 2 x 4 patches and 3 prefix tokens."""
    module = graft(vit(), LinearAngular(**settings)).blocks[0].attn
    for i, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=i) / (5 if parameter.ndim > 1 else 3)
    return module, TokenState(grid=(2, 4), prefix=3)


def test_threshold_is_the_mean_of_a_head_of_an_image():
    x = unit(random(2, 3, 7, 4))
    x[1, 2] += 5  # of another image and head: it must not matter
    for b in range(2):
        for h in range(3):
            mean = sum(x[b, h].flatten().tolist()) / 28
            assert binary(x)[b, h].tolist() == [[float(value > mean) for value in row] for row in x[b, h].tolist()]
    released = (x > x.mean()).double()  # over the batch, as released: another image decides
    assert not torch.equal(released, binary(x))
    assert torch.equal(binary(x[:1]), binary(x)[:1])


def test_gradient_is_that_of_the_clamp():
    x = torch.tensor([-0.5, -1e-9, 1e-9, 0.3, 0.999, 1.5], dtype=torch.float64).view(1, 1, 6, 1).requires_grad_()
    (binary(x) * torch.arange(1.0, 7).view(6, 1)).sum().backward()
    assert x.grad.flatten().tolist() == [0, 0, 3, 4, 5, 0]
    q, k, v = (x.requires_grad_() for x in random(3, 2, 3, 7, 4).unbind(0))
    straight = torch.autograd.grad(angular(binary(q), binary(k), v).sin().sum(), (q, k, v))
    q_b, k_b = (binary(x).detach().requires_grad_() for x in (q, k))
    plain = torch.autograd.grad(angular(q_b, k_b, v).sin().sum(), (q_b, k_b, v))
    for got, through, x in zip(straight, plain, (q, k, None), strict=True):
        window = 1.0 if x is None else ((x > 0) & (x < 1)).double()
        assert (got - through * window).abs().max() < 1e-12
        assert through.abs().max() > 0.01


def test_keys_and_values_first_is_the_same():
    q, k, v = random(3, 2, 3, 50, 4).unbind(0)
    expected = v / 2 + (binary(q) @ binary(k).mT) @ v / math.pi
    assert (angular(binary(q), binary(k), v) - expected).abs().max() < 1e-12
    assert (expected - v / 2).abs().max() > 1


@pytest.mark.parametrize("groups", [1, 2])
def test_the_module_is_the_formula(groups):
    """Token by token; the convolution runs over the patches of a channel, not into other channels, prefix or inserted."""
    module, state = mixer(kernel=5)
    state = TokenState(grid=(2, 4), prefix=3, groups=groups, read_out=(True, True))
    n = 3 + 8 * groups + 2
    x = random(2, n, 24)
    q, k, v = (
        (x @ layer.weight.T + layer.bias).unflatten(-1, (3, 8)).transpose(1, 2)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    y = torch.zeros_like(v)
    for b in range(2):
        for h in range(3):
            q_h, k_h = (torch.stack([row / row.square().sum().sqrt() for row in rows[b, h]]) for rows in (q, k))
            q_h, k_h = (rows > rows.mean() for rows in (q_h, k_h))
            for i in range(n):
                row = 0.5 * v[b, h, i]
                for j in range(n):
                    row = row + (q_h[i] & k_h[j]).sum().double() / math.pi * v[b, h, j]
                row = row / row.square().sum().sqrt()
                y[b, h, i] = row
                start = 3 + 8 * ((i - 3) // 8)
                for t in range(-2, 3):
                    if 3 <= i < n - 2 and start <= i + t < start + 8:
                        y[b, h, i] += module.conv.weight[h, 0, t + 2, 0] * v[b, h, i + t]
    expected = module.proj(y.transpose(1, 2).flatten(2))
    out = module(x, state=state)
    assert (out - expected).abs().max() < 1e-12
    module.conv.weight.data.zero_()
    assert (module(x, state=state) - out).abs().max() > 0.01


def test_heads_have_length_one_before_the_convolution_and_the_class_token_sees_the_patches():
    module, state = mixer()
    module.conv.weight.data.zero_()
    module.proj.weight.data, module.proj.bias.data = torch.eye(24).double(), torch.zeros(24).double()
    x = random(1, 11, 24)
    out = module(x, state=state)
    assert (out.unflatten(-1, (3, 8)).square().sum(-1) - 1).abs().max() < 1e-12
    moved = x.clone()
    moved[:, 10] *= -2
    assert (module(moved, state=state) - out)[:, 0].abs().max() > 1e-3
    module.v_proj.bias.data.zero_()
    assert not module(0 * x, state=state).any()  # no value, no direction: 0 and not NaN


def test_parameters():
    """On the width of PVTv2-B0's first stage: four linears and a convolution of 9 per head."""
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=1)
    new = new_parameters(graft(model, LinearAngular()))
    assert sum(p.numel() for p in new.values()) == 12 * (4 * (32 * 32 + 32) + 9)


def test_the_recipe_of_the_paper_shift_layers_in_it():
    model, x = graft(vit(), "linear_angular", "shift_linear:linears=q_proj+k_proj+v_proj+proj+fc1+fc2"), random(2, 3, 12, 16)
    check(model, x)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.blocks[0].attn.parameters())


def test_bad_input():
    for kernel in (0, 4):
        with pytest.raises(SettingError, match=rf"kernel={kernel}\. Expected an odd number"):
            LinearAngular(kernel=kernel)
    with pytest.raises(SettingError, match=r"heads=7\. Expected a divisor of the width 24"):
        graft(vit(), LinearAngular(heads=7))
    with pytest.raises(GraftError, match="already holds LinearAngularMixer, a mixer"):
        graft(vit(), "linear_angular", "retention")
