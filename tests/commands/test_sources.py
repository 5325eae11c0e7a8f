"""Every kind of data from end to end: trained on, interrupted, resumed, looked at and predicted."""

from __future__ import annotations

import csv
import json
import os
import signal
import tarfile

import numpy as np
import pytest

from data import made
from data.sources.test_named import make_fashion
from train.conftest import SMALL
from train.interrupting import at_step, differing
from vitreous.commands.cli import main
from vitreous.lens.reading import read

TREE = made.tree(("train/cat", "train/dog", "val/cat", "val/dog"))
LABELS = {name: (name.split("/")[1], "test" if name.startswith("val") else "train") for name in TREE}


def folder(root):
    return made.write(root / "photos", TREE)


def one_folder(root):
    return made.write(root / "photos", made.tree(("1", "2", "10"), images=8))


def tar(root):
    with tarfile.open(root / "photos.tar.xz", "w:xz") as file:
        file.add(folder(root), "")
    return root / "photos.tar.xz"


def table(root, head="file,label,split", row="{},{},{}"):
    lines = [row.format(name, *LABELS[name], name.count("cat")) for name in TREE]
    (folder(root) / "photos.csv").write_text("\n".join([head, *lines]) + "\n")
    return root / "photos" / "photos.csv"


def table_of_several(root):
    return table(root, "file,split,label:cat,label:animal", "{0},{2},{3},1")


def hugging_face(root):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["dog", "cat"])
    rows = {part: {"image": [], "label": []} for part in ("train", "test")}
    for name, (label, part) in LABELS.items():
        rows[part]["image"].append({"bytes": TREE[name], "path": None})
        rows[part]["label"].append(names.str2int(label))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    parts = {part: datasets.Dataset.from_dict(columns, features=features) for part, columns in rows.items()}
    datasets.DatasetDict(parts).save_to_disk(root / "saved")
    return f"hf:{root / 'saved'}"


def fashion(root):
    make_fashion(root / "fashion")
    return root / "fashion"


def arrays(part, count):
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 10


def cifar_folder(root):
    path = root / "cifar-10-batches-bin"
    path.mkdir()
    (path / "batches.meta.txt").write_text("\n".join(f"class {k}" for k in range(10)))
    for number, name in enumerate(["test_batch", *(f"data_batch_{k}" for k in range(1, 6))]):
        images, labels = arrays(name, 4 + number)
        rows = np.concatenate([labels[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1)
        (path / f"{name}.bin").write_bytes(rows.tobytes())
    return path


def npz(root):
    values = {f"{axis}_{part}": array for part in ("train", "test") for axis, array in zip("xy", arrays(part, 10), strict=True)}
    np.savez(root / "set.npz", classes=[f"class {k}" for k in range(10)], **values)
    return root / "set.npz"


SOURCES = {
    "made scenes": lambda root: "cutouts:train=16,test=8,size=16",
    "a folder with parts": folder,
    "a folder of classes": one_folder,
    "an archive": tar,
    "a table": table,
    "a table of several classes": table_of_several,
    "hf": hugging_face,
    "idx files": fashion,
    "CIFAR's files": cifar_folder,
    "an npz": npz,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_from_end_to_end(tmp_path, monkeypatch, kind):
    source = str(SOURCES[kind](tmp_path))
    task = ["--task", "multi_label"] * ("several" in kind)
    shape = ["--image-size", "16", "--model-kwargs", *SMALL, "--batch-size", "4", "--epochs", "1", "--device", "cpu"]
    words = ["train", source, *task, *shape]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main([*words, "--out", str(tmp_path / "run")]) == 130
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert differing(tmp_path / "run", tmp_path / "whole") == []

    run = str(tmp_path / "run")
    pictures = made.write(tmp_path / "pictures", {f"{k}.png": made.picture(k) for k in range(2)})
    shown = [source] if kind in ("a folder with parts", "a folder of classes", "an archive") else [str(pictures)]
    assert (
        main(["look", run, *shown, "--limit", "2", "--noise", "0", "--device", "cpu", "--out", str(tmp_path / "reading")]) == 0
    )
    assert len(read(tmp_path / "reading").images) == 2
    assert main(["predict", run, *shown, "--device", "cpu", "--out", str(tmp_path / "predictions.csv")]) == 0
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == {"a folder of classes": 24}.get(kind, len(TREE) if shown == [source] else 2)
    classes = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["classes"]
    assert {row["predicted"] for row in rows} <= set(classes)
