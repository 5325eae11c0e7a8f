"""What goes into a page comes out of it: maps within their step, numbers, names; and nothing that can do harm."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitreous.report import packing


def unpacked(text: str, height: int, width: int) -> np.ndarray:
    """The values as the page's script reads them, written anew: low + byte / 254 * (high - low), byte 255 is nothing."""
    data = base64.b64decode(text)
    count = len(data) // (8 + height * width)
    ranges = np.frombuffer(data[: 8 * count], "<f4").reshape(count, 2).astype(float)
    cells = np.frombuffer(data[8 * count :], np.uint8).reshape(count, height, width).astype(float)
    values = ranges[:, :1, None] + cells / 254 * (ranges[:, 1:, None] - ranges[:, :1, None])
    return np.where(cells == 255, np.nan, values)


@pytest.mark.parametrize("signed", [False, True])
def test_maps_come_back_within_half_a_step(signed):
    maps = np.random.default_rng(0).normal(0.3, 2, (5, 3, 4, 6)) * np.logspace(-6, 3, 5)[:, None, None, None]
    found = unpacked(packing.quantised(maps, signed), 4, 6).reshape(maps.shape)
    most = np.abs(maps).max(axis=(-2, -1), keepdims=True)
    span = 2 * most if signed else np.ptp(maps, axis=(-2, -1), keepdims=True)
    assert (np.abs(found - maps) <= span / 508 * (1 + 1e-3)).all()


def test_zero_of_a_signed_map_is_exact():
    found = unpacked(packing.quantised(np.array([[[-0.3, 0.0], [0.1, 0.7]], [[0.0, 0.0], [0.0, 0.0]]]), True), 2, 2)
    assert found[0, 0, 1] == 0
    assert (found[1] == 0).all()


def test_a_constant_map_and_missing_places_survive():
    maps = np.array([[[2.5, 2.5]], [[np.nan, 1.0]], [[np.nan, np.nan]], [[np.inf, 4.0]]])
    found = unpacked(packing.quantised(maps, False), 1, 2)
    np.testing.assert_allclose(found[0], 2.5)
    np.testing.assert_array_equal(np.isnan(found[1:, 0]), [[True, False], [True, True], [True, False]])


def test_half_precision_is_read():
    maps = np.array([[[6e-5, 0.25]]], np.float16)
    np.testing.assert_allclose(unpacked(packing.quantised(maps, False), 1, 2), maps, atol=1e-3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.123456789, 0.12346),
        (3.0, 3),
        (-0.0, 0),
        (12, 12),
        (1e300, 1e300),
        (float("nan"), None),
        (float("inf"), None),
        (None, None),
    ],
)
def test_numbers_are_short_and_finite(value, expected):
    assert packing.number(value) == expected
    json.dumps(packing.number(value), allow_nan=False)


@given(st.text(), st.text())
def test_what_cannot_be_seen_is_written_out_and_names_stay_apart(one, other):
    shown = packing.legible(one)
    assert not packing.INVISIBLE.search(shown.replace("\\\\", "").replace("\\", ""))
    assert (shown == packing.legible(other)) == (one == other) or "␠" in one + other


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat.jpg", "cat.jpg"),
        ("cat.jpg ", "cat.jpg␠"),
        ("  ", "␠␠"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),
        ("a\\x1b", "a\\\\x1b"),
        ("C:\\photos", "C:\\photos"),
        ("\udcff.jpg", "\\udcff.jpg"),
        ("line\u2028break", "line\\u2028break"),
        ("Müller 猫.png", "Müller 猫.png"),
    ],
)
def test_legible(name, expected):
    assert packing.legible(name) == expected
    assert packing.legible({name: [name, 1, None]}) == {expected: [expected, 1, None]}


@given(st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_in_a_script_is_the_same_value_and_cannot_leave_it(value):
    text = packing.script_json(value)
    assert json.loads(text) == value
    assert re.fullmatch(r"[\x20-\x7e]*", text)
    assert not set(text) & set("<>&")


def test_only_pictures_become_pictures():
    data = io.BytesIO()
    Image.new("RGB", (2, 2)).save(data, "PNG")
    assert packing.picture(data.getvalue()).startswith("data:image/png;base64,")
    assert packing.picture(b"<svg onload='hit()'>") == ""
    assert packing.picture(b"") == ""
