"""Stopping early: the best weights are kept, a resumed run stops where the whole one does, the summary is honest."""

import json
from pathlib import Path

import pytest
import torch

from train.interrupting import ENTRY, Moments, differing, in_child
from vitreous.base.metrics import CLASSIFICATION, Metric
from vitreous.tasks.classification import ClassificationObjective
from vitreous.train import load, train
from vitreous.train.engine import early_stopping
from vitreous.train.engine.resume import resume
from vitreous.train.records.run_folder import read_metrics, read_table

ACCURACY = CLASSIFICATION[0]


def lines(*accuracies, names=("test",)):
    return [{"epoch": k, "tests": {name: {"accuracy": value} for name in names}} for k, value in enumerate(accuracies, 1)]


@pytest.mark.parametrize(
    ("accuracies", "patient", "best", "done"),
    [
        ((0.5,), 1, 1, False),
        ((0.5, 0.5), 1, 1, True),  # equal is no better
        ((0.5, 0.6), 1, 2, False),
        ((0.5, 0.4, 0.6, 0.1), 2, 3, False),
        ((0.5, 0.4, 0.6, 0.1, 0.6), 2, 3, True),
        ((0.5, 0.4, 0.3), None, 3, False),
    ],
)
def test_when_to_stop_and_what_to_keep(accuracies, patient, best, done):
    found = lines(*accuracies)
    assert early_stopping.to_keep(found, patient, ACCURACY)["epoch"] == best
    assert early_stopping.exhausted(found, patient, ACCURACY) == done
    assert early_stopping.finished(found, 9, patient, ACCURACY) == done
    assert early_stopping.finished(found, len(found), patient, ACCURACY)


def test_lower_is_better_where_the_metric_says_so():
    error = Metric("accuracy", "px", "lower", "error")
    found = lines(0.5, 0.4, 0.4, 0.6)
    assert early_stopping.to_keep(found, 2, error)["epoch"] == 2
    assert early_stopping.exhausted(found, 2, error)
    assert "no better error on `test` for 2 epochs" in early_stopping.why(found, 9, 2, error)


def test_what_is_watched():
    assert early_stopping.watched(["test", "swapped"]) == "test"
    assert early_stopping.watched(["test", "val"]) == "val"
    assert early_stopping.watched(["held-out", "test", "val"]) == "held-out"
    assert "had no part" in early_stopping.why(lines(0.5, names=("test", "val")), 9, 2, ACCURACY)
    assert "flattered" in early_stopping.why(lines(0.5), 9, 2, ACCURACY)
    assert "none was picked" in early_stopping.why(lines(0.5), 9, None, ACCURACY)


@pytest.fixture
def falling(monkeypatch):
    """Accuracy on the held-out images as told, epoch by epoch, the rest as it is."""
    given = [0.3, 0.6, 0.5, 0.4, 0.9, 0.9]
    real = ClassificationObjective.score

    def told(objective, outputs):
        found = real(objective, outputs)
        if len(outputs["target"]) == 6:  # those held out, one a class
            found["accuracy"] = given[told.session.progress.epoch - 1]
        return found

    prepare = ENTRY.prepare
    monkeypatch.setattr(ENTRY, "prepare", lambda *args: setattr(told, "session", prepare(*args)) or told.session)
    monkeypatch.setattr("vitreous.train.engine.resume.prepare", ENTRY.prepare)
    monkeypatch.setattr(ClassificationObjective, "score", told)


RUN = dict(epochs=6, patience=2, hold_out=0.1, lr=3e-3)


def test_the_best_epoch_is_kept_and_the_summary_says_why_it_stopped(settings, quiet, falling, tmp_path):
    folder = train(settings(**RUN), quiet)
    assert [line["epoch"] for line in read_metrics(folder)] == [1, 2, 3, 4]
    text = (folder / "summary.md").read_text()
    assert "Stopped after epoch 4 of 6: no better accuracy on `held-out` for 2 epochs. The model is of epoch 2" in text
    assert "Not finished" not in text
    two = train(settings(epochs=6, hold_out=0.1, lr=3e-3, out=str(tmp_path / "two"), patience=6), quiet)
    found = {line["set"] for line in read_table(folder / "predictions.csv")}
    assert found == {"held-out", "test", "swapped"}
    right = [line["label"] == line["predicted"] for line in read_table(folder / "predictions.csv") if line["set"] == "test"]
    assert sum(right) / len(right) == pytest.approx(read_metrics(two)[1]["tests"]["test"]["accuracy"])
    saved = load(folder).state_dict()
    assert any(not torch.equal(value, saved[name]) for name, value in load(two).state_dict().items())
    said = resume(folder, console=quiet)
    assert said == folder
    assert len(read_metrics(folder)) == 4  # it is finished


@pytest.mark.forks
def test_a_killed_run_stops_where_the_whole_one_does(settings, quiet, falling, tmp_path):
    whole = train(settings(**RUN, out=str(tmp_path / "whole")), quiet)
    with pytest.MonkeyPatch.context() as patch:
        counted = Moments(patch, act=lambda: None)
        train(settings(**RUN, out=str(tmp_path / "counted")), quiet)
    for k in range(1, 6):
        folder = tmp_path / f"killed-{k}"

        def dies(folder=folder, at=counted.count * k // 6):
            with pytest.MonkeyPatch.context() as patch:
                Moments(patch, at=at)
                train(settings(**RUN, out=str(folder)), quiet)

        assert in_child(dies) == -9
        resume(folder, console=quiet)
        assert differing(whole, folder) == []


def test_several_seeds_report_the_epochs_that_are_kept(settings, quiet):
    folder = train(settings(seeds=2, epochs=3, patience=3, lr=3e-3), quiet)
    means = []
    for seed in (0, 1):
        found = read_metrics(folder / f"seed-{seed}")
        assert json.loads((Path(folder) / f"seed-{seed}" / "run.json").read_text())["settings"]["patience"] == 3
        means.append(max(line["tests"]["test"]["accuracy"] for line in found))
    assert f"| mean | {50 * sum(means):.2f} % |" in (folder / "summary.md").read_text()
