"""What counts as a class token, and what is shown where there is none: object queries, latents, prompts, registers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import foreground, look
from vitreous.lens.layer_features import QUERIES
from vitreous.lens.tap import trace
from vitreous.lens.token_coordinates import is_class_name

HEADS, WIDTH, SIDE, PITCH = 2, 8, 3, 4


class Attention(nn.Module):
    """Keeps its maps (B, H, N, M)."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), *self.kv(y).chunk(2, -1)))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        self.maps = weights.detach()
        return x + (weights @ v).transpose(1, 2).flatten(2)


class Tokens(nn.Module):
    """Patches behind tokens of these parameters, {name: count}; `tokens` joins them: (images, patches, named) -> tokens."""

    def __init__(self, tokens=None, **counts: int):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second = nn.Conv2d(3, WIDTH, PITCH, PITCH), Attention(), Attention()
        self.counts, self.tokens = counts, tokens
        for name, count in counts.items():
            self.register_parameter(name, nn.Parameter(torch.randn(1, count, WIDTH)))
        self.pos_embed = nn.Parameter(torch.randn(1, SIDE * SIDE + sum(counts.values()), WIDTH))
        for p in self.parameters():
            p.data.mul_(2)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).mT
        named = [getattr(self, name).expand(len(images), -1, -1) for name in self.counts]
        x = torch.cat([*named, patches], 1) + self.pos_embed
        return self.second(self.first(x, x), x) if self.tokens is None else self.tokens(self, patches, named)


def later_registers(model, patches, named):
    """Registers between a class token and patches, put in behind the position table."""
    x = torch.cat([named[0], patches], 1) + model.pos_embed[:, : 1 + SIDE * SIDE]
    x = torch.cat([x[:, :1], named[1], x[:, 1:]], 1)
    return model.second(model.first(x, x), x)


def decoder(model, patches, named):
    """Queries attend to each other, then to patches."""
    return model.second(model.first(named[0], named[0]), patches)


def resampler(model, patches, named):
    """Latents attend to themselves and to patches, joined."""
    return model.second(model.first(named[0], torch.cat([named[0], patches], 1)), torch.cat([patches, named[0]], 1))


@pytest.fixture
def images():
    return torch.rand(3, 3, SIDE * PITCH, SIDE * PITCH, generator=torch.Generator().manual_seed(3)) * 2 - 1


SELF = {
    "class token": (Tokens(cls_token=1), True),
    "class embedding and registers": (Tokens(class_embedding=1, register_tokens=2), True),
    "registers put in later": (Tokens(later_registers, class_token=1, registers=3), True),
    "registers first": (Tokens(registers=3, cls_token=1), False),
    "prompts first": (Tokens(prompts=2, cls_token=1), False),
    "registers": (Tokens(reg_token=2), False),
    "prompts": (Tokens(prompt_embeddings=4), False),
    "memory": (Tokens(memory=1), False),
}


@pytest.mark.parametrize("name", SELF)
def test_the_class_row_is_shown_where_the_first_token_is_the_class(name, images):
    model, has_class = SELF[name]
    reading = look(model.eval(), images, noise=0)
    assert [layer["has_class"] for layer in reading.layers] == [has_class] * 2
    prefix = sum(model.counts.values())
    assert [layer["prefix"] for layer in reading.layers] == [prefix] * 2
    for layer, module in enumerate((model.first, model.second)):
        first, mean = (
            rows[..., prefix:].unflatten(-1, (SIDE, SIDE)).numpy() for rows in (module.maps[:, :, 0], module.maps.mean(2))
        )
        assert np.abs(first - mean).max() > 0.02  # the other one would be seen
        assert np.abs(reading.maps.heads("attention", layer) - (first if has_class else mean)).max() < 1e-3
    assert ("class attention" in foreground(model, images).rule) == has_class


@pytest.mark.parametrize("count", [2, QUERIES + 3])
def test_queries_are_shown_one_by_one(count, images):
    model = Tokens(decoder, queries=count).eval()
    reading = look(model, images, noise=0)
    assert [layer["has_class"] for layer in reading.layers] == [False, False]
    maps = model.second.maps.unflatten(-1, (SIDE, SIDE)).numpy()  # (B, H, queries, rows, columns)
    shown = min(count, QUERIES)
    for number in range(shown):
        assert np.abs(reading.maps.heads(f"query{number + 1}", 1) - maps[:, :, number]).max() < 1e-3
    assert np.abs(reading.maps.heads("attention", 1) - maps.mean(2)).max() < 1e-3
    assert {name for name, _ in reading.maps if name.startswith("query")} == {f"query{n + 1}" for n in range(shown)}
    assert f"query1 to query{shown} are the maps of {shown} of {count}" in reading.layers[1]["note"]
    assert "class" not in foreground(model, images).rule


def test_what_was_pooled_from_everything_has_no_map(images):
    """Latents, or object queries of a second decoder layer, that attend to each other: not to the middle of the image."""

    def perceiver(model, patches, named):
        latents = model.first(named[0], patches)
        return model.second(latents, latents)

    reading = look(Tokens(perceiver, latents=3).eval(), images, noise=0)
    assert ("attention", 0) in reading.maps
    assert ("attention", 1) not in reading.maps
    assert (reading.layers[1]["grid"], reading.layers[1]["note"]) == (None, "where its tokens are is not known")
    untouched = look(Tokens(decoder, queries=3).eval(), images, noise=0)
    assert untouched.layers[0]["note"] == "where its tokens are is not known"  # equal for all images, of one window


