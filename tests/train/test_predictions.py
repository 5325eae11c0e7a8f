"""What a run says of single photographs and classes: files, names, pictures, and the loss along an epoch."""

import csv
import io
import json

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from data.made import tree, write
from train.conftest import SMALL
from vitreous.base.statistics import wilson
from vitreous.train import train
from vitreous.train.engine.resume import resume
from vitreous.train.engine.session import SPANS, Progress
from vitreous.train.records import predictions
from vitreous.train.records.run_folder import read_metrics, read_table


@pytest.fixture
def run(settings, quiet, tmp_path):
    """A run on photographs in folders `=cat` (a formula to a spreadsheet) and `dog`."""
    files = {name.replace("cat/", "=cat/"): data for name, data in tree().items()}
    photos = write(tmp_path / "photos", files)
    return train(settings(data=str(photos), image_size=16, epochs=1, batch_size=4, model_kwargs=SMALL), quiet)


def test_each_row_has_its_file_and_the_names_of_its_classes(run):
    manifest = {row["name"]: row["label"] for row in read_table(run / "manifest.csv") if row["set"] == "test"}
    classes = json.loads((run / "config.json").read_text())["label_names"]
    rows = read_table(run / "predictions.csv")
    assert rows
    for row in rows:
        assert manifest[row["file"].removeprefix("'")] == row["label"]
        for column in ("label", "predicted"):
            assert row[f"{column}_class"].removeprefix("'") == classes[int(row[column])]
            assert not row[f"{column}_class"].startswith("=")


def test_each_class_has_its_accuracy_with_wilsons_interval(run):
    rows = [row for row in read_table(run / "predictions.csv") if row["set"] == "test"]
    table = [row for row in read_table(run / "classes.csv") if row["set"] == "test"]
    assert [row["class"] for row in table] == [str(k) for k in range(len(table))]
    for row in table:
        of_class = [one["label"] == one["predicted"] for one in rows if one["label"] == row["class"]]
        assert (int(row["images"]), int(row["correct"])) == (len(of_class), sum(of_class))
        if not of_class:
            assert row["accuracy"] == row["low"] == row["high"] == ""
            continue
        numbers = [float(row[name]) for name in ("accuracy", "low", "high")]
        assert numbers == pytest.approx([sum(of_class) / len(of_class), *wilson(sum(of_class), len(of_class))])


def test_wrong_answers_have_pictures_the_surest_first_and_few(settings, quiet, monkeypatch):
    monkeypatch.setattr(predictions, "PICTURES", 5)
    folder = train(settings(epochs=1), quiet)
    pictures = safetensors.numpy.load_file(folder / "mistakes.safetensors")
    for name in ("test", "swapped"):
        rows = [row for row in read_table(folder / "predictions.csv") if row["set"] == name]
        wrong = [row for row in rows if row["label"] != row["predicted"]]
        surest = sorted(wrong, key=lambda row: -float(row["probability"]))[:5]
        assert {key for key in pictures if key.startswith(f"{name}/")} == {f"{name}/{row['index']}" for row in surest}
    for data in pictures.values():
        assert len(data) < 8_000
        assert max(Image.open(io.BytesIO(data.tobytes())).size) <= predictions.SIDE


def test_a_run_that_was_killed_before_its_pictures_makes_them(settings, quiet, monkeypatch, tmp_path):
    whole = train(settings(epochs=1), quiet)
    monkeypatch.setattr("vitreous.train.engine.loop.write_mistakes", lambda run, session: 1 / 0)
    folder = tmp_path / "killed"
    with pytest.raises(ZeroDivisionError):
        train(settings(epochs=1, out=str(folder)), quiet)
    monkeypatch.undo()
    assert not (folder / "mistakes.safetensors").exists()
    resume(folder, console=quiet)
    assert (folder / "mistakes.safetensors").read_bytes() == (whole / "mistakes.safetensors").read_bytes()


def test_sets_of_classes_have_names_and_average_precision(settings, quiet, tmp_path):
    rng, lines = np.random.default_rng(0), ["file,split,label:red,label:blue"]
    for i in range(24):
        red, blue = i % 2, i // 2 % 2
        pixels = rng.integers(0, 90, (16, 16, 3)).astype(np.uint8)
        pixels[..., 0] += 150 * red
        pixels[..., 2] += 150 * blue
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'test' if i >= 16 else 'train'},{red},{blue}")
    (tmp_path / "images.csv").write_text("\n".join(lines) + "\n")
    folder = train(settings(data=str(tmp_path / "images.csv"), task="multi_label", image_size=16, batch_size=8), quiet)
    rows = read_table(folder / "predictions.csv")
    names = {"": "", "0": "red", "1": "blue", "0 1": "red; blue"}
    assert [row["present_class"] for row in rows] == [names[row["present"]] for row in rows]
    assert [row["file"] for row in rows] == [f"{i}.png" for i in sorted(range(16, 24), key=lambda i: f"{i}.png")]
    table = read_table(folder / "classes.csv")
    assert [(row["name"], row["images"], row["present"]) for row in table] == [("red", "8", "4"), ("blue", "8", "4")]
    mean = np.mean([float(row["average_precision"]) for row in table])
    assert read_metrics(folder)[-1]["tests"]["test"]["mean_average_precision"] == pytest.approx(mean)
    wrong = sorted((row for row in rows if row["wrong"]), key=lambda row: -float(row["loss"]))
    assert [set(row["wrong"].split()) for row in rows] == [
        set(row["present"].split()) ^ set(row["predicted"].split()) for row in rows
    ]
    if wrong:
        assert set(safetensors.numpy.load_file(folder / "mistakes.safetensors")) == {f"test/{row['index']}" for row in wrong}


def test_the_loss_along_an_epoch_is_that_of_its_steps(settings, quiet):
    lines = read_metrics(train(settings(), quiet))
    assert [[update for update, _ in line["loss_by_update"]] for line in lines] == [[1, 2, 3], [4, 5, 6]]
    for line in lines:  # batches of 16, 16 and 8 images
        losses = [loss for _, loss in line["loss_by_update"]]
        assert np.average(losses, weights=[16, 16, 8]) == pytest.approx(line["losses"]["total"], rel=1e-6)


def test_a_long_epoch_has_few_spans_of_equal_length():
    progress = Progress(updates=1000)
    for step in range(1003):
        progress.add_to_curve(float(step), 2, 1003)
        progress.updates, progress.step = progress.updates + 1, step + 1
    assert len(progress.curve) == SPANS
    assert progress.curve[-1][0] == 2003
    sizes = [weight / 2 for _, _, weight in progress.curve]
    assert sum(sizes) == 1003
    assert {50, 51} == set(sizes)
    assert sum(total for _, total, _ in progress.curve) == 2 * sum(range(1003))


def test_the_tables_are_tables(run):
    for name in ("predictions.csv", "classes.csv"):
        with open(run / name, encoding="utf-8", newline="") as file:
            assert len({len(row) for row in csv.reader(file)}) == 1
