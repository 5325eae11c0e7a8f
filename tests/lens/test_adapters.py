"""An adapter on a query and key layer is part of all that is read of the model: it equals a model with merged weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitreous import calibrate, graft
from vitreous.base.errors import HostError
from vitreous.hosts.attention import query_key_weights
from vitreous.layers.linear import Linear
from vitreous.lens.direction import Direction, identity, sample_of
from vitreous.lens.formulas import spectra
from vitreous.lens.layer_features import layer_features
from vitreous.lens.look import look

WIDTH, HEADS, RANK = 24, 3, 4
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 5}


class Wrapped(nn.Module):
    """The LoRA-ViT and SAMed pattern: a module around timm's qkv, without a weight of its own."""

    def __init__(self, qkv, seed):
        super().__init__()
        self.qkv, d = qkv, qkv.in_features
        self.aq, self.bq, self.av, self.bv = (nn.Linear(*size, bias=False) for size in [(d, RANK), (RANK, d)] * 2)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.aq, self.bq, self.av, self.bv):
                layer.weight.normal_(std=0.4, generator=generator)

    def forward(self, x):
        y, d = self.qkv(x), x.shape[-1]
        y[..., :d] += self.bq(self.aq(x))
        y[..., -d:] += self.bv(self.av(x))
        return y

    def delta(self):
        zero = torch.zeros(WIDTH, WIDTH, dtype=self.aq.weight.dtype)
        return torch.cat([self.bq.weight @ self.aq.weight, zero, self.bv.weight @ self.av.weight])


class LowRank(Linear):
    """The same as an item of the linear slot."""

    def initialise(self, seed):
        inner = Wrapped(nn.Linear(WIDTH, 3 * WIDTH), seed)
        self.inner = inner
        del inner.qkv
        return self

    def effective_weight(self):
        return self.weight + self.inner.delta()

    def delta(self):
        return self.inner.delta()


WAYS = {"wrapper": Wrapped, "slot": lambda qkv, seed: LowRank.of(qkv).initialise(seed)}


