"""A run over damaged files goes on without them and says so; strict stops; what vanishes on the way is written down."""

import csv
import io

import pytest
from rich.console import Console

from data import made
from vitreous.base.errors import DataError
from vitreous.commands.cli import main
from vitreous.train import train
from vitreous.train.engine import loader, loop, prepare
from vitreous.train.engine.resume import resume
from vitreous.train.records.lost_images import write_quarantine
from vitreous.train.records.run_folder import Run, read_table


def photos(root):
    """Sixteen sound files, two more of a class with a formula for its name, and three that cannot be read."""
    files = made.tree() | {"train/=dog/0.png": made.picture(70), "train/=dog/1.png": made.picture(71)}
    files |= {"train/cat/bad.png": b"", "train/=dog/\x1b[2J.png": b"x", "val/dog/cut.png": made.picture(9)[:90]}
    return str(made.write(root / "photos", files))


@pytest.fixture
def recipe(settings, tmp_path):
    return lambda **more: settings(data=photos(tmp_path), image_size=16, epochs=1, batch_size=4, aug="crop", **more)


def rows(folder):
    with open(folder / "quarantine.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_quarantined_images_are_written_down_and_said(recipe, capsys):
    folder = train(recipe(), Console(width=200))
    assert rows(folder) == [
        ["file", "class", "split", "reason"],
        ["train/=dog/\\x1b[2J.png", "'=dog", "train", "not an image"],
        ["train/cat/bad.png", "cat", "train", "the file is empty"],
        ["val/dog/cut.png", "dog", "val", "image file is truncated"],
    ]
    out = capsys.readouterr().out
    assert "Quarantined: 3 of 21 images" in out
    assert "train cat 1 of 5" in out
    assert "\x1b[2J" not in out
    assert len(read_table(folder / "predictions.csv")) == 8


def test_a_sound_run_has_no_quarantine(settings, quiet):
    assert not (train(settings(epochs=1), quiet) / "quarantine.csv").exists()


def test_strict_stops_before_anything_is_written(recipe, tmp_path, capsys):
    with pytest.raises(DataError, match="Found 3 of 21 images"):
        train(recipe(strict=True))
    assert not (tmp_path / "run").exists()
    assert main(["train", str(tmp_path / "photos"), "--strict", "--out", str(tmp_path / "run")]) == 2
    assert "Found 3 of 21 images that cannot be read" in capsys.readouterr().err


def test_what_vanishes_on_the_way_is_added_once(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "PAUSE", 0.0)
    session, run = prepare.prepare(recipe()), Run(tmp_path / "run")
    assert write_quarantine(session, run) == []
    before = rows(run.folder)
    (tmp_path / "photos/val/cat/1.png").unlink()
    assert sum(len(x) for x, _ in session.tests["test"]) == 7
    (said,) = write_quarantine(session, run)
    assert "val/cat/1.png: no such file or directory" in said
    assert rows(run.folder) == [*before, ["val/cat/1.png", "cat", "test", "no such file or directory"]]
    list(session.tests["test"])
    assert write_quarantine(session, run) == []
    assert len(rows(run.folder)) == len(before) + 1


def test_predictions_keep_the_numbers_of_their_images(recipe, tmp_path, monkeypatch, quiet):
    monkeypatch.setattr(loader, "PAUSE", 0.0)
    plain = loop.finish_epoch

    def lose_one(*given):
        (tmp_path / "photos/val/cat/1.png").unlink()
        plain(*given)

    monkeypatch.setattr(loop, "finish_epoch", lose_one)
    folder = train(recipe(), quiet)
    assert [int(row["index"]) for row in read_table(folder / "predictions.csv")] == [0, 2, 3, 4, 5, 6, 7]
    assert rows(folder)[-1] == ["val/cat/1.png", "cat", "test", "no such file or directory"]


def test_resume_shows_how_far_the_reading_of_files_is(recipe, tmp_path, monkeypatch, quiet):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), quiet)
    out = io.StringIO()
    resume(tmp_path / "run", console=Console(file=out, force_terminal=True))
    assert "reading files" in out.getvalue()
    assert "epoch 1/1" in out.getvalue()
