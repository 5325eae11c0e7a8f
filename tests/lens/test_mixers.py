"""`look` at a model in which a mixer stands where attention was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contract.hosts import build, images
from vitreous import SpectralGate, graft
from vitreous.base.errors import HostError
from vitreous.lens.layer_features import layer_features
from vitreous.lens.look import look

NOTE = "No attention in blocks.1.attn (Gate), blocks.2.attn (Gate): "


@pytest.mark.parametrize("host", ["dinov2", "dinov3"])
def test_look_says_which_blocks_have_no_attention_and_reads_the_others(host, tmp_path):
    model, x = graft(build(host), SpectralGate(layers=(1, 2))), images()
    for reading in (look(model, x), look(model, x, out=tmp_path / "reading")):
        assert [note.startswith(NOTE) for note in reading.facts["notes"] if "blocks.1.attn" in note] == [True]
        assert [layer["name"] for layer in reading.facts["layers"] if layer["kind"] == "token"] == [
            "blocks.0.attn",
            "blocks.3.attn",
        ]
        assert all(layer["verified"] for layer in reading.facts["layers"])
        assert {layer for name, layer in reading.maps if not name.startswith("mixing")} <= {-1, 0, 1}
    plain = look(build(host), x)
    assert not any("No attention" in note for note in plain.facts["notes"])
    np.testing.assert_array_equal(reading.maps["attention", 0], plain.maps["attention", 0])  # before the mixers
    assert not np.array_equal(reading.maps["attention", 1], plain.maps["attention", 3])


def test_rollout_ends_at_a_mixer():
    """Behind it the product of the attentions that are left is not how patches reach a token."""
    behind = look(graft(build("dinov2"), SpectralGate(layers=(2,))), images(), probes=["rollout"])
    assert list(behind.maps) == [("rollout", 0), ("rollout", 1)]
    first = look(graft(build("dinov2"), SpectralGate(layers=(0,))), images(), probes=["rollout"])
    assert list(first.maps) == []


def test_a_model_of_mixers_alone_has_mixing_maps_and_nothing_else():
    reading = look(graft(build("class_avg"), SpectralGate(layers=(0, 1, 2, 3))), images())
    assert {name for name, _ in reading.maps} == {"mixing", "mixing_middle"}
    assert [layer["kind"] for layer in reading.layers] == ["mixing"] * 4
    with pytest.raises(HostError, match=r"showed no attention map, and no softmax.*Expected.*--modules"):
        look(graft(build("class_avg"), SpectralGate(layers=(0, 1, 2, 3))), images(), probes=["attention_maps"])


def test_mixers_beside_merged_tokens():
    model = graft(build("dinov2"), "token_merging:layers=1", SpectralGate(layers=(2,)))
    reading = look(model, images())
    names = [layer["name"] for layer in reading.facts["layers"]]
    assert names == ["blocks.0.attn", "blocks.1.attn", "blocks.3.attn", "blocks.2.attn"]
    assert reading.layers[-1]["kind"] == "mixing"
    assert reading.facts["model"]["mechanisms"] == ["token_merging:layers=1", str(SpectralGate(layers=(2,)))]


@pytest.mark.parametrize("mixed", [(0, 2, 3), (0, 1, 2), (1, 2)])
def test_features_of_the_attentions_that_are_left(mixed):
    """A block is still a block, not all of them, where it holds the only attention."""
    model, outputs = graft(build("plain"), SpectralGate(layers=mixed)), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, inputs, out, i=i: outputs.__setitem__((i, "block"), out.tokens()))
        block.attn.register_forward_hook(lambda _, inputs, out, i=i: outputs.__setitem__((i, "attn"), out))
    layers = layer_features(model, images())
    left = [i for i in range(4) if i not in mixed]
    assert [layer.key[0] for layer in layers] == [f"blocks.{i}.attn" for i in left]
    for i, layer in zip(left, layers, strict=True):
        assert torch.equal(layer.tokens, outputs[i, "block"][:, 1:])
        assert torch.equal(layer.output, outputs[i, "attn"][:, 1:])
