"""Two processes over gloo, started by torchrun, do what one does; one that is killed ends the other, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from train.conftest import SMALL
from vitreous.cli import main
from vitreous.errors import SettingError
from vitreous.team import Team
from vitreous.train import TrainSettings, train
from vitreous.train.distributed import check_team
from vitreous.train.inputs import Order, cut, rejoined
from vitreous.train.run import read_metrics, read_rows

DATA = "cutouts:train=41,test=40,size=16"
RECIPE = f"train {DATA} --model-kwargs {' '.join(SMALL)} --batch-size 16 --epochs 2 --lr 2e-3 --device cpu"
WITH_PENALTIES = f"{RECIPE} --graft svda --clip-grad 1 --model-ema 0.9 --aug pad"
LONG = f"{WITH_PENALTIES} --epochs 8 --save-every 2"
WITHOUT = f"{RECIPE} --graft svda:orthogonality=0,entropy=0 --clip-grad 1 --model-ema 0.9 --mixup 0.3 --cutmix 0.5"


def team(words: str, **options) -> subprocess.Popen:
    """`torchrun --nproc-per-node 2 -m vitreous WORDS`, begun."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitreous"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*start, *words.split()], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes, **options)


def done(words: str, code: int = 0) -> str:
    """What two processes say that end with this code."""
    process = team(words)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == code, said
    return said


def differences(a, b) -> float:
    """The largest difference of two models' weights, which have the same names."""
    one, two = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


