"""The report reads what `look` writes: the numbers and maps of a page are those of the reading."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import pytest
import timm
import torch

from report.test_packing import unpacked
from vitreous.lens.look import look
from vitreous.report.page import write


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A reading of three made images with masks, on disk, and what its page holds."""
    root = tmp_path_factory.mktemp("looked")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7).eval()
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    masks = np.zeros((3, 160, 160), bool)
    masks[:, 40:100, 30:120] = True
    reading = look(model, images, masks=masks, out=root / "reading", about={"name": "<made>", "weights": "random"})
    text = write([root / "reading"], root / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    return reading, data["sources"][0]["readings"][0]


def test_facts_and_images_are_there(looked):
    reading, shown = looked
    assert shown["random"]
    assert shown["title"] == "<made>"
    assert [layer["name"] for layer in shown["layers"]] == [layer["name"] for layer in reading.layers]
    assert shown["count"] == shown["shown"] == 3
    assert all(image["picture"] is not None and image["mask"] is not None for image in shown["images"])


def test_maps_come_back_within_half_a_step(looked):
    reading, shown = looked
    names = list(reading.maps)
    assert {f"{component}/{layer}" for component, layer in names} == set(shown["maps"])
    for component, layer in names:
        entry, expected = shown["maps"][f"{component}/{layer}"], reading.maps.heads(component, layer)
        found = unpacked(entry["cells"], entry["height"], entry["width"]).reshape(expected.shape)
        span = (
            2 * np.abs(expected).max((-2, -1), keepdims=True) if entry["signed"] else np.ptp(expected, (-2, -1), keepdims=True)
        )
        assert (np.abs(found - expected) <= span / 508 * 1.001 + 1e-9).all(), (component, layer)


def test_what_patches_look_at_comes_back_within_a_step(looked):
    reading, shown = looked
    queries = shown["queries"]
    assert queries["images"] == reading.facts["queries"]["images"] == [0, 1, 2]
    for name, text in queries["rows"].items():
        layer, image = name.split("/")
        entry, data = queries["layers"][layer], zlib.decompress(base64.b64decode(text))
        h, w, size = entry["height"], entry["width"], entry["key_height"] * entry["key_width"]
        scale = np.frombuffer(data, "<f4", entry["heads"] * h * w).reshape(-1, h, w)
        cells = np.frombuffer(data, np.uint8, offset=scale.nbytes).reshape(-1, h, w, size)
        for patch in ((0, 0), (h - 1, w // 2)):
            for head in range(entry["heads"]):
                expected = reading.query(int(image), int(layer), patch, head).ravel()
                found = cells[head, *patch] * scale[head, *patch]
                assert np.abs(found - expected).max() <= expected.max() / 126 * 1.001


def test_spectra_are_those_of_the_reading(looked):
    reading, shown = looked
    assert [entry["layer"] for entry in shown["spectra"]] == [layer["layer"] for layer in reading.layers]
    for entry in shown["spectra"]:
        expected = reading.spectra[entry["source"], entry["layer"]]
        values = np.frombuffer(base64.b64decode(entry["values"]), "<f4").reshape(entry["heads"], entry["axes"])
        np.testing.assert_array_equal(values, expected)


def test_measures_are_the_means_of_the_table(looked):
    reading, shown = looked
    table = reading.table()
    measures = [name for name in table if name not in ("layer", "head", "image", "source", "kind")]
    assert shown["table"]["columns"] == measures
    checked = 0
    for source, kind, layer, head, *cells in shown["table"]["rows"]:
        here = (table["source"] == source) & (table["kind"] == kind) & (table["layer"] == layer) & (table["head"] == head)
        for name, cell in zip(measures, cells, strict=True):
            values = table[name][here]
            values = values[np.isfinite(values)]
            assert (cell is None) == (len(values) == 0)
            if cell is not None:
                assert cell[0] == pytest.approx(values.mean(), rel=1e-5, abs=1e-12)
                checked += 1
    assert checked > 100


def test_scores_are_those_of_the_summary(looked):
    reading, shown = looked
    summary = reading.facts["summary"]
    assert len(shown["summary"]) == len(summary["component"])
    best = max((row for row in shown["summary"] if row[0] == "attention" and row[3] == "auroc"), key=lambda row: row[4])
    table = reading.scores()
    here = (table["component"] == "attention") & (table["layer"] == best[1]) & (table["head"] == best[2])
    assert best[4] == pytest.approx(table["auroc"][here].mean(), rel=1e-3)
