"""Interrupted runs end as if they had not been: killed, told to stop, out of disk, with damaged states; or they are refused."""

import json
import os
import random
import shutil
import signal
import sys

import pytest
import torch
from PIL import Image

from train.interrupting import Moments, at_step, die, differing, in_child, limit_files
from vitreous.base.errors import DataError, SettingError
from vitreous.commands.cli import main
from vitreous.train import load, train
from vitreous.train.engine import loop
from vitreous.train.engine.lock import locked
from vitreous.train.engine.resume import resume
from vitreous.train.engine.state import read_state, write_state
from vitreous.train.records.run_folder import read_metrics
from vitreous.train.study.study import study

pytestmark = pytest.mark.forks

RECIPE = dict(
    data="cutouts:train=40,test=24,size=16",
    graft=("svda",),
    batch_size=8,
    lr=2e-3,
    warmup_epochs=0.5,
    clip_grad=1.0,
    mixup=0.3,
    cutmix=0.5,
    drop_path=0.2,
    aug="pad",
    model_ema=0.9,
    save_every=2,
)
STEPS = 5  # in an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The settings and the folder of a run that was not interrupted, and the moments it had."""
    from rich.console import Console

    from train.conftest import SMALL
    from vitreous.train import TrainSettings

    out = tmp_path_factory.mktemp("whole") / "run"
    chosen = TrainSettings(**RECIPE, epochs=2, model_kwargs=SMALL, device="cpu", out=str(out))
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch)
        train(chosen, Console(quiet=True))
    return chosen, out, moments.count


def begin(settings, quiet, folder, **changes):
    """The run of `whole`, to be interrupted, in its own folder."""
    return lambda: train(settings(**{**RECIPE, **changes}, out=str(folder)), quiet)


# -- killed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "seed"), [(0, 1), (2, 2)])
def test_a_run_killed_at_random_moments_ends_byte_equal(settings, quiet, tmp_path, whole, workers, seed):
    draw, folder = random.Random(seed), tmp_path / "run"
    work = begin(settings, quiet, folder, workers=workers)
    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch:
            Moments(patch, draw.randrange(15, whole[2] // 4))
            assert in_child(work) == -signal.SIGKILL
        assert (folder / "run.json").exists()
        work = lambda: resume(folder, console=quiet)  # noqa: E731
    work()
    assert differing(folder, whole[1]) == []
    assert not (folder / "state").exists()
    assert not (folder / "lock").exists()
    assert resume(folder, console=quiet) == folder  # finished: nothing is done
    assert differing(folder, whole[1]) == []


def test_killed_inside_a_save_it_goes_on_from_the_state_before(settings, quiet, tmp_path, whole, monkeypatch, capfd):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        replace = os.replace
        patch.setattr(os, "replace", lambda a, b: die() if "000000004.safe" in str(b) else replace(a, b))
        assert in_child(begin(settings, quiet, folder)) == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "state").iterdir()) == [
        "000000000.safetensors",
        "000000002.safetensors",
        "000000004.safetensors.partial",
    ]
    assert main(["resume", str(folder)]) == 0
    out = capfd.readouterr().out
    assert "Took over the lock of process" in out
    assert "after 2 updates" in out
    assert differing(folder, whole[1]) == []