def host(cls=VisionTransformer, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(**SMALL | options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def adapted(way, **options):
    model = host(**options)
    for i, block in enumerate(model.blocks):
        block.attn.qkv = WAYS[way](block.attn.qkv, i).double()
    return model.eval()


def merged(way, **options):
    model = host(**options)
    with torch.no_grad():
        for block, other in zip(model.blocks, adapted(way, **options).blocks, strict=True):
            block.attn.qkv.weight += other.attn.qkv.delta()
    return model


def silenced(model):
    """The same model with its adapters set to zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bq." in name or ".bv." in name:
                parameter.zero_()
    return model


def pictures(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
def test_a_reading_is_that_of_the_merged_model(way):
    model, plain = adapted(way), merged(way)
    torch.testing.assert_close(model(pictures()), plain(pictures()), atol=1e-9, rtol=1e-9)
    reading, expected = look(model, pictures()), look(plain, pictures())
    assert [layer["grid"] for layer in reading.layers] == [[4, 4], [4, 4]]
    assert not any("weight spectrum" in note for note in reading.facts["notes"])
    for name, values in expected.table().items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(reading.table()[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            assert (reading.table()[name] == values).all(), name
    table, without = reading.table(), look(silenced(model), pictures()).table()
    of_weights = table["source"] == "weight"
    assert of_weights.sum() == 2 * HEADS
    assert (np.abs(table["effective_rank"] - without["effective_rank"])[of_weights] > 1e-3).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", [VisionTransformer, Eva])
def test_spectra_and_svda_are_those_of_the_merged_model(way, cls):
    """Through SVDA's adopted attention, on EVA too, where the host's own forward would leave an adapter out."""
    model, plain = (graft(make(way, cls=cls), "svda:layers=0") for make in (adapted, merged))
    x = torch.randn(2, 17, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = model.blocks[0].attn, plain.blocks[0].attn
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-9, rtol=1e-9)
    for find in (lambda attention: spectra.weight(attention, HEADS, WIDTH // HEADS).values, lambda a: query_key_weights(a)[0]):
        torch.testing.assert_close(find(ours), find(theirs), atol=1e-6, rtol=1e-6)
        assert (find(ours) - find(silenced(model).blocks[0].attn)).abs().max() > 1e-2
    assert ours.penalties()["svda_orthogonality"].item() == pytest.approx(theirs.penalties()["svda_orthogonality"].item())
    ours.penalties()["svda_orthogonality"].backward()
    learning = [name for name, p in ours.qkv.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in learning} >= {"aq", "bq"}


@pytest.mark.parametrize("way", WAYS)
def test_svda_starts_from_the_attention_with_the_adapter(way):
    sigma = []
    for model in (adapted(way), merged(way), host()):
        calibrate(graft(model, "svda:start=import"), pictures())
        sigma.append(model.blocks[1].attn.sigma.detach())
    torch.testing.assert_close(sigma[0], sigma[1], atol=1e-6, rtol=1e-6)
    assert (sigma[0] - sigma[2]).abs().max() > 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_a_direction_belongs_to_the_model_with_its_adapter(way):
    model = adapted(way)
    for layer, other in zip(layer_features(model, pictures()), layer_features(merged(way), pictures()), strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=1e-5, rtol=1e-5)
    direction = Direction((), (), (), 8, (4, 4), model=identity(model), sample=sample_of(model))
    direction.check(copy.deepcopy(model).float())
    with pytest.raises(HostError, match="whose weights are others"):
        direction.check(silenced(model))
    with pytest.raises(HostError, match="names or shapes"):
        direction.check(merged(way))


def test_a_direction_samples_what_an_adapter_computes_with():
    model, plain = adapted("slot"), merged("slot")
    at = [name for name, p in model.named_parameters() if p.ndim > 1].index("blocks.0.attn.qkv.weight")
    other = [name for name, p in plain.named_parameters() if p.ndim > 1].index("blocks.0.attn.qkv.weight")
    assert torch.equal(sample_of(model)[at], sample_of(plain)[other])


def test_a_direction_samples_what_a_weight_is_made_of():
    """shift_linear with form=ps has shifts and signs, and no weight."""
    model = graft(host(), "shift_linear:form=ps")
    direction = Direction((), (), (), 8, (4, 4), model=identity(model), sample=sample_of(model))
    direction.check(copy.deepcopy(model))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".shift"):
                p.add_(1)
    with pytest.raises(HostError, match="whose weights are others"):
        direction.check(model)


class Gated(nn.Module):
    """No linear layer: what comes out depends on the size of what goes in."""

    def __init__(self, qkv):
        super().__init__()
        self.qkv = qkv

    def forward(self, x):
        return self.qkv(x) * x.norm(dim=-1, keepdim=True).sigmoid()


def test_what_is_no_linear_layer_is_said_and_left_out():
    model = host()
    for block in model.blocks:
        block.attn.qkv = Gated(block.attn.qkv)
    reading = look(model, pictures())
    assert not (reading.table()["source"] == "weight").any()
    assert any("Attention is no affine map" in note and "blocks.0.attn" in note for note in reading.facts["notes"]), (
        reading.facts["notes"]
    )


class SelfAttention(nn.Module):
    """The names of another package, whose classes we do not know."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


def test_adapters_in_attention_of_other_packages():
    """As peft wraps them: a module whose `weight` is that of the layer inside."""

    class Peft(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.lora = base_layer, nn.Linear(WIDTH, WIDTH, bias=False)

        weight = property(lambda self: self.base_layer.weight)
        bias = property(lambda self: self.base_layer.bias)

        def forward(self, x):
            return self.base_layer(x) + self.lora(x)

    module = SelfAttention()
    module.query = Peft(module.query)
    plain = copy.deepcopy(module)
    plain.query = plain.query.base_layer
    with torch.no_grad():
        plain.query.weight += module.query.lora.weight
    found, expected = (spectra.weight(m, HEADS, WIDTH // HEADS).values for m in (module, plain))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
