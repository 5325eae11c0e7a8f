"""Patches of another size against the formula in loops, closed forms of counts and costs, and a real model's predictions."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from vitreous import PatchScale, check, graft, new_parameters, ungraft
from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.bench.operation_count import operations
from vitreous.hosts.host import embed, run
from vitreous.mechanisms.embed.patch_scale import resampled

SMALL = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit(**options):
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL | {"reg_tokens": 1} | options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pictures(height=16, width=24, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, dtype=torch.float64, generator=generator)


def resize(picture, size):
    """A picture (h, w) in another size, by the filter that the formula names."""
    return F.interpolate(picture[None, None], size, mode="bicubic", antialias=True)[0, 0]


def resize_matrix(old, new):
    """R (new^2, old^2), column by column: what becomes of a picture with one bright pixel."""
    basis = torch.eye(old**2, dtype=torch.float64).view(old**2, old, old)
    return torch.stack([resize(one, (new, new)).flatten() for one in basis], dim=1)


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}, {"no_embed_class": True}])
@pytest.mark.parametrize("patch", [4, 2])
def test_tokens_are_the_formula(patch, options):
    host = vit(**options)
    prefix = 0 if options.get("no_embed_class") else 2
    inverse = torch.linalg.pinv(resize_matrix(8, patch))  # (64, p^2)
    kernels = (host.patch_embed.proj.weight.flatten(2) @ inverse).unflatten(2, (patch, patch)).detach()
    places = host.pos_embed[0, prefix:].detach().unflatten(0, (2, 3))  # 16 x 24 pixels
    rows, columns = 16 // patch, 24 // patch
    model = graft(host, PatchScale(patch=patch))
    x = pictures()
    found = model._pos_embed(model.patch_embed(x))
    assert found.shape == (2, 2 + rows * columns, 12)
    for d in range(12):
        position = resize(places[..., d], (rows, columns))
        for i, row, column in np.ndindex(2, rows, columns):
            here = x[i, :, patch * row : patch * (row + 1), patch * column : patch * (column + 1)]
            expected = (kernels[d] * here).sum() + host.patch_embed.proj.bias[d] + position[row, column]
            assert abs(found[i, 2 + columns * row + column, d] - expected) < 1e-4  # timm resamples in single precision
    if prefix:
        assert torch.equal(model.pos_embed[:, :2], vit(**options).pos_embed[:, :2])


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_number_of_tokens(patch):
    model = check(graft(vit(), PatchScale(patch=patch)), pictures())
    assert model.patch_embed(pictures()).shape[1] == model.patch_embed.num_patches == (16 // patch) * (24 // patch)
    assert model.forward_features(pictures()).shape == (2, 2 + 16 * 24 // patch**2, 12)


@pytest.mark.parametrize("patch", [32, 16, 8, 4, 2, 1])
def test_parameters_are_the_closed_form(patch):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    before = sum(p.numel() for p in model.parameters())
    new = new_parameters(graft(model, PatchScale(patch=patch)))
    more = 3 * 768 * (patch**2 - 16**2) + 768 * (224**2 // patch**2 - 14**2)
    assert sum(p.numel() for p in model.parameters()) - before == more
    assert set(new) == {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}


def test_the_hosts_own_patch_size_is_the_host():
    for options in ({}, {"dynamic_img_size": True}):
        assert torch.equal(graft(vit(**options), PatchScale(patch=8))(pictures()), vit(**options)(pictures()))


def test_larger_kernels_give_what_the_host_gave():
    """R has full column rank where patches grow, so w' R = w: enlarged patches meet the products that they had, all of them."""
    projection, patches = vit().patch_embed.proj, pictures(8, 8)
    enlarged = torch.stack([torch.stack([resize(one, (16, 16)) for one in image]) for image in patches])
    torch.testing.assert_close(resampled(projection, (16, 16))(enlarged), projection(patches), atol=1e-4, rtol=1e-4)


def test_smaller_kernels_nearly_give_it_on_smooth_patches_alone():
    """w' R is w on what the smaller size can hold, R^+ R x: of a constant, a ramp, a slow wave nearly all, of noise little."""
    projection = nn.Conv2d(1, 64, 8, bias=False, dtype=torch.float64)
    projection.weight = nn.Parameter(torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8))  # gives back its patch
    line = torch.linspace(-1, 1, 8, dtype=torch.float64)
    wave = torch.cos(1.5 * (line[:, None] + line))
    patches = {"constant": torch.ones_like(wave), "ramp": line.expand(8, 8), "wave": wave, "noise": pictures(8, 8)[0, 0]}
    smaller, errors = resampled(projection, (4, 4)), {}
    for name, patch in patches.items():
        error = smaller(resize(patch, (4, 4))[None, None]).flatten() - patch.flatten()
        errors[name] = (error.norm() / patch.norm()).item()
    assert max(errors["constant"], errors["wave"]) < 0.15  # at the edges, where the filter is cut off
    assert errors["ramp"] < 0.25
    assert errors["noise"] > 0.7


def test_channels_sizes_and_sides():
    model = graft(vit(in_chans=5, dynamic_img_size=True), "patch_scale")
    assert model.patch_embed.patch_size == (4, 4)  # half of the host's
    assert model(pictures(8, 40, channels=5)).isfinite().all()
    model = graft(vit(dynamic_img_size=True, dynamic_img_pad=True), PatchScale(patch=2))
    assert model(pictures(13, 21)).isfinite().all()
    wide = graft(vit(patch_size=(8, 4)), "patch_scale")
    assert wide.patch_embed.patch_size == (4, 2)
    assert wide.patch_embed.grid_size == (4, 12)


