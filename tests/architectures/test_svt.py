"""SVT against the released network: parameters, logits, and that each part of it counts; sizes, heads, refusals."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch.nn import functional as F

from architectures.released import fill, pictures
from vitreous.architectures.svt import filtered, grid_of
from vitreous.base.errors import SettingError
from vitreous.hosts.mixer import mixers_in
from vitreous.layers.stream import TokenState

SMALL = {
    "img_size": 64,
    "stem_width": 4,
    "embed_dims": (8, 12, 16, 24),
    "num_heads": (1, 2, 2, 3),
    "mlp_ratios": (2, 2, 2, 2),
    "depths": (2, 1, 1, 1),
}
SMALL_NETWORKS = {"svt_h_s": SMALL | {"depths": (1, 1, 1, 1)}}
PYRAMID = {  # names of ours in the authors' code, of SpectFormer's pyramid, too
    r"^patch_embed\.": "patch_embed1.",
    r"^stages\.(\d)\.downsample\.": lambda found: f"patch_embed{int(found[1]) + 1}.",
    r"^stages\.(\d)\.blocks\.(\d+)": lambda found: f"block{int(found[1]) + 1}.{found[2]}",
    r"^stages\.(\d)\.norm": lambda found: f"norm{int(found[1]) + 1}",
    r"^norm\.": "norm4.",
    r"\.mlp\.dwconv\.": ".mlp.dwconv.dwconv.",
}
SCATTER = {
    r"\.attn\.low$": ".attn.complex_weight_ll",
    r"\.attn\.([wb])([12])$": lambda found: f".attn.complex_weight_lh_{found[1] * (found[1] == 'b')}{found[2]}",
}


def released(model, names):
    """{name in the authors' code: tensor} of weights by the rule that the stored logits were made with."""
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        weights[name] = value if "num_batches" in name else fill(name, value.shape)
    return weights


def count(name, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, **options).parameters())


def test_has_the_parameters_of_the_released_networks():
    assert {name: count(name) for name in ("svt_h_s", "svt_h_b", "svt_h_l")} == {
        "svt_h_s": 22_052_592,
        "svt_h_b": 32_878_544,
        "svt_h_l": 54_594_000,
    }
    assert count("svt_h_s", aux_head=False) == 21_603_592


@torch.no_grad()
def test_equals_the_released_network():
    """Logits at 224 pixels with weights by name; without any one part they would be others."""
    model = timm.create_model("svt_h_s").eval()
    weights = {**released(model, PYRAMID | SCATTER), "block1.0.attn.xfm.h0o": torch.zeros(1, 1, 13, 1)}
    model.load_state_dict(filtered(weights, model))
    logits = model(pictures(1, 224))[0]
    torch.testing.assert_close(logits[:4], torch.tensor([-0.97547, -0.62834, 1.94665, 0.99237]), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack([logits.mean(), logits.std()]), torch.tensor([0.21649, 1.39587]), atol=1e-4, rtol=0)
    model.set_input_size(64)
    logits = model(pictures(1, 64))[0]
    for part in ("attn.low", "attn.w2", "attn.b1", "post_network.0.attn", "aux_head.weight"):
        tensors = [p for name, p in model.named_parameters() if part in name]
        values = [p.clone() for p in tensors]
        for p in tensors:
            p.zero_()
        assert (model(pictures(1, 64))[0] - logits).abs().max() > 1e-2, part
        for p, value in zip(tensors, values, strict=True):
            p.copy_(value)


