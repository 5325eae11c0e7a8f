"""Tokens that a model chooses, image by image, are drawn where they are in each image, or nowhere."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import look
from vitreous.lens.tap import capture

HEADS, WIDTH, SIDE, KEEP, PITCH = 2, 8, 4, 5, 4  # 5 of 4 x 4 patches


class Block(nn.Module):
    """x + attention; keys may be of other tokens than queries. Keeps the maps (B, H, N, M)."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        y, z = self.norm(x), self.norm(x if keys is None else keys)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(y), *self.kv(z).chunk(2, -1)))
        self.maps = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1).detach()
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Chooser(nn.Module):
    """A block of all patches if `before`, then one of those that `choose` takes. Keeps the indices (B, KEEP)."""

    def __init__(self, choose, before: bool = False, keys_alone: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second, self.third = nn.Conv2d(3, WIDTH, PITCH, PITCH), Block(), Block(), Block()
        self.choose, self.before, self.keys_alone = choose, before, keys_alone
        for p in self.parameters():
            p.data.mul_(3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        x = self.first(x) if self.before else x
        kept, self.index = self.choose(x)
        x = self.second(x, kept) if self.keys_alone else self.second(kept)
        return self.third(x)


def gathered(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])), index


def largest(x):
    return gathered(x, x.norm(dim=-1).topk(KEEP).indices)


def by_chance(x):
    return gathered(x, torch.rand(x.shape[:2]).argsort(1)[:, :KEEP])


def drawn(x):
    return gathered(x, torch.multinomial(x.norm(dim=-1), KEEP))


def masked(x):
    length = x.norm(dim=-1)
    mask = length >= length.topk(KEEP).values[:, -1:]
    return x[mask].view(len(x), KEEP, -1), mask.nonzero()[:, 1].view(len(x), -1)


def listed(x):
    """Indices go through Python."""
    index = x.norm(dim=-1).topk(KEEP).indices.tolist()
    return torch.stack([tokens[own] for tokens, own in zip(x, index, strict=True)]), torch.tensor(index)


def tabled(x):
    """Indices go through numpy, and come back as a new tensor."""
    return gathered(x, torch.tensor(np.argsort(x.norm(dim=-1).numpy(), axis=1)[:, :KEEP].tolist()))


def shuffled(x):
    """All tokens stay, in another order."""
    return gathered(x, x.norm(dim=-1).argsort(1))


CHOICES = {f.__name__: f for f in (largest, by_chance, drawn, masked, listed, tabled, shuffled)}


def on_grid(values: Tensor, index: Tensor) -> np.ndarray:
    """(B, H, tokens) at their places (B, tokens) -> (B, H, SIDE, SIDE)."""
    empty = torch.zeros(*values.shape[:2], SIDE * SIDE)
    return empty.scatter(2, index[:, None].expand_as(values), values).unflatten(-1, (SIDE, SIDE)).numpy()


