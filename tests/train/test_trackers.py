"""Trackers: TensorBoard's own reader finds every number, one that fails stops no run, no run folder has code imported."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.interrupting import NAN, breaking, output
from vitreous.base.errors import SettingError, UnknownName, VitreousError
from vitreous.commands.resume import Resume
from vitreous.commands.train import Train
from vitreous.train import train
from vitreous.train.engine.resume import recorded_settings, resume
from vitreous.train.records.run_folder import read_metrics
from vitreous.train.records.trackers import flat

OURS = """
told = []

class Mine:
    def start(self, folder, facts, epoch):
        told.append(("start", facts["seed"], epoch))
    def log(self, epoch, values):
        told.append(("log", epoch, values))
    def finish(self):
        told.append(("finish",))

class Broken(Mine):
    def log(self, epoch, values):
        raise OSError("no such server")

class Offline:
    def __init__(self):
        raise RuntimeError("not logged in")

class Half:
    def start(self, folder, facts, epoch):
        pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "tracking_of_mine.py").write_text(OURS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "tracking_of_mine."
    sys.modules.pop("tracking_of_mine", None)


def scalars(folder):
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboards_reader_finds_the_numbers_of_metrics_jsonl(settings, quiet):
    folder = train(settings(tracker=("tensorboard",)), quiet)
    found, lines = scalars(folder), read_metrics(folder)
    assert {"lr", "losses/total", "tests/swapped/accuracy", "gradients/total", "images_per_second"} <= set(found)
    assert set(found) == set(flat(lines[0]))
    for name, events in found.items():
        assert [step for step, _ in events] == [1, 2]
        assert [value for _, value in events] == pytest.approx([flat(line)[name] for line in lines], rel=1e-6)


def test_epochs_that_are_done_again_are_there_once(settings, quiet, monkeypatch):
    stop = iter([False, False, True])
    monkeypatch.setattr("vitreous.train.records.summary.write", lambda folder: 1 / 0 if next(stop, False) else None)
    with pytest.raises(ZeroDivisionError):
        train(settings(epochs=4, tracker=("tensorboard",)), quiet)
    monkeypatch.undo()
    folder = resume(settings().out, console=quiet)
    found = scalars(folder)["losses/total"]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx([line["losses"]["total"] for line in read_metrics(folder)], rel=1e-6)


def test_epochs_that_a_return_within_a_run_does_again_are_there_once(settings, quiet, mine, monkeypatch):
    """The state before a finite step is that after the first epoch, which is then finished a second time."""
    breaking(monkeypatch, output("blocks.0.mlp", NAN), at=(5,))
    folder = train(settings(rollbacks=1, tracker=("tensorboard", mine + "Mine")), quiet)
    told = sys.modules["tracking_of_mine"].told
    assert [event[0] for event in told] == ["start", "log", "finish", "start", "log", "log", "finish"]
    assert [event[-1] for event in told if event[0] == "start"] == [1, 1]
    assert [event[1] for event in told if event[0] == "log"] == [1, 1, 2]
    found = scalars(folder)["losses/total"]
    assert [step for step, _ in found] == [1, 2]
    assert [value for _, value in found] == pytest.approx([line["losses"]["total"] for line in read_metrics(folder)], rel=1e-6)


def test_a_tracker_of_another_package_is_told_the_same(settings, quiet, mine):
    folder = train(settings(tracker=(mine + "Mine",)), quiet)
    told = sys.modules["tracking_of_mine"].told
    assert [event[:2] for event in told] == [("start", 0), ("log", 1), ("log", 2), ("finish",)]
    assert [event[2] for event in told[1:3]] == [flat(line) for line in read_metrics(folder)]


def test_one_that_fails_is_reported_and_the_run_goes_on(settings, mine, capsys):
    folder = train(settings(tracker=(mine + "Broken",)))
    assert len(read_metrics(folder)) == 2
    said = capsys.readouterr().out
    assert said.count("OSError: no such server") == 1


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("tensorbord", UnknownName, "Did you mean 'tensorboard'"),
        ("no_such_package.Class", SettingError, "No module named"),
        ("json.NoSuch", SettingError, "NoSuch"),
        ("tracking_of_mine.Offline", SettingError, r"RuntimeError: not logged in.*Check the name"),
        ("tracking_of_mine.Half", SettingError, "without log, finish"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(settings, quiet, mine, tmp_path, name, kind, said):
    with pytest.raises(kind, match=said):
        train(settings(tracker=(name,)), quiet)
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_says_what_to_install(settings, quiet, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(VitreousError, match=r"pip install \"vitreous\[tensorboard\]\""):
        train(settings(tracker=("tensorboard",)), quiet)


def test_a_run_folder_has_no_code_imported(settings, quiet, mine):
    record = {"settings": {"data": "cutouts", "tracker": ["tensorboard", "tracking_of_mine.Mine"]}}
    assert recorded_settings(record, {}).tracker == ("tensorboard",)
    assert "tracking_of_mine" not in sys.modules
    assert recorded_settings(record, {"tracker": None}).tracker == ("tensorboard",)
    changed = Resume.read(["RUN", "--tracker", "tracking_of_mine.Mine"]).changes()
    assert recorded_settings(record, changed).tracker == ("tracking_of_mine.Mine",)


def test_the_command_line_takes_several():
    words = ["cutouts", "--tracker", "tensorboard", "--tracker", "a.b.C"]
    assert Train.read(words).settings().tracker == ("tensorboard", "a.b.C")