def test_frames_that_look_like_heads_are_said(images):
    """Two frames of each image, each attended on its own: maps of 2 frames x 2 heads, at the same places."""

    def video(model, patches, named):
        frames = torch.stack([patches, patches / 2], 1)
        return model.second(frames, frames).mean(1)

    class Frames(Attention):
        heads, join = HEADS, False

        def forward(self, x, y):
            x = x.flatten(0, 1) if self.join else x  # images and frames in one axis
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in (self.q(x), *self.kv(x).chunk(2, -1)))
            return (torch.softmax(q @ k.mT, -1) @ v).transpose(-2, -3).flatten(-2).unflatten(0, (len(y), -1)).flatten(1, -3)

    model = Tokens(video)
    model.second = Frames()
    for model.second.heads, model.second.join, said in ((2, False, "2 x 2 maps"), (2, True, "2 x 2 maps"), (1, True, "2 maps")):
        (layer,) = look(model.eval(), images, noise=0).layers
        assert layer["heads"] == 2 * model.second.heads
        assert f"{said} have the same places" in layer["note"]
    assert not any(layer["note"] for layer in look(Tokens(cls_token=1).eval(), images, noise=0).layers)


def test_tokens_on_no_grid_are_said(images):
    """Windows of four places and the token of their region, which lies between them."""

    def regions(model, patches, named):
        fine = F.interpolate(patches.mT.unflatten(-1, (SIDE, SIDE)), scale_factor=2, mode="bilinear")
        windows = F.unfold(fine, 2, stride=2).unflatten(1, (WIDTH, 4)).permute(0, 3, 2, 1)  # (B, regions, 4, WIDTH)
        x = torch.cat([patches[:, :, None], windows], 2).flatten(0, 1)
        return model.second(x, x).unflatten(0, (-1, SIDE * SIDE)).flatten(1, 2)

    (layer,) = look(Tokens(regions).eval(), images, noise=0).layers
    assert (layer["grid"], layer["note"]) == (None, "its tokens lie on no grid")


def test_latents_beside_patches_are_no_class_token(images):
    model = Tokens(resampler, class_latents=3).eval()  # whatever their name
    reading = look(model, images, noise=0)
    assert [layer["has_class"] for layer in reading.layers] == [False, False]
    for layer, (module, keys) in enumerate([(model.first, slice(3, None)), (model.second, slice(0, SIDE * SIDE))]):
        maps = module.maps[..., keys].unflatten(-1, (SIDE, SIDE)).numpy()
        for number in range(3):
            assert np.abs(reading.maps.heads(f"query{number + 1}", layer) - maps[:, :, number]).max() < 1e-3


def test_one_class_query_beside_patches_and_a_pooled_token_count(images):
    """Class attention of one query, as in CaiT, and a mean of all patches before them, as in CLIP's pooling."""

    def alone(model, patches, named):
        both = torch.cat([named[0], patches], 1)
        return model.second(model.first(named[0], both), both)

    def pooled(model, patches, named):
        both = torch.cat([patches.mean(1, keepdim=True), patches], 1)
        return model.second(model.first(both, both), both)

    for model in (Tokens(alone, cls_token=1), Tokens(pooled)):
        reading = look(model.eval(), images, noise=0)
        assert [layer["has_class"] for layer in reading.layers] == [True, True]
        right = model.second.maps[:, :, 0, 1:].unflatten(-1, (SIDE, SIDE)).numpy()
        assert np.abs(reading.maps.heads("attention", 1) - right).max() < 1e-3


def test_queries_joined_before_a_class_token_later_are_none(images):
    """As in EoMT, whose last blocks have object queries of an embedding in front of everything."""

    def late(model, patches, named):
        x = torch.cat([named[0], patches], 1)
        x = model.first(x, x)
        x = torch.cat([model.query.weight[None, :, :].expand(len(x), -1, -1), x], 1)
        return model.second(x, x)

    model = Tokens(late, cls_token=1)
    model.query = nn.Embedding(2, WIDTH)
    layers = look(model.eval(), images, noise=0).layers
    assert [(layer["has_class"], layer["prefix"]) for layer in layers] == [(True, 1), (False, 3)]


def test_tokens_are_named_after_their_parameters(images):
    def names(model):
        return [call.first_token for call in trace(model.eval(), images).calls.values()]

    assert names(Tokens(prompts=2, cls_token=1)) == ["prompts"] * 2
    assert names(Tokens(later_registers, class_token=1, registers=3)) == ["class_token"] * 2
    assert names(Tokens()) == ["", ""]
    assert names(Tokens(table_in_pieces, cls_token=1)) == ["cls_token"] * 2
    assert names(vector_with_a_norm_of_its_own()) == ["cls_token"] * 2


def table_in_pieces(model, patches, named):
    """As where positions of the class token and interpolated ones of patches are joined."""
    x = torch.cat([named[0], patches], 1)
    x = x + torch.cat([model.pos_embed[:, :1], model.pos_embed[:, 1:]], 1)
    return model.second(model.first(x, x), x)


def vector_with_a_norm_of_its_own():
    def tokens(model, patches, named):
        first = model.norm(model.cls_token.reshape(WIDTH).expand(len(patches), 1, WIDTH))
        x = torch.cat([first, patches], 1)
        return model.second(model.first(x, x), x)

    model = Tokens(tokens)
    model.cls_token, model.norm = nn.Parameter(torch.randn(WIDTH)), nn.LayerNorm(WIDTH)
    return model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cls_token", True), ("vit.class_embedding", True), ("cls_token_0", True), ("model.cls_emb.weight", True),
        ("classifier.weight", False), ("class_head.weight", False), ("classes.0.weight", False), ("cls_pos_embed", False),
        ("reg_token", False), ("query_embed.weight", False), ("weight", False),
    ],
)  # fmt: skip
def test_names_of_class_tokens(name, expected):
    assert is_class_name(name) is expected
