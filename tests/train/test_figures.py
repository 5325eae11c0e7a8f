"""Figures and tables of runs: arms by their settings, means and ranges by hand, and what a reading lacks."""

from __future__ import annotations

import csv
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vitreous.base.errors import DataError, SettingError
from vitreous.commands.compare import Compare
from vitreous.train.study.courses import EPOCH, LAYER, arms_of, courses, missing, run_folders

COLUMNS = ("layer", "head", "image", "source", "kind", "angular_alignment", "angular_alignment_paper", "spectral_entropy")


def make_run(folder, seed, graft=(), epochs=2, lr=0.1, entropy=None, readings=True):
    """A run folder; its alignment is seed + epoch + layer / 10 on average, its entropy `entropy` + layer."""
    (folder / "readings").mkdir(parents=True)
    settings = {"graft": list(graft), "lr": lr, "seed": seed, "out": str(folder), "model_kwargs": ["depth=2"]}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    lines = [
        {"epoch": e, "seconds": 2.0 + seed, "tests": {"test": {"accuracy": 0.1 * e + 0.01 * seed, "loss": 1.0}}}
        for e in range(1, epochs + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for epoch in range(epochs + 1 if readings else 0):
        reading = folder / "readings" / f"epoch-{epoch:03d}"
        reading.mkdir()
        with open(reading / "table.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for layer in (0, 1):
                for image, off in ((0, -0.5), (1, 0.5)):
                    aligned = seed + epoch + layer / 10 + off
                    writer.writerow([layer, 0, image, "attention", "token", aligned, 9 + aligned, ""])
                    writer.writerow([layer, 0, image, "attention", "effective", 99, 99, ""])
                writer.writerow([layer, 0, "", "weight", "token", "", "", 99])
                if entropy is not None:
                    writer.writerow([layer, 0, "", "learned", "token", "", "", entropy + layer])
    return folder


def test_arms_are_runs_of_equal_settings_but_the_seed(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "study" / f"a-seed-{seed}", seed)
        make_run(tmp_path / "study" / f"b-seed-{seed}", seed, ["svda", "spc:after=1"])
    make_run(tmp_path / "alone", 0, lr=0.2)
    runs = run_folders([tmp_path / "study", tmp_path / "alone", tmp_path / "study/a-seed-1"])
    arms = {name: [run.name for run in group] for name, group in arms_of(runs).items()}
    assert arms == {
        "plain, lr=0.1": ["a-seed-0", "a-seed-1"],
        "svda spc:after=1, lr=0.1": ["b-seed-0", "b-seed-1"],
        "plain, lr=0.2": ["alone"],
    }
    with pytest.raises(DataError, match=r"no run in .*nothing"):
        run_folders([tmp_path / "nothing"])


def test_means_and_ranges_by_hand(tmp_path):
    runs = [make_run(tmp_path / str(seed), seed, epochs=2 + seed) for seed in (0, 2)]
    of = courses(runs)
    accuracy = of["test accuracy %", EPOCH]
    assert list(accuracy) == [1, 2]  # epochs that both have
    assert [(round(one.mean, 6), round(one.low, 6), round(one.high, 6), one.runs) for one in accuracy.values()] == [
        (11, 10, 12, 2), (21, 20, 22, 2)
    ]  # fmt: skip
    assert of["seconds per epoch", EPOCH][1].mean == 3
    aligned = of["angular alignment (cosine)", EPOCH]
    assert [round(one.mean, 6) for one in aligned.values()] == [1.05, 2.05, 3.05]  # before training as well
    by_layer = of["angular alignment (cosine)", LAYER]  # of each run's last epoch, 2 and 4
    assert {layer: (round(one.low, 6), round(one.high, 6)) for layer, one in by_layer.items()} == {0: (2, 6), 1: (2.1, 6.1)}
    assert round(courses(runs, paper=True)["angular alignment (cosine), paper's form", EPOCH][0].mean, 6) == 10.05
    assert not any("spectral" in quantity for quantity, _ in of)  # weights have a spectrum, but it is not the learned one


def test_a_learned_spectrum_is_the_arms_that_has_one(tmp_path):
    arms = {"plain": [make_run(tmp_path / "a", 0)], "svda": [make_run(tmp_path / "b", 0, ["svda"], entropy=2.0)]}
    of = {name: courses(runs) for name, runs in arms.items()}
    key = ("spectral entropy (nats)", EPOCH)
    assert missing(of, key) == ["plain"]
    assert of["svda"][key][0].mean == 2.5
    assert [one.mean for one in of["svda"]["spectral entropy (nats)", LAYER].values()] == [2, 3]


def test_figures_and_tables_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        make_run(tmp_path / f"plain-{seed}", seed)
        make_run(tmp_path / f"svda-{seed}", seed, ["svda"], entropy=2.0)
    Compare(folders=(str(tmp_path),), figures=str(tmp_path / "out")).run()
    assert "training.svg" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "training.svg", "training.png", "indicators.svg", "indicators.png", "runs.md", "runs.csv"
    }  # fmt: skip
    svg = (tmp_path / "out/indicators.svg").read_text()
    text = " ".join(ElementTree.fromstring(svg).itertext())
    assert text.count("spectral entropy (nats)") == 2  # over epochs, and over layers
    assert len(re.findall("none in plain(?!,)", text)) == 2  # of the spectral entropy
    assert "nan" not in text.lower()
    pixels = np.asarray(Image.open(tmp_path / "out/training.png").convert("RGB"))
    assert {tuple(pixel) for pixel in pixels.reshape(-1, 3)} >= {(0, 114, 178), (213, 94, 0)}  # a line of each arm
    lines = list(csv.DictReader((tmp_path / "out/runs.csv").read_text().splitlines()))
    entropy = [line for line in lines if line["quantity"] == "spectral entropy (nats)" and line["over"] == LAYER]
    assert [(line["arm"], line["at"], line["mean"], line["runs"]) for line in entropy] == [
        ("svda", "0", "2", "2"), ("svda", "1", "3", "2")
    ]  # fmt: skip
    table = (tmp_path / "out/runs.md").read_text()
    assert "| plain | 2 | 20.5 (20 to 21) |" in table


def test_runs_with_nothing_to_show_and_mistaken_options(tmp_path):
    make_run(tmp_path / "begun", 0, epochs=0, readings=False)
    with pytest.raises(SettingError, match="no finished epoch in the runs of plain"):
        Compare(folders=(str(tmp_path),), figures=str(tmp_path / "out")).run()
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingError, match="1 folders without --figures"):
        Compare(folders=("a",)).run()
    with pytest.raises(SettingError, match="--out and --figures"):
        Compare(folders=("a",), figures="b", out="c").run()
