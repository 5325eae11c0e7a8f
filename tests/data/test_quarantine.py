"""A corpus of damaged and unusual files: what can be read is converted as promised, the rest is left out, with a reason."""

import os
import random
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data import made
from vitreous.base.errors import DataError
from vitreous.data import open_data
from vitreous.data.decoding import FORMATS, PIXELS, Unreadable, decode
from vitreous.data.problems import cell, shown
from vitreous.data.quarantine import COLUMNS, Quarantined, examine, lines

JPEG = made.picture(3, (64, 48), kind="JPEG")
BAD = {
    "cut.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "cut.png": (made.picture(3, (64, 48))[:2000], ""),
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"<html>404</html>", "not an image"),
    "bomb.png": (made.bomb(), "pixels"),
    "large.png": (made.bomb(8_001), f"the limit is {PIXELS:,} in all"),
    "thin.png": (made.picture(4, (1, 300)), "times as long as wide"),
    "script.png": (b"<svg onload=alert(1)>", "not an image"),
    "pickle.png": (b"cos\nsystem\n(S'touch executed'\ntR.", "not an image"),
    "deep.tif": (made.encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "32 bits"),
}
GOOD = {
    "animated.gif": (made.animated(5), "animated, first frame taken"),
    "cmyk.jpg": (made.picture(6, mode="CMYK", kind="JPEG"), "CMYK, converted"),
    "sixteen.png": (made.sixteen_bits(7), "16 bits, upper 8 kept"),
    "palette.png": (made.picture(8, mode="P"), "palette, converted"),
    "alpha.png": (made.picture(9, mode="RGBA"), "transparent, alpha dropped"),
    "turned.jpg": (made.turned(10), "turned as EXIF says"),
    "misnamed.jpg": (made.picture(11), "PNG under another suffix"),
    "one.png": (made.picture(12, (1, 1)), None),
    "long.png": (made.picture(13, (150, 1)), None),
}


def corpus(root):
    files = made.tree()
    files |= {f"train/cat/{name}": raw for name, (raw, _) in (BAD | GOOD).items()}
    return made.write(root, files)


def test_a_folder_of_every_fault_is_survived(tmp_path):
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    data = open_data(str(corpus(tmp_path / "photos")))
    assert {bad.file for bad in data.quarantined} == {f"train/cat/{name}" for name in BAD}
    for bad in data.quarantined:
        assert (bad.label, bad.split) == ("cat", "train")
        assert BAD[bad.file.rpartition("/")[2]][1] in bad.reason
    assert {f"train/cat/{name}" for name in GOOD} < set(data.train.names)
    assert len(data.train) == 8 + len(GOOD)
    for i in range(len(data.train)):  # what is left can be read
        assert data.train.image(i).mode == "RGB"
    said = " ".join(data.remarks)
    assert f"{len(BAD)} of {16 + len(BAD) + len(GOOD)} images" in said
    assert f"train cat {len(BAD)} of {4 + len(BAD) + len(GOOD)}" in said
    for _, note in GOOD.values():
        assert note is None or note in said
    assert "2 palette, converted" in said  # a GIF has one too
    assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == (limit, filters)  # no global switch was touched
    assert not (tmp_path / "executed").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_strict_stops_and_names_the_first(tmp_path):
    with pytest.raises(DataError, match=rf"Found {len(BAD)} of .* the first 'train/cat/bomb.png' .*strict"):
        open_data(str(corpus(tmp_path)), strict=True)


@pytest.mark.parametrize("name", GOOD)
def test_sizes_and_pixels_are_those_of_decoding(name):
    raw = GOOD[name][0]
    quick, whole = (examine({name: raw}, pixels=pixels)[name] for pixels in (False, True))
    assert quick.size == whole.size == decode(raw, name, 3).size
    assert (quick.notes, quick.contents) == (whole.notes, whole.contents)


def test_the_quick_look_agrees_with_decoding_on_damaged_files():
    """Bytes changed, taken out and cut off at random, in every format: no other exception, and the same verdict."""
    draw, files = random.Random(0), {}
    for kind in FORMATS:
        raw = made.picture(20, (40, 30), kind=kind)
        for k in range(40):
            broken = bytearray(raw)
            for _ in range(draw.randint(1, 6)):
                broken[draw.randrange(len(broken) if k % 2 else 60)] = draw.randrange(256)
            files[f"{k}.{kind}"] = bytes(broken[: draw.randint(1, len(broken))] if k % 4 == 0 else broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = examine(files)
        for name, raw in files.items():
            try:
                decode(raw, name, 3)
                assert not found[name].reason
            except Unreadable as error:
                assert bool(found[name].reason) == bool(error.reason) == True  # noqa: E712
    assert {bool(one.reason) for one in found.values()} == {True, False}


def test_what_is_no_plain_file_is_quarantined_and_keeps_nobody_waiting(tmp_path):
    made.write(tmp_path, made.tree())
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    os.symlink("/dev/zero", tmp_path / "train/cat/zero.png")
    os.symlink(tmp_path / "nowhere", tmp_path / "train/cat/gone.png")
    data = open_data(str(tmp_path))
    reasons = {bad.file.rpartition("/")[2]: bad.reason for bad in data.quarantined}
    assert reasons == {
        "gone.png": "no such file or directory", "pipe.png": "not a plain file", "zero.png": "not a plain file",
    }  # fmt: skip


def test_a_class_of_which_nothing_is_left_is_refused(tmp_path):
    files = made.tree() | {f"train/eel/{k}.png": b"" for k in range(2)} | {"val/eel/0.png": made.picture(70)}
    with pytest.raises(DataError, match=r"no image that can be read of 'eel' to train on, such as 'train/eel/0.png'"):
        open_data(str(made.write(tmp_path, files)))


def test_the_same_files_give_the_same_sets_and_bad_ones_do_not_move_the_split(tmp_path):
    good = made.tree(("cat", "dog"), images=20)
    plain = open_data(str(made.write(tmp_path / "a", good)))
    some = open_data(str(made.write(tmp_path / "b", good | {"cat/bad.png": b"", "dog/bad.jpg": JPEG[:300]})))
    again = open_data(str(tmp_path / "b"))
    assert some.train.names == again.train.names == plain.train.names
    assert some.tests["test"].names == plain.tests["test"].names
    assert [bad.split for bad in some.quarantined] == ["", ""]


def test_progress_is_told(tmp_path):
    told = []
    open_data(str(made.write(tmp_path, made.tree())), progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (16, 16)


def test_names_do_no_harm_in_a_table_or_on_a_terminal():
    assert shown("caf\udce9 \x1b[31m\u202e\\n\n") == r"caf\udce9 \x1b[31m\u202e\\n\n"
    assert shown("Kätzchen <b>") == "Kätzchen <b>"
    assert [cell(text) for text in ("=cmd|'/C calc'!A0", "+1", "-1", "@x", " =1", "a=1")] == [
        "'=cmd|'/C calc'!A0", "'+1", "'-1", "'@x", "' =1", "a=1",
    ]  # fmt: skip
    bad = Quarantined("train/=1/\x1b]0;x\x07.png", "=1", "train", "why")
    assert bad.cells() == (r"train/=1/\x1b]0;x\x07.png", "'=1", "train", "why")
    assert len(bad.cells()) == len(COLUMNS)
    assert not any("\x1b" in line for line in lines([bad], Counter({("train", "=1"): 3})))
