"""The polyline path mask against paths walked in loops, at large rates, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from vitreous import PolylineMask, check, graft, new_parameters
from vitreous.base.errors import GraftError, HostError, MaskError
from vitreous.layers.polyline import PathRates, polyline
from vitreous.layers.stream import Assignment, TokenState
from vitreous.lens.look import look

SMALL = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
GRID = 3, 5


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | {"reg_tokens": 1} | options).double().eval()


def pictures(height=12, width=20):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def state(prefix=2, **fields):
    return TokenState(grid=GRID, prefix=prefix, **fields)


def tokens(count=17):
    return torch.randn(2, count, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def large(model):
    """The model with rates of order 1 and more, which differ from token to token.

    At the authors' start a wrong path would hide.
    """
    for attention in (block.attn for block in model.blocks):
        with torch.no_grad():
            attention.rates.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(3))
            attention.rates.rate_bias.fill_(0.5)
    return model


def rates_by_hand(attention, patches):
    """alpha, beta (B, H, h, w) of patches (B, P, D), number by number."""
    weight, biases, factors = (p.tolist() for p in attention.rates.parameters())
    rates = torch.zeros(2, len(patches), 3, *GRID, dtype=torch.float64)
    for n, picture in enumerate(patches.tolist()):
        for p, patch in enumerate(picture):
            for h in range(3):
                for which in range(2):
                    logit = sum(patch[8 * h + c] * weight[which][c] for c in range(8)) + biases[h]
                    rates[which, n, h, p // 5, p % 5] = -math.exp(factors[h]) * math.log1p(math.exp(logit))
    return rates


def walked(alpha, beta, wrong=False):
    """M (P, P) of rates (h, w), step by step.

    wrong: along the query's column in place of the key's.
    """
    (height, width), alpha, beta = alpha.shape, alpha.tolist(), beta.tolist()
    places = [(row, column) for row in range(height) for column in range(width)]
    paths = torch.zeros(len(places), len(places), dtype=torch.float64)
    for query, (i, j) in enumerate(places):
        for key, (k, l) in enumerate(places):
            along_row = sum(alpha[i][column] for column in range(min(j, l) + 1, max(j, l) + 1))
            paths[query, key] = along_row + sum(beta[row][j if wrong else l] for row in range(min(i, k) + 1, max(i, k) + 1))
    return paths


def by_hand(attention, x, wrong=False):
    """The output for tokens x (B, N, D), 2 of them without a place: two softmaxes, averaged."""
    alpha, beta = rates_by_hand(attention, x[:, 2:])
    q, k, v = attention.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 8**0.5
    mask = torch.zeros_like(scores)
    for n in range(len(x)):
        for h in range(3):
            mask[n, h, 2:, 2:] = walked(alpha[n, h], beta[n, h], wrong)
    weights = (scores + mask).softmax(-1) / 2 + (scores + mask.mT).softmax(-1) / 2
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_attention_decays_along_both_paths():
    """And the query's column in place of the key's is another model, as large rates show."""
    attention, x = large(graft(vit(), PolylineMask())).blocks[0].attn, tokens()
    out = attention(x, state=state())
    torch.testing.assert_close(out, by_hand(attention, x), atol=1e-13, rtol=1e-13)
    wrong = by_hand(attention, x, wrong=True)
    assert ((out - wrong).norm() / out.norm()) > 0.01
    torch.testing.assert_close(attention.rates_of(x, state())[:, :, :, 0], rates_by_hand(attention, x[:, 2:]))


def drawn(groups=1):
    shape = 2, 1, 2, groups, *GRID
    return -2 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_paths_are_walked_step_by_step():
    alpha, beta = drawn()
    paths = polyline(alpha, beta)
    for h in range(2):
        torch.testing.assert_close(paths[0, h], walked(alpha[0, h, 0], beta[0, h, 0]), atol=1e-13, rtol=1e-13)
    assert (paths.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert (paths - paths.mT).abs().max() > 0.1


def test_the_transpose_walks_the_column_first():
    """It is the mask of the transposed picture, rows and columns exchanged."""
    alpha, beta = drawn()
    turned = polyline(beta.mT, alpha.mT)[0, 0].unflatten(1, (5, 3)).unflatten(0, (5, 3)).permute(1, 0, 3, 2)
    torch.testing.assert_close(polyline(alpha, beta)[0, 0].T, turned.flatten(2).flatten(0, 1), atol=1e-13, rtol=1e-13)


def test_rates_that_are_alike_count_steps():
    rate = torch.full((1, 1, 1, *GRID), -1.0)
    steps = polyline(rate, 10 * rate)[0, 0].unflatten(1, GRID).unflatten(0, GRID)
    assert steps[0, 0].tolist() == [[0, -1, -2, -3, -4], [-10, -11, -12, -13, -14], [-20, -21, -22, -23, -24]]


def test_channels_walk_at_rates_of_their_own():
    """The query's row has the rates of the query's channel, the key's column the key's."""
    alpha, beta = drawn(groups=2)
    paths = polyline(alpha, beta)[0, 1].unflatten(1, (2, 15)).unflatten(0, (2, 15))
    for g in range(2):
        for other in range(2):
            expected = walked(alpha[0, 1, g], beta[0, 1, other])
            torch.testing.assert_close(paths[g, :, other], expected, atol=1e-13, rtol=1e-13)


@torch.no_grad()
def test_without_rates_it_is_the_host_and_with_endless_ones_patches_see_themselves():
    model = vit()
    expected = model(pictures())
    graft(model, PolylineMask())
    assert (model(pictures()) - expected).abs().max() > 1e-6
    for block in model.blocks:
        block.attn.rates.log_factor.fill_(-1e4)
    torch.testing.assert_close(model(pictures()), expected, atol=1e-12, rtol=1e-12)
    lonely = vit(class_token=False, reg_tokens=0, global_pool="avg")
    attention = graft(lonely, PolylineMask()).blocks[0].attn
    attention.rates.log_factor.fill_(20)
    values = attention.qkv(tokens(15))[..., 48:]
    torch.testing.assert_close(attention(tokens(15), state=state(0)), attention.proj(values))


def test_start_and_number_of_parameters():
    rates = PathRates(2000, 1000, torch.Generator().manual_seed(0))
    steps = F.softplus(rates.rate_bias)
    assert 1e-3 * 0.999 < steps.min() < 2e-3
    assert 0.09 < steps.max() < 0.1 * 1.001
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.1  # log-uniform
    assert 0 <= rates.log_factor.min() < rates.log_factor.max() <= math.log(1.1)
    with torch.device("meta"):
        host = VisionTransformer(embed_dim=192, num_heads=3, depth=12)
    new = new_parameters(graft(host, "polyline_mask:layers=0"))
    assert sum(p.numel() for p in new.values()) == 2 * 64 + 2 * 3


@pytest.mark.parametrize("size", [(20, 12), (60, 4), (24, 24)])
def test_any_image_size_has_its_own_paths(size):
    """Two of these have as many patches as the model was made for; the image gives the grid."""
    model, fixed = large(graft(vit(dynamic_img_size=True), "polyline_mask")), large(graft(vit(), "polyline_mask"))
    fixed.set_input_size(size)
    torch.testing.assert_close(fixed(pictures(*size)), check(model, pictures(*size))(pictures(*size)), atol=1e-4, rtol=1e-4)


def test_inserted_tokens_are_seen_as_without_a_mask():
    attention, x = large(graft(vit(), "polyline_mask")).blocks[0].attn, tokens(19)
    first, second = attention.biases(x, x, x, state(read_out=(False, True)))
    assert torch.equal(second, first.mT)
    assert torch.equal(first[..., :17, :17], attention.biases(x[:, :17], x, x, state())[0])
    assert (first[..., [0, 1, 17, 18]] == 0).all()
    assert (first[..., [0, 1, 17, 18], :] == 0).all()


def test_a_merged_token_sets_the_rates_of_its_places_and_has_their_mean():
    attention, x = large(graft(vit(), "polyline_mask")).blocks[0].attn, tokens(16)
    index = torch.tensor([[0, 1, 2, 2, *range(3, 16)]]).expand(2, -1)  # the first two places are one
    merged = attention.biases(x, x, x, state(assignment=Assignment(index, tokens=16)))[0]
    apart = attention.biases(x[:, index[0]], x, x, state())[0]
    torch.testing.assert_close(merged[:, :, 3:, 3:], apart[:, :, 4:, 4:])
    torch.testing.assert_close(merged[:, :, 2, 3:], apart[:, :, 2:4, 4:].mean(2))
    torch.testing.assert_close(merged[:, :, 2, 2], apart[:, :, 2:4, 2:4].mean((2, 3)))


def test_look_verifies_both_maps():
    reading = look(large(graft(vit(), "polyline_mask")).float(), pictures().float().clamp(0, 1))
    assert {layer["name"].partition("#")[0] for layer in reading.layers} >= {"blocks.0.attn", "blocks.1.attn"}
    assert all(layer["error"] < 1e-5 for layer in reading.layers)


def test_real_weights_hardly_notice_the_start(shared_data):
    """The real ViT-Tiny, untrained, says the same of 48 of 50 photographs."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:16]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        plain = model(images).argmax(1)
        assert (graft(model, "polyline_mask")(images).argmax(1) == plain).sum() >= 14


def test_bad_input():
    dropping = graft(vit(patch_drop_rate=0.5), "polyline_mask").train()
    with pytest.raises(MaskError, match=r"tokens whose places .* not known\..*patch_drop_rate.*polyline_mask"):
        dropping(pictures())
    with pytest.raises(MaskError, match=r"grid of 2 x 3 x 5\. Expected rows and columns"):
        dropping.blocks[0].attn(tokens(32), state=TokenState(grid=(2, 3, 5), prefix=2))
    with pytest.raises(GraftError, match="already holds"):
        graft(vit(), "svda", "polyline_mask")
    host = vit()
    host.blocks[1].attn.num_heads = 7
    with pytest.raises(HostError, match=r"width 24 and 7 heads at blocks\.1\.attn\. Expected heads that divide"):
        graft(host, "polyline_mask")