@torch.no_grad()
def test_block_and_head_are_the_formula():
    torch.manual_seed(0)
    model = timm.create_model("svt_h_s", **SMALL, num_classes=5).double().eval()
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    block, x = model.stages[0].blocks[0], torch.randn(2, 16 * 12, 8, dtype=torch.float64)
    mixed = block.attn.mix(block.norm1(x).unflatten(1, (16, 12))).flatten(1, 2)
    y = x + mixed
    hidden = block.mlp.fc1(block.norm2(y))
    dwconv = block.mlp.dwconv
    hidden = F.conv2d(hidden.mT.reshape(2, 16, 16, 12), dwconv.weight, dwconv.bias, padding=1, groups=16).flatten(2).mT
    expected = y + block.mlp.fc2(F.gelu(hidden))
    torch.testing.assert_close(block(x, (16, 12)), expected, atol=1e-12, rtol=1e-12)
    assert mixed.abs().max() > 0.1

    images = pictures(2, 64).double()
    features, last = model.forward_features(images), model.post_network[0]
    patches = model.stages(model.patch_embed(images)).flatten(2).mT
    tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
    normed = last.norm1(tokens)
    q = last.attn.q(normed[:, :1]).unflatten(2, (3, 8)).transpose(1, 2) / 8**0.5
    k, v = last.attn.kv(normed).unflatten(2, (2, 3, 8)).permute(2, 0, 3, 1, 4)
    z = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
    cls = tokens[:, :1] + last.attn.proj(z)
    cls = cls + last.mlp(last.norm2(cls))
    torch.testing.assert_close(features, model.norm(torch.cat([cls, patches], dim=1)), atol=1e-12, rtol=1e-12)
    logits = model.head(features[:, 0]) + 0.5 * model.aux_head(features[:, 1:]).max(1).values
    torch.testing.assert_close(model(images), logits, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(logits, model.head(features[:, 0]), atol=0.01)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (72, 40), (33, 50)], ids=str)
def test_grids_of_stages(size):
    """Counted by the convolutions, odd ones included; mixers have the grid of their stage."""
    model = timm.create_model("svt_h_s", **SMALL | {"img_size": size}).eval()
    grids = [tuple(y.shape[2:]) for y in model.forward_intermediates(torch.zeros(1, 3, *size), intermediates_only=True)]
    assert grids == [grid_of(size, stage) for stage in range(4)]
    assert {name for name in mixers_in(model)} == {"stages.0.blocks.0.attn", "stages.0.blocks.1.attn"}
    assert mixers_in(model)["stages.0.blocks.0.attn"].low.shape[1:] == tuple(n + n % 2 for n in grids[0])


def test_another_image_size_interpolates_the_gains_once_or_each_time():
    model, x = timm.create_model("svt_h_s", **SMALL).eval(), pictures(2, 96)
    before = model(x)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_input_size(96)
    assert model.stages[0].blocks[0].attn.low.shape == (8, 24, 24)
    torch.testing.assert_close(model(x), before)
    larger = timm.create_model("svt_h_s", **SMALL | {"img_size": 96}).eval()
    larger.load_state_dict(filtered(weights, larger))
    assert torch.equal(larger(x), model(x))


def test_mixer_is_called_with_the_grid():
    mixer = timm.create_model("svt_h_s", **SMALL).stages[0].blocks[0].attn
    x = torch.randn(1, 12, 8)
    assert torch.equal(mixer(x, (3, 4)), super(type(mixer).__mro__[1], mixer).forward(x, state=TokenState(grid=(3, 4))))


def test_heads():
    model = timm.create_model("svt_h_s", **SMALL, num_classes=7).eval()
    features = model.forward_features(pictures(1, 64))
    assert model.forward_head(features, pre_logits=True).shape == (1, 24)
    model.reset_classifier(3, "avg")
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 1:].mean(1))
    assert model(pictures(1, 64)).shape == (1, 3)
    model.reset_classifier(3, "")
    assert model(pictures(1, 64)).shape == (1, 5, 3)
    model.reset_classifier(0, "token")
    assert torch.equal(model(pictures(1, 64)), features[:, 0])
    features = timm.create_model("svt_h_s", **SMALL, features_only=True, out_indices=(0, 1))
    assert features(pictures(1, 64))[-1].shape == (1, 12, 8, 8)


def test_bad_input():
    with pytest.raises(SettingError, match=r"global_pool='max'\. Expected token, avg"):
        timm.create_model("svt_h_s", **SMALL, global_pool="max")
    with pytest.raises(SettingError, match=r"with 6 channels where wavelets.*Expected a multiple of 4"):
        timm.create_model("svt_h_s", **SMALL | {"embed_dims": (6, 12, 16, 24)})
    with pytest.raises(SettingError, match=r"Found embed_dims of 4, num_heads of 4, depths of 3, mlp_ratios of 4 stages"):
        timm.create_model("svt_h_s", **SMALL | {"depths": (1, 1, 1)})
    with pytest.raises(SettingError, match=r"Found 5 heads for a width of 8\. Expected a divisor"):
        timm.create_model("svt_h_s", **SMALL | {"embed_dims": (8, 12, 16, 24), "num_heads": (5, 1, 1, 1)})
