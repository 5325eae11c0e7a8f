"""A study: arms in pairs of equal seed, one folder, the same result however often it was interrupted, mistakes named first."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from data.made import tree, write
from train.conftest import SMALL
from train.interrupting import Moments, differing, in_child
from vitreous.base.errors import SettingError, UnknownName, VitreousError
from vitreous.commands.cli import main
from vitreous.commands.study import Study
from vitreous.data import quarantine
from vitreous.train import train
from vitreous.train.records.run_folder import read_metrics, read_table
from vitreous.train.study.study import again, choose, plan, study

ARMS = ("plain", "svda:scale=sqrt")
FOLDERS = {f"{arm}-seed-{seed}" for arm in ("plain", "svda-scale=sqrt") for seed in (3, 4)}


@pytest.fixture
def given(settings, tmp_path):
    def build(**changes):
        return settings(**{"epochs": 1, "seeds": 2, "seed": 3, "out": str(tmp_path / "study"), **changes})

    return build


def results(folder):
    return json.loads((folder / "study.json").read_text())["results"]


def test_files_are_decoded_once_for_all_runs(settings, quiet, tmp_path, monkeypatch):
    """And each run is what it is on its own: with its seed's images of a limit."""
    photos = write(tmp_path / "photos", tree())
    decoded, examined = [], quarantine.examined
    monkeypatch.setattr(quarantine, "examined", lambda *given: (decoded.append(given[1]), examined(*given))[1])
    small = dict(data=str(photos), image_size=16, epochs=1, batch_size=4, limit=6)
    folder = study(settings(**small, seeds=2, out=str(tmp_path / "study")), ARMS, quiet)
    assert len(decoded) == len(set(decoded)) == 16
    seeds = train(settings(**small, seeds=2, out=str(tmp_path / "seeds")), quiet)
    assert len(decoded) == 32
    alone = train(settings(**small, seed=1, out=str(tmp_path / "alone")), quiet)
    assert len(decoded) == 48
    assert differing(alone, seeds / "seed-1") == differing(alone, folder / "plain-seed-1") == []


