"""What is optional ends no look, and what is wrong with a model, its weights or the pixels is said, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lens.explicit import SIZE, pixels, vit
from vitreous.base.errors import HostError
from vitreous.lens import look as module
from vitreous.lens.look import look
from vitreous.lens.probe import Component, Measure, Observer, Probe, Rows


class Careless(Observer):
    """Fails at one of its callbacks, in images from a number on."""

    def fail(self, callback):
        if callback == self.probe.at and self.batch.first >= self.probe.first:
            raise AttributeError(f"no such thing in {callback}")

    def initialise(self):
        self.fail("initialise")

    def on_rows(self, block):
        self.fail("on_rows")

    def on_output(self, name, call_index, output):
        self.fail("on_output")

    def on_attention(self, call, where):
        self.readout.rows.append(
            Rows(where.layer, "attention", call.kind, {"calls": torch.ones(self.batch.count, 2)}, self.batch.first)
        )
        self.readout.maps[f"flat/{where.layer}"] = torch.ones(self.batch.count, *where.grid)
        if where.layer == 1:
            self.fail("on_attention")

    def on_layer(self, features):
        self.fail("on_layer")

    def finish(self):
        self.fail("finish")
        return self.readout


@dataclass(frozen=True, kw_only=True)
class CarelessProbe(Probe):
    at: str = "finish"
    first: int = 0
    observer: ClassVar[type[Observer]] = Careless
    measures: ClassVar[tuple[Measure, ...]] = (Measure("calls", "Calls", low=0, high=1, explains="One each."),)
    components: ClassVar[tuple[Component, ...]] = (Component("flat", "Flat", explains="One everywhere."),)

    def outputs(self, model, batch):
        return ["blocks.1"]


@pytest.mark.parametrize("at", ["initialise", "on_rows", "on_output", "on_attention", "on_layer", "finish"])
def test_a_measure_that_fails_ends_no_look_and_takes_nothing_from_others(at):
    images = pixels(3)
    whole = look(vit(), images, probes="attention_rows", noise=0)
    reading = look(vit(), images, probes=["attention_rows", CarelessProbe(at=at, first=2)], noise=0, batch_size=2)
    (note,) = reading.facts["notes"]
    assert re.fullmatch(rf"\S*CarelessProbe was left out( from blocks\.\d\S* on)?: AttributeError: no such thing in {at}", note)
    ours, theirs = reading.table(), whole.table()
    rows = ours["head"] >= -1
    for name, column in theirs.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(ours[name][rows], column, rtol=1e-4, err_msg=name)
    seen = np.isfinite(reading.maps["flat", 2]).all(axis=(1, 2))
    assert seen.tolist() == [True, True, at == "finish"]  # what it had read by then stays; the rest is NaN, not 0


def test_a_map_that_only_a_later_part_has_is_none_for_the_earlier_images(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)

    class Late(CarelessProbe):
        pass

    reading = look(vit(), pixels(4), probes=[CarelessProbe(at="on_attention", first=2)], noise=0)
    seen = np.isfinite(reading.maps["flat", 2]).all(axis=(1, 2))
    assert seen.tolist() == [True, True, False, False]


def spoiled(name, value=float("nan")):
    model = vit()
    with torch.no_grad():
        model.get_parameter(name).flatten()[0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_have_no_maps_of_zeros(value):
    reading = look(spoiled("blocks.1.mlp.fc1.weight", value), pixels(2), noise=0)
    weights, activations = (
        next(note for note in reading.facts["notes"] if word in note) for word in ("Weights", "Activations")
    )
    assert "blocks.1.mlp.fc1.weight" in weights
    assert "from the output of blocks.1.mlp.fc1 (Linear) on" in activations
    assert [refusal["name"] for refusal in reading.facts["refused"]] == ["blocks.2.attn"]
    assert "not finite" in reading.facts["refused"][0]["reason"]
    assert [layer["name"] for layer in reading.layers] == ["blocks.0.attn", "blocks.1.attn"]
    for key in reading.maps:
        assert reading.maps.heads(*key).any() or key[0] == "artifacts", key
    assert ("u1", 1) not in reading.maps  # the stream behind the layer
    assert ("attention", 1) in reading.maps
    assert [image["predicted"] for image in reading.images] == [None, None]


def test_a_model_in_which_nothing_is_finite_says_so():
    with pytest.raises(
        HostError, match=r"blocks\.0\.attn: its queries, keys or values are not finite.*Expected numbers.*weights"
    ):
        look(spoiled("pos_embed"), pixels(2), noise=0)


def test_an_overflow_in_half_precision_is_named():
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.mul_(1e6)
    reading = look(model.half(), pixels(2), noise=0)
    (note,) = [note for note in reading.facts["notes"] if "Activations" in note]
    assert "from the output of blocks.0.mlp.fc2 (Linear) on" in note


def test_an_image_that_is_not_finite_is_skipped_by_name():
    images = pixels(3)
    images[1, 0, 0, 0] = float("nan")
    reading = look(vit(), images, noise=0)
    assert [image["name"] for image in reading.images] == ["image 0", "image 2"]
    assert reading.facts["notes"] == []
    assert reading.facts["skipped"][0]["name"] == "image 1"
    assert "not finite" in reading.facts["skipped"][0]["reason"]


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.485, 0.456, 0.406)])
def test_pixels_that_are_not_normalised_as_the_model_wants_are_said(mean):
    model = vit()
    model.pretrained_cfg = {"input_size": (3, *SIZE), "mean": mean, "std": (0.25,) * 3}
    raw = (pixels(2) + 1) / 2
    given = {"right": (raw - torch.tensor(mean).view(3, 1, 1)) / 0.25, "0 to 1": raw, "0 to 255": raw * 255, "flat": 0 * raw}
    said = {name: look(model, x, probes="rank_collapse", noise=0).facts["notes"] for name, x in given.items()}
    assert said["right"] == said["flat"] == []
    for name in ("0 to 1", "0 to 255"):
        assert "do not look normalised" in said[name][0], name
        assert f"mean {mean[0]:.3g}, {mean[1]:.3g}" in said[name][0], name


class Packed(nn.Module):
    """All images as one sequence, each attending to itself alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.qkv = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 48)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        owner = torch.arange(len(x)).repeat_interleave(tokens.shape[1])
        q, k, v = self.qkv(tokens.flatten(0, 1)[None]).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, (owner[:, None] == owner)[None])


def test_models_that_pack_images_say_how_they_are_seen():
    for settings in ({}, {"batch_size": 1}):
        with pytest.raises(HostError, match="batch_size=1, noise=0"):
            look(Packed(), torch.rand(2, 3, 24, 16), **settings)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = vit()

    def forward(self, x, text=None):
        return self.inside(x) * text.shape[1]


def test_what_is_no_model_of_images_is_said():
    with pytest.raises(HostError, match=r"Two fails on images \(1, 3, .*AttributeError.*Expected a model.*Give the part"):
        look(Two(), pixels(2))
    program = torch.export.export(vit(), (pixels(1),)).module()
    with pytest.raises(HostError, match=r"refuses eval mode.*Expected the model itself"):
        look(program, pixels(1))
    for name in ("vit_tiny_patch16_224", {}):
        with pytest.raises(HostError, match=r"as model\. Expected a torch\.nn\.Module"):
            look(name, pixels(1))
