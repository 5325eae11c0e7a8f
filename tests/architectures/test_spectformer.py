"""SpectFormer against the released networks: parameters, logits, parts that count; its blocks; grafts on it; sizes."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from architectures.released import pictures
from architectures.test_svt import PYRAMID, count, released
from architectures.test_svt import SMALL as SMALL_PYRAMID
from vitreous import check, graft, ungraft
from vitreous.architectures.spectformer import filtered, filtered_pyramid
from vitreous.base.errors import GraftError, SettingError
from vitreous.hosts.mixer import mixers_in
from vitreous.layers.fourier import kernel_of
from vitreous.lens.look import look

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 4, "spectral": 2, "num_classes": 5}
SMALL_NETWORKS = {"spectformer_tiny": SMALL, "spectformer_h_s": SMALL_PYRAMID | {"depths": (1, 1, 1, 1)}}


def small(**options):
    torch.manual_seed(0)
    model = timm.create_model("spectformer_tiny", **SMALL | options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_has_the_parameters_of_the_released_networks():
    expected = {
        "spectformer_tiny": 9_158_376,
        "spectformer_xsmall": 20_028_520,
        "spectformer_small": 32_449_768,
        "spectformer_base": 57_159_656,
        "spectformer_h_s": 22_226_928,
        "spectformer_h_b": 33_052_880,
        "spectformer_h_l": 54_675_792,
    }
    assert {name: count(name) for name in expected} == expected
    assert count("spectformer_h_s", aux_head=False) == 21_777_928


RELEASED = {
    "spectformer_tiny": (
        filtered,
        {r"^(blocks\.[0-3])\.attn\.": r"\1.filter."},
        ([-0.74240, 0.78573, 0.00647, 1.22655], [0.04133, 0.60911]),
    ),
    "spectformer_h_s": (
        filtered_pyramid,
        PYRAMID,
        ([0.39584, -1.73948, -0.22883, 0.93590], [0.18797, 1.41215]),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
@torch.no_grad()
def test_equals_the_released_network(name):
    """Logits at 224 pixels with weights by name; without the filters they would be others."""
    filter_fn, names, (first, moments) = RELEASED[name]
    model = timm.create_model(name).eval()
    model.load_state_dict(filter_fn(released(model, names), model))
    logits = model(pictures(1, 224))[0]
    torch.testing.assert_close(logits[:4], torch.tensor(first), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack([logits.mean(), logits.std()]), torch.tensor(moments), atol=1e-4, rtol=0)
    for mixer in mixers_in(model).values():
        mixer.complex_weight.zero_()
    assert (model(pictures(1, 224))[0] - logits).abs().max() > 1e-2


@torch.no_grad()
def test_spectral_block_has_one_residual():
    """x + MLP(LN(filter(LN(x)))), the filter as a circular convolution in loops; the next blocks have two residuals."""
    model, seen = small().double(), []
    block = model.blocks[1]
    block.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0].x, output.x)))
    model(pictures(1, 32).double())
    x, y = seen
    normed = block.norm1(x).unflatten(1, (4, 4))
    kernel = kernel_of(torch.view_as_complex(block.attn.complex_weight), (4, 4))
    filtered_x = torch.zeros_like(normed)
    for i in range(4):
        for j in range(4):
            filtered_x += kernel[i, j] * normed.roll((i, j), dims=(1, 2))
    torch.testing.assert_close(y, x + block.mlp(block.norm2(filtered_x.flatten(1, 2))), atol=1e-12, rtol=1e-12)
    assert (y - x).abs().max() > 0.1
    assert [hasattr(block.attn, "qkv") for block in model.blocks] == [False, False, True, True]


@torch.no_grad()
def test_logits_are_those_of_the_mean_of_normed_patches():
    model = small()
    features = model.forward_features(pictures(2, 32))
    torch.testing.assert_close(model(pictures(2, 32)), model.head(features.mean(1)))
    assert features.shape == (2, 16, 16)


def test_start_of_the_spectral_weights():
    weight = timm.create_model("spectformer_tiny").blocks[0].attn.complex_weight
    assert weight.shape == (14, 8, 256, 2)
    assert abs(weight.std() - 0.02) < 1e-3


@torch.no_grad()
def test_weights_go_to_other_grids_by_their_kernel():
    """From 4 x 4 patches to 6 x 4: a larger image, from the same weights; positions by timm's interpolation."""
    model, larger = small(), small(img_size=(48, 32))
    weights = {re.sub(r"^(blocks\.[01])\.attn\.", r"\1.filter.", name): value for name, value in model.state_dict().items()}
    larger.load_state_dict(filtered(weights, larger))
    for i in (0, 1):
        own, other = model.blocks[i].attn, larger.blocks[i].attn
        assert other.complex_weight.shape == (6, 3, 16, 2)
        torch.testing.assert_close(torch.view_as_real(own.weight((6, 4))), other.complex_weight)
    model.set_input_size((48, 32))
    x = torch.randn(1, 3, 48, 32)
    torch.testing.assert_close(model(x), larger(x), atol=1e-5, rtol=1e-5)
    square = timm.create_model("spectformer_h_s", **SMALL_PYRAMID).eval()
    wide = timm.create_model("spectformer_h_s", **SMALL_PYRAMID | {"img_size": (64, 96)}).eval()
    wide.load_state_dict(filtered_pyramid(square.state_dict(), wide))
    square.set_input_size((64, 96))
    assert square.stages[1].blocks[0].attn.complex_weight.shape == wide.stages[1].blocks[0].attn.complex_weight.shape
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(wide(x), square(x), atol=1e-5, rtol=1e-5)


def test_any_image_size():
    model = small(dynamic_img_size=True)
    assert model(torch.randn(2, 3, 40, 24)).isfinite().all()


GRAFTS = ["svda:layers=2+3", "spc:after=2", "evit:keep=0.5,layers=2", "extra_tokens", "adaptformer", "spectral_gate:layers=2"]


@pytest.mark.parametrize("text", GRAFTS)
def test_grafts_stand_on_it_and_come_out(text):
    model, x = small(global_pool="avg"), pictures(2, 32)
    if text.startswith("evit"):
        model = small(class_token=True, global_pool="token")
    plain = model(x)
    check(graft(model, text), x)
    assert torch.equal(model(x), plain) == text.startswith("adaptformer")
    assert ungraft(model).changed == ()
    assert torch.equal(model(x), plain)


def test_a_spectral_block_refuses_what_needs_queries_and_keys():
    with pytest.raises(GraftError, match=r"blocks\.0\.attn already holds Gate, a mixer"):
        graft(small(), "svda")


READS_CLASS_TOKEN = {"spectral": 4, "class_token": True, "global_pool": "token"}


@pytest.mark.parametrize(("options", "most"), [({"spectral": -1}, 4), ({"spectral": 5}, 4), (READS_CLASS_TOKEN, 3)])
def test_refuses_numbers_of_spectral_blocks_that_cannot_be(options, most):
    with pytest.raises(SettingError, match=rf"Found spectral={options['spectral']} of 4 blocks.*Expected 0 to {most}"):
        small(**options)
    assert small(**options | {"spectral": most})(pictures(2, 32)).isfinite().all()


def test_look_reads_attention_and_then_how_the_filters_mix():
    reading = look(small(), pictures(2, 32))
    assert [layer["name"] for layer in reading.layers] == [f"blocks.{i}.attn" for i in (2, 3, 0, 1)]
    assert all(layer["verified"] for layer in reading.layers[:2])
    assert {layer for name, layer in reading.maps if name == "mixing"} >= {2, 3}