@pytest.mark.forks
def test_a_study_says_what_its_runs_say_and_goes_on_where_it_was_killed(given, quiet, tmp_path):
    folder = study(given(), ARMS, quiet)
    assert {path.name for path in folder.iterdir()} == FOLDERS | {"study.json", "summary.md"}
    for arm, name in (("plain", "plain"), ("svda:scale=sqrt", "svda-scale=sqrt")):
        scores = [read_metrics(folder / f"{name}-seed-{seed}")[-1]["tests"]["test"]["accuracy"] for seed in (3, 4)]
        assert results(folder)["tests"]["test"]["arms"][arm]["accuracy"] == scores
        course = results(folder)["courses"][arm][0]
        assert (course["quantity"], course["over"]) == ("test accuracy %", "epoch")
        assert course["points"] == [[1, *(pytest.approx(100 * f(scores)) for f in (mean, min, max))]]
    one = {path.name: read_table(path / "manifest.csv") for path in folder.glob("*-seed-*")}
    assert one["plain-seed-3"] == one["svda-scale=sqrt-seed-3"] != one["plain-seed-4"]

    with pytest.MonkeyPatch.context() as patch:
        counted = Moments(patch, act=lambda: None)
        study(given(out=str(tmp_path / "counted")), ARMS, quiet)
    for k in (1, 2):  # in different runs
        other = tmp_path / f"killed-{k}"

        def dies(other=other, at=counted.count * (3 * k - 2) // 7):
            with pytest.MonkeyPatch.context() as patch:
                Moments(patch, at=at)
                study(given(out=str(other)), ARMS, quiet)

        assert in_child(dies) == -9
        assert again(other, quiet) == other if k == 2 else study(given(out=str(other)), ARMS, quiet) == other
        assert results(other)["tests"] == results(folder)["tests"]
        for name in FOLDERS:
            assert differing(folder / name, other / name) == []


def test_finished_runs_are_kept_and_other_studies_refused(given, quiet, tmp_path):
    folder = study(given(seeds=1), ARMS, quiet)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/model.safetensors")}
    assert len(before) == 2
    study(given(seeds=1), ARMS, quiet)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/model.safetensors")} == before
    with pytest.raises(SettingError, match=r"another study.*lr: 0\.0005, now 0\.001"):
        study(given(seeds=1, lr=1e-3), ARMS, quiet)
    with pytest.raises(SettingError, match=r"another study.*seeds"):
        study(given(), ARMS, quiet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("kept")
    with pytest.raises(SettingError, match="Found something"):
        study(given(out=str(tmp_path / "other")), ARMS, quiet)


@pytest.mark.parametrize(
    ("arms", "changes", "kind", "said"),
    [
        (("plain",), {}, SettingError, "at least two"),
        ((), {}, SettingError, "none"),
        (("svda", " svda "), {}, SettingError, "all different"),
        (("plain", "svdaa"), {}, UnknownName, "Did you mean 'svda'"),
        (("plain", "svda svda"), {}, VitreousError, "already"),
        (("plain", "svda:layers=7"), {}, SettingError, "0 to 1"),
        (("plain", "svda"), {"graft": ("spc",)}, SettingError, "--arm svda"),
        (("plain", "model=vit_tinny"), {}, UnknownName, "vit_tiny"),
        (("plain", "model=test_vit model=test_vit2"), {}, SettingError, "two networks"),
        (("plain", "cvt_13 depth=3"), {}, SettingError, "Expected model=cvt_13"),
        (("plain", "dept=3"), {}, SettingError, "dept"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(given, quiet, tmp_path, arms, changes, kind, said):
    with pytest.raises(kind, match=said):
        study(given(**changes), arms, quiet)
    assert not list(tmp_path.rglob("run.json"))
    assert not list(tmp_path.rglob("study.json"))
    assert not Path(given().out).exists()


NETWORK = "model=test_vit img_size=16 patch_size=4 embed_dim=24 depth=1 num_heads=3"


def test_arms_of_other_networks(given, quiet):
    folder = study(given(seeds=1), ("plain", "qk_norm=True svda", NETWORK), quiet)
    models = {
        run.name: json.loads((run / "run.json").read_text())["model"] for run in sorted(folder.glob("*-seed-3")) if run.is_dir()
    }
    assert [model["architecture"] for model in models.values()] == ["test_vit", "vit_tiny_patch16_224", "vit_tiny_patch16_224"]
    assert [model["mechanisms"] for model in models.values()] == [[], [], ["svda"]]
    cost = results(folder)["cost"]
    for arm, run in (("plain", "plain-seed-3"), (NETWORK, next(name for name in models if name.startswith("model=")))):
        assert cost[arm]["parameters"] == models[run]["parameters"]
    assert cost["qk_norm=True svda"]["parameters"] > cost["plain"]["parameters"]  # norms of queries and keys, and the spectrum
    assert f"{cost[NETWORK]['parameters']:,} |" in (folder / "summary.md").read_text()
    assert again(folder, quiet) == folder


def test_default_folders_are_found_again(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = given(out=None), given(out=None, lr=1e-3)
    folders = {}
    for settings in (one, two, one):
        asked = plan(settings, ("plain", "svda"))
        folder = choose(settings, asked)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.json").write_text(json.dumps(asked))
        folders.setdefault(settings.lr, set()).add(folder.as_posix())
    assert folders == {5e-4: {"studies/cutouts"}, 1e-3: {"studies/cutouts-2"}}
    assert choose(replace(two, workers=1), plan(two, ("plain", "svda"))).name == "cutouts-2"


def test_folders_of_arms_are_plain_and_apart(given):
    arms = ("../x", "x", "svda:layers=0-1 spc")
    assert [arm["folder"] for arm in plan(given(), arms)["arms"]] == ["x", "x-2", "svda-layers=0-1-spc"]


def test_the_command(given, quiet, tmp_path, capsys):
    words = ["cutouts:train=40,test=24,size=16", "--arm", "plain", "--arm", "svda", "--seeds", "1", "--epochs", "1"]
    words += ["--batch-size", "16", "--device", "cpu"]
    words += ["--model-kwargs", "patch_size=4", "depth=2", "embed_dim=24", "num_heads=2", "--out"]
    folder = tmp_path / "typed"
    command = Study.read([*words, str(folder)])
    assert command.arm == ("plain", "svda")
    assert command.settings().seeds == 1
    assert Study.read(["cutouts"]).settings().seeds == 3
    assert main(["study", *words, str(folder)]) == 0
    assert f"Report: {folder}/report.html" in capsys.readouterr().out
    assert main(["resume", str(folder)]) == 0
    capsys.readouterr()
    for words in (["--workers", "1"], ["--allow-changes"], ["--tracker", "tensorboard"]):
        assert main(["resume", str(folder), *words]) == 2
        assert capsys.readouterr().err.startswith("error: Found options for the study")
    (folder / "study.json").write_text("{}")
    assert main(["resume", str(folder)]) == 2


@pytest.mark.slow
def test_two_processes_do_the_study_of_one(given, quiet, tmp_path):
    alone, folder = study(given(seeds=1), ARMS, quiet), tmp_path / "two"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitreous"]
    words += ["study", "cutouts:train=40,test=24,size=16", "--arm", ARMS[0], "--arm", ARMS[1], "--seed", "3", "--seeds", "1"]
    words += ["--epochs", "1", "--batch-size", "16", "--device", "cpu", "--out", str(folder), "--model-kwargs", *SMALL]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Done: {folder}/summary.md") == 1
    for name in ("plain-seed-3", "svda-scale=sqrt-seed-3"):
        losses = [read_metrics(path / name)[0]["losses"]["total"] for path in (alone, folder)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert set(results(folder)["tests"]["test"]["arms"]) == set(ARMS)
