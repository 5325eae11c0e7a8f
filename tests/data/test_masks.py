"""Foreground of mask files: by value, by class, by alpha; what is not clear is refused."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data import made
from vitreous.base.errors import DataError
from vitreous.data.masks import ALPHA_NOTE, CLASS_NOTE, GREY_NOTE, VOID_NOTE, decode_mask
from vitreous.data.validate import check_data

PLACES = np.array([[0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 3, 3, 3, 7, 0, 0], [0, 0, 3, 3, 3, 7, 2, 0], [0, 0, 0, 3, 7, 7, 2, 0]])
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 10, 10, 10, 20, 0, 0, 0, 0, 9, 255, 255, 255]  # as in PASCAL VOC


def saved(values, dtype=np.uint8, palette=None, **options):
    image = Image.fromarray(np.asarray(values, dtype))
    if palette:
        image = Image.fromarray(np.asarray(values, np.uint8), "L").convert("L")
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(palette)
    return made.encoded(image, **options)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 255]], [[False, True]]),
        ([[0, 1]], [[False, True]]),
        ([[0, 15]], [[False, True]]),  # below half, and foreground
        ([[100, 200]], [[False, True]]),
        ([[7, 7]], [[True, True]]),
        ([[0, 0]], [[False, False]]),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_of_two_values_the_larger_is_foreground(values, expected, dtype):
    assert decode_mask(saved(values, dtype), "m")[0].tolist() == expected


def test_indices_of_a_palette_are_classes_whatever_their_colours():
    mask, note = decode_mask(saved(PLACES, palette=PALETTE), "m")
    np.testing.assert_array_equal(mask, PLACES > 0)  # by brightness, classes 2 and 3 would be background
    assert note == CLASS_NOTE
    void = np.where(PLACES == 7, 255, PLACES)
    mask, note = decode_mask(saved(void, palette=PALETTE + [0, 0, 0] * 247 + [224, 224, 192]), "m")
    np.testing.assert_array_equal(mask, (PLACES > 0) & (PLACES != 7))
    assert note == VOID_NOTE


@pytest.mark.parametrize("palette", [None, "greys"])
def test_small_numbers_in_a_grey_picture_are_classes(palette):
    ramp = np.repeat(np.arange(256), 3).tolist() if palette else None
    values = np.tile(np.where(PLACES == 2, 255, PLACES), (2, 2))
    mask, note = decode_mask(saved(values, palette=ramp), "m")
    np.testing.assert_array_equal(mask, np.isin(values, (3, 7)))
    assert note == VOID_NOTE
    deep = saved(np.tile(PLACES, (2, 2)) * 1000, np.uint16)
    np.testing.assert_array_equal(decode_mask(deep, "m")[0], np.tile(PLACES, (2, 2)) > 0)


@pytest.mark.parametrize("ramp", [False, True])
def test_edges_of_a_drawn_shape_are_cut_at_half_and_never_taken_for_classes(ramp):
    large = Image.new("L", (160, 160))
    ImageDraw.Draw(large).ellipse((24, 40, 130, 120), fill=255)
    soft = large.resize((40, 40), Image.Resampling.BOX)
    raw = saved(np.asarray(soft), palette=np.repeat(np.arange(256), 3).tolist() if ramp else None)
    mask, note = decode_mask(raw, "m")
    assert note == GREY_NOTE
    assert mask[20, 20]
    assert mask.sum() == pytest.approx((np.asarray(large) > 0).mean() * 1600, rel=0.03)


def test_alpha_counts():
    """A cut-out photograph, and a white shape on transparent white."""
    shape = np.zeros((12, 16), np.uint8)
    shape[3:9, 4:12] = 255
    for colours in (made.pixels(5), np.full((12, 16, 3), 255, np.uint8)):
        cut = made.encoded(Image.fromarray(np.dstack([colours, shape])))
        mask, note = decode_mask(cut, "m")
        np.testing.assert_array_equal(mask, shape > 0)
        assert note == ALPHA_NOTE
    both = Image.fromarray(np.dstack([shape, np.full_like(shape, 255)]))
    np.testing.assert_array_equal(decode_mask(made.encoded(both), "m")[0], shape > 0)  # opaque: the greys say it
    keyed = Image.fromarray(np.where(shape > 0, 4, 1).astype(np.uint8), "L")
    np.testing.assert_array_equal(decode_mask(made.encoded(keyed, transparency=1), "m")[0], shape > 0)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (made.picture(3), "192 colours"),
        (made.picture(3, (64, 48), mode="L"), "values from .* may be classes or shades"),
        (saved([[1, 2]]), "2 values from 1 to 2"),
        (saved(np.tile([[0, 128, 128, 255]], (8, 8))), "3 values from 0 to 255"),
        (saved([[0, 1]], palette=[255, 255, 255, 0, 0, 0]), "index 0 is white"),
        (saved(np.array([[[0, 0, 0, 255], [255, 255, 255, 255], [9, 9, 9, 0]]])), "alpha and the black and white"),
    ],
    ids=["photograph", "greys", "two classes without a background", "trimap", "palette upside down", "alpha and greys"],
)
def test_what_is_not_clear_is_refused(raw, reason):
    with pytest.raises(DataError, match=rf"^Found the mask 'm.png', of which .*{reason}.*; expected two values.* Save it so"):
        decode_mask(raw, "m.png")


def test_a_colour_on_black_is_foreground_and_the_check_says_how_masks_were_read(tmp_path):
    red = np.zeros((12, 16, 3), np.uint8)
    red[2:7, 3:9, 0] = 40
    assert decode_mask(made.encoded(Image.fromarray(red)), "m")[0].sum() == 30
    classes = saved(np.kron(PLACES, np.ones((3, 2), int)), palette=PALETTE)
    masks = {"masks/train/cat/0.png": classes, "masks/train/cat/1.png": made.encoded(Image.new("L", (16, 12)))}
    findings = check_data(str(made.write(tmp_path, made.tree() | masks)))
    assert findings.notes == {CLASS_NOTE: 1}
    assert [(problem.kind, problem.file) for problem in findings.problems] == [("mask", "masks/train/cat/1.png")]
