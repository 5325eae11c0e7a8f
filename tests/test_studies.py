"""The tables of the studies of both papers follow from their stored results, and say what these hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from scipy import stats

from vitreous import graft, grafts, parse
from vitreous.models import model_folder
from vitreous.models.create import create_model
from vitreous.train.settings import TrainSettings, key_values

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import study  # noqa: E402
import study_tables  # noqa: E402

STUDIES = {
    "svda": study_tables.SVDA,
    "svd_vit": study_tables.SVD_VIT,
    "networks": study_tables.NETWORKS,
    "adapters": study_tables.ADAPTERS,
}
STORED = sorted(path for name in STUDIES for path in (BENCHMARKS / name).glob("*/*.json"))
NEEDED = {"data", "arm", "seed", "command", "accuracy", "epochs", "commit", "versions", "machine", "wall_seconds"}


def test_the_tables_agree_with_the_stored_results():
    for path, text in study_tables.pages().items():
        assert path.read_text(encoding="utf-8") == text.rstrip() + "\n", "run `python benchmarks/study_tables.py`"


def test_every_result_says_how_it_was_made_and_lies_at_its_place():
    assert STORED
    for path in STORED:
        result, name = json.loads(path.read_text(encoding="utf-8")), path.parent.parent.name
        assert result.keys() >= NEEDED
        assert path == study.result_path(BENCHMARKS / name, result["data"], result["arm"], result["seed"])
        arm = STUDIES[name][result["data"]][result["arm"]]
        protocol = study.PROTOCOLS[result["data"]]
        assert (result["graft"], result["model_kwargs"], result.get("model"), result.get("recipe", {})) == (
            list(arm.graft),
            study.arm_arguments(protocol, arm),
            arm.model,
            dict(arm.recipe),
        ), "the arm has changed since: train it again"
        assert result["seed"] in protocol.seeds
        assert f"--arm {result['arm']} --seed {result['seed']}" in result["command"]


@pytest.mark.parametrize("folder", STUDIES)
def test_every_arm_of_every_protocol_can_be_built(folder):
    counts = {}
    for data, arms in STUDIES[folder].items():
        protocol = study.PROTOCOLS[data]
        name = protocol.recipe.get("model", TrainSettings.model if protocol.border is None else "vit_tiny_patch16_224")
        size = {"cutouts-64": 64, "cutouts": 32}.get(data, 112 if protocol.border is not None else None)
        for arm_name, arm in arms.items():
            arguments = key_values(study.arm_arguments(protocol, arm))
            if Path(arm.model or name).is_dir():  # a trained network to start from
                model = model_folder.load(arm.model or name, **arguments)
            else:
                model = create_model(arm.model or name, image_size=size and (size, size), num_classes=6, **arguments)
            graft(model, *(parse(text) for text in arm.graft))
            assert len(grafts(model)) == len(arm.graft), (folder, arm)
            counts[data, arm_name] = sum(parameter.numel() for parameter in model.parameters())
    for (data, arm_name), count in counts.items():
        if data == "cutouts-64" and f"{count:,} parameters" not in STUDIES[folder][data][arm_name].what:
            assert count == pytest.approx(counts[data, "plain"], rel=0.1), arm_name


def made(accuracy: float, seed: int) -> dict:
    return {"arm": "a", "seed": seed, "accuracy": {"test": accuracy}}


def test_differences_are_paired_by_seed_with_students_interval():
    ours = {seed: made(value, seed) for seed, value in enumerate((0.90, 0.85, 0.95, 0.99))}
    base = {seed: made(value, seed) for seed, value in enumerate((0.88, 0.84, 0.92))}  # the fourth seed is in one arm alone
    low, high = stats.ttest_rel([90, 85, 95], [88, 84, 92]).confidence_interval()
    text = study_tables.against(ours, base, study_tables.accuracy("test"))
    assert text == f"+2.0 [{low:+.1f}, {high:+.1f}] undecided"
    assert study_tables.against(base, ours, study_tables.accuracy("test")).startswith("-2.0")
    assert study_tables.against(ours, {0: base[0]}, study_tables.accuracy("test")) == "seeds: 1"


def test_broken_runs_are_left_out_and_counted(tmp_path):
    for seed in (0, 1):
        result = made(0.9, seed) | ({"broken": "accuracy below 0.5"} if seed else {})
        study.write_result(study.result_path(tmp_path, "cutouts", "a", seed), result)
    assert list(study.results(tmp_path, "cutouts")["a"]) == [0]
    assert study.broken(tmp_path, "cutouts") == 1


@pytest.mark.parametrize("words", [["fashion-mnist"], ["cutouts", "--arm", "nobody"], ["nothing"], ["animals-last-2"]])
def test_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(BENCHMARKS / "svda", study_tables.SVDA, words)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
