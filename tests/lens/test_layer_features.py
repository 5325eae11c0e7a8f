"""What each layer shows on the grid: against a pass written out, and against the record of merged and dropped tokens."""

from __future__ import annotations

import pytest
import timm
import torch

from lens.explicit import GRID, explicit, pixels, vit
from lens.passes import seen as seen_by_probes
from vitreous import graft, parse
from vitreous.base.errors import SettingError
from vitreous.layers.stream import Stream
from vitreous.lens.formulas.maps import fused_rollout_step
from vitreous.lens.layer_features import FeatureCollector, LayerFeatures, layer_features, modules_around
from vitreous.lens.probe import chosen
from vitreous.lens.probes import rollout
from vitreous.lens.tap import trace, watch
from vitreous.lens.token_coordinates import has_class_token

PLAIN = {
    "class": ({}, 1, True),
    "class and registers": ({"reg_tokens": 3}, 4, True),
    "patches alone": ({"class_token": False, "global_pool": "avg"}, 0, False),
    "registers alone": ({"class_token": False, "global_pool": "avg", "reg_tokens": 3}, 3, False),
}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-5)


def followed(model, images: torch.Tensor, **options) -> list[LayerFeatures]:
    layouts = trace(model, images)
    collector = FeatureCollector(layouts, len(images), class_token=has_class_token(model), **options)
    watch(model, images, collector.on_attention, layouts=layouts, on_output=collector.on_output)
    collector.finish()
    return collector.layers


@pytest.mark.parametrize("kind", PLAIN)
def test_features_and_attention_of_a_plain_vit_are_those_of_a_pass_written_out(kind):
    changes, prefix, has_class = PLAIN[kind]
    model, images = vit(**changes), pixels(3)
    found, expected = followed(model, images), explicit(model, images)
    assert [layer.layer for layer in found] == [0, 1, 2]
    assert {layer.key[0] for layer in found} == {f"blocks.{i}.attn" for i in range(3)}
    joint = torch.eye(expected[0].tokens.shape[1], dtype=torch.float64)
    rolled = seen_by_probes(model, images, "rollout", class_token=has_class)[1].maps
    for layer, written in zip(found, expected, strict=True):
        assert (layer.grid, layer.token_grid) == (GRID, GRID)
        assert (layer.has_class, layer.prefix, layer.merged) == (has_class, prefix, False)
        rows = written.attention[:, :, 0] if has_class else written.attention.mean(2)
        close(layer.attention, rows[..., prefix:])
        close(layer.keys, written.keys[:, prefix:])
        close(layer.output, written.output[:, prefix:])
        close(layer.tokens, written.tokens[:, prefix:])
        joint = (0.5 * written.attention.mean(1) + 0.5 * torch.eye(joint.shape[-1])) @ joint
        close(rolled[f"rollout/{layer.layer}"].flatten(1), (joint[:, 0] if has_class else joint.mean(1))[:, prefix:])


def test_of_a_single_block_the_attention_is_not_taken_for_the_block():
    model, images = vit(depth=1), pixels(2)
    (layer,), (written,) = followed(model, images), explicit(model, images)
    close(layer.output, written.output[:, 1:])
    close(layer.tokens, written.tokens[:, 1:])


def test_only_the_images_that_count_are_kept_and_the_whole_stream_is_shown():
    model, images, streams = vit(), pixels(4), []
    layouts = trace(model, images)
    collector = FeatureCollector(layouts, 2, on_layer=lambda layer: streams.append(layer.stream.clone()))
    watch(model, images, collector.on_attention, layouts=layouts, on_output=collector.on_output)
    for name in ("attention", "keys", "output", "tokens"):
        assert torch.equal(getattr(collector.layers[1], name), getattr(followed(model, images)[1], name)[:2])
    assert [tuple(x.shape) for x in streams] == [(4, 25, 24)] * 3
    close(streams[1], explicit(model, images)[1].tokens)
    assert all(layer.stream is None for layer in collector.layers)


def test_a_layer_is_handed_on_once_and_when_all_of_it_is_there():
    complete = []
    followed(vit(), pixels(2), on_layer=lambda layer: complete.append((layer.layer, layer.tokens is not None)))
    assert complete == [(0, True), (1, True), (2, True)]


