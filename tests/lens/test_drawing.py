"""Readings in Python: pictures of maps, what they say of themselves, and how a notebook shows them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from lens.explicit import pixels, vit
from vitreous.base.errors import SettingError, UnknownName
from vitreous.lens import drawing
from vitreous.lens.look import look
from vitreous.lens.reading import read


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A reading with a title that is no HTML, and rows of patches; and the same from its folder."""
    folder, probes = tmp_path_factory.mktemp("drawing") / "out", ["all", "relevance"]
    about = {"name": "<b>mine</b>", "weights": "random"}
    reading = look(vit(), pixels(6), probes=probes, noise=0, query_budget=1, about=about, out=folder)
    return reading, read(folder)


def cells(picture: Image.Image) -> np.ndarray:
    """The colour in the middle of each of 4 x 6 patches."""
    return np.asarray(picture)[20::40, 20::40].astype(int)


def stops(scale: str) -> np.ndarray:
    return np.array([list(bytes.fromhex(stop)) for stop in scale.split()])


def test_a_map_covers_its_picture_from_dark_to_light(looked):
    for reading in looked:
        values, shown = reading.maps["attention", 1, 0][2], cells(reading.show("attention", 2, 1, 0, opacity=1))
        low, high = (np.unravel_index(at(values), values.shape) for at in (np.argmin, np.argmax))
        np.testing.assert_array_equal(shown[low], stops(drawing.PLAIN)[0])
        np.testing.assert_array_equal(shown[high], stops(drawing.PLAIN)[-1])
        order = np.argsort(values.ravel())
        share = (values.ravel()[order] - values.min()) / (values.max() - values.min())
        expected = [[np.interp(x, np.linspace(0, 1, 9), stops(drawing.PLAIN)[:, c]) for c in range(3)] for x in share]
        np.testing.assert_allclose(shown.reshape(-1, 3)[order], expected, atol=0.51)
        assert reading.show("attention", 2, 1, 0, opacity=1).size == (240, 160)  # of 24 x 16


def test_opacity_goes_from_picture_to_map(looked):
    reading = looked[0]
    none, half, full = (np.asarray(reading.show("attention", opacity=opacity)).astype(int) for opacity in (0, 0.5, 1))
    np.testing.assert_array_equal(none, np.asarray(drawing.picture(reading, 0)))
    np.testing.assert_allclose(half, (none + full) / 2, atol=1)


def test_zero_of_a_signed_map_is_white_and_an_unknown_sign_has_colours_of_its_own(looked):
    values = np.array([[-2.0, 0.0, 1.0, np.nan]])
    shown = drawing.colours(values, drawing.SIGNED, True)[0]
    np.testing.assert_array_equal(shown[[0, 1]], stops(drawing.SIGNED)[[0, 4]])
    np.testing.assert_array_equal(shown[2], stops(drawing.SIGNED)[6])
    assert shown[3].tolist() == [128] * 3
    assert (drawing.colours(np.zeros((2, 2)), drawing.SIGNED, True) == 0xF5).all()
    reading = looked[0]
    for image, confidence in enumerate(reading.maps.confidence("u1", 2)):
        values = reading.maps["u1", 2][image]
        largest = np.unravel_index(np.abs(values).argmax(), values.shape)
        scale = drawing.SIGNED if confidence >= 0.95 else drawing.UNSIGNED
        expected = stops(scale)[0 if values[largest] < 0 else -1]
        np.testing.assert_array_equal(cells(reading.show("u1", image, 2, opacity=1))[largest], expected)


def test_the_best_map_of_the_last_layer_is_meant(looked):
    reading = looked[0]
    same = [(reading.show(), reading.show("relevance")), (reading.show("attention", 1), reading.show("attention", 1, 2))]
    for a, b in same:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert not np.array_equal(np.asarray(reading.show("relevance")), np.asarray(reading.show("attention")))


def test_what_a_patch_looks_at_is_shown_with_the_patch_outlined(looked):
    reading = looked[0]
    shown = np.asarray(reading.show(image=1, layer=1, head=1, patch=(2, 3), opacity=1)).astype(int)
    expected = drawing.colours(reading.query(1, 1, (2, 3), 1), drawing.PLAIN, False)
    white = (shown == 255).all(-1)
    outline = np.zeros_like(white)
    outline[80:120, 120:160] = True
    outline[82:118, 122:158] = False
    np.testing.assert_array_equal(white, outline)
    np.testing.assert_array_equal(shown[20::40, 20::40], expected)


def test_what_is_not_there_is_said(looked):
    reading = looked[0]
    with pytest.raises(UnknownName, match="'u9 2'"):
        reading.show("u9", layer=2)
    with pytest.raises(SettingError, match="image 6 of 6"):
        reading.show(image=6)
    with pytest.raises(SettingError, match="opacity=2"):
        reading.show(opacity=2)
    with pytest.raises(SettingError, match="Found head 5"):
        reading.show("attention", head=5)


def test_a_reading_says_what_it_holds_and_what_was_not_verified(looked):
    for reading in looked:
        text = repr(reading)
        assert text.startswith("Reading of <b>mine</b>\n  6 images, 3 attentions of 2 heads on grids of 4x6\n")
        for part in ("attention (3)", "relevance", "attention_entropy", "weights: random"):
            assert part in text
        assert "not verified" not in text
    spoiled = look(vit(), pixels(2), probes="attention_maps", noise=0)
    spoiled.facts["refused"] = [{"name": f"blocks.{i}", "reason": "its map is off"} for i in range(4)]
    spoiled.facts["notes"] = ["Something else."]
    assert "not verified, and left out: blocks.0: its map is off" in repr(spoiled)
    assert "; 1 more\n  note: Something else." in repr(spoiled)


def test_a_notebook_shows_pictures_and_the_same_words(looked):
    for reading in looked:
        html = reading._repr_html_()
        assert html.count('<img src="data:image/png;base64,') == 4
        assert "<b>" not in html
        assert "&lt;b&gt;mine" in html
        assert "Relevance for a class" in html
        assert re.search(r"<li>6 images, 3 attentions", html)
    nothing = look(vit(), pixels(1), probes="rank_collapse", noise=0)
    assert "<img" not in nothing._repr_html_()
    assert "maps, with how many layers: none" in repr(nothing)
