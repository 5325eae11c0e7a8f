"""Mixing maps: which place of a module moves which, against formulas and full Jacobians."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models.metaformer import MetaFormer, Pooling
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import vitreous
from contract.hosts import build, images
from vitreous import SpectralGate, graft, read
from vitreous.base.errors import HostError, SettingError, UnknownName
from vitreous.hosts.mixer import mixers_in
from vitreous.layers.exposed import Exposed
from vitreous.lens.formulas import mixing
from vitreous.lens.look import look
from vitreous.lens.module_calls import named_modules
from vitreous.lens.reading import CHUNK
from vitreous.mechanisms.mixer.spectral_gate import Gate

ROWS, COLUMNS, WIDTH = 4, 5, 6
MIXERS = sorted(path.stem for path in (Path(vitreous.__file__).parent / "mechanisms/mixer").glob("[a-z]*.py"))


def gate(width=WIDTH):
    new = Gate.instead_of(nn.Identity())
    new.initialise((ROWS, COLUMNS), width, torch.Generator().manual_seed(3))
    return new.requires_grad_(False)


def of_tokens(mixer, rows=ROWS, columns=COLUMNS):
    return lambda x: mixer.mix(x.unflatten(1, (rows, columns))).flatten(1, 2)


def circulant(mixer, rows=ROWS, columns=COLUMNS):
    """(N, N) sqrt(sum_c k_c^2) at the offset between places, from the formula irfft2(W)."""
    kernel = torch.fft.irfft2(mixer.weight((rows, columns)).detach().to(torch.complex128), s=(rows, columns), dim=(0, 1))
    size = kernel.square().sum(-1).sqrt()
    places = [(r, c) for r in range(rows) for c in range(columns)]
    return torch.tensor([[size[(r - s) % rows, (c - t) % columns] for s, t in places] for r, c in places])


def test_of_a_spectral_gate_all_three_are_the_matrix_of_its_formula():
    mixer, x = gate(), torch.randn(1, ROWS * COLUMNS, WIDTH)
    f, expected = of_tokens(mixer), circulant(mixer)
    matrix, difference = mixing.unit_response(f, x)
    assert difference < 1e-6
    by_signs = mixing.response(f, x, size=1.0, probes=1)
    by_gradient = mixing.influence(f, torch.cat([x, 2 * x]), probes=1, chunk=7)
    for found in (matrix, by_signs, *by_gradient):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * float(expected.max()))
    assert expected[0].max() > 1.3 * expected[0].min()  # not all alike, which any map would equal


def test_removal_puts_the_mean_token_in_place_of_one():
    mixer, x = gate(), torch.randn(1, ROWS * COLUMNS, WIDTH)
    f, matrix = of_tokens(mixer), mixing.response(of_tokens(mixer), x, chunk=3)
    for j in (0, 7):
        changed = x.clone()
        changed[0, j] = x[0].mean(0)
        torch.testing.assert_close(matrix[:, j], (f(changed) - f(x))[0].norm(dim=-1), rtol=1e-4, atol=1e-6)


def attention(x):
    """Softmax attention without weights, which is its own query, key and value."""
    return (3 * x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) @ x


def test_influence_approaches_the_full_jacobian_of_an_attention():
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(attention, x)[0, :, :, 0]  # (M, E, N, D)
    expected = jacobian.square().sum((1, 3)).sqrt()
    errors = [float((mixing.influence(attention, x, probes)[0] - expected).norm() / expected.norm()) for probes in (1, 16, 256)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05
    assert mixing.gradient_error(attention, x) < 1e-2


def test_a_causal_mixer_has_nothing_above_the_diagonal():
    decay = torch.tensor(0.7) ** (torch.arange(9)[:, None] - torch.arange(9)).clamp(min=0)
    x = torch.randn(1, 9, 4)

    def retain(x):
        return torch.tril(decay * (x @ x.mT)) @ x

    for matrix in (mixing.response(retain, x), mixing.influence(retain, x, 2)[0]):
        share = mixing.shares(matrix)
        assert float(torch.triu(share, 1).abs().max()) == 0
        torch.testing.assert_close(share.sum(-1), torch.ones(9))
        assert float(torch.tril(share, -1).max()) > 0.01


class StraightThrough(nn.Module):
    """Signs of the mean over places, with the gradient of the identity."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True) + 0.1 * x
        return mean + (mean.sign() - mean).detach()


