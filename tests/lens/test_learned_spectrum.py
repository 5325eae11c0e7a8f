"""Learned spectra: what a module exposes, else the parameter by which queries or keys are multiplied; never a name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from lens.explicit import pixels, vit
from vitreous import graft, parse
from vitreous.lens.learned_spectrum import learned_spectrum
from vitreous.lens.look import look

HEADS, WIDTH = 2, 12


class Foreign(nn.Module):
    """Attention of unit queries and keys with a weight per direction, under any name, on either side; `sigma` does nothing."""

    def __init__(self, attention, name, side, shape):
        super().__init__()
        self.qkv, self.proj, self.side = attention.qkv, attention.proj, side
        generator = torch.Generator().manual_seed(3)
        self.sigma = nn.Parameter(torch.rand(HEADS, WIDTH, generator=generator) + 0.5)
        if name:
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) + 0.2))
        self.weight = getattr(self, name).detach().reshape(HEADS, 1, WIDTH) if name else None

    def forward(self, x, **options):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        self.unit = normalize(q, dim=-1), normalize(k, dim=-1)
        q, k = self.unit
        if self.side == "q":
            q = q * self.weight
        elif self.side == "k":
            k = k * self.weight
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def foreign(name="gains", side="q", shape=(HEADS, WIDTH)):
    model = vit()
    model.blocks[1].attn = Foreign(model.blocks[1].attn, name, side, shape)
    return model


def column(table, name, source):
    return table[name][(table["source"] == source) & (table["layer"] == 1) & (table["head"] >= 0)]


@pytest.mark.parametrize(
    ("name", "side", "shape"),
    [("sigmas", "q", (HEADS, WIDTH)), ("gains", "k", (1, HEADS, 1, WIDTH)), ("w", "q", (HEADS, 1, WIDTH))],
)
def test_a_parameter_that_multiplies_queries_or_keys_is_found_and_said(name, side, shape):
    model, images = foreign(name, side, shape), pixels(2)
    reading = look(model, images, noise=0)
    table, weight = reading.table(), model.blocks[1].attn.weight.flatten(1).double()
    energy = weight.square() / weight.square().sum(-1, keepdim=True)
    np.testing.assert_allclose(column(table, "spectral_entropy", "learned"), -(energy * energy.log()).sum(-1), rtol=1e-6)
    (note,) = [note for note in reading.facts["notes"] if "learned spectrum" in note]
    assert note == f"blocks.1.attn: learned spectrum: the parameter {name}, by which queries or keys are multiplied"
    with torch.no_grad():
        model(images)
    q, k = model.blocks[1].attn.unit
    cosine = (q * k).sum(-1).mean(-1)
    np.testing.assert_allclose(column(table, "angular_alignment", "attention").reshape(2, HEADS), cosine, atol=1e-5)


@pytest.mark.parametrize("name", [None, "sigmas"])
def test_a_name_makes_no_spectrum(name):
    """Parameters of the right shape that multiply nothing, whatever they are called."""
    reading = look(foreign(name, None), pixels(2), noise=0)
    assert "learned" not in reading.table()["source"]
    assert not [note for note in reading.facts["notes"] if "learned" in note]


def test_what_is_exposed_is_taken_before_any_search():
    model, images = graft(vit(), parse("svda:start=gentle,layers=1")), pixels(2)
    sigma = model.blocks[1].attn.sigma.detach().double()
    reading = look(model, images, noise=0)
    rank = np.exp([-(p * p.log()).sum() for p in sigma.square() / sigma.square().sum(-1, keepdim=True)])
    np.testing.assert_allclose(column(reading.table(), "effective_rank", "learned"), rank, rtol=1e-6)
    assert not [note for note in reading.facts["notes"] if "learned spectrum" in note]
    q = torch.randn(1, 1, HEADS, 5, WIDTH)
    found = learned_spectrum(nn.Identity(), q, q, [torch.ones(3), sigma])
    assert torch.equal(found.values, sigma)
    assert learned_spectrum(nn.Identity(), q, q, [sigma[:1]]) is None
