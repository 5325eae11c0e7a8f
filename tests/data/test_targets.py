"""Targets: their values, strata, parts and batches, and the check that a task's data carries them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from vitreous.base.errors import DataError
from vitreous.data import (
    ArraySamples,
    ClassIndex,
    ClassSet,
    Cutouts,
    Mask,
    NoTarget,
    Picture,
    PictureSamples,
    check_target,
    open_data,
)
from vitreous.data.holdout import hold_out

NAN = float("nan")
SETS = [[1, 0, 0], [1, 1, 0], [1, 0, NAN], [0, 0, 0], [NAN, 0, 1]]
TARGETS = {
    "class index": ClassIndex([2, 0, 1, 1, 0]),
    "class set": ClassSet(SETS),
    "mask": Mask([np.full((2, 3), i) for i in range(5)]),
    "picture": Picture([np.full((2, 3, 3), 51 * i, np.uint8) for i in range(5)]),
    "no target": NoTarget(5),
}
SHAPES = {
    "class index": ((2,), torch.int64),
    "class set": ((2, 3), torch.float32),
    "mask": ((2, 2, 3), torch.int64),
    "picture": ((2, 3, 2, 3), torch.float32),
    "no target": ((2, 0), torch.float32),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_batch_of_a_part_is_the_batch_of_the_whole(name):
    target = TARGETS[name]
    batch = target.take([3, 1])
    assert (batch.shape, batch.dtype) == SHAPES[name]
    part = target.subset(np.array([4, 3, 1]))
    assert (type(part), len(part)) == (type(target), 3)
    assert torch.equal(part.take([1, 2]), batch)
    assert (target.strata().shape, target.strata().dtype) == ((5,), np.int64)
    assert len(target.take([])) == 0


def test_values_of_a_batch():
    assert TARGETS["class index"].take([0, 2]).tolist() == [2, 1]
    assert TARGETS["class index"][0] == 2
    assert TARGETS["class set"].take([4]).nan_to_num(-1).tolist() == [[-1, 0, 1]]
    assert TARGETS["mask"].take([4]).unique().tolist() == [4]
    assert TARGETS["picture"].take([5 - 1, 0])[:, 0, 0, 0].tolist() == pytest.approx([0.8, 0])


def test_a_target_is_frozen():
    with pytest.raises(FrozenInstanceError):
        TARGETS["class index"].values = np.zeros(5)


def test_the_stratum_of_a_class_set_is_its_rarest_class():
    # class 0 is in three samples, classes 1 and 2 in one each; the fourth sample has none
    assert ClassSet(SETS).strata().tolist() == [0, 1, 0, 3, 2]


def test_a_class_set_holds_nothing_but_present_absent_and_unknown():
    for wrong in ([[0.5, 1]], [0, 1], np.empty((3, 0))):
        with pytest.raises(DataError, match="Expected a matrix"):
            ClassSet(wrong)


def test_classes_in_words():
    assert ClassIndex([1]).class_text(0, ["cat", "dog"]) == "dog"
    assert ClassSet(SETS).class_text(1, ["cat", "dog", "cow"]) == "cat+dog"
    assert NoTarget(3).class_text(0, []) == ""


def test_records_tell_targets_apart():
    assert ClassIndex([3, 1]).record(0) == "3"
    assert ClassSet(SETS).record(4) == "nan 0 1"
    assert ClassIndex([3, 1]).content() == np.array([3, 1], np.int64).tobytes()  # as run folders hold it
    assert len({target.content() for target in TARGETS.values()}) == len(TARGETS)


def test_samples_of_any_target():
    images = np.zeros((5, 4, 4, 3), np.uint8)
    for name, target in TARGETS.items():
        part = ArraySamples(images, target).subset([1, 0])
        assert len(part) == 2
        assert torch.equal(part.target.take([0]), target.take([1]))
        assert part.labels.tolist() == ([0, 2] if name == "class index" else [-1, -1])
    assert ArraySamples(images, [0, 1, 0, 1, 0])[1][1] == 1
    with pytest.raises(DataError, match="one label per image"):
        ArraySamples(images, NoTarget(4))


def test_images_without_a_label_have_no_target():
    samples = PictureSamples([Cutouts(1).image(0)])
    assert isinstance(samples.target, NoTarget)
    assert samples.labels.tolist() == [-1]


def test_a_task_is_refused_data_with_another_target():
    data = open_data("cutouts:size=16,classes=2,train=8,test=4")
    check_target(data, ClassIndex, "classification")
    check_target(data, NoTarget, "masked_autoencoder")
    with pytest.raises(DataError, match=r"'cutouts', whose train images have one class each. Expected a set of classes.*multi"):
        check_target(data, ClassSet, "multi_label")
    mixed = replace(data, tests={"test": ArraySamples(data.train.images[:4], ClassSet([[1, 0]] * 4))})
    with pytest.raises(DataError, match="whose test images have a set of classes"):
        check_target(mixed, ClassIndex, "classification")


def test_class_sets_are_limited_and_held_out_by_their_rarest_class():
    made = Cutouts(40, size=16, classes=2)
    rare = np.arange(40) % 10 == 0  # 4 of 40, each of class 0 as well
    sets = ClassSet(np.stack([np.ones(40), rare], 1))
    data = replace(open_data("cutouts:size=16,classes=2,train=8,test=4"), train=ArraySamples(made.images, sets))
    assert data.limited(8).train.target.values.sum(0).tolist() == [8, 4]
    held = hold_out(data, 0.25)
    assert held.tests["held-out"].target.values.sum(0).tolist() == [10, 1]
    assert held.train.target.values.sum(0).tolist() == [30, 3]