def test_gradients_that_are_made_up_are_seen():
    x = torch.randn(1, 8, 6)
    assert mixing.gradient_error(StraightThrough(), x) > 0.5
    assert mixing.gradient_error(of_tokens(gate()), torch.randn(1, ROWS * COLUMNS, WIDTH)) < 1e-2


def test_measures_are_those_of_the_rows():
    share = mixing.shares(torch.rand(2, 6, 6) + 0.01)
    share[1, 2] = 0  # a place that nothing moves does not count
    points = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0)) * 4
    cover = torch.tensor([1.0, 0.5, 0, 0, 0, 0]).expand(2, -1).clone()
    cover[1] = torch.nan
    values = mixing.measures(share, (points, points), cover)
    for image, live in ((0, range(6)), (1, (0, 1, 3, 4, 5))):
        rows = [share[image, i].double() for i in live]
        far = [(points[i] - points).norm(dim=-1) for i in live]
        expected = {
            "mixing_entropy": [-(row * row.log()).sum() for row in rows],
            "mixing_places": [1 / row.square().sum() for row in rows],
            "mixing_distance": [(row * d).sum() for row, d in zip(rows, far, strict=True)],
        }
        for name, each in expected.items():
            assert float(values[name][image]) == pytest.approx(float(sum(each) / len(each)), rel=1e-5)
    assert float(values["mixing_foreground"][0]) == pytest.approx(float((share[0, :, 0] + share[0, :, 1] / 2).mean()), rel=1e-5)
    assert values["mixing_foreground"][1].isnan()


# -- look -----------------------------------------------------------------------------------------


def convnext():
    torch.manual_seed(0)
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 12, 12), num_classes=3).eval()


def pixels(count=2, side=64):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_a_depthwise_convolution_has_its_receptive_field_and_the_norms_of_its_kernel():
    model = convnext()
    reading = look(model, pixels(), probes=["mixing:modules=stages.0.blocks.0.conv_dw+stages.1.blocks.0.conv_dw"], noise=0)
    assert [(layer["name"], layer["kind"], layer["route"], layer["grid"]) for layer in reading.layers] == [
        ("stages.0.blocks.0.conv_dw", "mixing", "unit vectors", [16, 16]),
        ("stages.1.blocks.0.conv_dw", "mixing", "unit vectors", [8, 8]),
    ]
    kernel = model.stages[0].blocks[0].conv_dw.weight[:, 0].square().sum(0).sqrt().detach().numpy()  # (7, 7)
    for row, column in ((8, 8), (0, 15)):
        expected = np.zeros((22, 22))
        expected[row : row + 7, column : column + 7] = kernel
        expected = expected[3:19, 3:19]
        found = reading.query(0, 0, (row, column))
        np.testing.assert_allclose(found, expected / expected.sum(), atol=2 * found.max() / 510)
        assert (found > 0).sum() == (expected > 0).sum()  # nothing beyond the field
    assert reading.maps["mixing_middle", 0][0, 8, 8] == pytest.approx(kernel[3, 3] / kernel.sum(), rel=1e-3)
    assert (reading.table()["mixing_self"] < 0.2).all()


def test_a_block_with_a_faint_branch_is_not_taken_for_linear():
    """At the start layer scale is 1e-6: nearly all of the output is the residual."""
    reading = look(convnext(), pixels(1, 32), probes=["mixing:modules=stages.0.blocks.*"], noise=0)
    assert {layer["route"] for layer in reading.layers} == {"removal"}
    assert (reading.table()["mixing_self"] > 0.99).all()


