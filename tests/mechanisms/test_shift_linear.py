"""Shift linear against the paper's formula as loops: exact powers of two, straight-through gradients, what is lossless."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from contract.hosts import HOSTS, build, images
from vitreous import ShiftLinear, check, graft, grafts, new_parameters, no_weight_decay, ungraft
from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.hosts.host import host_of
from vitreous.layers.linear import affine
from vitreous.mechanisms.linear.shift_linear import (
    RoundedLinear,
    ShiftedLinear,
    fixed_point,
    lowest,
    own_linears,
    powers,
    rounded,
    straight_through,
)
from vitreous.testing.hosts import LINEAR_HOSTS

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit():
    torch.manual_seed(0)
    return VisionTransformer(**SMALL).double().eval()


def random(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shifted(**settings):
    """A layer 6 -> 4 whose shifts and signs lie on both sides of every edge."""
    layer = ShiftedLinear.of(nn.Linear(6, 4).double())
    layer.initialise(ShiftLinear(**settings), torch.Generator().manual_seed(0))
    layer.shift.data = 9 * random(4, 6) - 7
    layer.sign.data = 1.5 * random(4, 6, seed=2)
    return layer


def by_hand(p, s, lo):
    """2^round(clamp(p, lo, 0)) * sign(round(s)) of two numbers; Python rounds halves to the even number, as torch does."""
    return math.copysign(2.0 ** round(min(max(p, lo), 0)), round(s)) if round(s) else 0.0


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_weight_is_the_papers_formula(bits):
    layer, lo = shifted(bits=bits), -(2 ** (bits - 1) - 2)
    weight = layer.effective_weight()
    numbers = zip(layer.shift.flatten().tolist(), layer.sign.flatten().tolist(), strict=True)
    assert weight.flatten().tolist() == [by_hand(p, s, lo) for p, s in numbers]
    assert {0.0} < set(weight.flatten().tolist())  # the sign is ternary
    assert lowest(bits) == lo


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_powers_are_exact(dtype):
    """In every precision, for every shift of eight bits, also after the surrogate of the gradient is added."""
    shift = torch.arange(-126, 1).to(dtype)
    expected = torch.tensor([2.0**k for k in range(-126, 1)], dtype=torch.float64)
    for sign in (-1.0, 1.0):
        weight = powers(shift, torch.full_like(shift, sign), 8)
        assert torch.equal(weight.double(), sign * expected)
        assert torch.equal(straight_through(weight, shift * math.pi), weight)


def test_gradients_are_the_papers():
    """dL/dshift = g W ln 2 and dL/dsign = g with g = dL/dW; x and bias as in any linear layer."""
    layer, x = shifted(), random(5, 6, seed=3).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    weight, g = layer.effective_weight().detach(), 2 * out.detach().T @ x.detach()
    assert torch.allclose(layer.sign.grad, g)
    assert torch.allclose(layer.shift.grad, g * weight * math.log(2))
    assert torch.allclose(x.grad, 2 * out.detach() @ weight)
    assert torch.allclose(layer.bias.grad, 2 * out.detach().sum(0))
    assert (layer.sign.grad[weight == 0] != 0).all()  # a weight of 0 can come back
    assert not layer.shift.grad[weight == 0].any()


def test_rounding_is_to_the_nearest_power_by_its_logarithm():
    weight = torch.tensor([0.0, 1.0, 5.0, -0.75, -0.7, 0.3, 2.0**-14, -(2.0**-15), 1e-9], dtype=torch.float64)
    assert rounded(weight, 5).tolist() == [0.0, 1.0, 1.0, -1.0, -0.5, 0.25, 2.0**-14, -(2.0**-14), 2.0**-14]
    layer = RoundedLinear.of(nn.Linear(6, 4).double())
    layer.initialise(ShiftLinear(form="q"), torch.Generator())
    x = random(5, 6)
    out = layer(x)
    out.square().sum().backward()
    assert torch.equal(layer.effective_weight(), rounded(layer.weight, 5))
    assert not torch.equal(layer.effective_weight(), layer.weight)
    assert torch.allclose(layer.weight.grad, 2 * out.detach().T @ x)  # straight through


@pytest.mark.parametrize("form", ["ps", "q"])
def test_a_host_of_powers_of_two_is_converted_without_loss(form):
    model, x = vit(), random(2, 3, 16, 16)
    start = model(x)
    for block in model.blocks:
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linear.weight.data = rounded(linear.weight.data, 5)
            linear.weight.data[0, :3] = 0
    before = model(x)
    assert (before - start).abs().max() > 1e-3
    assert torch.equal(check(graft(model, ShiftLinear(form=form)), x)(x), before)


@pytest.mark.parametrize("start", ["import", "random"])
def test_starts(start):
    layer = ShiftedLinear.of(linear := nn.Linear(200, 100))
    layer.initialise(ShiftLinear(start=start), torch.Generator().manual_seed(0))
    weight = layer.effective_weight()
    if start == "import":
        ratio = (weight / linear.weight)[linear.weight.abs() > 2.0**-14]
        assert (ratio.log2().abs() <= 0.5 + 2**-7).all()  # nearest, but for what bfloat16 rounds away
        return
    assert 0.48 < (weight == 0).float().mean() < 0.52
    assert (layer.shift.min().item(), layer.shift.max().item()) == pytest.approx((-14, 0), abs=0.01)


def test_fixed_point():
    x = torch.tensor([0.3, -0.3, 1e-6, -1e-6, 4e4, -4e4, 0.5], dtype=torch.float64, requires_grad=True)
    y = fixed_point(x)
    floors = [math.floor(v * 65536) / 65536 for v in (0.3, -0.3, 1e-6, -1e-6)]
    assert y.tolist() == [*floors, 2.0**15 - 2.0**-16, -(2.0**15), 0.5]
    y.sum().backward()
    assert (x.grad == 1).all()
    layer, exact = shifted(fixed_point=True), shifted()
    x = random(3, 6)
    expected = fixed_point(x) @ exact.effective_weight().T + fixed_point(exact.bias)
    layer.bias = exact.bias
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-15)
    assert 0 < (layer(x) - exact(x)).abs().max() < 1e-3


@pytest.mark.parametrize("host", [*HOSTS, *LINEAR_HOSTS])
def test_every_linear_layer_of_every_block_of_every_host(host):
    model = check(graft(build(host), "shift_linear"), images())
    of = host_of(model)
    paths = {path for i in range(len(of.blocks)) for path in of.linears(i).values()}
    assert all(isinstance(model.get_submodule(path), ShiftedLinear) for path in paths)
    assert set(new_parameters(model)) == {f"{path}.{kind}" for path in paths for kind in ("shift", "sign")}
    assert not any(f"{path}.weight" in model.state_dict() for path in paths)
    assert new_parameters(model).keys() <= no_weight_decay(model)
    layer = model.get_submodule(min(paths))
    assert torch.equal(affine(layer)[0], layer.effective_weight())


def test_a_layer_that_is_never_called():
    model = timm.create_model("beit_base_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=32)
    with pytest.raises(HostError, match=r"blocks\.0\.attn\.qkv of this Beit stands in an attention that reads its weight"):
        graft(model, "shift_linear")
    check(graft(model, "shift_linear:linears=proj+fc1+fc2"), images())


def test_layers_of_other_grafts_are_left_alone_unless_named():
    model = graft(vit(), "retention:layers=0", "adaptformer:bottleneck=2,layers=1")
    assert own_linears(model, 0) == ["fc1", "fc2"]
    assert own_linears(model, 1) == own_linears(vit(), 1)
    graft(model, "shift_linear")
    assert type(model.blocks[0].attn.q_proj) is nn.Linear
    ungraft(model)
    graft(model, "shift_linear:layers=0,linears=q_proj+k_proj+v_proj+proj+fc1")
    assert isinstance(model.blocks[0].attn.proj, ShiftedLinear)
    assert len(grafts(model)) == 3
    check(model, random(2, 3, 16, 16))


def test_bad_input():
    for bits in (1, 9):
        with pytest.raises(SettingError, match=rf"bits={bits}\. Expected 2 to 8"):
            ShiftLinear(bits=bits)
    with pytest.raises(HostError, match=r"blocks\.0 has no linear layer 'fc9'"):
        graft(vit(), "shift_linear:linears=fc9")
    with pytest.raises(GraftError, match="already holds ShiftedLinear, which overrides the layer"):
        graft(vit(), "shift_linear", "shift_linear:form=q")
