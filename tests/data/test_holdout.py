"""Images set aside: by contents, in every class, the same whatever their order and names."""

import numpy as np
import pytest
from PIL import Image

from vitreous.base.errors import DataError
from vitreous.data import ArraySamples, Data, open_data
from vitreous.data.holdout import HELD_OUT, hold_out


def made(images, labels):
    train, test = ArraySamples(images, labels), ArraySamples(images[:2], labels[:2])
    classes = tuple(str(k) for k in range(max(labels) + 1))
    return Data("made", train, {"test": test}, classes, 1, images.shape[1:3], (0.5,), (0.5,))


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (60, 4, 4, 1), np.uint8)


def test_a_share_of_every_class_is_set_aside(pictures):
    labels = [0] * 30 + [1] * 20 + [2] * 10
    found = hold_out(made(pictures, labels), 0.2)
    assert np.bincount(found.tests[HELD_OUT].labels).tolist() == [6, 4, 2]
    assert np.bincount(found.train.labels).tolist() == [24, 16, 8]
    together = np.concatenate([found.train.images, found.tests[HELD_OUT].images])
    assert sorted(map(bytes, together)) == sorted(map(bytes, pictures))
    assert list(found.tests) == [HELD_OUT, "test"]


def test_order_does_not_matter(pictures):
    labels = np.array([0] * 30 + [1] * 30)
    order = np.random.default_rng(1).permutation(60)
    one, two = (hold_out(made(pictures[i], labels[i].tolist()), 0.1) for i in (np.arange(60), order))
    assert {bytes(x) for x in one.tests[HELD_OUT].images} == {bytes(x) for x in two.tests[HELD_OUT].images}


def test_progress_is_told(pictures):
    told = []
    hold_out(made(pictures, [0] * 60), 0.1, lambda done, of: told.append((done, of)))
    assert told == [(k + 1, 60) for k in range(60)]


def test_copies_stay_on_one_side(pictures):
    doubled = np.concatenate([pictures, pictures])
    found = hold_out(made(doubled, [0] * 120), 0.3)
    assert not {bytes(x) for x in found.train.images} & {bytes(x) for x in found.tests[HELD_OUT].images}
    assert len(found.tests[HELD_OUT]) == 36


def test_a_class_of_one_image_keeps_it(pictures):
    found = hold_out(made(pictures[:11], [0] * 10 + [1]), 0.5)
    assert np.bincount(found.train.labels).tolist() == [5, 1]
    with pytest.raises(DataError, match="two different images"):
        hold_out(made(pictures[:2], [0, 1]), 0.5)


def test_files_are_told_by_their_bytes_not_by_their_names(tmp_path, pictures):
    for name in ("a", "b"):
        for k, pixels in enumerate(pictures[:40]):
            part = "train" if k < 32 else "test"
            path = tmp_path / name / part / f"class{k % 2}" / (f"{k}.png" if name == "a" else f"z{97 - k}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(path)
    one, two = (hold_out(open_data(str(tmp_path / name)), 0.25) for name in "ab")
    aside = [{bytes(np.asarray(s.image(i))) for i in range(len(s))} for s in (one.tests[HELD_OUT], two.tests[HELD_OUT])]
    assert aside[0] == aside[1]
    assert len(aside[0]) == 8