def test_mixers_are_measured_by_default_and_as_their_formula_says(tmp_path):
    model, x = graft(build("dinov2"), SpectralGate(layers=(1,))), images()
    gate = model.blocks[1].attn
    reading = look(model, x, out=tmp_path / "reading")
    layer = reading.layers[-1]
    assert (layer["name"], layer["route"], layer["prefix"], layer["layer"]) == ("blocks.1.attn", "unit vectors", 5, 3)
    grid = tuple(layer["grid"])
    expected = mixing.shares(circulant(gate, *grid)).unflatten(0, grid).unflatten(2, grid)
    found = reading.query(1, 3, (1, 2))
    np.testing.assert_allclose(found, expected[1, 2].numpy(), atol=found.max() / 500)
    middle = reading.maps["mixing_middle", 3]
    np.testing.assert_allclose(middle[0], expected[grid[0] // 2, grid[1] // 2].numpy(), rtol=1e-3, atol=1e-6)
    assert np.isfinite(middle[:2]).all()
    mean = reading.maps["mixing", 3][:2]  # all places of a circle move others alike
    np.testing.assert_allclose(mean, 1 / (grid[0] * grid[1]), rtol=1e-3)
    assert len(np.unique(mean[0])) == 1
    assert np.isnan(middle[2:]).all()  # of the first two images alone
    table = reading.table()
    here = table["source"] == "mixing"
    assert set(table["image"][here].tolist()) == {0, 1}
    assert np.isnan(table["mixing_places"][~here]).all()
    assert np.isnan(table["attention_entropy"][here]).all()  # never under attention's name
    kernel = reading.exact["kernel", 3]
    assert kernel.shape == (16, *grid)
    np.testing.assert_allclose(
        np.fft.ifftshift(kernel[0]) * 32**0.5, circulant(gate, *grid)[:, 0].unflatten(0, grid), rtol=1e-4
    )
    assert layer["exact"]["kernel"]["channels"][0] == -1
    assert layer["exact"]["kernel"]["count"] == 32
    assert reading.show("mixing_middle", layer=3).size
    assert reading.show(image=0, layer=3, patch=(0, 0)).size
    again = read(tmp_path / "reading")
    np.testing.assert_array_equal(again.maps["mixing", 3], reading.maps["mixing", 3])
    assert again.layers == reading.layers


def test_merged_tokens_leave_the_places_of_a_mixer_as_they_are():
    names = ["mixing"]
    plain = look(graft(build("dinov2"), SpectralGate(layers=(2,))), images(), probes=names)
    merged = look(graft(build("dinov2"), "token_merging:layers=1", SpectralGate(layers=(2,))), images(), probes=names)
    np.testing.assert_allclose(merged.maps["mixing_middle", 3], plain.maps["mixing_middle", 3], rtol=1e-3)


def test_budget_and_images():
    model, x = graft(build("dinov2"), SpectralGate(layers=(1,))), images(3)
    assert look(model, x, probes=["mixing"], query_budget=0).facts["queries"]["images"] == []
    for size in (1, 2):
        reading = look(model, x, probes=["mixing:images=2"], batch_size=size)
        assert reading.facts["queries"]["images"] == [0, 1]
        with pytest.raises(SettingError, match="Found no attention of single patches for image 2"):
            reading.query(2, 3, (0, 0))


def test_a_look_that_was_interrupted_goes_on_with_the_same_layers(tmp_path):
    model, x = graft(build("dinov2"), SpectralGate(layers=(1,))), images(CHUNK + 1)
    whole = look(model, x, out=tmp_path / "reading", noise=0)
    table, kernel = whole.table(), whole.exact["kernel", 3]
    for name in ("reading.json", "table.csv", "table.json", "parts/00001.safetensors"):
        (tmp_path / "reading" / name).unlink()
    again = look(model, x, out=tmp_path / "reading", noise=0)
    assert again.layers == whole.layers
    np.testing.assert_array_equal(again.exact["kernel", 3], kernel)
    for name, values in again.table().items():
        np.testing.assert_array_equal(values, table[name])
    assert np.isnan(again.maps["mixing", 3][2:]).all()


def test_share_of_the_object():
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, :, :32] = 1
    masks[1, :16] = 1
    reading = look(convnext(), pixels(), masks=masks, probes=["mixing:modules=stages.0.blocks.0.conv_dw"], noise=0)
    found = reading.table()["mixing_foreground"]
    rows = [np.stack([reading.query(i, 0, (r, c)) for r in range(16) for c in range(16)]) for i in range(2)]
    assert found[0] == pytest.approx(rows[0][..., :8].sum() / rows[0].sum(), rel=1e-2)
    assert found[1] == pytest.approx(rows[1][:, :4].sum() / rows[1].sum(), rel=1e-2)


class Net(nn.Module):
    """A picture, one module between its stem and its head."""

    def __init__(self, middle, width=6, tokens=False):
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, width, 8, 8), middle, nn.Linear(width, 3)
        self.norm, self.act, self.tokens = nn.BatchNorm2d(width), nn.ReLU(inplace=True), tokens

    def forward(self, x):
        x = self.stem(x)
        if self.tokens:
            return self.head(self.middle(x.flatten(2).mT).mean(1))
        x = self.act(self.norm(self.middle(x)))
        return self.head(x.mean((2, 3)))


