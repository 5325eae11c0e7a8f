"""The command line as a user meets it: what it prints, where it writes, and that mistakes cost nothing."""

import dataclasses
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from vitreous import __version__, catalogue
from vitreous.base.text_form import settings
from vitreous.commands.cli import COMMANDS, command_class, main, overview
from vitreous.commands.train import Train
from vitreous.mechanism import mechanism_class
from vitreous.train import TrainSettings, load, save
from vitreous.train.options import Usual, flag
from vitreous.train.records.run_folder import read_metrics

NETWORK = "--model-kwargs patch_size=4 depth=2 embed_dim=24 num_heads=2"
DATA = "cutouts:train=40,test=24,size=16"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(words: str) -> int:
    return main(shlex.split(words))


def test_train_writes_a_folder_that_plain_timm_reads(elsewhere, capsys):
    assert call(f"train {DATA} --epochs 1 {NETWORK} --out here") == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert "epoch 1/1" in out.out
    assert out.out.endswith("Done: here/summary.md\nReport: here/report.html\n")
    assert "<title>" in Path("here/report.html").read_text(encoding="utf-8")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(timm.create_model("local-dir:here", pretrained=True).eval()(x), load("here")(x))


def test_the_summary_names_a_next_command_that_works(elsewhere):
    call(f"train {DATA} --epochs 1 {NETWORK} --graft svda")
    following = re.search(r"Next: `vitreous (.*?)`", (elsewhere / "runs/cutouts-svda/summary.md").read_text())[1]
    assert call(f"{following} --epochs 1") == 0
    assert len(list((elsewhere / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian cutouts", "'train'"),
        ("train cutoutz", "'cutouts'"),
        ("train no/such/photos", "no/such/photos"),
        ("train cutouts --model vit_tinny_patch16_224", "'vit_tiny_patch16_224'"),
        ("train cutouts --model no/such/run", "no/such/run"),
        ("train cutouts --modle vit_tiny_patch16_224", "--model"),
        ("train cutouts --graft svdaa", "'svda'"),
        ("train cutouts --graft svda:scal=one", "'scale'"),
        ("train cutouts --graft svda:scale=tow", "'learned'"),
        (f"train {DATA} {NETWORK} --graft svda:layers=0-2", "0 to 1"),
        (f"train {DATA} {NETWORK} --graft spc --graft spc:after=9", "1 to 2"),
        (f"train {DATA} {NETWORK} --freeze blocks.1-2", "'blocks.1'"),
        (f"train {DATA} {NETWORK} --opt adamm", "'adam'"),
        (f"train {DATA} {NETWORK} --epochs many", "--epochs"),
        (f"train {DATA} --model-kwargs patch_size=5", "5 x 5"),
        ("train", "DATA"),
        ("list svdaa", "'svda'"),
        ("demo --quik", "--quick"),
    ],
)
def test_mistakes_end_in_a_message_and_code_2(elsewhere, capsys, words, said):
    assert call(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err + shown.out
    assert "Traceback" not in shown.err + shown.out
    assert list(elsewhere.iterdir()) == []


def test_weights_that_do_not_fit_are_said_and_nothing_is_written(elsewhere, capsys):
    save(timm.create_model("test_vit", num_classes=6), elsewhere / "other")
    assert call(f"train {DATA} --model vit_tiny_patch16_224 --weights other/model.safetensors") == 2
    assert re.search(r"error: .*do not fit.*missing blocks\.6\.", capsys.readouterr().err)
    assert [path.name for path in elsewhere.iterdir()] == ["other"]


def test_a_folder_in_use_is_refused(elsewhere, capsys):
    (elsewhere / "here").mkdir()
    (elsewhere / "here/mine.txt").write_text("mine")
    assert call(f"train {DATA} {NETWORK} --out here") == 2
    assert "--out" in capsys.readouterr().err
    assert [path.name for path in (elsewhere / "here").iterdir()] == ["mine.txt"]


def test_an_interrupt_is_code_130_and_keeps_what_was_done(elsewhere, capsys, monkeypatch):
    from vitreous.train.engine import loop

    def interrupted(session, *others, step=loop.train_epoch):
        if session.progress.epoch == 2:
            raise KeyboardInterrupt
        step(session, *others)

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    assert call(f"train {DATA} {NETWORK} --epochs 3 --out here") == 130
    assert [line["epoch"] for line in read_metrics(elsewhere / "here")] == [1]
    assert load("here").num_classes == 6
    assert "1 of 3 epochs" in (elsewhere / "here/summary.md").read_text()


INTERRUPT = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {imported!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
sys.meta_path.insert(0, Finder())
sys.argv = ["vitreous", *{words!r}]
runpy.run_module("vitreous", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("imported", "words"),
    [
        ("vitreous.commands.cli", "list"),
        ("torch", "look test_vit x.png --random-weights"),
        ("timm", "train cutouts --epochs 1"),
        ("vitreous.commands.predict", "predict run x.png"),
    ],
)
def test_ctrl_c_is_quiet_from_the_first_import_on(elsewhere, imported, words):
    """Sent when a module begins to be imported, wherever that is."""
    program = INTERRUPT.format(imported=imported, words=words.split())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    # Python ends by the signal itself where it fell into an exec(), which a shell reports as 130, too
    assert done.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in done.stderr
    assert list(elsewhere.iterdir()) == []


def test_list_shows_every_mechanism_with_its_settings(capsys):
    assert call("list") == 0
    shown = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    for name in catalogue():
        assert name in shown
        assert re.sub(r"\s+", "", mechanism_class(name).paper) in shown
        assert all(f"{setting}=" in shown for setting in settings(mechanism_class(name)))
    assert "scratch_vit_patch4_28" in shown


@pytest.mark.parametrize("name", [*catalogue(), "scratch_vit_patch8_224"])
def test_list_of_one_shows_its_docstring(name, capsys):
    assert call(f"list {name}") == 0
    shown = capsys.readouterr().out
    if name in catalogue():
        assert mechanism_class(name).__doc__.splitlines()[0] in shown
        assert all(setting in shown for setting in settings(mechanism_class(name)))


def test_list_of_a_kind_or_a_slot_shows_what_is_there(capsys):
    for kind, there, absent in (
        ("networks", ["cvt_13", "scratch_vit_patch4_28"], "svda"),
        ("mixer", ["spectral_gate"], "gaussian_mask"),
        ("tasks", ["multi_label"], "svda"),
        ("mechanisms", list(catalogue()), "cvt_13"),
    ):
        assert call(f"list {kind}") == 0
        shown = re.sub(r"[\s│]+", "", capsys.readouterr().out)
        assert all(name in shown for name in there)
        assert absent not in shown
    assert call("list mixxer") == 2
    assert "'mixer'" in capsys.readouterr().err


def test_version_and_help(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"vitreous {__version__}\n"
    for words in ("", "--help"):
        assert call(words) == 0
        assert "vitreous" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "study"])
def test_help_of_training_shows_first_the_ten_settings_that_most_people_set(name, capsys):
    assert call(f"{name} --help") == 0
    flags = re.findall(r"^\W{2}(--[a-z][a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    if name == "study":
        assert flags.pop(0) == "--arm"
    assert flags[:10] == [flag(field.name) for field in dataclasses.fields(Usual)]
    assert {*flags, "--data"} == {flag(field.name) for field in dataclasses.fields(TrainSettings)}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_whole_and_its_examples_can_be_parsed(name, capsys):
    command = command_class(name)
    text = inspect.getdoc(command)
    assert len(text.splitlines()[0]) <= 88
    assert f"  {name} {command.usage}" in overview()
    assert call(f"{name} --help") == 0
    assert f"vitreous {name}" in capsys.readouterr().out
    examples = re.findall(rf"^  vitreous {name} (.*(?:\n      .*)*)", text, re.MULTILINE)
    assert examples or name in ("demo", "list")
    for words in examples:
        parsed = command.read(shlex.split(words))
        if isinstance(parsed, Train):
            assert parsed.settings().data


def test_what_is_no_command_is_not_imported(capsys):
    for name in ("cli", "_demo", "__init__", "os", "../cli", ""):
        assert main([name]) == 2
        assert capsys.readouterr().err.startswith("error: Unknown command ")


def test_demo_compares_four_and_names_a_command_that_works(elsewhere, capsys):
    assert call("demo --quick --out show") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert {path.name for path in (elsewhere / "show").iterdir()} == {
        "plain",
        "SVDA",
        "SVDA-sqrt",
        "SVD-ViT",
        "first-look",
        "report.html",
    }
    rows = ("usual", "gain, swapped", "on the object", "effective", "seconds")
    for row in (*rows, "first-look/report.html"):
        assert row in shown.out
    assert re.search(r"graft\s+│\s+│\s+0 │\s+0 │\s+0 │", shown.out)
    following = re.search(r"^  (?:\S*/)?vitreous (train cutouts)( .*)$", shown.out, re.MULTILINE)
    assert call(f"{following[1]}:train=40,test=24{following[2]} --out more") == 0


def test_the_installed_command_prints_no_traceback_and_no_colour_into_a_pipe(elsewhere):
    words = [sys.executable, "-m", "vitreous", "train", DATA, "--epochs", "1", *NETWORK.split(), "--out", "here"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