@pytest.mark.parametrize(
    "other", ["spectral_gate", "retention:form=chunkwise,chunk=16", "gaussian_mask", "tokens_to_token", "evit"]
)
def test_others_are_made_for_the_new_grid(other):
    """They come second; before it they are refused, since the grid would change under them."""
    options = {"class_token": other == "evit", "reg_tokens": 0, "global_pool": "avg"}
    model = check(graft(vit(**options), PatchScale(patch=4), other), pictures())
    assert model.forward_features(pictures()).shape[1] == 24 + options["class_token"]
    ungraft(model, all=True)
    plain = vit(**options)(pictures())
    assert torch.equal(model(pictures()), plain)
    with pytest.raises(GraftError, match=r"is in the model.*graft patch_scale first\.$|which patch_scale would undo"):
        graft(vit(**options), other, PatchScale(patch=4))


def test_single_pixels_with_a_mixer():
    model = graft(vit(class_token=False, reg_tokens=0, global_pool="avg"), PatchScale(patch=1), "spectral_gate")
    assert check(model, pictures()).forward_features(pictures()).shape == (2, 384, 12)
    assert model.patch_embed.proj.weight.shape == (12, 3, 1, 1)


def test_a_pickled_copy_gives_the_host_back():
    """1536 patches: a number that is another object in the copy."""
    model = pickle.loads(pickle.dumps(graft(vit(img_size=(32, 48)), PatchScale(patch=1))))
    assert model.patch_embed.num_patches == 1536
    ungraft(model)
    assert torch.equal(model(pictures(32, 48)), vit(img_size=(32, 48))(pictures(32, 48)))


# -- what it costs -----------------------------------------------------------------------------------------------------

PUBLISHED = {16: 17.6, 8: 78.1, 4: 448, 2: 3966, 1: 50669}  # ViT-B at 224 pixels, multiply-adds in G


def counted(patch):
    """Multiply-adds of one image."""
    with torch.device("meta"):
        model = graft(timm.create_model("vit_base_patch16_224", depth=1).eval(), PatchScale(patch=patch))
        return operations(lambda: model(torch.zeros(1, 3, 224, 224))).total / 2


@pytest.mark.parametrize("patch", PUBLISHED)
def test_multiply_adds_are_the_closed_form(patch):
    n = 224**2 // patch**2 + 1
    block, rest = 12 * n * 768**2 + 2 * n**2 * 768, 3 * 768 * 224**2 + 768 * 1000
    assert counted(patch) == block + rest
    assert (12 * block + rest) / 1e9 == pytest.approx(PUBLISHED[patch], rel=3e-3)


@pytest.mark.parametrize(("mixer", "expected"), [(None, 2), ("retention:form=chunkwise", 1), ("spectral_gate:layers=0+1", 1)])
def test_attention_grows_with_the_square_of_tokens_and_a_linear_mixer_as_their_number(mixer, expected):
    """Exponents of the cost in the number of tokens, from 256 to 1024: of products of tokens with tokens, or of the blocks."""

    def cost(patch):
        model = graft(vit(img_size=32, class_token=False, reg_tokens=0, global_pool="avg"), PatchScale(patch=patch))
        graft(model, *([mixer] if mixer else []))
        stream = embed(model, pictures(32, 32))
        kinds = operations(lambda: run(model, stream)).by_kind
        return sum(count for kind, count in kinds.items() if mixer or "attention" in kind or "bmm" in kind)

    assert math.log(cost(1) / cost(2), 4) == pytest.approx(expected, abs=0.05)  # Fourier: N log N


# -- refusals, and the real model --------------------------------------------------------------------------------------


def test_bad_input():
    with pytest.raises(SettingError, match=r"^Found patch=0\. Expected 1 pixel or more\."):
        PatchScale(patch=0)
    with pytest.raises(SettingError, match=r"^Found patches of 5 x 5 pixels in images of 16 x 24\. Expected sides that divide"):
        graft(vit(), PatchScale(patch=5))
    with pytest.raises(SettingError, match=r"^Found patches of 7 x 7 pixels and no patch"):
        graft(vit(patch_size=7, img_size=14), "patch_scale")
    with pytest.raises(HostError, match="lays positions over a fixed list of tokens"):
        graft(Eva(**SMALL, use_rot_pos_emb=True), "patch_scale")
    for other in ("channelvit", "patch_scale"):
        with pytest.raises(GraftError, match=r"Expected .*Take"):
            graft(vit(), other, "patch_scale")


def test_the_real_model(shared_data):
    """At doubled size with doubled patches it sees the same tokens and decides the same; halved patches keep most of it."""

    def host(size):
        path = f"local-dir:{shared_data}/weights/vit_tiny_patch16_224"
        return timm.create_model(path, pretrained=True, img_size=size).eval()

    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:6]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before, positions = host(224)(x), host(224).pos_embed
        assert torch.equal(graft(host(224), PatchScale(patch=16))(x), before)
        doubled = graft(host(448), PatchScale(patch=32))
        doubled.pos_embed.copy_(positions)  # of the same grid; else resampled to 28 x 28 and back
        there = doubled(F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True))
        assert torch.equal(there.argmax(1), before.argmax(1))
        assert F.cosine_similarity(there, before).min() > 0.999
        halved = graft(host(224), PatchScale(patch=8))
        assert halved.patch_embed.num_patches == 784
        assert F.cosine_similarity(halved(x[:2]), before[:2]).min() > 0.5