class Counted(nn.Module):
    """Squares the mean over places beside each place; counts images."""

    count = 0

    def forward(self, x):
        self.count += len(x)
        return x + x.mean((2, 3), keepdim=True).square()


def test_what_changes_its_input_in_place_is_no_mixer():
    model = Net(nn.AvgPool2d(3, 1, 1)).eval()
    reading = look(model, pixels(1, 40), probes=["mixing:modules=middle+norm"], noise=0)
    assert [layer["name"] for layer in reading.layers] == ["middle"]
    assert any("norm" in note and "moves each place by itself alone" in note for note in reading.facts["notes"])
    with pytest.raises(HostError, match=r"no mixing map.*act.*moves each place by itself alone.*Expected"):
        look(model, pixels(1, 40), probes=["mixing:modules=act"], noise=0)


def test_costs_one_pass_of_the_module_for_each_place_and_image():
    model = Net(Counted()).eval()
    look(model, pixels(3, 40), probes=["mixing:modules=middle,images=1"], noise=0)
    once = model.middle.count
    model.middle.count = 0
    look(model, pixels(3, 40), probes=["mixing:modules=middle,images=2"], noise=0)
    assert 25 <= model.middle.count - once <= 25 + 14  # 5 x 5 places; the pass itself and checks


class Coupled(nn.Module):
    """Shows whether a place is above the mean of the whole batch."""

    def forward(self, x):
        return x * (1 + (x - x.mean()).tanh()) + x.mean((1,), keepdim=True)


class Showing(Counted):
    """Shows how bright its input is."""

    def __init__(self):
        super().__init__()
        self.shown = Exposed("heat", "number", "Mean of its input.")

    def forward(self, x):
        self.shown(x.mean((1, 2, 3)))
        return super().forward(x)


def test_numbers_that_modules_expose_without_attention():
    model, x = Net(Showing()).eval(), pixels(2, 40)
    table = look(model, x, probes=["all", "mixing:modules=middle"], noise=0).table()
    here = table["source"] == "exposed"
    assert table["layer"][here].tolist() == [0]
    assert table["exposed_heat"][here] == pytest.approx([float(model.stem(x).mean().detach())], rel=1e-5)
    with pytest.raises(HostError, match=r"no attention and no mixing map \(no modules were named\)\. Expected"):
        look(model, x, noise=0)


def test_an_image_that_depends_on_its_batch_mates_is_run_alone():
    torch.manual_seed(0)
    model, x = Net(Coupled(), tokens=True).eval(), pixels(1, 32)
    reading = look(model, x, probes=["mixing:modules=middle"], noise=0)
    assert "batch mates" in reading.layers[0]["note"]
    tokens = model.stem(x).flatten(2).mT.detach()
    matrix = torch.stack([(model.middle(removed(tokens, j)) - model.middle(tokens))[0].norm(dim=-1) for j in range(16)], dim=1)
    expected = mixing.shares(matrix)[10].unflatten(0, (4, 4))  # row 2, column 2
    np.testing.assert_allclose(reading.maps["mixing_middle", 0][0], expected, rtol=2e-3)


