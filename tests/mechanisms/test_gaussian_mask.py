"""The Gaussian mixture mask against the paper's formula as loops, its symmetries, and tokens that come and go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer

from vitreous import GaussianMask, check, graft, new_parameters, ungraft
from vitreous.base.errors import GraftError, HostError, MaskError, SettingError
from vitreous.layers.geometry import squared_distances
from vitreous.layers.stream import Assignment, TokenState
from vitreous.lens.look import look
from vitreous.mechanisms.attn.gaussian_mask import mixture

SMALL = {"img_size": (12, 16), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | {"reg_tokens": 1} | options).double().eval()


class OtherEmbed(PatchEmbed):
    """Some other way from images to patches."""


def pictures(height=12, width=16):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loops(alpha, deviation, height, width):
    """W (H, N, N) of the paper, entry by entry."""
    places = [(row, column) for row in range(height) for column in range(width)]
    out = torch.zeros(len(alpha), len(places), len(places), dtype=torch.float64)
    for h, (weights, spreads) in enumerate(zip(alpha.tolist(), deviation.tolist(), strict=True)):
        for i, (y, x) in enumerate(places):
            for j, (v, u) in enumerate(places):
                square = (y - v) ** 2 + (x - u) ** 2
                out[h, i, j] = sum(a * math.exp(-square / (2 * (s**2 + 1e-5))) for a, s in zip(weights, spreads, strict=True))
    return out


def state(height=3, width=4, prefix=2, **fields):
    return TokenState(grid=(height, width), prefix=prefix, **fields)


def drawn(heads=2, kernels=3, spread=2.0):
    generator = torch.Generator().manual_seed(2)
    alpha, deviation = torch.randn(2, heads, kernels, generator=generator, dtype=torch.float64)
    return alpha, spread * deviation


def test_mask_is_the_papers_formula():
    alpha, deviation = drawn()
    found = mixture(squared_distances((3, 4)), alpha, deviation)
    torch.testing.assert_close(found, loops(alpha, deviation, 3, 4), atol=1e-14, rtol=1e-14)


def test_closed_form_equals_the_released_one():
    """A power of exp(-dist^2 / 2) in float32: the same on the 8 x 8 grid, where nothing underflows; gone on 16 x 16."""
    alpha, deviation = drawn(spread=10.0)
    base = (-squared_distances((8, 8)).float()).exp().sqrt()
    powers = base ** (1 / (deviation.float().square() + 1e-5))[..., None, None]
    released = (alpha.float()[..., None, None] * powers).sum(1)
    ours = mixture(squared_distances((8, 8)).float(), alpha.float(), deviation.float())
    assert (ours - released).abs().max() < 1e-5
    assert ((-squared_distances((16, 16)).float()).exp().sqrt() == 0).sum() == 21792
    assert (mixture(squared_distances((16, 16)).float(), torch.ones(1, 1), 10 * torch.ones(1, 1)) > 0).all()


def test_mask_is_symmetric_and_moves_with_the_grid():
    alpha, deviation = drawn()
    mask = mixture(squared_distances((4, 4)), alpha, deviation)
    assert torch.equal(mask, mask.mT)
    grid = mask.unflatten(2, (4, 4)).unflatten(1, (4, 4))  # (H, y, x, v, u)
    assert torch.equal(grid[:, 1:, 1:, 1:, 1:], grid[:, :-1, :-1, :-1, :-1])  # translation
    assert torch.equal(grid.rot90(1, (1, 2)).rot90(1, (3, 4)), grid)  # rotation


def test_attention_multiplies_the_scores():
    """Class and register tokens see, and are seen, as in the host; block by block, in loops over tokens."""
    model = graft(vit(), GaussianMask())
    attention = model.blocks[0].attn
    x = torch.randn(1, 14, 24, dtype=torch.float64)
    alpha, deviation = attention.alpha.detach(), attention.deviation.detach()
    patches = loops(alpha, deviation, 3, 4)
    qkv = (x[0] @ attention.qkv.weight.T + attention.qkv.bias).unflatten(1, (3, 3, 8))
    out = torch.zeros(14, 3, 8, dtype=torch.float64)
    for h in range(3):
        for i in range(14):
            scores = torch.zeros(14, dtype=torch.float64)
            for j in range(14):
                weight = patches[h, i - 2, j - 2] if i >= 2 and j >= 2 else 1.0
                scores[j] = weight * (qkv[i, 0, h] @ qkv[j, 1, h]) / 8**0.5
            out[i, h] = scores.softmax(0) @ qkv[:, 2, h]
    torch.testing.assert_close(attention(x, state=state())[0], attention.proj(out.flatten(1)), atol=1e-12, rtol=1e-12)


def test_one_wide_gaussian_of_weight_one_is_the_host():
    model = vit()
    expected = model(pictures())
    graft(model, GaussianMask(kernels=1, start="wide"))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.deviation.fill_(1e9)
    torch.testing.assert_close(model(pictures()), expected, atol=1e-12, rtol=1e-12)


def test_published_number_of_parameters():
    """2 * 3 * 12 * 9 = 648 for the authors' ViT: width 192, 9 blocks of 12 heads, 8 x 8 patches, no class token."""
    host = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=9, num_heads=12, mlp_ratio=2, class_token=False, global_pool="avg"
    )
    graft(host, "gaussian_mask")
    assert sum(p.numel() for p in new_parameters(host).values()) == 648
    assert host.blocks[0].attn.mask(64, state(8, 8, 0)).shape == (12, 64, 64)


