"""Data sets of Hugging Face on disk: decoded by us, classes by name, nothing fetched; and what is said without the package."""

import builtins
import pickle
from dataclasses import replace

import numpy as np
import pytest

from data import made
from vitreous.base.errors import DataError, VitreousError
from vitreous.data import open_data
from vitreous.data.views import of_file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A set of two splits with a damaged image, and a part of it without splits."""
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["zebra", "ant"])
    features = datasets.Features({"picture": datasets.Image(decode=False), "label": names})

    def part(start, count, bad=()):
        raw = [b"broken" if k in bad else made.picture(start + k) for k in range(count)]
        rows = {"picture": [{"bytes": r, "path": None} for r in raw], "label": [k % 2 for k in range(count)]}
        return datasets.Dataset.from_dict(rows, features=features).cast_column("picture", datasets.Image())

    root = tmp_path_factory.mktemp("hub")
    datasets.DatasetDict(train=part(0, 8, bad=[2]), validation=part(20, 4)).save_to_disk(root / "split")
    part(0, 20).save_to_disk(root / "whole")
    return root


def test_splits_and_classes_by_name(saved):
    data = open_data(f"hf:{saved / 'split'}")
    assert data.classes == ("ant", "zebra")
    assert data.train.labels.tolist() == [1, 0, 0, 1, 0, 1, 0]
    assert [(bad.file, bad.label, bad.reason) for bad in data.quarantined] == [("train/000002", "zebra", "not an image")]
    np.testing.assert_array_equal(np.asarray(data.tests["test"].image(3)), made.pixels(23))
    copied = pickle.loads(pickle.dumps(data.train))  # as for worker processes
    np.testing.assert_array_equal(np.asarray(copied.image(0)), made.pixels(0))


def test_the_sets_own_order_of_classes_is_said_where_ours_is_another(saved):
    assert "Class order: that of texts (ant, zebra, ...); the data set itself has zebra, ant, ...." in " ".join(
        open_data(f"hf:{saved / 'split'}").remarks
    )


def test_an_image_in_a_table_has_an_identity(saved):
    """Of its first bytes, as that of a file; none where the row has no image."""
    data = open_data(f"hf:{saved / 'whole'}")
    source = data.train.sources[0]
    assert of_file(source) == of_file(source.read_bytes())
    assert of_file(replace(source, table=[{"picture": None}], index=0)) == []


def test_one_table_is_split_by_content(saved):
    data = open_data(f"hf:{saved / 'whole'}")
    assert (len(data.train), len(data.tests["test"])) == (16, 4)


def test_what_is_no_saved_set(saved, tmp_path):
    for path, found in ((tmp_path, "cannot read"), (tmp_path / "none", "no folder")):
        with pytest.raises(DataError, match=found):
            open_data(f"hf:{path}")


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    plain = builtins.__import__

    def without(name, *rest, **more):
        if name == "datasets":
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(VitreousError, match=r'pip install "vitreous\[datasets\]"'):
        open_data(f"hf:{tmp_path}")
