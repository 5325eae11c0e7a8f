"""Patches under attack and corruption: closed forms, planted models, and the mechanism `temperature` in the probe."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from vitreous import graft, ungraft
from vitreous.base.errors import HostError, SettingError
from vitreous.commands._looking import overview
from vitreous.lens.look import look
from vitreous.lens.patch_attack import (
    Perturbation,
    Scale,
    attacked,
    corners_of,
    generator,
    logits_of,
    patch_pixels,
    salience_of,
)
from vitreous.lens.probe import BatchInfo
from vitreous.lens.probes.patch_perturbation import PatchPerturbation
from vitreous.lens.tap import trace
from vitreous.report.page import write
from vitreous.report.reading import ReadingFolder, page_content
from vitreous.testing.hosts import anatomy

PLAIN = Scale((0.0,) * 3, (1.0,) * 3)


def pixels(count=3, side=32, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
        model = VisionTransformer(**small).eval()
        for name, p in model.named_parameters():
            if "weight" in name and p.ndim > 1:
                nn.init.normal_(p, std=0.3)
    return model


class Bright(nn.Module):
    """One attention over patches of 8 x 8: each looks at the brightest ones, and the mean brightness seen decides.

    logits (B, 2) = (0, 40 (seen - 0.5)); the map is softmax(gain * brightness), the same in every row.
    """

    def __init__(self, gain=8.0):
        super().__init__()
        self.patches, self.gain = nn.Conv2d(3, 1, 8, 8, bias=False), gain
        nn.init.constant_(self.patches.weight, 1 / (3 * 64))

    def forward(self, x):
        x = self.patches(x).flatten(2).mT  # (B, N, 1)
        seen = F.scaled_dot_product_attention((1 + 0 * x)[:, None], self.gain * x[:, None], x[:, None], scale=1.0)
        seen = 40 * (seen[:, 0].mean(1) - 0.5)
        return torch.cat([torch.zeros_like(seen), seen], dim=1)


def rows(model, images, **settings):
    """{kind: {measure: (images,)}} of the probe, and its reading."""
    reading = look(model, images, probes=[PatchPerturbation(**settings)], noise=0)
    table = reading.table()
    kinds = dict.fromkeys(table["kind"].tolist())
    own = {kind: (table["source"] == "patch") & (table["kind"] == kind) for kind in kinds}
    names = [measure.name for measure in PatchPerturbation.measures]
    return {kind: {name: table[name][mask] for name in names} for kind, mask in own.items() if mask.any()}, reading


# -- the perturbation ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3, 30])
def test_an_attack_on_a_linear_model_has_a_closed_form(steps):
    """Of two classes by w x the gradient has one sign throughout: x + steps * step * sign(w), clamped."""
    w = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    x, where = pixels(2, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    where[0, :, 2:4, 4:6] = where[1, :, :2, :2] = True
    changed = attacked(lambda p: F.softplus((p * w).sum((1, 2, 3))), x, where, steps, 0.05)
    expected = x.clone()
    for b, c, i, j in where.expand_as(x).nonzero().tolist():
        expected[b, c, i, j] = min(1.0, max(0.0, x[b, c, i, j] + steps * 0.05 * math.copysign(1, w[c, i, j])))
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0)
    assert steps == 0 or (changed - x).abs().max() > 0.04


@pytest.mark.parametrize("kind", ["adversarial", "noise", "shot", "impulse", "blur", "contrast", "brightness"])
def test_only_pixels_of_the_patch_change_and_stay_in_range(kind):
    """Outside not a bit, in the model's own units; inside, most of them, and always within what pixels can be."""
    model, scale = vit(), Scale((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    images = scale.images(pixels())
    where = patch_pixels(torch.tensor([[0, 0], [2, 3], [1, 1]]), 1, (4, 4), (32, 32))
    assert where.sum((1, 2, 3)).tolist() == [64] * 3
    changed = Perturbation(kind, steps=5)(model, images, torch.tensor([0, 1, 2]), where, scale)
    outside = ~where.expand_as(images)
    assert torch.equal(changed[outside], images[outside])
    assert (changed != images)[where.expand_as(images)].double().mean() > 0.2
    back = scale.pixels(changed)
    assert back.min() >= 0
    assert back.max() <= 1
    with pytest.raises(SettingError, match=r"Found pixels from .* before normalisation\. Expected 0 to 1"):
        scale.pixels(images + 3)


def test_more_steps_never_lower_the_loss():
    model, images, classes = vit().requires_grad_(False), pixels(), torch.tensor([0, 1, 2])
    where = patch_pixels(torch.ones(3, 2, dtype=torch.long), 2, (4, 4), (32, 32))
    before = torch.full((3,), -math.inf)
    for steps in (0, 1, 2, 4, 8):
        changed = Perturbation(steps=steps)(model, images, classes, where, PLAIN)
        loss = F.cross_entropy(logits_of(model, changed), classes, reduction="none")
        assert (loss >= before - 1e-6).all()
        before = loss
    assert (before > F.cross_entropy(logits_of(model, images), classes, reduction="none") + 0.01).all()


def test_places():
    salience = torch.zeros(2, 4, 5)
    salience[0, 3, 4], salience[1, 1, 2] = 1.0, 1.0
    three = [generator(0, i) for i in range(2)]
    assert corners_of("salient", 1, (4, 5), salience, three).tolist() == [[3, 4], [1, 2]]
    assert corners_of("salient", 2, (4, 5), salience, three).tolist() == [[2, 3], [0, 1]]
    assert corners_of("centre", 2, (4, 5), salience, three).tolist() == [[1, 1]] * 2
    drawn = corners_of("random", 1, (4, 5), salience, [generator(3, i) for i in range(50)])
    assert set(drawn[:, 0].tolist()) == set(range(4))
    assert set(drawn[:, 1].tolist()) == set(range(5))
    assert torch.equal(drawn[7:9], corners_of("random", 1, (4, 5), salience, [generator(3, i) for i in (7, 8)]))
    assert patch_pixels(torch.tensor([[2, 3]]), 2, (4, 5), (8, 10)).nonzero()[:, 2:].unique(dim=0).tolist() == [
        [i, j] for i in range(4, 8) for j in range(6, 10)
    ]


def test_the_salient_patch_is_the_one_that_the_answer_hangs_on():
    class One(nn.Module):
        def forward(self, x):
            value = x[:, :, 8:16, 24:].mean((1, 2, 3))
            return torch.stack([value, -value], dim=1)

    salience = salience_of(One(), pixels(), torch.zeros(3, dtype=torch.long), (4, 4))
    assert salience.flatten(1).argmax(1).tolist() == [7] * 3
    assert (salience.flatten(1)[:, :7] == 0).all()


# -- the probe -------------------------------------------------------------------------------------


def test_attention_is_drawn_to_a_planted_patch_and_the_answer_flips():
    """The attack brightens the patch; rollout on it is half of softmax(gain b), half of its own place."""
    images = 0.3 + 0.02 * pixels()
    found, reading = rows(Bright(), images, at=(1, 2), steps=10, step=0.1)
    values = found["T = 1"]
    assert (values["patch_fooled"] == 1).all()
    b = F.avg_pool2d(images.mean(1), 8).flatten(1).double()
    for brightness, name in ((b, "patch_before"), (b.clone().index_fill_(1, torch.tensor(6), 1.0), "patch_after")):
        share = (8 * brightness).softmax(1)[:, 6]
        np.testing.assert_allclose(values[name], 0.5 * share + 0.5 / 16, rtol=1e-4)
    assert (values["patch_after"] > 5 * values["patch_before"]).all()
    assert (values["patch_lost"] > 0.9).all()
    assert [image["classes"]["rollout_after"]["class"] for image in reading.images] == [1, 1, 1]
    assert reading.maps["rollout_after"].reshape(3, -1).argmax(1).tolist() == [6] * 3


def test_the_fooling_rate_rises_with_the_steps():
    images = 0.3 + 0.02 * pixels() - 0.05 * torch.arange(3).view(-1, 1, 1, 1)
    rates = [rows(Bright(), images, at=(1, 2), steps=s, step=0.05)[0]["T = 1"]["patch_fooled"].mean() for s in (0, 5, 9, 20)]
    assert rates[0] == 0
    assert rates[-1] == 1
    assert rates == sorted(rates)


def test_temperatures_are_the_mechanism_in_the_model():
    """Readings at T are those of the grafted model; what was made at the first is tried on the others; nothing stays behind."""
    model, images = vit(), pixels()
    before = anatomy(model), model(images)
    settings = {"at": (1, 1), "size": 2, "steps": 3}
    found, _ = rows(model, images, temperatures=(1.0, 3.0), **settings)
    assert anatomy(model) == before[0]
    assert torch.equal(model(images), before[1])
    alone, _ = rows(model, images, **settings)
    for name, value in alone["T = 1"].items():
        np.testing.assert_array_equal(found["T = 1"][name], value)
    where = patch_pixels(torch.ones(3, 2, dtype=torch.long), 2, (4, 4), (32, 32))
    classes = before[1].argmax(1)
    first = Perturbation(steps=3, step=0.2)(model, images, classes, where, PLAIN)
    graft(model, "temperature:temperature=3.0")
    own, _ = rows(model, images, **settings)
    for name in ("patch_fooled", "patch_lost", "patch_before", "patch_after"):
        np.testing.assert_array_equal(found["T = 3"][name], own["T = 1"][name])
    with torch.no_grad():
        clean, transferred = model(images).argmax(1), model(first).argmax(1)
    ungraft(model)
    np.testing.assert_array_equal(found["T = 3"]["patch_fooled_transferred"], (transferred != clean).double())
    np.testing.assert_array_equal(found["T = 3"]["patch_unchanged"], (clean == classes).double())
    assert np.isnan(found["T = 1"]["patch_fooled_transferred"]).all()
    assert (found["T = 3"]["patch_lost"] != found["T = 1"]["patch_lost"]).any()


def test_a_model_that_answers_alike_cannot_be_fooled():
    model = vit()
    nn.init.zeros_(model.head.weight)
    found, _ = rows(model, pixels(), steps=5)
    assert (found["T = 1"]["patch_fooled"] == 0).all()
    assert (found["T = 1"]["patch_lost"] == 0).all()
    np.testing.assert_allclose(found["T = 1"]["patch_after"], found["T = 1"]["patch_before"])


def test_batches_and_seeds_do_not_matter():
    images = pixels(3)
    probe = PatchPerturbation(kind="noise", place="random", seed=4)
    readings = [look(vit(), images, probes=[probe], noise=0, batch_size=size).table() for size in (1, 3)]
    for measure in probe.measures:
        np.testing.assert_allclose(readings[0][measure.name], readings[1][measure.name], atol=1e-6)
    other = look(vit(), images, probes=[PatchPerturbation(kind="noise", place="random", seed=5)], noise=0).table()
    assert (other["patch_after"] != readings[0]["patch_after"]).any()


def test_images_that_are_wrong_before_may_be_left_out():
    """By labels, which tensors do not have: the measures of those that are wrong are NaN."""
    model, images = vit().eval(), pixels(3)
    probe = PatchPerturbation(counted="correct", at=(1, 1), steps=1)
    labels = model(images).argmax(1).tolist()
    wrong = (labels[1] + 1) % 5
    batch = BatchInfo(images, 3, trace(model, images), mean=(0.0,) * 3, std=(1.0,) * 3)
    with torch.no_grad():
        readout = probe.extra(model, batch, [labels[0], wrong, labels[2]])
    (row,) = readout.rows
    for name in ("patch_fooled", "patch_lost", "patch_before", "patch_after"):
        assert row.values[name].isnan()[:, 0].tolist() == [False, True, False]


def test_the_changed_picture_is_stored_and_on_the_page(tmp_path):
    images = 0.3 + 0.02 * pixels(2)
    probes = ["rollout", PatchPerturbation(at=(1, 2), steps=10, step=0.1)]
    reading = look(Bright(), images, probes=probes, noise=0, out=tmp_path / "reading")
    tensors = reading.parts[0].tensors
    plain, changed = (
        np.asarray(Image.open(io.BytesIO(tensors[name].tobytes()))).astype(float)
        for name in ("picture/1", "picture/rollout_after/1")
    )
    assert changed[10:14, 18:22].mean() > 240
    assert abs(plain - changed)[:, :8].max() < 8  # but for JPEG
    assert plain[10:14, 18:22].mean() < 100
    bright = np.asarray(reading.show("rollout_after", 1, opacity=0.0)).astype(float)
    assert bright[80:112, 144:176].mean() > 240
    assert np.asarray(reading.show("rollout_before", 1, opacity=0.0))[80:112, 144:176].mean() < 100
    pictures: dict[str, int] = {}
    content = page_content(ReadingFolder(tmp_path / "reading"), 2, pictures)
    image = content["images"][1]
    assert image["changed"].keys() == {"rollout_after"}
    assert image["changed"]["rollout_after"] != image["picture"]
    write([tmp_path / "reading"], tmp_path / "page.html")
    assert "an adversarial patch, 10 steps of 0.1" in (tmp_path / "page.html").read_text()


# -- what is refused -------------------------------------------------------------------------------


def notes_of(model, images, **settings):
    reading = look(model, images, probes=["rollout", PatchPerturbation(**settings)], noise=0)
    return " ".join(reading.facts["notes"]), reading


def test_what_cannot_be_perturbed_is_told():
    text, _ = notes_of(vit(), 3 * pixels() - 2)
    assert "it is not known how they were normalised. Expected that" in text
    model = vit()
    model.head = nn.Identity()
    model.num_classes = 0
    text, _ = notes_of(model, pixels())
    assert "no choice of one class. Expected logits" in text
    text, _ = notes_of(vit(), pixels(), at=(3, 4))
    assert "size=1 at row and column [3, 4] of a grid of 4 x 4 patches. Expected" in text
    text, _ = notes_of(vit(), pixels(), size=5)
    assert "size=5 at row and column [0, 0] of a grid of 4 x 4" in text
    with pytest.raises(HostError, match="no choice of one class"):
        logits_of(nn.Flatten(), torch.zeros(2, 1, 1, 1))


def test_a_temperature_that_does_not_fit_leaves_the_others():
    text, reading = notes_of(graft(vit(), "svda:scale=sqrt"), pixels(), temperatures=(1.0, 2.0), steps=1)
    assert "patch_perturbation has no readings at T = 2" in text
    assert "already holds SpectralAttention" in text
    table = reading.table()
    assert set(table["kind"][table["source"] == "patch"]) == {"T = 1"}


def test_bad_input():
    for settings, message in (
        ({"severity": 6}, "Found severity=6. Expected 1 to 5"),
        ({"steps": -1}, "Found steps=-1. Expected 0"),
        ({"step": 0}, "Found step=0.0. Expected above 0 to 1"),
        ({"size": 0}, "Found size=0. Expected 1"),
        ({"temperatures": (1.0, 1.0)}, "Expected each once"),
        ({"at": (1,)}, "Expected 2"),
        ({"kind": "fog"}, "Expected one of"),
    ):
        with pytest.raises(SettingError, match=message.replace("(", r"\(")):
            PatchPerturbation(**settings)


def test_the_command_line_has_a_row_for_each_temperature():
    _, reading = rows(vit(), pixels(2), at=(0, 0), steps=1, temperatures=(1.0, 2.0))
    console = Console(file=io.StringIO(), width=80)
    console.print(overview(reading)[-1])
    heading, *lines = (line.split() for line in console.file.getvalue().splitlines())
    assert heading == ["whole", "model", "fooled", "transfer", "lost", "before", "after", "kept"]
    assert [" ".join(line[:3]) for line in lines] == ["T = 1", "T = 2"]