def test_rollout_says_how_heads_are_fused_and_what_is_discarded():
    model, images = vit(), pixels(2)
    plain = seen_by_probes(model, images, "rollout")[1]
    readout = seen_by_probes(model, images, "rollout:fusion=max,discard=0.5")[1]
    joint = None
    for layer in explicit(model, images):
        joint = fused_rollout_step(joint, [(slice(0, 25), layer.attention)], "max", 0.5)
    close(readout.maps["rollout/2"].flatten(1), joint[:, 0, 1:])
    assert not plain.details
    assert readout.details["rollout/2"] == {"rule": "the maximum over heads, without the lowest 50 % of each layer's attention"}
    with pytest.raises(SettingError, match=r"discard=1\.0"):
        chosen(["rollout:discard=1"])


def test_rollout_ends_where_tokens_are_too_many(monkeypatch):
    monkeypatch.setattr(rollout, "TOKENS", 24)
    assert seen_by_probes(vit(), pixels(1), "rollout")[1].maps == {}


@pytest.mark.parametrize("spec", ["evit:keep=0.5,layers=0-1", "token_merging", "spc:after=1", "svda"])
def test_under_our_grafts_every_value_stands_where_the_record_of_the_tokens_says(spec):
    model, images = vit(), pixels(3)
    graft(model, parse(spec))
    streams, maps, keys = {}, {}, {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, out, i=i: streams.__setitem__(i, out))

    def see(call):
        maps[call.name], keys[call.name] = call.map()[:, 0], call.k[:, 0].clone()

    found = followed(model, images)
    watch(model, images, see)
    changed = 0
    for i, layer in enumerate(found):
        assert (layer.grid, layer.token_grid, layer.has_class, layer.prefix) == (GRID, GRID, True, 1)
        before = streams[i - 1].state if i and isinstance(streams[i - 1], Stream) else None
        after = streams[i].state if isinstance(streams[i], Stream) else None
        x = streams[i].x if isinstance(streams[i], Stream) else streams[i]
        changed += before is not None and not before.plain
        for b in range(3):
            for p in range(24):
                at = p + 1 if before is None or before.assignment is None else int(before.assignment.index[b, p + 1])
                weights = maps[f"blocks.{i}.attn"][b, :, 0, at] if at >= 0 else torch.zeros(2)
                if before is not None and before.assignment is not None and at >= 0:  # places share what their token gets
                    weights = weights / (before.assignment.index[b] == at).sum()
                torch.testing.assert_close(layer.attention[b, :, p], weights, rtol=1e-5, atol=1e-7)
                k = keys[f"blocks.{i}.attn"][b, :, at].flatten() if at >= 0 else torch.zeros(24)
                torch.testing.assert_close(layer.keys[b, p], k, rtol=1e-5, atol=1e-6)
                at = p + 1 if after is None or after.assignment is None else int(after.assignment.index[b, p + 1])
                token = x[b, at] if at >= 0 else torch.zeros(24)
                torch.testing.assert_close(layer.tokens[b, p], token, rtol=1e-5, atol=1e-6)
    assert changed == {"svda": 0}.get(spec, 2)  # layers that saw other tokens than the image's own


def test_windows_are_put_back_where_they_lie():
    torch.manual_seed(0)
    small = {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 3}
    model = timm.create_model("swin_tiny_patch4_window7_224", **small).eval()
    images, outputs = torch.randn(2, 3, 56, 56), {}
    for name, child in model.named_modules():
        if name.endswith(("blocks.0", "blocks.1")):
            child.register_forward_hook(lambda _, args, out, name=name: outputs.__setitem__(name, out))
    found = layer_features(model, images)
    assert [layer.grid for layer in found] == [(14, 14), (14, 14), (7, 7), (7, 7)]
    for layer, windows in zip(found, (4, 4, 1, 1), strict=True):
        assert not layer.has_class
        total = layer.attention.sum(-1)  # a mean row of each window, which sums to one
        torch.testing.assert_close(total, torch.full_like(total, windows))
        torch.testing.assert_close(layer.tokens, outputs[layer.key[0].removesuffix(".attn")].flatten(1, 2))


