"""Maps of a class against Chefer et al.'s formulas: loops in float64, autograd through attention that is written out."""

from __future__ import annotations

import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lens.explicit import pixels, vit
from vitreous import graft, parse
from vitreous.base.errors import SettingError, UnknownName
from vitreous.lens.look import look
from vitreous.lens.preserve_state import preserve_state
from vitreous.lens.probe import BatchInfo, chosen
from vitreous.lens.reading import read
from vitreous.lens.tap import trace, watch
from vitreous.lens.token_coordinates import has_class_token

CLOSE = {"rtol": 2e-4, "atol": 1e-9}


def written_out(model, images, target=None):
    """[(A (B, H, N, M), dS/dA)] of every attention and the classes, by autograd through A itself, in float64."""
    maps = []

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        maps.append((scores if attn_mask is None else scores + attn_mask).softmax(-1))
        return maps[-1] @ v

    with pytest.MonkeyPatch.context() as patch, preserve_state(model), torch.enable_grad():
        patch.setattr(F, "scaled_dot_product_attention", attend)
        logits = model(images.double())
        classes = logits.argmax(-1) if target is None else torch.full((len(images),), target)
        score = sum(row[number] for row, number in zip(logits, classes, strict=True))
        gradients = torch.autograd.grad(score, maps)
    return [(a.detach(), g) for a, g in zip(maps, gradients, strict=True)], classes.tolist()


def contribution(a, gradient):
    """Mean over heads of the positive part of A * dS/dA, of one image, entry by entry."""
    heads, n, m = a.shape
    c = torch.zeros(n, m, dtype=torch.float64)
    for i in range(n):
        for j in range(m):
            c[i, j] = sum(max(0.0, float(a[h, i, j] * gradient[h, i, j])) for h in range(heads)) / heads
    return c


def by_loops(layers, image, groups=None, inserted=None):
    """R of one image through all layers. groups: {layer: present token of each original one}; inserted: {layer: tokens}."""
    joint, members = None, None
    for number, (a, gradient) in enumerate(layers):
        c = contribution(a[image], gradient[image])
        joint = torch.eye(len(c), dtype=torch.float64) if joint is None else joint
        if groups and groups.get(number) is not None:  # a token made of others has their mean
            members = groups[number][image].tolist() if members is None else members
            now = groups[number][image].tolist()
            original = torch.zeros(len(now), joint.shape[1], dtype=torch.float64)
            for place, token in enumerate(members if number > min(groups) else range(len(now))):
                if token >= 0:
                    original[place] = joint[token]
            joint = torch.stack([original[[i for i, t in enumerate(now) if t == token]].mean(0) for token in range(len(c))])
            members = now
        if inserted and number in inserted:
            joint = torch.block_diag(joint, torch.eye(inserted[number], dtype=torch.float64))
        joint = joint + c @ joint
    return joint


def extra(model, images, text):
    """What a probe reads of a batch in passes of its own."""
    (probe,) = chosen([text], model)
    batch = BatchInfo(images, len(images), trace(model, images), class_token=has_class_token(model))
    with preserve_state(model):
        return probe.extra(model, batch, [])


# -- against the formula -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("target", [None, 2])
def test_relevance_is_that_of_the_paper(fused, target):
    model, images = vit().double(), pixels(2)
    for block in model.blocks:
        block.attn.fused_attn = fused
    readout = extra(model, images, "relevance" if target is None else f"relevance:target={target}")
    for block in model.blocks:
        block.attn.fused_attn = True
    layers, classes = written_out(model, images, target)
    for image in range(2):
        expected = by_loops(layers, image)[0, 1:].reshape(4, 6)
        np.testing.assert_allclose(readout.maps["relevance/-1"][image], expected, **CLOSE)
    assert readout.classes == {"relevance": classes}


def test_attention_for_a_class_is_a_times_its_gradient_head_by_head():
    model, images = vit().double(), pixels(2)
    readout = extra(model, images, "grad_attention")
    layers, _ = written_out(model, images)
    for number, (a, gradient) in enumerate(layers):
        expected = (a * gradient).clamp(min=0)[:, :, 0, 1:].unflatten(-1, (4, 6))
        np.testing.assert_allclose(readout.maps[f"grad_attention/{number}"], expected, **CLOSE)