@pytest.fixture
def images():
    return torch.rand(4, 3, SIDE * PITCH, SIDE * PITCH, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", CHOICES)
def test_maps_are_at_the_places_of_each_image(name, before, images):
    model = Chooser(CHOICES[name], before).eval()
    reading = look(model, images, noise=0)
    layer = int(before)
    maps, right = reading.maps.heads("attention", layer), on_grid(model.second.maps.mean(2), model.index)
    assert np.abs(maps - right).max() < 1e-3
    first = on_grid(model.second.maps.mean(2), model.index[:1].expand_as(model.index))
    assert np.abs(right - first)[1:].max() > 0.05  # at the first image's places they would be wrong
    for record in reading.layers[layer:]:
        assert record["grid"] == [SIDE, SIDE]
        assert "image has its own places" in record["note"]


def test_distances_are_those_of_each_image(images):
    model = Chooser(largest).eval()
    table = look(model, images, noise=0, probes=["attention_rows"]).table()
    where = torch.stack([model.index // SIDE, model.index % SIDE], -1) * float(PITCH)
    far = (where[:, :, None] - where[:, None]).square().sum(-1).sqrt()  # (B, N, M)
    right = (model.second.maps * far[:, None]).sum(-1).mean(-1)  # (B, H)
    own = (table["layer"] == 0) & (table["head"] >= 0) & (table["source"] == "attention")
    assert table["mean_distance"][own] == pytest.approx(right.numpy().ravel(), rel=1e-4)


def test_features_of_chosen_tokens_are_on_no_grid(images):
    """Which token of a bare tensor is where differs from image to image; numbers of all tokens stay."""
    reading = look(Chooser(largest, before=True).eval(), images, noise=0)
    assert ("u1", 0) in set(reading.maps)
    assert not {("u1", 1), ("u1", 2), ("artifacts", 2)} & set(reading.maps)
    table = reading.table()
    assert np.isfinite(table["rank_collapse"][(table["layer"] == 2) & (table["head"] == -1)]).any()


def test_queries_of_all_patches_keep_their_places(images):
    """Keys are chosen, queries and what follows are not: the layer behind is as in any model."""
    model = Chooser(largest, before=True, keys_alone=True).eval()
    reading = look(model, images, noise=0)
    right = on_grid(model.second.maps.mean(2), model.index)
    assert np.abs(reading.maps.heads("attention", 1) - right).max() < 1e-3
    assert reading.layers[2]["note"] == ""
    assert ("u1", 2) in set(reading.maps)
    right = model.third.maps.mean(2).unflatten(-1, (SIDE, SIDE)).numpy()
    assert np.abs(reading.maps.heads("attention", 2) - right).max() < 1e-3


@pytest.mark.parametrize("count", [1, 4])
def test_chance_out_of_sight_is_on_no_grid(count, images):
    """Python's random numbers are not seen; the first image then gives other values than alone."""
    generator = random.Random(1)

    def out_of_sight(x):
        return gathered(x, torch.tensor([generator.sample(range(SIDE * SIDE), KEEP) for _ in x]))

    reading = look(Chooser(out_of_sight).eval(), images[:count], noise=0)
    assert [layer["grid"] for layer in reading.layers] == [None, None]
    assert all("alone, the first image gives other values" in layer["note"] for layer in reading.layers)
    assert not [name for name, _ in reading.maps if name in ("attention", "u1", "k1")]
    assert np.isfinite(reading.table()["attention_entropy"]).any()


def test_tokens_between_places_are_on_no_grid(images):
    """Means of two chosen patches are at no patch: numbers, and the reason."""

    def merged(x):
        some, index = largest(x)
        return (some[:, 1:] + some[:, :-1]) / 2, index

    reading = look(Chooser(merged).eval(), images, noise=0)
    assert reading.layers[0]["grid"] is None
    assert "no grid is known" in reading.layers[0]["note"]
    assert "attention" not in {name for name, _ in reading.maps}


def test_other_models_are_followed_once(images, monkeypatch):
    """Coordinates of a whole batch are followed only where something was chosen."""
    monkeypatch.setattr(capture, "CoordinateTracer", None)
    look(Chooser(lambda x: (x[:, [3, 1, 2, 0, 9]], None)).eval(), images, noise=0)
    with pytest.raises(TypeError):
        look(Chooser(largest).eval(), images, noise=0)


@pytest.mark.parametrize(("choose", "compared"), [(by_chance, False), (drawn, False), (None, True)])
def test_noise_is_measured_only_where_the_same_tokens_were_chosen(choose, compared, images):
    """Between rows of other tokens there is no change to measure."""

    def always(x):
        """By values that noise does not change: of the order of the patches alone."""
        return gathered(x, (x.detach() * 0).sum(-1).argsort(dim=1, stable=True)[:, :KEEP])

    model = Chooser(choose or always).eval()
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    table = look(model, images, noise=0.05, probes=["robustness", "attention_rows"]).table()
    assert np.isfinite(table["attention_entropy"]).any()
    assert np.isfinite(table["perturbation_robustness"]).any() == compared


def test_tokens_without_a_place_beside_chosen_ones_are_counted(images):
    """Mask tokens of a decoder stand for patches, but nothing of the image is in them."""
    mask = nn.Parameter(torch.randn(1, 1, WIDTH))

    def with_masks(x):
        some, index = largest(x)
        return torch.cat([some, mask.expand(len(x), 3, -1)], 1), index

    model = Chooser(with_masks)
    model.mask = mask
    reading = look(model.eval(), images, noise=0)
    assert "3 of 8 tokens have no place and are in no map" in reading.layers[0]["note"]
    right = on_grid(model.second.maps.mean(2)[..., :KEEP], model.index)
    assert np.abs(reading.maps.heads("attention", 0) - right).max() < 1e-3