def test_starts():
    attention = graft(vit(embed_dim=2000, num_heads=1000, depth=1), GaussianMask()).blocks[0].attn
    assert abs(attention.deviation.mean() - 10) < 1
    assert abs(attention.deviation.std() - 10) < 1
    assert abs(attention.alpha.mean()) < 0.2
    assert abs(attention.alpha.std() - 2) < 0.2
    wide = graft(vit(), GaussianMask(start="wide")).blocks[0].attn
    assert torch.equal(wide.deviation[0], 5 * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))  # 3 x 4: diagonal 5
    assert torch.equal(wide.alpha, torch.full((3, 3), 1 / 3).double())
    assert wide.mask(14, state()).min() > 0.7
    assert wide.mask(14, state()).max() <= 1 + 1e-6


@pytest.mark.parametrize("size", [(12, 16), (16, 12), (8, 24), (24, 24)])
def test_any_image_size_has_its_own_mask(size):
    """Three of these have 12 patches, or a multiple: the grid comes from the image, not from the number of tokens."""
    model = graft(vit(dynamic_img_size=True), "gaussian_mask")
    check(model, pictures(*size))
    attention = model.blocks[0].attn
    grid = size[0] // 4, size[1] // 4
    begun = model.blocks[0](model._pos_embed(model.patch_embed(pictures(*size))))
    assert begun.state == state(*grid)
    expected = loops(attention.alpha.detach(), attention.deviation.detach(), *grid)
    torch.testing.assert_close(attention.mask(2 + grid[0] * grid[1], begun.state)[:, 2:, 2:], expected, atol=1e-12, rtol=1e-12)
    fixed = graft(vit(), "gaussian_mask")
    fixed.set_input_size(size)
    torch.testing.assert_close(fixed(pictures(*size)), model(pictures(*size)), atol=1e-4, rtol=1e-4)


def test_inserted_tokens_are_seen_as_without_a_mask():
    model = graft(vit(), "extra_tokens:tokens=2,kind=register", "gaussian_mask")
    check(model, pictures())
    mask = model.blocks[1].attn.mask(16, state(read_out=(False, False)))
    assert torch.equal(mask[:, :14, :14], model.blocks[1].attn.mask(14, state()))
    assert (mask[:, 14:] == 1).all()
    assert (mask[:, :, 14:] == 1).all()


def test_is_measured_like_any_other_attention():
    """The map is recomputed with the mask, and must give what the model computed, inserted tokens included."""
    reading = look(graft(vit(), "gaussian_mask", "extra_tokens"), pictures().clamp(0, 1))
    assert [layer["name"] for layer in reading.layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(layer["error"] < 1e-5 for layer in reading.layers)
    assert "learned" not in reading.table()["source"]


def test_a_merged_token_has_the_mean_of_its_places():
    attention = graft(vit(), "gaussian_mask").blocks[0].attn
    index = torch.tensor([[0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 2]])  # the places 2, 3 and 13 are one
    merged = attention.mask(12, state(assignment=Assignment(index, tokens=12)))[0]
    mask = attention.mask(14, state())
    torch.testing.assert_close(merged[:, 2, 5], mask[:, [2, 3, 13], 6].mean(1), atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(merged[:, 2, 2], mask[:, [2, 3, 13]][..., [2, 3, 13]].mean((1, 2)), atol=1e-14, rtol=1e-14)


def test_tokens_without_places_are_refused():
    attention = graft(vit(), "gaussian_mask").blocks[0].attn
    with pytest.raises(MaskError, match=r"11 tokens whose places .* not known\. Expected a token for each place\. Switch"):
        attention.mask(11)
    dropping = graft(vit(patch_drop_rate=0.5), "gaussian_mask").train()
    with pytest.raises(MaskError, match="patch_drop_rate"):
        dropping(pictures())


def test_svda_and_the_mask_refuse_each_other():
    for first, second in (("svda", "gaussian_mask"), ("gaussian_mask", "svda")):
        with pytest.raises(GraftError, match=rf"already holds \w+, which overrides attention itself; {second} would undo"):
            graft(vit(), first, second)
    check(graft(vit(), "svda:layers=0", "gaussian_mask:layers=1"), pictures())


def test_bad_input():
    with pytest.raises(SettingError, match=r"kernels=0\. Expected 1 or more"):
        GaussianMask(kernels=0)
    with pytest.raises(HostError, match=r"patch_embed is a .*OtherEmbed\. Expected timm\..*PatchEmbed"):
        graft(vit(embed_layer=OtherEmbed), "gaussian_mask")


def test_real_weights_hardly_notice_the_wide_start(shared_data):
    """start=wide: the real ViT-Tiny says the same of 49 of 50 photographs, untrained."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:16]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        plain = model(images).argmax(1)
        masked = graft(model, GaussianMask(start="wide"))(images).argmax(1)
    assert (plain == masked).sum() >= 15
    assert ungraft(model).changed == ()