def test_the_tokens_that_the_logit_is_read_from_decide_which_rows_count():
    """The mean of patches; registers and a class token that nobody reads are left out."""
    for changes in ({"class_token": False, "global_pool": "avg"}, {"global_pool": "avg", "reg_tokens": 2}):
        model, images = vit(**changes).double(), pixels(2)
        readout, prefix = extra(model, images, "relevance"), model.num_prefix_tokens
        layers, _ = written_out(model, images)
        for image in range(2):
            joint = by_loops(layers, image)
            expected = (joint - torch.eye(len(joint), dtype=torch.float64))[prefix:, prefix:].mean(0).reshape(4, 6)
            np.testing.assert_allclose(readout.maps["relevance/-1"][image], expected, **CLOSE)
        grads = extra(model, images, "grad_attention").maps
        for number, (a, gradient) in enumerate(layers):
            expected = (a * gradient).clamp(min=0)[..., prefix:].mean(2).unflatten(-1, (4, 6))
            np.testing.assert_allclose(grads[f"grad_attention/{number}"], expected, **CLOSE)


def test_queries_that_read_from_all_tokens_at_the_end_are_followed():
    model, images = vit(class_token=False, global_pool="map").double(), pixels(2)
    readout = extra(model, images, "relevance")
    (*layers, last), _ = written_out(model, images)
    for image in range(2):
        expected = contribution(last[0][image], last[1][image]) @ by_loops(layers, image)
        np.testing.assert_allclose(readout.maps["relevance/-1"][image], expected[0].reshape(4, 6), **CLOSE)


@pytest.mark.parametrize("spec", ["svda", "evit:keep=0.5,layers=0-1", "extra_tokens:kind=register,tokens=2,after=1"])
def test_grafts_are_followed(spec):
    model, images = vit(), pixels(2)
    graft(model, parse(spec))
    model.double()
    groups = {}

    def note(call):
        if call.assignment is not None:
            groups[len(seen)] = call.assignment.index
        seen.append(call.name)

    seen = []
    watch(model, images, note)
    readout, grads = (extra(model, images, name) for name in ("relevance", "grad_attention"))
    layers, _ = written_out(model, images)
    for image in range(2):
        joint = by_loops(layers, image, groups, {1: 2} if spec.startswith("extra") else None)
        np.testing.assert_allclose(readout.maps["relevance/-1"][image], joint[0, 1:25].reshape(4, 6), **CLOSE)
    assert not readout.notes
    if groups:  # what a group has is shared out among its patches, so that sums stay
        a, gradient = layers[2]
        np.testing.assert_allclose(
            grads.maps["grad_attention/2"].sum((-1, -2)), (a * gradient).clamp(min=0)[:, :, 0, 1:].sum(-1), **CLOSE
        )
        assert layers[2][0].shape[-1] < layers[0][0].shape[-1]


# -- other models ------------------------------------------------------------------------------------------------------


def test_a_module_of_torch_has_the_same_maps_as_attention_written_out():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 24, 48, num_classes=5).double().eval()
    nn.init.normal_(model.heads.head.weight)
    images = pixels(2)[..., :16]
    readout = extra(model, images, "relevance")
    layers, _ = written_out(model, images)
    for image in range(2):
        np.testing.assert_allclose(readout.maps["relevance/-1"][image], by_loops(layers, image)[0, 1:].reshape(4, 4), **CLOSE)


def test_windows_have_attention_for_a_class_and_a_reason_for_no_relevance():
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(2, 2), num_heads=(2, 4), embed_dim=8,
        num_classes=5,
    ).eval()  # fmt: skip
    reading = look(model, pixels(2).repeat(1, 1, 2, 2)[..., :32], probes=["relevance", "grad_attention"], noise=0)
    assert set(reading.maps) == {("grad_attention", layer) for layer in range(4)}
    assert all(np.isfinite(reading.maps[key]).all() and reading.maps[key].any() for key in reading.maps)
    (note,) = reading.facts["notes"]
    assert re.fullmatch(r"No relevance map: layers\.0\.blocks\.0\.attn: tokens attend in windows", note)


class Detached(nn.Module):
    """The model, whose first half is out of the graph."""

    def __init__(self):
        super().__init__()
        self.vit = vit()

    def forward(self, x):
        with torch.no_grad():
            x = self.vit.patch_embed(x)
            x = self.vit.blocks[0](self.vit._pos_embed(x))
        x = self.vit.blocks[2](self.vit.blocks[1](x))
        return self.vit.head(self.vit.norm(x)[:, 0])


