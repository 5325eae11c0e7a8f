"""Local windows against loops and the unfold formulation."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from vitreous import LocalWindow, check, graft, new_parameters, ungraft
from vitreous.base.errors import GraftError, HostError, MaskError, SettingError
from vitreous.layers.stream import Assignment, TokenState
from vitreous.lens.look import look
from vitreous.mechanisms.attn.local_window import windows

SMALL = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
SHAPES = [(3, 1), (5, 1), (3, 2), (1, 1)]  # window, dilation


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | {"reg_tokens": 1} | options).double().eval()


def pictures(height=12, width=20):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def state(prefix=2, **fields):
    return TokenState(grid=(3, 5), prefix=prefix, **fields)


def sees(i, j, window, dilation):
    """Whether token i sees token j; 2 prefix tokens, then patches of a 3 x 5 grid."""
    if i < 2 or j < 2:
        return True
    (y, x), (v, u) = divmod(i - 2, 5), divmod(j - 2, 5)
    steps = range(-(window // 2) * dilation, (window // 2) * dilation + 1, dilation)
    return v - y in steps and u - x in steps


def projected(attention, x):
    return (x[0] @ attention.qkv.weight.T + attention.qkv.bias).unflatten(1, (3, 3, 8))  # (N, parts, heads, width)


@pytest.mark.parametrize(("window", "dilation"), SHAPES)
def test_attention_is_that_of_the_window(window, dilation):
    """Entry by entry; the class and the register token see, and are seen, as in the host."""
    attention = graft(vit(), LocalWindow(window=window, dilation=dilation)).blocks[0].attn
    x = torch.randn(1, 17, 24, dtype=torch.float64)
    qkv = projected(attention, x)
    out = torch.zeros(17, 3, 8, dtype=torch.float64)
    for h in range(3):
        for i in range(17):
            keys = [j for j in range(17) if sees(i, j, window, dilation)]
            weights = torch.stack([qkv[i, 0, h] @ qkv[j, 1, h] / 8**0.5 for j in keys]).softmax(0)
            out[i, h] = sum(w * qkv[j, 2, h] for w, j in zip(weights, keys, strict=True))
    expected = attention.proj(out.flatten(1))
    torch.testing.assert_close(attention(x, state=state())[0], expected, atol=1e-13, rtol=1e-13)
    assert (attention(x, state=state()) - attention.host.forward(attention, x)).abs().max() > 1e-3


@pytest.mark.parametrize(("window", "dilation"), SHAPES[:3])
def test_border_of_zeros_is_the_padded_convolution(window, dilation):
    """torch's unfold pads with zeros: keys there have score 0 and value 0, and get their share."""
    model = vit(class_token=False, reg_tokens=0, global_pool="avg")
    attention = graft(model, LocalWindow(window=window, dilation=dilation, border="zero")).blocks[0].attn
    x = torch.randn(1, 15, 24, dtype=torch.float64)
    q, k, v = projected(attention, x).permute(1, 2, 0, 3)  # (heads, N, width) each

    def unfolded(rows):  # (heads, N, width) -> (heads, width, cells, N)
        picture = rows.mT.unflatten(2, (3, 5))
        cells = F.unfold(picture, window, dilation=dilation, padding=dilation * (window // 2))
        return cells.unflatten(1, (8, -1))

    weights = (torch.einsum("hnc,hcwn->hwn", q, unfolded(k)) / 8**0.5).softmax(1)
    out = torch.einsum("hwn,hcwn->nhc", weights, unfolded(v)).flatten(1)
    result = attention(x, state=state(0))[0]
    torch.testing.assert_close(result, attention.proj(out), atol=1e-15, rtol=0)
    attention.border = "masked"
    assert (attention(x, state=state(0))[0] - result).abs().max() > 1e-3


@pytest.mark.parametrize("fused", [True, False])
def test_a_window_over_the_whole_grid_is_the_host(fused):
    """k >= 2 max(H, W) - 1, bit for bit; one size less is another model."""
    model = vit().float()
    for block in model.blocks:
        block.attn.fused_attn = fused
    expected = model(pictures().float())
    assert torch.equal(graft(model, LocalWindow(window=9))(pictures().float()), expected)
    for block in model.blocks:
        block.attn.window = 7
    assert (model(pictures().float()) - expected).abs().max() > 1e-6
    assert new_parameters(model) == {}


def test_windows_move_with_the_grid_and_are_symmetric():
    inside = windows((4, 5), 3)
    assert torch.equal(inside, inside.T)
    grid = inside.unflatten(1, (4, 5)).unflatten(0, (4, 5))
    assert torch.equal(grid[1:, 1:, 1:, 1:], grid[:-1, :-1, :-1, :-1])
    assert inside.sum(1).unflatten(0, (4, 5)).tolist() == [[4, 6, 6, 6, 4], [6, 9, 9, 9, 6], [6, 9, 9, 9, 6], [4, 6, 6, 6, 4]]
    assert windows((2, 3, 3), 3).sum(1).max() == 18  # volumes


@pytest.mark.parametrize("border", ["masked", "zero"])
@pytest.mark.parametrize("size", [(20, 12), (60, 4), (24, 24)])
def test_any_image_size_has_its_own_windows(size, border):
    """Two of these have as many patches as the model was made for; the image gives the grid."""
    model = graft(vit(dynamic_img_size=True), LocalWindow(border=border))
    fixed = graft(vit(), LocalWindow(border=border))
    fixed.set_input_size(size)
    torch.testing.assert_close(fixed(pictures(*size)), check(model, pictures(*size))(pictures(*size)), atol=1e-4, rtol=1e-4)
    attention, grid = model.blocks[0].attn, (size[0] // 4, size[1] // 4)
    q = torch.zeros(1, 3, 2 + grid[0] * grid[1], 8, dtype=torch.float64)
    (bias,) = attention.biases(q, q, q, TokenState(grid=grid, prefix=2))
    assert torch.equal(bias[0, 0, 2:, 2:] == 0, windows(grid, 3))


def test_inserted_tokens_see_and_are_seen():
    attention = graft(vit(), LocalWindow(border="zero")).blocks[0].attn
    q = torch.zeros(1, 3, 19, 8, dtype=torch.float64)
    (bias,) = attention.biases(q, q, q, state(read_out=(False, True)))
    assert (bias[0, 0, :, [0, 1, 17, 18]] == 0).all()
    assert (bias[0, 0, [0, 1, 17, 18]] == 0).all()
    assert attention.outside(q, state(read_out=(False, True)))[0, 0, [0, 1, 17, 18]].tolist() == [[0.0]] * 4


def test_a_merged_token_weighs_by_the_share_of_its_places():
    attention = graft(vit(), LocalWindow(border="zero")).blocks[0].attn
    # the first two places are one token
    merged = state(assignment=Assignment(torch.tensor([[0, 1, 2, 2, *range(3, 16)]]), tokens=16))
    q = torch.zeros(1, 3, 16, 8, dtype=torch.float64)
    (bias,) = attention.biases(q, q, q, merged)
    inside = windows((3, 5), 3).double()
    torch.testing.assert_close(bias.exp()[0, 0, 2, 3:], inside[:2, 2:].mean(0))
    torch.testing.assert_close(bias.exp()[0, 0, 3:, 2], inside[2:, :2].mean(1))
    assert (bias.exp()[0, 0, 2, 3:] == 0.5).any()
    assert attention.outside(q, merged)[0, 0, 2] == (5 + 3) / 2


def test_look_verifies_maps_of_windows():
    reading = look(graft(vit(), LocalWindow()).float(), pictures().float().clamp(0, 1))
    assert [layer["name"] for layer in reading.layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(layer["error"] < 1e-5 for layer in reading.layers)


def test_real_weights_want_wide_windows(shared_data):
    """The real ViT-Tiny, untrained: the same answer for 46 of 50 photographs with 13, for 16 with 3."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:16]
    images, same = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, []
    with torch.no_grad():
        plain = model(images).argmax(1)
        for window in (27, 13, 3):
            same.append((graft(model, LocalWindow(window=window))(images).argmax(1) == plain).sum().item())
            ungraft(model)
    assert same[0] == 16 > same[1] > 12 > 8 > same[2]


def test_tokens_without_places_are_refused():
    dropping = graft(vit(patch_drop_rate=0.5), LocalWindow()).train()
    with pytest.raises(MaskError, match=r"tokens whose places .* not known\..*patch_drop_rate.*local_window"):
        dropping(pictures())


def test_bad_input():
    for window in (0, 4):
        with pytest.raises(SettingError, match=rf"window={window}\. Expected an odd number"):
            LocalWindow(window=window)
    with pytest.raises(SettingError, match=r"dilation=0\. Expected 1 or more"):
        LocalWindow(dilation=0)
    with pytest.raises(GraftError, match="already holds"):
        graft(vit(), "svda", "local_window")

    class OtherEmbed(PatchEmbed):
        """Some other way from images to patches."""

    with pytest.raises(HostError, match=r"OtherEmbed\. Expected timm\..*PatchEmbed"):
        graft(vit(embed_layer=OtherEmbed), "local_window")
