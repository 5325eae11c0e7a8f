"""T2T-ViT against the released network's counts and answers; its positions, sizes and grafts."""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
from torch.nn import functional as F

from architectures.released import fill
from architectures.released import pictures as recorded
from vitreous import check, graft, ungraft
from vitreous.architectures.t2t_vit import checkpoint_filter_fn, our_tensors, sinusoid
from vitreous.base.errors import SettingError
from vitreous.models.weights import fill as load

COUNTS = {  # released: all numbers, and those that train
    "t2t_vit_7": (4_310_222, 4_255_694),
    "t2t_vit_10": (5_889_230, 5_834_702),
    "t2t_vit_12": (6_941_902, 6_887_374),
    "t2t_vit_14": (21_545_550, 21_465_806),
    "t2t_vit_t_14": (21_541_070, 21_465_422),
}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 5}
STEPS = {"token_width": 8, "features": 4, "token_dropout": 0.0}
SMALL_NETWORKS = {"t2t_vit_7": SMALL | STEPS}


def small(**settings):
    torch.manual_seed(0)
    return timm.create_model("t2t_vit_7", **SMALL | STEPS | settings).eval()


def pictures(size=(32, 32), channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def released_name(name):
    """The authors' name of a tensor of ours."""
    name = re.sub(r"^patch_embed\.proj\.steps\.(\d)", lambda m: f"tokens_to_token.attention{int(m[1]) + 1}", name)
    name = name.replace("patch_embed.proj.project", "tokens_to_token.project").replace(".directions", ".w")
    return re.sub(r"(^tokens.*\.mlp)\.fc(\d)", lambda m: f"{m[1]}.{2 * int(m[2]) - 2}", name)


def released_weights(model):
    wanted = {released_name(name): value for name, value in model.state_dict().items()}
    return {name: value if name == "pos_embed" else fill(name, value.shape) for name, value in wanted.items()}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_released_ones(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    trained = sum(p.numel() for p in model.parameters())
    assert (sum(value.numel() for value in model.state_dict().values()), trained) == COUNTS[name]


def test_logits_are_the_released_ones():
    model = timm.create_model("t2t_vit_7").eval()
    weights = released_weights(model)
    model.load_state_dict(our_tensors(weights))
    with torch.no_grad():
        logits = model(recorded(1, 224))
        expected = torch.tensor([0.10459, 1.00217, -0.00377, -0.80869])
        torch.testing.assert_close(logits[0, :4], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            torch.stack([logits.mean(), logits.std()]), torch.tensor([-0.02587, 0.98451]), atol=1e-4, rtol=0
        )
        model.patch_embed.proj.steps[0].directions.zero_()
        assert (model(recorded(1, 224)) - logits).abs().max() > 1e-3  # the performer takes part


def test_queries_of_released_weights_take_their_scale():
    model = small()
    weights = released_weights(model)
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    attention, x = model.blocks[0].attn, torch.randn(1, 5, 24)
    q, k, v = (x @ weights["blocks.0.attn.qkv.weight"].T).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    z = (q @ k.mT / math.sqrt(24)).softmax(-1) @ v
    torch.testing.assert_close(attention(x), attention.proj(z.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["performer", "softmax"])
def test_a_released_file_loads(kind):
    model = small(kind=kind)
    weights = released_weights(model)
    for i in (1, 2):  # released softmax steps have a module around q, k, v and the projection
        if kind == "softmax":
            old = f"tokens_to_token.attention{i}."
            weights[f"{old}attn.qkv.weight"] = weights.pop(f"{old}kqv.weight")
            for part in ("weight", "bias"):
                weights[f"{old}attn.proj.{part}"] = weights.pop(f"{old}proj.{part}")
                weights[f"{old}mlp.fc1.{part}"] = weights.pop(f"{old}mlp.0.{part}")
                weights[f"{old}mlp.fc2.{part}"] = weights.pop(f"{old}mlp.2.{part}")
    load(model, weights, "released.pth")
    ours = model.patch_embed.proj.steps[0].kqv.weight
    name = "tokens_to_token.attention1.kqv.weight"
    if kind == "softmax":
        q, k, v = weights[name.replace("kqv", "attn.qkv")].chunk(3)
        assert torch.equal(ours, torch.cat([k, q, v]))
    else:
        assert torch.equal(ours, weights[name])
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    assert checkpoint_filter_fn(saved, model) is saved  # ours stay as they are


def test_positions_are_the_papers_and_never_train():
    model = small()
    for n in range(17):
        for j in range(24):
            angle = n / 10000 ** (2 * (j // 2) / 24)
            expected = math.cos(angle) if j % 2 else math.sin(angle)
            assert abs(model.pos_embed[0, n, j].item() - expected) < 1e-7
    assert "pos_embed" not in dict(model.named_parameters())
    model.init_weights()
    assert torch.equal(model.pos_embed[0], sinusoid(17, 24))
    assert small(pos_embed="none").pos_embed is None


def test_other_sizes_channels_and_patches():
    model = small()
    model.set_input_size((48, 32))
    assert model(pictures((48, 32))).shape == (2, 5)
    assert "pos_embed" in dict(model.named_buffers())
    assert small(img_size=(16, 40))(pictures((16, 40))).shape == (2, 5)
    assert small(dynamic_img_size=True)(pictures((24, 56))).shape == (2, 5)
    assert small(in_chans=1, patch_size=4)(pictures(channels=1)).shape == (2, 5)
    assert small(strides=(2, 2), patch_size=4).patch_embed.grid_size == (8, 8)
    features = timm.create_model("t2t_vit_7", features_only=True, out_indices=(0, 1), **SMALL, **STEPS)(pictures())
    assert [tuple(f.shape) for f in features] == [(2, 24, 4, 4)] * 2
    for settings in ({"img_size": 36}, {"strides": (4, 4)}, {"patch_size": 6, "img_size": 36}, {"features": 9}):
        with pytest.raises(SettingError, match=r"^Found .*Expected .*\. \w"):
            small(**settings)
    with pytest.raises(SettingError, match=r"^Found patch_size=\(4, 4\)"):
        model.set_input_size(patch_size=(4, 4))


@pytest.mark.parametrize("text", ["svda", "spc:after=1", "evit:layers=0,keep=0.5", "gaussian_mask", "token_merging:tokens=2"])
def test_mechanisms_stand_in_it(text):
    model, x = small(), pictures()
    plain = model(x)
    check(graft(model, text), x)
    assert not torch.equal(model(x), plain)
    ungraft(model)
    assert torch.equal(model(x), plain)


def test_it_learns():
    model, x = small(token_dropout=0.1).train(), pictures()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), torch.tensor([1, 3])))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert all(p.grad is not None for p in model.parameters())