def test_what_cannot_be_explained_says_why_and_ends_no_look():
    cases = {
        "not of classes": vit(num_classes=0, global_pool=""),
        r"no gradient reaches vit\.blocks\.0\.attn": Detached(),
    }
    for reason, model in cases.items():
        reading = look(model, pixels(2), probes=["all", "relevance"], noise=0)
        assert any(re.search(reason, note) for note in reading.facts["notes"]), reason
        assert not any(name == "relevance" for name, _ in reading.maps)
        assert ("attention", 2) in reading.maps


def test_a_logit_that_depends_on_no_attention_has_no_maps_of_zeros():
    model = vit()
    nn.init.zeros_(model.head.weight)
    reading = look(model, pixels(2), probes=["relevance", "grad_attention"], noise=0)
    assert not list(reading.maps)
    assert [note.partition(":")[0] for note in sorted(reading.facts["notes"])] == [
        "No attention for a class in blocks.0.attn to blocks.2.attn (3)", "No relevance map",
    ]  # fmt: skip


def test_half_precision_and_frozen_weights_have_maps():
    model, images = vit(), pixels(2)
    whole = look(model, images, probes=["relevance"], noise=0).maps["relevance"]
    frozen = look(vit().requires_grad_(False), images, probes=["relevance"], noise=0).maps["relevance"]
    np.testing.assert_array_equal(frozen, whole)
    half = look(vit().bfloat16(), images, probes=["relevance:target=1"], noise=0).maps["relevance"]
    exact = look(model, images, probes=["relevance:target=1"], noise=0).maps["relevance"]
    assert np.corrcoef(half.ravel(), exact.ravel())[0, 1] > 0.98


# -- which class, and what is stored -----------------------------------------------------------------------------------


def test_a_reading_says_which_class_each_map_is_for(tmp_path):
    model, images = vit(), pixels(3)
    model.pretrained_cfg = {"label_names": ["cat", "dog, hound", "bird", "fish", "7"], "mean": (0.5,) * 3, "std": (0.5,) * 3}
    looked = look(model, images, probes=["relevance", "grad_attention:target=hound"], out=tmp_path / "out", batch_size=2)
    for reading in (looked, read(tmp_path / "out")):
        for image in reading.images:
            assert image["classes"]["relevance"]["name"] == image["predicted"]
            assert image["classes"]["grad_attention"] == {"class": 1, "name": "dog, hound"}
        rules = {record["name"]: record["rule"] for record in reading.facts["components"]}
        assert rules["grad_attention"] == "the gradient of class dog, hound (1)"
        assert "predicts" in rules["relevance"]
        assert reading.facts["probes"] == ["relevance", "grad_attention:target=1"]
    named = look(model, images, probes=["relevance:target=7"], noise=0).images[0]["classes"]["relevance"]
    assert named == {"class": 4, "name": "7"}  # a name that is a number comes first
    with pytest.raises(UnknownName, match="'dogg'"):
        look(model, images, probes=["relevance:target=dogg"])
    with pytest.raises(SettingError, match=r"class 5 of 5.*0 to 4"):
        look(model, images, probes=["relevance:target=5"])
    with pytest.raises(SettingError, match="another reading"):
        look(model, images, probes=["relevance:target=1", "grad_attention:target=hound"], out=tmp_path / "out", batch_size=2)


def test_both_maps_come_from_one_pass_and_only_where_asked_for(monkeypatch):
    from vitreous.lens import class_gradients as module

    passes, run = [], module.gradient_pass
    monkeypatch.setattr(module, "gradient_pass", lambda *args: passes.append(1) or run(*args))
    look(vit(), pixels(2), noise=0)
    assert not passes
    look(vit(), pixels(2), probes=["relevance", "grad_attention"], noise=0)
    assert len(passes) == 1


def test_a_pass_with_gradients_sees_what_a_pass_without_sees():
    model, images = vit(), pixels(2)
    model(images).sum().backward()
    before, seen = model.head.weight.grad.clone(), {False: [], True: []}
    for gradients, calls in seen.items():
        result = watch(model, images, lambda call, calls=calls: calls.append((call.name, call.map())), gradients=gradients)
        assert result.output.requires_grad == gradients
    for (name, a), (other, b) in zip(*seen.values(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert not b.requires_grad
    assert torch.equal(model.head.weight.grad, before)
    assert not images.requires_grad
