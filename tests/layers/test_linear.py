"""The weight of whatever stands where a linear layer was: read, asked for, or measured; never read around an adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from vitreous.base.errors import HostError
from vitreous.layers.linear import Linear, acts_as_linear, affine

WIDTH, OUT = 12, 18


def host(bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(WIDTH, OUT, bias=bias)


class LowRank(Linear):
    """LoRA of rank 2 as an item of the linear slot."""

    def initialise(self):
        generator = torch.Generator().manual_seed(1)
        self.down = nn.Parameter(torch.randn(2, self.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(self.out_features, 2, generator=generator))
        return self

    def effective_weight(self):
        return self.weight + self.up @ self.down

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x @ self.down.T @ self.up.T


class Wrapper(nn.Module):
    """LoRA as others write it: a module around the layer, with a dropout, and a `weight` that is the base layer's."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        adapter = LowRank.of(host()).initialise()
        self.down, self.up, self.drop = adapter.down, adapter.up, nn.Dropout(0.5)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        y = self.base_layer(x)
        y[..., :] += self.drop(x) @ self.down.T @ self.up.T
        return y


def merged(bias=True):
    adapter = LowRank.of(host()).initialise()
    return host().weight + adapter.up @ adapter.down, host().bias if bias else None


def test_as_it_is_it_equals_the_hosts_layer():
    plain, x = host(), torch.randn(3, 5, WIDTH)
    calls = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    ours = Linear.of(plain)
    assert torch.equal(ours(x), plain(x))
    assert len(calls) == 2  # hooks are shared
    assert ours.weight is plain.weight
    assert list(ours.state_dict()) == ["weight", "bias"]
    assert affine(ours) == (plain.weight, plain.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_of_ours_and_one_of_others_have_the_merged_weight(bias):
    weight, b = merged(bias)
    x = torch.randn(4, WIDTH)
    for layer in (LowRank.of(host(bias)).initialise(), Wrapper(host(bias)).train()):
        w, found = affine(layer)
        torch.testing.assert_close(w, weight, atol=1e-6, rtol=1e-6)
        assert (found is None) is (not bias)
        if bias:
            torch.testing.assert_close(found, b, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer.eval()(x), F.linear(x, w, found), atol=1e-5, rtol=1e-5)


def test_measuring_disturbs_nobody():
    layer, calls = Wrapper(host()).train(), []
    for module in layer.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    state, values = torch.get_rng_state(), copy.deepcopy(layer.state_dict())
    affine(layer)
    assert not calls
    assert layer.training
    assert layer.drop.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, values[name]) for name, value in layer.state_dict().items())
    assert len(layer._forward_hooks) == len(layer.drop._forward_hooks) == 1


def test_a_measured_weight_is_differentiable():
    layer, ours = Wrapper(host()), LowRank.of(host()).initialise()
    for module in (layer, ours):
        (affine(module)[0].square().sum() + affine(module)[1].sum()).backward()
    torch.testing.assert_close(layer.up.grad, ours.up.grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.down.grad, ours.down.grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight.grad, ours.weight.grad, atol=1e-4, rtol=1e-5)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_layers_whose_own_weight_is_the_truth():
    parametrized = host()
    parametrize.register_parametrization(parametrized, "weight", Halved())
    torch.testing.assert_close(affine(parametrized)[0], host().weight / 2)
    pixel = nn.Conv2d(WIDTH, OUT, 1)
    assert torch.equal(affine(pixel)[0], pixel.weight[:, :, 0, 0])
    assert acts_as_linear(pixel)


class Transposed(nn.Module):
    """A layer class of its own, whose weight lies the other way round."""

    def __init__(self):
        super().__init__()
        self.in_features = WIDTH
        self.weight = nn.Parameter(torch.randn(WIDTH, OUT))

    def forward(self, x):
        return x @ self.weight


def test_a_strange_class_is_measured_and_not_believed():
    layer = Transposed()
    torch.testing.assert_close(affine(layer)[0], layer.weight.T)
    half = Transposed().bfloat16()
    assert torch.equal(affine(half)[0], half.weight.T)


class Mixing(nn.Linear):
    """Not one map per token."""

    def forward(self, x):
        return super().forward(x - x.mean(1, keepdim=True))


class Typed(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(torch.int64))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()), "no affine map"),
        (nn.Sequential(nn.Linear(WIDTH, OUT), nn.LayerNorm(OUT)), "no affine map"),
        (Mixing(WIDTH, OUT), "no affine map"),
        (Typed(WIDTH, OUT), "cannot be run"),
        (nn.GELU(), "input width is not known"),
    ],
    ids=["gelu", "norm", "mixing", "typed", "no width"],
)
def test_what_is_no_linear_map_is_refused(layer, text):
    with pytest.raises(HostError, match=rf"(?s){text}.*Expected .*effective_weight"):
        affine(layer)


def test_what_may_be_tried():
    assert acts_as_linear(host())
    assert acts_as_linear(Wrapper(host()))
    assert not acts_as_linear(nn.GELU())
    assert not acts_as_linear(nn.Conv2d(3, 3, 3))
    assert not acts_as_linear(None)
