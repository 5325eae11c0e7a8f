"""Mixing maps and exact readings on the page, from a reading that was looked at."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from contract.hosts import build, images
from report.test_browser import cells, visit
from vitreous import SpectralGate, graft
from vitreous.lens.look import look
from vitreous.lens.reading import CHUNK
from vitreous.report.page import write
from vitreous.report.reading import ReadingFolder, page_content


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A reading of more than one part: of two attentions and two mixers, and of mixers alone."""
    root, model = tmp_path_factory.mktemp("mixing"), graft(build("dinov2"), SpectralGate(layers=(1,)), "retention:layers=2")
    both = look(model, images(CHUNK + 2), out=root / "both", noise=0)
    alone = look(graft(build("class_avg"), SpectralGate(layers=(0, 1, 2, 3))), images(2), out=root / "alone", noise=0)
    for name in ("both", "alone"):
        write([root / name], root / f"{name}.html")
    return root, both, alone


def test_what_the_page_holds(looked):
    root, both, _ = looked
    content = page_content(ReadingFolder(root / "both"), CHUNK + 2, {})
    assert {name for name in content["maps"] if name.startswith("mixing")} == {
        f"{name}/{layer}" for name in ("mixing", "mixing_middle") for layer in (2, 3)
    }
    entry = content["maps"]["mixing/2"]
    size = entry["height"] * entry["width"]
    levels = np.frombuffer(base64.b64decode(entry["cells"]), np.uint8)[8 * (CHUNK + 2) :].reshape(CHUNK + 2, size)
    assert (levels[:2] < 255).all()
    assert (levels[2:] == 255).all()  # of the second part as well
    exact = {(one["quantity"], one["layer"]): one for one in content["exact"]}
    assert exact.keys() == both.exact.keys() >= {("kernel", 2), ("decay", 3)}
    for key, one in exact.items():
        values = np.frombuffer(base64.b64decode(one["values"]), "<f4").reshape(one["shape"])
        np.testing.assert_array_equal(values, both.exact[key])
    assert exact["decay", 3]["label"] == "Decay"
    assert exact["kernel", 2]["channels"][0] == -1
    assert set(content["queries"]["rows"]) >= {"2/0", "2/1", "3/0", "0/2"}
    assert "2/2" not in content["queries"]["rows"]  # of the first two images alone


def test_maps_of_mixers_beside_attention(browser, looked):
    root, _, _ = looked
    with visit(browser, root / "both.html") as page:
        shown = page.locator(".pane figcaption")
        assert "Attention, layer 1" in shown.text_content()  # it opens on an attention
        page.locator("#maps").get_by_label("3", exact=True).check(force=True)
        assert "Mixing, layer 3" in shown.text_content()
        assert "Moduleblocks.2.attn" in page.locator(".image-facts").text_content()
        assert "Attention" not in shown.text_content()
        assert "to see what moves it: there for the first 2 images" in page.locator(".looking-from").text_content()
        page.locator(".pane canvas").first.click(position={"x": 10, "y": 10})
        page.get_by_text("What moves the framed patch; no attention.").wait_for()
        assert "from row 1, column 1" in shown.text_content()
        page.keyboard.press("Escape")
        assert page.locator(".pane .legend canvas").count() == 1
        page.locator(".thumbs label").nth(2).click()
        assert page.locator(".pane .legend").text_content() == "Not measured for this image."
        told = "What moves each patch is there for the first 2 images, not for this one."
        assert told in page.locator(".looking-from").text_content()
        page.locator(".thumbs label").first.click()
        page.locator("#maps").get_by_label("Attention", exact=True).check(force=True)
        assert "Attention, layer 1" in shown.text_content()
        kinds = {(row[1], row[2], row[3]) for row in cells(page, "#layer-table-a")}
        assert ("blocks.1.attn", "mixing", "unit vectors") in kinds
        assert ("blocks.2.attn", "mixing", "removal") in kinds


def test_exact_readings_are_drawn(browser, looked):
    root, _, _ = looked
    with visit(browser, root / "both.html") as page:
        part = page.locator("#exact")
        assert part.locator(".exact-picture").count() == 8
        assert part.locator(".exact-picture").first.get_attribute("aria-label").startswith("Kernel, layer 2, all 32 channels: ")
        part.get_by_label("Frequency response by frequency", exact=True).check(force=True)
        assert part.locator("figure.chart").count() == 1
        part.get_by_label("Decay", exact=True).check(force=True)
        part.locator("#exact-decay .values > summary").click()
        assert [row[0] for row in cells(page, "#exact-decay")] == ["0", "1"]  # heads


def test_a_page_without_attention(browser, looked):
    root, _, _ = looked
    with visit(browser, root / "alone.html") as page:
        assert "Mixing, middle patch, layer 3" in page.locator(".pane figcaption").text_content()
        assert not page.locator("#glance").is_visible()
        assert page.locator("#indicators").get_by_text("Mixing places", exact=True).first.is_visible()
        assert not page.locator("#spectra").is_visible()


def test_rows_of_retention_reach_back_alone(looked):
    """Patches are read in raster order, and the prefix behind them."""
    _, both, _ = looked
    rows, columns = both.layers[-1]["grid"]
    for place in range(rows * columns):
        row = torch.from_numpy(both.query(0, 3, divmod(place, columns))).flatten()
        assert float(row[place + 1 :].sum()) == 0
        assert float(row[place]) > 0
