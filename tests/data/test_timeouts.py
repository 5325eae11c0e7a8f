"""A drive that hangs: one file is left behind and named, several end what was asked with one message, and nothing waits on."""

import csv
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm

from data import made
from vitreous.base.errors import DataError
from vitreous.commands.cli import main
from vitreous.data import decoding, timeouts
from vitreous.data.decoding import Unreadable, contents
from vitreous.data.quarantine import examine
from vitreous.data.timeouts import DriveGone
from vitreous.train import TrainSettings, save
from vitreous.train.engine import loader
from vitreous.train.engine.prepare import prepare

WAIT = 0.5


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Half a second in place of a minute; pipes, at which a reader waits for a writer, stand for a drive that hangs."""
    monkeypatch.setattr(timeouts, "PATIENCE", WAIT)
    monkeypatch.setattr(timeouts, "STALLED", [])
    monkeypatch.setattr(loader, "PAUSE", 0.0)
    monkeypatch.setattr(decoding, "read_file", Path.read_bytes)  # the true one does not open what is no plain file


def hang(folder, *names):
    """Put pipes where the files were."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)


def test_one_file_without_an_answer_is_left_behind(tmp_path):
    files = {f"{i}.png": made.picture(i) for i in range(8)}
    made.write(tmp_path, files)
    hang(tmp_path, "3.png")
    started = time.perf_counter()
    found = examine({name: tmp_path / name for name in files})
    assert time.perf_counter() - started < 10 * WAIT
    assert {name: seen.reason for name, seen in found.items() if seen.reason} == {"3.png": f"no answer within {WAIT} s"}
    for name, raw in files.items():  # no answer is taken for another's
        if name != "3.png":
            assert contents(tmp_path / name, name) == raw


def test_a_late_answer_is_not_taken_for_the_next(tmp_path):
    made.write(tmp_path, {"next.png": b"next"})
    hang(tmp_path, "late.png")
    with pytest.raises(Unreadable, match=r"'late\.png', which cannot be read .no answer within 0\.5 s."):
        contents(tmp_path / "late.png", "late.png")
    (tmp_path / "late.png").write_bytes(b"late")  # the reader that was left behind gets it now
    assert contents(tmp_path / "next.png", "next.png") == b"next"


def test_the_third_in_a_row_ends_it(tmp_path):
    made.write(tmp_path, {"sound.png": b"x"})
    names = [f"{i}.png" for i in range(5)]
    hang(tmp_path, *names)
    for name in names[:2]:
        with pytest.raises(Unreadable):
            contents(tmp_path / name, name)
    contents(tmp_path / "sound.png", "sound.png")  # an answer: counted anew
    for name in names[2:4]:
        with pytest.raises(Unreadable):
            contents(tmp_path / name, name)
    with pytest.raises(DriveGone, match=r"'2.png', '3.png', '4.png'\. Expected a drive that answers\. See"):
        contents(tmp_path / "4.png", "4.png")


def test_readers_end_with_the_threads_they_read_for(tmp_path):
    made.write(tmp_path, {"a.png": b"a"})
    before = threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: contents(tmp_path / "a.png", "a.png"), range(40))) == {b"a"}
    gc.collect()
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_data_check_lists_it_and_ends_where_the_drive_is_gone(tmp_path, capsys):
    folder = made.write(tmp_path / "photos", made.tree())
    hang(folder, "train/cat/1.png")
    assert main(["data", "check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "train/cat/1.png" in out
    assert "no answer within" in out
    hang(folder, *(f"train/dog/{i}.png" for i in range(4)))
    assert main(["data", "check", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: Found no answer within {WAIT} s from 'train/")
    assert "Traceback" not in said


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_without_one_and_stops_where_the_drive_is_gone(tmp_path, workers):
    folder = made.write(tmp_path / "photos", made.tree(images=6))
    network = ("patch_size=4", "depth=1", "embed_dim=24", "num_heads=2")
    small = {"image_size": 16, "batch_size": 4, "aug": "crop", "model_kwargs": network, "device": "cpu"}
    session = prepare(TrainSettings(str(folder), workers=workers, **small))
    hang(folder, "train/cat/1.png")
    assert sum(len(x) for x, _ in session.train) == 11
    assert list(session.train.lost.values()) == [f"no answer within {WAIT} s"]
    hang(folder, *(f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(6)))
    timeouts.STALLED.clear()
    said = r"all of a batch, the first 'train/.*' \(the drive does not answer\).* resume"
    with pytest.raises(DataError, match=said) as error:
        list(session.train)
    assert "Traceback" not in str(error.value)


def test_predict_lists_it_and_ends_where_the_drive_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = dict(img_size=16, patch_size=4, depth=1, embed_dim=24, num_heads=2, num_classes=3)
    save(timm.create_model("vit_tiny_patch16_224", **net), "model", classes=("a", "b", "c"))
    photos = made.write(tmp_path / "photos", {f"{i}.png": made.picture(i) for i in range(8)})
    hang(photos, "3.png")
    assert main(["predict", "model", "photos"]) == 0
    with open("predictions.csv", encoding="utf-8", newline="") as file:
        skipped = {row["file"]: row["skipped"] for row in csv.DictReader(file) if row["skipped"]}
    assert skipped == {"3.png": f"no answer within {WAIT} s"}
    hang(photos, *(f"{i}.png" for i in range(8)))
    assert main(["predict", "model", "photos", "--out", "again.csv"]) == 2
    assert "Found no answer within" in capsys.readouterr().err
    assert not Path("again.csv").exists()