def test_killed_before_anything_was_kept_it_begins_anew(settings, quiet, tmp_path, whole, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("vitreous.train.engine.state.States.save", lambda *_: die())
        assert in_child(begin(settings, quiet, folder)) == -signal.SIGKILL
    assert not (folder / "state").exists()
    resume(folder, console=quiet)
    assert differing(folder, whole[1]) == []


def test_several_seeds_go_on_where_they_were(settings, quiet, tmp_path, monkeypatch):
    there, here = tmp_path / "whole", tmp_path / "run"
    few = dict(seeds=3, epochs=1)
    train(settings(**few, out=str(there)), quiet)
    original = loop.train_epoch

    def in_the_second(session, *others):
        if session.settings.seed == 1:
            die()
        original(session, *others)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", in_the_second)
        assert in_child(lambda: train(settings(**few, out=str(here)), quiet)) == -signal.SIGKILL
    assert sorted(path.name for path in here.iterdir()) == ["seed-0", "seed-1"]
    resume(here, console=quiet)
    for seed in ("seed-0", "seed-1", "seed-2"):
        assert differing(here / seed, there / seed) == []
    assert (here / "summary.md").read_text() == (there / "summary.md").read_text()


@pytest.mark.parametrize(
    "recipe",
    [
        {"model": "test_resnet", "model_kwargs": (), "graft": (), "opt": "sgd"},  # running means in buffers
        {"graft": ("evit:keep=0.5,until=0.9,layers=1", "extra_tokens"), "opt": "muon", "layer_decay": 0.8},  # has a schedule
        {"train": "new+head", "freeze": ("blocks.0",), "aug": "rand-m9-mstd0.5", "sched": "step", "opt": "lamb", "amp": True},
    ],
    ids=["resnet", "evit", "new"],
)
def test_other_recipes_go_on_exactly_too(settings, quiet, tmp_path, monkeypatch, recipe):
    there = train(settings(**{**RECIPE, **recipe}, out=str(tmp_path / "whole")), quiet)
    here = stopped(settings, quiet, tmp_path / "run", monkeypatch, update=STEPS + 2, **recipe)
    resume(here, console=quiet)
    assert differing(here, there) == []


# -- told to stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_end_of_the_step(settings, quiet, tmp_path, whole, monkeypatch, number, code):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 3, lambda: os.kill(os.getpid(), number))
        assert in_child(begin(settings, quiet, folder, workers=2)) == code
    assert max(path.name for path in (folder / "state").iterdir()) == f"{STEPS + 3:09d}.safetensors"
    assert not (folder / "lock").exists()
    assert f"Not finished: `vitreous resume {folder}`" in (folder / "summary.md").read_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resume(folder, console=quiet, workers=0)
    assert differing(folder, whole[1]) == []
    assert "Not finished" not in (folder / "summary.md").read_text()


def test_a_signal_during_tests_ends_after_a_batch(settings, quiet, tmp_path, whole, monkeypatch):
    folder, original = tmp_path / "run", loop.test

    def told(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "test", told)
        assert in_child(begin(settings, quiet, folder)) == 143
    assert read_metrics(folder) == []
    resume(folder, console=quiet)
    assert differing(folder, whole[1]) == []


def test_a_second_interrupt_ends_at_once(settings, quiet, tmp_path, whole, monkeypatch):
    folder = tmp_path / "run"

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        at_step(patch, 4, twice)
        assert in_child(begin(settings, quiet, folder)) == 130
    assert max(path.name for path in (folder / "state").iterdir()) == "000000002.safetensors"
    resume(folder, console=quiet)
    assert differing(folder, whole[1]) == []


# -- no room, no whole file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["a state", "the end of an epoch"])
def test_a_full_disk_is_said_and_what_was_whole_is_kept(settings, quiet, tmp_path, whole, monkeypatch, capfd, moment):
    folder = tmp_path / "run"
    words = f"train {RECIPE['data']} --out {folder}"

    def fails():
        monkeypatch.setattr("vitreous.commands.train.Train.settings", lambda _: settings(**RECIPE, out=str(folder)))
        if moment == "a state":
            at_step(monkeypatch, 4, lambda: limit_files(20_000))
        else:
            original = loop.finish_epoch
            monkeypatch.setattr(loop, "finish_epoch", lambda *a: (limit_files(2_000), original(*a)))
        sys.exit(main(words.split()))

    assert in_child(fails) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: Cannot write ")
    assert str(folder) in said
    assert "File too large" in said
    assert "Traceback" not in said
    assert not list(folder.rglob("*.partial"))
    states = sorted(path.name for path in (folder / "state").iterdir())
    assert states == [f"{n:09d}.safetensors" for n in ((0, 2) if moment == "a state" else (4, 5))]
    resume(folder, console=quiet)
    assert differing(folder, whole[1]) == []


def stopped(settings, quiet, folder, monkeypatch, update=4, **changes):
    """A run that was told to stop after an update."""
    with monkeypatch.context() as patch:
        at_step(patch, update, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert in_child(begin(settings, quiet, folder, **changes)) == 143
    return folder


def test_a_damaged_state_is_said_and_the_one_before_is_used(settings, quiet, tmp_path, whole, monkeypatch, capfd):
    folder = stopped(settings, quiet, tmp_path / "run", monkeypatch, update=STEPS + 2)
    newest = folder / f"state/{STEPS + 2:09d}.safetensors"
    data = bytearray(newest.read_bytes())
    data[-40] ^= 1
    newest.write_bytes(data)
    assert main(["resume", str(folder)]) == 0
    out = capfd.readouterr().out
    assert "its sum does not agree" in out
    assert "after 6 updates" in out
    assert differing(folder, whole[1]) == []


def test_without_a_whole_state_it_is_refused(settings, quiet, tmp_path, monkeypatch):
    folder = stopped(settings, quiet, tmp_path / "run", monkeypatch)
    for path in (folder / "state").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    for _ in range(2):
        with pytest.raises(DataError, match="only damaged states"):
            resume(folder, console=quiet)


# -- who may go on, and with what ----------------------------------------------------------------------------------


def test_two_processes_are_kept_apart(settings, quiet, tmp_path, monkeypatch):
    folder = stopped(settings, quiet, tmp_path / "run", monkeypatch)
    ready, wait = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with locked(folder, print):
            os.write(ready[1], b".")
            os.read(wait[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SettingError, match=f"in use by process {child} on "):
        resume(folder, console=quiet)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = []
    with locked(folder, said.append):
        assert json.loads((folder / "lock").read_text())["process"] == os.getpid()
    assert said == [f"Took over the lock of process {child} on {os.uname().nodename}, which is gone."]
    with locked(folder, said.append):  # a lock that was let go is none
        assert len(said) == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lr", 0.1, "lr: 0.002, now 0.1"),
        ("graft", ["svda:scale=one"], r"model.grafts: \['svda:.*scale=paper.*'\], now \['svda:.*scale=one"),
        ("data", "cutouts:train=48,test=24,size=16", "data, 1 gone: train: 40 images"),
    ],
)
def test_changed_settings_are_refused_unless_allowed(settings, quiet, tmp_path, monkeypatch, name, value, said):
    folder = stopped(settings, quiet, tmp_path / "run", monkeypatch)
    record = json.loads((folder / "run.json").read_text())
    record["settings"][name] = value
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(SettingError, match=f"changes since the run began: .*{said}.*--allow-changes"):
        resume(folder, console=quiet)
    resume(folder, allow_changes=True, console=quiet)
    assert [line["epoch"] for line in read_metrics(folder)] == [1, 2]


@pytest.mark.parametrize(("value", "refused"), [("none", False), ("auto", True)])
def test_a_setting_that_the_record_did_not_know_counts_as_its_default(settings, quiet, tmp_path, monkeypatch, value, refused):
    """The run was begun before --recipe and --class-weights; one of both records learned of it since."""
    folder = stopped(settings, quiet, tmp_path / "run", monkeypatch)
    record = json.loads((folder / "run.json").read_text())
    del record["settings"]["recipe"], record["settings"]["class_weights"]
    (folder / "run.json").write_text(json.dumps(record))
    for path in (folder / "state").iterdir():
        state = read_state(path)
        del state["settings"]["class_weights"]
        state["settings"]["recipe"] = value
        write_state(path, state)
    if refused:
        with pytest.raises(SettingError, match="recipe: auto, now none"):
            resume(folder, console=quiet)
    else:
        resume(folder, console=quiet)


def test_other_versions_are_refused(settings, quiet, tmp_path, monkeypatch):
    folder = stopped(settings, quiet, tmp_path / "run", monkeypatch)
    record = json.loads((folder / "run.json").read_text())
    record["versions"]["torch"] = "1.0"
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(SettingError, match=r"versions.torch: 1.0, now"):
        resume(folder, console=quiet)


def test_changed_images_are_refused_by_name(settings, quiet, tmp_path, monkeypatch):
    photos, draw = tmp_path / "photos", random.Random(0)
    for part, count in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            (photos / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = bytes(draw.randrange(256) for _ in range(16 * 16 * 3))
                Image.frombytes("RGB", (16, 16), pixels).save(photos / part / name / f"{i}.png")
    folder = stopped(settings, quiet, tmp_path / "run", monkeypatch, update=1, data=str(photos), graft=(), image_size=16)
    kept = tmp_path / "kept"
    shutil.copytree(photos, kept)
    (photos / "train/cat/3.png").rename(photos / "train/cat/other.png")
    Image.new("RGB", (16, 16)).save(photos / "test/dog/1.png")
    said = "1 gone: train: train/cat/3.png; data, 1 new: train: train/cat/other.png; data, 1 changed: test: test/dog/1.png"
    with pytest.raises(SettingError, match=said):
        resume(folder, console=quiet)
    shutil.rmtree(photos)
    kept.rename(photos)
    resume(folder, console=quiet)


@pytest.mark.parametrize("command", ["resume", "replay", "route --limit 3 --out new"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), str(tmp_path)]) == 2
    assert not any(tmp_path.iterdir())
    assert "Found no run.json" in capsys.readouterr().err


def test_a_new_run_does_not_take_the_folder_of_an_unfinished_one(settings, quiet, tmp_path, monkeypatch):
    folder = stopped(settings, quiet, tmp_path / "run", monkeypatch)
    with pytest.raises(SettingError, match=f"vitreous resume {folder}"):
        train(settings(out=str(folder)), quiet)


def test_saved_weights_are_those_that_are_resumed(settings, quiet, tmp_path, whole):
    """The reference is not empty: what is compared above is a model that learned."""
    trained = load(whole[1]).state_dict()
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert len(read_metrics(whole[1])) == 2


@pytest.mark.parametrize("words", ["--lr 1e-3", "--batch-size=4", "--epochs 3 --workers 1"])
def test_a_setting_that_a_begun_run_keeps_is_named(words, capsys):
    assert main(["resume", "run", *words.split()]) == 2
    said = capsys.readouterr().err
    assert f"Found {words.split()[0].partition('=')[0]} for a run that has begun" in said
    assert "vitreous train DATA --model RUN" in said


def test_told_to_stop_it_names_the_folder_that_holds_all_that_is_left(settings, quiet, tmp_path, monkeypatch):
    """Of one run its own; of several seeds, and of a study, the one around it; in the words of the KeyboardInterrupt."""

    def stopped(work):
        with monkeypatch.context() as patch:
            at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt) as error:
                work()
        return str(error.value).rpartition("vitreous resume ")[2]

    small = dict(data=RECIPE["data"], epochs=1, batch_size=8)
    one, seeds, arms = (str(tmp_path / name) for name in ("one", "seeds", "arms"))
    assert stopped(lambda: train(settings(**small, out=one), quiet)) == one
    assert stopped(lambda: train(settings(**small, seeds=2, out=seeds), quiet)) == seeds
    assert stopped(lambda: study(settings(**small, seeds=2, out=arms), ("plain", "svda"), quiet)) == arms
    resume(seeds, console=quiet)
    assert (tmp_path / "seeds/seed-1/summary.md").is_file()