def test_a_shifted_window_pays_attention_where_the_image_is_bright():
    """Keys that grow with brightness under queries that are the same: attention received is a picture of the image."""
    torch.manual_seed(0)
    small = {"img_size": 56, "embed_dim": 16, "depths": (2,), "num_heads": (1,), "num_classes": 3}
    model = timm.create_model("swin_tiny_patch4_window7_224", **small).eval()
    attn = model.layers[0].blocks[1].attn
    with torch.no_grad():
        attn.qkv.weight.zero_()
        attn.qkv.bias.zero_()
        attn.qkv.bias[:16] = 1.0
        attn.qkv.weight[16:32] = 0.5
        attn.relative_position_bias_table.zero_()
    seen = {}
    model.layers[0].blocks[1].norm1.register_forward_hook(lambda _, args, out: seen.__setitem__("x", out))
    layer = layer_features(model, torch.randn(1, 3, 56, 56))[1]
    brightness = seen["x"].sum(-1).flatten()  # q k = 0.5 * 16 * sum of the token
    for row, col in ((4, 4), (3, 9), (10, 5)):  # inside one shifted window
        a, b = row * 14 + col, row * 14 + col + 1
        ratio = (layer.attention[0, 0, a] / layer.attention[0, 0, b]).log()
        torch.testing.assert_close(ratio, (brightness[a] - brightness[b]) * 0.5 * 16 / 16**0.5, rtol=1e-3, atol=1e-4)


def test_the_block_is_the_outermost_module_around_one_attention_alone():
    calls = [("encoder.layer.0.attention.self", 0), ("encoder.layer.1.attention.self", 0)]
    placed = {("encoder.layer.0", 0), ("encoder.layer.1", 0), ("encoder", 0)}
    assert modules_around(calls, placed) == {
        "encoder.layer.0": ("tokens", calls[0]), "encoder.layer.0.attention": ("output", calls[0]),
        "encoder.layer.1": ("tokens", calls[1]), "encoder.layer.1.attention": ("output", calls[1]),
    }  # fmt: skip
    alone = ("encoder.layer.0.attention.self", 0)
    one = {("encoder", 0), ("encoder.layer.0", 0)}
    names = {"encoder.layer.0": ("tokens", alone), "encoder.layer.0.attention": ("output", alone)}
    assert modules_around([alone], one) == names
    both = [("blocks.0.self_attn", 0), ("blocks.0.cross_attn", 0)]
    assert modules_around(both, {("blocks.0", 0), ("blocks.0.self_attn", 0)}) == {"blocks.0.self_attn": ("tokens", both[0])}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cls_token", "reg_token"], True),
        (["reg_token"], False),
        (["class_embedding"], True),
        (["weight"], False),
        (["queries"], False),
    ],
)
def test_registers_alone_are_no_class_token(names, expected):
    holder = torch.nn.Module()
    for name in names:
        holder.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    assert has_class_token(torch.nn.Sequential(holder)) is expected


@pytest.mark.parametrize("spec", ["channelvit", "channelvit+token_merging:tokens=3,layers=0"])
def test_a_token_per_channel_has_a_map_per_channel(spec):
    """Three tokens at each place: what the class token gives to each of them, and their mean."""
    model, images, maps = vit(), pixels(2), {}
    for part in spec.split("+"):
        graft(model, parse(part))
    watch(model, images, lambda call: maps.__setitem__(call.name, (call.map()[:, 0], call.assignment)))
    readout = seen_by_probes(model, images, "attention_maps")[1]
    for layer in range(3):
        whole, assignment = maps[f"blocks.{layer}.attn"]
        row = whole[:, :, 0]  # (B, H, tokens)
        if assignment is not None:
            row = assignment.share(row.mT).mT
        by_channel = readout.maps[f"attention_channels/{layer}"]
        close(by_channel, row[..., 1:].unflatten(-1, (3, *GRID)))
        close(readout.maps[f"attention/{layer}"], by_channel.mean(2))
    assert not [name for name in seen_by_probes(vit(), images, "attention_maps")[1].maps if "channels" in name]
