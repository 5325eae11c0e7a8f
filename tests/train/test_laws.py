"""The laws of training, for every task and update: parts and processes take the same steps, resumed runs end byte-equal."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from test_house import SRC
from train.conftest import SMALL
from train.interrupting import ENTRY, Moments, at_step, differing, in_child, in_team
from train.test_distributed import alike
from vitreous.base.errors import DataError, SettingError
from vitreous.commands.cli import main
from vitreous.data import ClassSet
from vitreous.tasks import TASKS, Dice, load_objective
from vitreous.train import train
from vitreous.train.engine import resume as resuming
from vitreous.train.engine.prepare import prepare
from vitreous.train.engine.resume import resume
from vitreous.train.engine.state import capture, own_tensors, restore
from vitreous.train.records.predictions import by_image
from vitreous.train.records.run_folder import read_metrics, read_table
from vitreous.train.updates import UPDATES

TURNED = "train.tasks_elsewhere.Turned"
CASES = {
    "multi_label": "--task multi_label --graft svda",
    "turned": f"--task {TURNED}",
    "elastic": "--task elastic",
    "masked": "--task masked_autoencoder:hide=0.5,width=16,depth=1,heads=2",
    "views": "--task train.tasks_elsewhere.TwoViews --aug pad",
    "sam": "--update sam:rho=0.1 --mixup 0.3 --smoothing 0.1",
    "adaptive": "--update sam:rho=1,adaptive=true --task multi_label --graft svda",
}
WORDS = (
    f"train cutouts:train=41,test=24,size=16 --model-kwargs {' '.join(SMALL)} --batch-size 16 --epochs 2 --lr 2e-3 "
    "--clip-grad 1 --model-ema 0.9 --device cpu"
)


def several_classes(opening):
    """Opens data whose images have one or two classes, of which every fifth is not known."""

    def opened(*arguments, **options):
        data = opening(*arguments, **options)
        for samples in (data.train, *data.tests.values()):
            labels, count = samples.target.values, len(data.classes)
            matrix = np.eye(count)[labels] + (np.arange(len(labels)) % 2)[:, None] * np.eye(count)[(labels + 2) % count]
            matrix.flat[::5] = np.nan
            samples.target = ClassSet(matrix)
        return data

    return opened


@pytest.fixture(autouse=True)
def classes_as_the_task_wants_them(monkeypatch):
    """Cutouts with several classes per image for the tasks that learn these; forked processes have it too."""
    for module in (ENTRY, resuming):

        def prepared(settings, *others):
            if settings.parsed_task().target is ClassSet:
                others = (*others[:2], several_classes(others[2]))
            return prepare(settings, *others)

        monkeypatch.setattr(module, "prepare", prepared)


def run(words: str, folder) -> None:
    assert main([*WORDS.split(), *words.split(), "--out", str(folder)]) == 0


def processes(words: str) -> set[int]:
    return set(in_team(lambda rank: sys.exit(main(words.split()))))


@pytest.mark.forks
@pytest.mark.parametrize("case", CASES)
def test_parts_and_processes_take_the_same_steps(tmp_path, case):
    run(CASES[case], tmp_path / "one")
    if "mixup" not in CASES[case]:  # mixed pairs do not stay together in a third
        run(f"{CASES[case]} --accumulate 3", tmp_path / "parts")
        agree(tmp_path / "parts", tmp_path / "one")
    assert processes(f"{WORDS} {CASES[case]} --out {tmp_path / 'two'}") == {0}
    agree(tmp_path / "two", tmp_path / "one")


def agree(a, b):
    if (a / "objective.safetensors").exists():
        one, two = (safetensors.torch.load_file(folder / "objective.safetensors") for folder in (a, b))
        for name in one:
            apart = (one[name] - two[name]).abs()
            if name.endswith("qkv.bias"):  # keys' part cancels in the softmax: its gradient is rounding, which Adam makes large
                apart = apart.view(3, -1)[[0, 2]]
            assert apart.max() < 1e-5, name
    alike(a, b)


@pytest.mark.forks
@pytest.mark.parametrize("case", CASES)
def test_killed_and_told_to_stop_runs_end_byte_equal(tmp_path, case, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    with monkeypatch.context() as patch:
        moments = Moments(patch)
        run(f"{CASES[case]} --drop-path 0.2 --save-every 2", whole)
    with monkeypatch.context() as patch:
        Moments(patch, moments.count // 3)
        assert in_child(lambda: run(f"{CASES[case]} --drop-path 0.2 --save-every 2", folder)) == -signal.SIGKILL
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert in_child(lambda: resume(folder)) == 143
    resume(folder)
    assert differing(folder, whole) == []


# -- what a task adds to a model -----------------------------------------------------------------------------------


def test_the_parts_beside_the_model_are_trained_averaged_kept_and_shipped(settings, quiet, tmp_path):
    chosen = settings(task=TURNED, model_ema=0.5, lr=1e-2, save_every=1, epochs=3)
    session = prepare(chosen)
    assert set(own_tensors(session.objective)) == {
        *(f"head.{name}" for name in ("weight", "bias")),
        *(f"teacher.{name}" for name in session.model.state_dict()),
    }
    before = session.objective.head.weight.detach().clone()
    folder = train(chosen, quiet)
    record = json.loads((folder / "run.json").read_text())
    assert record["task"]["text"] == f"{TURNED}:momentum=0.9"
    assert record["task"]["metrics"] == [{"name": "error", "unit": "", "better": "lower", "label": "error"}]
    assert list(record["task"]["fixed"]) == ["frozen"]
    lines = read_metrics(folder)
    assert lines[-1]["losses"]["turned"] < lines[0]["losses"]["turned"]
    assert "| epoch | loss | error: test |" in (folder / "summary.md").read_text()
    table = read_table(folder / "predictions.csv")
    assert list(table[0]) == ["set", "index", "error", "file"]
    values = by_image(folder, session.task.metrics[0])["test"].values()
    assert np.mean(list(values)) == pytest.approx(lines[-1]["tests"]["test"]["error"], abs=1e-4)
    again = prepare(chosen).objective
    load_objective(again, folder)
    assert (again.head.weight - before).abs().max() > 1e-3
    saved = safetensors.torch.load_file(folder / "objective.safetensors")
    assert set(saved) == {"head.weight", "head.bias"}


def test_teachers_stay_in_eval_mode_and_a_changed_one_is_noticed(settings, quiet, monkeypatch):
    chosen = settings(task=TURNED, save_every=1)
    objective = prepare(chosen).objective.train()
    assert objective.model.training
    assert objective.teacher.training
    assert not objective.frozen.training
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(chosen, quiet)
    path = f"{chosen.out}/run.json"
    with open(path) as file:
        record = json.load(file)
    record["task"]["fixed"]["frozen"] = "0" * 64
    with open(path, "w") as file:
        json.dump(record, file)
    with pytest.raises(SettingError, match=r"task\.fixed\.frozen"):
        resume(chosen.out, console=quiet)


def test_dice_draws_the_same_for_an_image_however_the_batch_is_cut():
    whole = Dice((3, 1, 7), 10, np.arange(10), torch.device("cpu"))
    part = Dice((3, 1, 7), 10, np.array([8, 2]), torch.device("cpu"))
    for shape in ((), (2, 3)):
        assert torch.equal(whole.uniform(*shape)[[8, 2]], part.uniform(*shape))
    assert not torch.equal(Dice((3, 1, 8), 10, np.arange(10), torch.device("cpu")).uniform(), whole.uniform())


def test_states_hold_the_objective(settings, quiet):
    chosen = settings(task=TURNED, save_every=1)
    session = prepare(chosen)
    state = capture(session)
    assert "head.weight" in state["objective"]
    other = prepare(replace(chosen, seed=1))
    assert not torch.equal(other.objective.head.weight, session.objective.head.weight)
    other = prepare(chosen)
    other.objective.head.weight.data.zero_()
    restore(other, state)
    assert torch.equal(other.objective.head.weight, session.objective.head.weight)


# -- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"task": "multi_label", "mixup": 0.3}, SettingError, "Found --mixup 0.3 with --task multi_label"),
        ({"task": "classification:smoothing=0.1", "smoothing": 0.2}, SettingError, "Found --smoothing 0.2 with --task"),
        ({"task": "classification:mixup=0.3", "batch_size": 15}, SettingError, "pair images"),
        ({"task": "multi_label:threshold=2"}, SettingError, "threshold=2"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(settings, changes, kind, said):
    with pytest.raises(kind, match=said):
        settings(**changes)


def test_a_flag_and_the_text_of_a_task_say_the_same(settings):
    flags = settings(smoothing=0.1, mixup=0.2, class_weights="balanced").parsed_task()
    assert flags == settings(task="classification:smoothing=0.1,mixup=0.2,class_weights=balanced").parsed_task()


def test_a_recipe_leaves_alone_what_the_text_of_the_task_says(settings):
    chosen, record = settings(task="classification:smoothing=0.3", recipe="scratch").with_recipe(False, 100)
    assert (chosen.parsed_task().smoothing, chosen.parsed_task().mixup) == (0.3, 0.8)
    assert record["values"]["mixup"]["value"] == 0.8
    other, _ = settings(task="multi_label", recipe="scratch").with_recipe(False, 100)
    assert not other.parsed_task().pairs_images


def test_data_without_the_target_of_the_task_are_refused_before_anything_is_written(settings, quiet, tmp_path):
    with pytest.raises(DataError, match="one class"):
        prepare(settings(task="multi_label"))
    assert list(tmp_path.iterdir()) == []


def test_a_loss_of_the_batch_as_a_whole_is_not_cut(settings, monkeypatch):
    monkeypatch.setattr(TASKS.item("classification"), "couples_images", True)
    prepare(settings())
    with pytest.raises(SettingError, match="Found --accumulate 2 with the task classification"):
        prepare(settings(accumulate=2))


def test_no_file_of_training_names_a_task_or_an_update_or_a_metric():
    """So that each of them is one file: nothing else has to be touched for the next."""
    names = {*TASKS.files, *UPDATES.files} - {"classification", "plain"} | {"accuracy", "cross-entropy", "cross_entropy"}
    files = [path for part in ("train", "report") for path in (SRC / part).rglob("*") if path.suffix in (".py", ".js", ".html")]
    for path in files:
        own = {path.stem} if path.parent.name == "updates" else set()
        words = re.findall("|".join(rf"\b{name}\b" for name in sorted(names - own)), path.read_text(), re.IGNORECASE)
        assert words == [], path