def alike(a, b) -> None:
    """Two runs with the same files, weights to 1e-5, metrics to 1e-4, and the same predictions."""
    assert differences(a, b) < 1e-5
    files = [{path.relative_to(run).as_posix() for path in run.rglob("*")} for run in (a, b)]
    assert files[0] == files[1]
    for one, two in zip(read_metrics(a), read_metrics(b), strict=True):
        for name in ("losses", "gradients"):
            assert one[name] == pytest.approx(two[name], rel=1e-4)
        assert one["tests"]["test"] == pytest.approx(two["tests"]["test"], rel=1e-4)
    rows = [read_rows(run / "predictions.csv") for run in (a, b)]
    assert [row[:4] for row in rows[0]] == [row[:4] for row in rows[1]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """`alone(words)`: the folder of that run by this one process, made once."""
    found = {}

    def build(words):
        if words not in found:
            found[words] = tmp_path_factory.mktemp("alone") / "run"
            assert main([*words.split(), "--out", str(found[words])]) == 0
        return found[words]

    return build


# -- the same step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["--accumulate 3", "--checkpointing"])
def test_one_process_in_parts_or_with_checkpointing_takes_the_same_steps(alone, tmp_path, more):
    folder = tmp_path / "run"
    assert main([*WITH_PENALTIES.split(), *more.split(), "--out", str(folder)]) == 0
    alike(folder, alone(WITH_PENALTIES))


def test_two_processes_equal_one_with_penalties_and_an_uneven_last_batch(alone, tmp_path):
    """41 images: the last batch of nine is cut into four and five; the penalties are those of one process."""
    folder = tmp_path / "run"
    said = done(f"{WITH_PENALTIES} --out {folder}")
    alike(folder, alone(WITH_PENALTIES))
    assert said.count("epoch 2/2") == 1
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    assert "svda_orthogonality" in read_metrics(folder)[-1]["losses"]


def test_two_processes_mix_in_parts_and_check_points_as_one(alone, tmp_path):
    folder = tmp_path / "run"
    done(f"{WITHOUT} --accumulate 2 --checkpointing --out {folder}")
    alike(folder, alone(WITHOUT))


def test_a_sharded_model_takes_the_same_steps_and_goes_on(alone, tmp_path):
    folder = tmp_path / "run"
    done(f"{WITHOUT} --shard --accumulate 2 --out {folder}")
    alike(folder, alone(WITHOUT))


def test_sharding_is_refused_with_penalties_and_said_once(tmp_path):
    said = done(f"{RECIPE} --graft svda --shard --out {tmp_path / 'run'}", code=1)
    assert said.count("error: Found --shard and grafts with penalties (svda_entropy, svda_orthogonality)") == 1
    assert not (tmp_path / "run").exists()


def test_bfloat16_runs_in_two_processes(tmp_path):
    done(f"{RECIPE} --epochs 1 --graft svda --amp --out {tmp_path / 'run'}")
    assert np.isfinite(read_metrics(tmp_path / "run")[0]["losses"]["total"])


# -- killed, told to stop ------------------------------------------------------------------------------------------


def children(process: subprocess.Popen) -> list[int]:
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(word) for word in file.read().split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a longer run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done(f"{LONG} --out {folder}")
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds its processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_ends_the_run_which_goes_on_to_the_same_end(whole, tmp_path, number):
    folder = tmp_path / "run"
    process = team(f"{LONG} --out {folder}")
    while len(read_metrics(folder)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(children(process)[1], number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "vitreous/train/loop.py" not in said  # torchrun shows a traceback of its own, we none
    assert list((folder / "state").glob("*.safetensors"))
    if number == signal.SIGKILL:
        assert main(["resume", str(folder)]) == 2  # one process would not end as two
    done(f"resume {folder}")
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (folder / "state").exists()


def test_other_numbers_of_processes_are_refused_unless_allowed(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    assert main([*RECIPE.split(), "--out", str(folder), "--save-every", "1"]) == 0
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"processes": 2}))
    (folder / "metrics.jsonl").unlink()  # as if it had not been finished
    assert main(["resume", str(folder)]) == 2
    assert "processes: 2, now 1" in capsys.readouterr().err
    assert main(["resume", str(folder), "--allow-changes"]) == 0
    assert "will not end exactly as it would have: processes: 2, now 1" in capsys.readouterr().out.replace("\n", " ")


# -- look ----------------------------------------------------------------------------------------------------------


def test_a_look_of_two_processes_is_that_of_one(tmp_path):
    photos, draw = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for i in range(50):
        Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(photos / f"{i:02d}.png")
    (photos / "03.png").write_bytes(b"no image")
    (photos / "20.png").write_bytes(b"no image")
    words = f"look test_vit {photos} --random-weights --model-kwargs img_size=32 --device cpu --curves 1 --out"
    assert main([*words.split(), str(tmp_path / "one")]) == 0
    done(f"{words} {tmp_path / 'two'}")
    names = {path.name for path in (tmp_path / "one").rglob("*")}
    assert names == {path.name for path in (tmp_path / "two").rglob("*")}
    for name in ("table.csv", "table.json", "reading.json", "curves.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# -- parts of batches, and what does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_hold_each_image_once_and_pairs_together(count, size):
    rows = np.arange(count)
    parts = [cut(rows, Team(rank, size)) for rank in range(size)]
    assert rejoined([torch.from_numpy(part) for part in parts]).tolist() == rows.tolist()
    for part in parts:
        assert {count - 1 - row for row in part.tolist()} == set(part.tolist())  # each beside the one it is mixed with
        if count % 2 == 0:
            assert (part[::-1] == count - 1 - part).all()
    assert max(map(len, parts)) - min(map(len, parts)) <= 2


def test_batches_that_are_not_shuffled_are_dealt_out_whole():
    dealt = [[rows.tolist() for _, rows in Order(10, 4, team=Team(rank, 2))] for rank in (0, 1)]
    assert dealt == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]]
    assert [len(Order(10, 4, team=Team(rank, 2))) for rank in (0, 1)] == [2, 1]


def test_settings_that_do_not_fit_the_number_of_processes_are_refused():
    with pytest.raises(SettingError, match="--shard in one process"):
        check_team(TrainSettings("cutouts", shard=True), 1)
    with pytest.raises(SettingError, match="Expected at least 8"):
        check_team(TrainSettings("cutouts", batch_size=6, mixup=0.1), 4)
    with pytest.raises(SettingError, match="Leave the number out"):
        Team(0, 2).device(torch.device("cuda:1"))


def test_checkpointing_is_refused_where_a_network_has_none(settings, quiet, monkeypatch):
    def none(*_):
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.set_grad_checkpointing", none)
    with pytest.raises(SettingError, match="Found --checkpointing for vit_tiny_patch16_224, which has none"):
        train(settings(checkpointing=True), quiet)
