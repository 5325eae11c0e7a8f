"""Strip attention against the host's attention at its limit, and against sums as loops."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vitreous import StripAttention, check, graft, new_parameters
from vitreous.base.errors import GraftError, SettingError
from vitreous.layers.stream import TokenState
from vitreous.lens.look import look

SMALL = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}  # 3 x 5 patches


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | {"reg_tokens": 2} | options).double().eval()


def random(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixer(**settings):
    """A mixer of 24 channels with weights away from their small start, and a state of 3 x 5 patches and 3 prefix tokens."""
    module = graft(vit(), StripAttention(**settings)).blocks[0].attn
    for i, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=i) / (5 if parameter.ndim == 2 else 3)
    return module, TokenState(grid=(3, 5), prefix=3)


def test_without_reduction_and_of_equal_widths_it_is_the_hosts_attention():
    """With the host's joint layer split into three, to the bit."""
    host, x = vit(), random(2, 3, 12, 20)
    model = graft(vit(), StripAttention(reduction=1, strip=8))
    for block, plain in zip(model.blocks, host.blocks, strict=True):
        for name, weight, bias in zip("qkv", plain.attn.qkv.weight.chunk(3), plain.attn.qkv.bias.chunk(3), strict=True):
            layer = block.attn.get_submodule(f"{name}_proj")
            layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
        block.attn.proj.load_state_dict(plain.attn.proj.state_dict())
    assert torch.equal(model(x), host(x))
    model.blocks[1].attn.reduce.weight.data.mul_(1.1)
    assert (model(x) - host(x)).abs().max() > 1e-4


@pytest.mark.parametrize("reduction", [2, 3, 7])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_module_is_the_formula(reduction, groups):
    """3 x 5 patches: a grid that r = 2 divides in neither direction, r = 3 in one, and one smaller than r = 7."""
    module, r = mixer(reduction=reduction, strip=2)[0], reduction
    state = TokenState(grid=(3, 5), prefix=3, groups=groups, read_out=(True,))
    n = 3 + 15 * groups + 1
    x = random(2, n, 24)
    kernel, out = module.reduce.weight[:, 0], torch.zeros_like(x)
    rows = [x[:, i] for i in range(3)]
    for group in range(groups):
        for top in range(0, 3, r):
            for left in range(0, 5, r):
                cell = torch.zeros(2, 24, dtype=torch.float64)
                for i in range(r):
                    for j in range(r):
                        place = 5 * min(top + i, 2) + min(left + j, 4)  # beyond the edge: the last row and column again
                        cell += kernel[:, i, j] * x[:, 3 + 15 * group + place]
                rows.append(cell)
    keys = torch.stack([*rows, x[:, -1]], dim=1)
    assert keys.shape[1] == 4 + groups * math.ceil(3 / r) * math.ceil(5 / r)
    q, k, v = module.q_proj(x), module.k_proj(keys), module.v_proj(keys)
    for h in range(3):
        d, w = slice(2 * h, 2 * h + 2), slice(8 * h, 8 * h + 8)
        for i in range(n):
            scores = torch.stack([(q[:, i, d] * k[:, j, d]).sum(-1) / math.sqrt(2) for j in range(keys.shape[1])], dim=1)
            out[:, i, w] = (scores.softmax(1)[..., None] * v[:, :, w]).sum(1)
    assert (module(x, state=state) - module.proj(out)).abs().max() < 1e-12


def test_the_convolution_starts_as_the_mean_of_its_patches():
    module = graft(vit(), StripAttention(reduction=3)).blocks[0].attn
    x = random(1, 18, 24)
    keys = module.reduced(x, TokenState(grid=(3, 5), prefix=3))
    patches = x[0, 3:].unflatten(0, (3, 5))
    assert torch.equal(keys[0, :3], x[0, :3])
    assert torch.allclose(keys[0, 3], patches[:, :3].mean((0, 1)))
    assert torch.allclose(keys[0, 4], (patches[:, 3].sum(0) + 2 * patches[:, 4].sum(0)) / 9)


def test_one_channel_makes_scores_of_rank_one():
    """What compression costs: with d = 1 all queries order the keys alike, or the other way round."""
    module, state = mixer(strip=1)
    x = random(1, 18, 24)
    q, k = module.q_proj(x), module.k_proj(module.reduced(x, state))
    scores = (q.mT[:, :, :, None] * k.mT[:, :, None])[0]  # (H, N, M)
    orders = scores.argsort(-1)
    for h in range(3):
        assert all(row.tolist() in (orders[h, 0].tolist(), orders[h, 0].flip(0).tolist()) for row in orders[h])


def test_parameters():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
    new = new_parameters(graft(model, StripAttention(reduction=4, strip=16)))
    one = 2 * (384 * 96 + 96) + 2 * (384 * 384 + 384) + 384 * 16
    assert sum(p.numel() for p in new.values()) == 12 * one


def test_look_reads_its_attention():
    """Its keys are coarser than its queries, and maps are on the grid of the patches."""
    model, images = graft(vit(), StripAttention(layers=(1,))).float(), random(2, 3, 12, 20).float()
    reading = look(model, images)
    assert [layer["name"] for layer in reading.facts["layers"]] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(layer["verified"] for layer in reading.facts["layers"])
    assert not any("No attention in" in note for note in reading.facts["notes"])
    assert {layer for name, layer in reading.maps if name == "attention"} == {0, 1}


def test_any_image_size_and_bad_input():
    check(graft(vit(dynamic_img_size=True), "strip_attention:reduction=3"), random(1, 3, 8, 28))
    for name in ("reduction", "strip"):
        with pytest.raises(SettingError, match=rf"{name}=0\. Expected 1 or more"):
            StripAttention(**{name: 0})
    with pytest.raises(SettingError, match=r"heads=5\. Expected a divisor of the width 24"):
        graft(vit(), StripAttention(heads=5))
    with pytest.raises(GraftError, match="already holds StripMixer, a mixer"):
        graft(vit(), "strip_attention", "svda")