def removed(tokens, j):
    tokens = tokens.clone()
    tokens[0, j] = tokens[0].mean(0)
    return tokens


def test_influence_is_refused_by_name_where_gradients_are_made_up():
    model = Net(StraightThrough(), tokens=True).eval()
    with pytest.raises(HostError, match=r"gradients of middle \(StraightThrough\).*binary or spiking.*Expected by=removal"):
        look(model, pixels(1, 32), probes=["mixing:modules=middle,by=influence"], noise=0)
    reading = look(model, pixels(1, 32), probes=["mixing:modules=middle"], noise=0)
    assert reading.layers[0]["route"] == "removal"
    reading = look(Net(Counted()).eval(), pixels(1, 40), probes=["mixing:modules=middle,by=influence"], noise=0)
    assert reading.layers[0]["route"] == "influence"


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_is_as_linear_as_it_says_and_reads_what_can_be_drawn(name):
    model = graft(build("dinov2"), f"{name}:layers=1")
    mixers = mixers_in(model)
    if not mixers:  # made of attention, which `look` reads as such
        assert model.blocks[1].attn.attends
        return
    reading = look(model, images(1), probes=["mixing"], noise=0)
    assert not any("No mixing map" in note or "in the reading of" in note for note in reading.facts["notes"])
    (mixer,) = mixers.values()
    layer = reading.layers[-1]
    assert (layer["kind"], "says that it is linear" in layer["note"]) == ("mixing", False)
    assert not mixer.linear or layer["route"] == "unit vectors"
    assert {quantity for quantity, _ in reading.exact} == set(mixer.reading())
    assert all(np.isfinite(values).all() for values in reading.exact.values())


def test_gradients_of_our_mixers_are_true_but_for_the_binary_one():
    names = {"retention": "influence", "hyena": "influence", "scattering": "influence", "linear_angular": None}
    for name, route in names.items():
        probes = ["mixing:by=influence"] if route else ["attention_maps", "mixing:by=influence"]  # one that can be measured
        reading = look(graft(build("dinov2"), f"{name}:layers=1"), images(1), probes=probes, noise=0)
        routes = [layer["route"] for layer in reading.layers if layer["kind"] == "mixing"]
        assert routes == ([route] if route else []), name
    assert any("gradients of blocks.1.attn (LinearAngularMixer)" in note for note in reading.facts["notes"])


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x).mean(1, keepdim=True)


def test_bad_input():
    model = convnext()
    with pytest.raises(UnknownName, match=r"Unknown module 'stages\.\*\.block'.*Patterns are such as"):
        look(model, pixels(), probes=["mixing:modules=stages.*.block"])
    with pytest.raises(HostError, match=r"head\.fc \(Linear\) has an output \(1, 3\) that has no axis of places\. Expected"):
        look(model, pixels(), probes=["mixing:modules=head.fc"], noise=0)
    with pytest.raises(HostError, match=r"showed no attention map.*Expected.*name the modules that mix places"):
        look(model, pixels())
    with pytest.raises(HostError, match=r"Found 256 places\. Expected 100 at most.*Raise mixing:places"):
        look(model, pixels(), probes=["mixing:modules=stages.0.blocks.0,places=100"], noise=0)
    with pytest.raises(HostError, match=r"gives another output when it is run by itself"):
        look(Net(Noisy(), tokens=True).eval(), pixels(1, 32), probes=["mixing:modules=middle"], noise=0)
    with pytest.raises(SettingError, match=r"Found images=0\. Expected 1 or more\."):
        look(model, pixels(), probes=["mixing:images=0"])


def test_patterns():
    model = convnext()
    assert named_modules(model, ["stages.*.blocks.*"]) == [f"stages.{i}.blocks.0" for i in range(4)]
    assert "stages.0.blocks.0.conv_dw" in named_modules(model, ["stages.0.**"])


class Liar(Gate):
    def mix(self, patches):
        return super().mix(patches).relu()


class LyingGate(SpectralGate):
    def changes(self, model):
        changes = super().changes(model)
        for module in changes.values():
            if type(module) is Gate:
                module.__class__ = Liar
        return changes


def test_a_mixer_that_is_not_as_linear_as_it_says():
    reading = look(graft(build("class_avg"), LyingGate(layers=(0,))), images(1), probes=["mixing"])
    assert "it says that it is linear, and is not" in reading.layers[-1]["note"]
    assert reading.layers[-1]["route"] == "removal"


# -- networks -------------------------------------------------------------------------------------


def by_hand(f, tokens):
    """Shares (N, N) of removal, token by token; tokens (1, N, D)."""
    moved = [(f(removed(tokens, j)) - f(tokens))[0].norm(dim=-1) for j in range(tokens.shape[1])]
    return mixing.shares(torch.stack(moved, dim=1).detach())


def test_the_token_mlp_of_an_mlp_mixer():
    """It gets (B, D, N)."""
    torch.manual_seed(0)
    model = MlpMixer(img_size=128, patch_size=32, embed_dim=12, num_blocks=1, num_classes=3).eval()
    inputs = []
    model.blocks[0].mlp_tokens.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    x = pixels(1, 128)
    reading = look(model, x, probes=["mixing:modules=blocks.0.mlp_tokens+blocks.0"], noise=0)
    tokens = inputs[0][:1].mT
    assert tokens.shape == (1, 16, 12)
    expected = by_hand(lambda t: model.blocks[0].mlp_tokens(t.mT).mT, tokens)[10].unflatten(0, (4, 4))
    layer = next(each["layer"] for each in reading.layers if each["name"] == "blocks.0.mlp_tokens")
    np.testing.assert_allclose(reading.maps["mixing_middle", layer][0], expected, rtol=2e-3, atol=1e-5)


def test_the_pooling_of_poolformer_is_exact():
    torch.manual_seed(0)
    model = MetaFormer(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), token_mixers=Pooling, num_classes=3).eval()
    reading = look(model, pixels(1, 96), probes=["mixing:modules=stages.0.blocks.0.token_mixer"], noise=0)
    assert reading.layers[0]["route"] == "unit vectors"
    expected = np.zeros((24, 24))  # mean of 3 x 3, without the place itself: 1/9 - 1 in the middle
    expected[11:14, 11:14] = 1 / 9
    expected[12, 12] = 8 / 9
    np.testing.assert_allclose(reading.maps["mixing_middle", 0][0], expected / expected.sum(), rtol=1e-3, atol=1e-7)


def test_a_spiking_network_by_removal_alone_with_its_firing_rate():
    torch.manual_seed(0)
    model = timm.create_model("spikformer_8_384", embed_dim=32, depth=1, num_heads=2, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.constant_(module.weight, 4.0)  # as drawn, deep layers are silent
            nn.init.constant_(module.bias, 0.5)
    outputs = []
    model.blocks[0].attn.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    reading = look(model, x, probes=["all", "mixing:modules=blocks.*.attn"], noise=0)
    (layer,) = reading.layers
    assert (layer["name"], layer["route"], layer["grid"]) == ("blocks.0.attn", "removal", [4, 4])
    spikes = next(output for output in outputs if output.shape[1] == 2)  # (T, B, D, H, W)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(reading.table()["firing_rate"], spikes.mean((0, 2, 3, 4)), rtol=1e-5)
    assert (reading.table()["mixing_places"] > 1.5).all()
    with pytest.raises(HostError, match=r"blocks\.0\.attn \(SpikingAttention\).*binary or spiking"):
        look(model, x, probes=["mixing:modules=blocks.*.attn,by=influence"], noise=0)


def test_half_precision_and_masks_of_none():
    model = convnext().to(torch.bfloat16)
    reading = look(model, pixels(1), probes=["mixing:modules=stages.0.blocks.0.conv_dw"], noise=0)
    assert reading.layers[0]["route"] in ("removal", "unit vectors")
    assert np.isfinite(reading.table()["mixing_places"]).all()
    assert np.isnan(reading.table()["mixing_foreground"]).all()
