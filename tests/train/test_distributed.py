"""Two processes over gloo do what one does, whatever happens to one of them; most are forked here, some torchrun starts."""

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

from data.sources.test_named import make_fashion
from train.conftest import SMALL
from train.interrupting import NAN, at_step, breaking, differing, in_team, output
from vitreous.base.errors import DataError, SettingError
from vitreous.base.processes import Team, connected
from vitreous.commands.cli import main
from vitreous.data.sources import named
from vitreous.train import TrainSettings, train
from vitreous.train.engine import loader
from vitreous.train.engine.distributed import check_team
from vitreous.train.engine.loader import Order, Prepared, cut, rejoined
from vitreous.train.engine.sharding import check_optimizer
from vitreous.train.engine.state import read_state
from vitreous.train.records.run_folder import read_metrics, read_rows

DATA = "cutouts:train=41,test=40,size=16"
RECIPE = f"train {DATA} --model-kwargs {' '.join(SMALL)} --batch-size 16 --epochs 2 --lr 2e-3 --device cpu"
WITH_PENALTIES = f"{RECIPE} --graft svda --clip-grad 1 --model-ema 0.9 --aug pad"
WITH_TERMS = WITH_PENALTIES.replace("--graft svda", "--graft svda --graft train.terms.Sizes")
LONG = f"{WITH_PENALTIES} --epochs 8 --save-every 2"
WITHOUT = f"{RECIPE} --graft svda:orthogonality=0,entropy=0 --clip-grad 1 --model-ema 0.9 --mixup 0.3 --cutmix 0.5"


def torchrun(words: str) -> subprocess.Popen:
    """`torchrun --nproc-per-node 2 -m vitreous WORDS`, begun."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitreous"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*start, *words.split()], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def done(words: str, size: int = 2, codes: set[int] = frozenset({0}), change=lambda rank, patch: None) -> None:
    """`vitreous WORDS` in so many processes, which must end with these codes. change: what is done to each before."""

    def work(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            change(rank, patch)
            sys.exit(main(words.split()))

    assert set(in_team(work, size)) == codes


def differences(a, b) -> float:
    """The largest difference of two models' weights, which have the same names."""
    one, two = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


def number(cell: str) -> float | str:
    """A cell of a table with a decimal point as a number, any other as it is."""
    return float(cell) if "." in cell and cell.replace(".", "").isdigit() else cell


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
    for one, two in zip(*rows, strict=True):
        assert [number(cell) for cell in one[:4]] == pytest.approx([number(cell) for cell in two[:4]], abs=1e-4)


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
    assert main([*WITH_TERMS.split(), *more.split(), "--out", str(folder)]) == 0
    alike(folder, alone(WITH_TERMS))


@pytest.mark.forks
def test_two_processes_equal_one_with_penalties_and_an_uneven_last_batch(alone, tmp_path, capfd):
    """41 images: the last batch of nine is cut into four and five; the penalties are those of one process."""
    folder, one = tmp_path / "run", alone(WITH_TERMS)
    capfd.readouterr()
    done(f"{WITH_TERMS} --out {folder}")
    alike(folder, one)
    assert capfd.readouterr().out.count("epoch 2/2") == 1
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    assert {"svda_orthogonality", "size"} < read_metrics(folder)[-1]["losses"].keys()


@pytest.mark.forks
def test_two_processes_mix_in_parts_and_check_points_as_one(alone, tmp_path):
    folder = tmp_path / "run"
    done(f"{WITHOUT} --accumulate 2 --checkpointing --out {folder}")
    alike(folder, alone(WITHOUT))


@pytest.mark.forks
def test_five_processes_have_fewer_images_than_processes_in_the_last_batch(alone, tmp_path):
    """41 images in batches of eight: the last one has one image, and four processes have none.

    By SGD: where a gradient is nearly zero, AdamW's first steps make much of the rounding of five sums.
    """
    words, folder = f"{WITH_TERMS} --batch-size 8 --epochs 1 --accumulate 2 --opt sgd --lr 0.1", tmp_path / "run"
    done(f"{words} --out {folder}", size=5)
    alike(folder, alone(words))


@pytest.mark.forks
def test_bfloat16_runs_in_two_processes(tmp_path):
    done(f"{RECIPE} --epochs 1 --graft svda --amp --out {tmp_path / 'run'}")
    assert np.isfinite(read_metrics(tmp_path / "run")[0]["losses"]["total"])


# -- spread weights ------------------------------------------------------------------------------------------------


@pytest.mark.forks
def test_a_sharded_model_takes_the_same_steps_and_goes_on(alone, tmp_path, capfd):
    """Stopped in the middle of the second epoch; resumed it ends where one process and the uninterrupted run end."""
    words, whole, folder = f"{WITHOUT} --shard --accumulate 3", tmp_path / "whole", tmp_path / "run"
    done(f"{words} --out {whole}")
    alike(whole, alone(WITHOUT))
    told = lambda rank, patch: at_step(patch, 3, lambda: rank and os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    done(f"{words} --out {folder}", codes={143}, change=told)
    assert max(path.name for path in (folder / "state").iterdir()) == "000000003.safetensors"
    capfd.readouterr()
    done(f"resume {folder}")
    assert "after 3 updates, in epoch 2 of 2" in capfd.readouterr().out.replace("\n", " ")
    assert differences(folder, whole) < 1e-6
    alike(folder, alone(WITHOUT))


@pytest.mark.forks
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--graft svda", "Found --shard and grafts with penalties (svda_entropy, svda_orthogonality)"),
        ("--opt muon", "Found --shard with --opt muon; its step with spread weights is another one"),
        ("--opt novograd", "Found --shard with --opt novograd; it cannot work with spread weights"),
        ("--opt adafactor", "Found --shard with --opt adafactor; it cannot work with spread weights"),  # after a restart
    ],
)
def test_sharding_is_refused_with_a_reason_that_is_said_once(tmp_path, capfd, more, said):
    done(f"{RECIPE} {more} --shard --out {tmp_path / 'run'}", codes={2})
    err = capfd.readouterr().err
    assert err.count("error:") == 1
    assert said in err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.forks
def test_optimizers_that_treat_each_weight_by_itself_are_taken():
    def work(rank):
        with connected(torch.device("cpu")):
            for name in ("adamw", "sgd", "lion", "lamb", "adan"):
                check_optimizer(name, torch.device("cpu"), 2)

    assert in_team(work) == [0, 0]


# -- steps that are not finite, images that are not there ----------------------------------------------------------


def not_a_number_in_the_second(rank, patch):
    """The fourth update breaks in one process alone."""
    if rank == 1:
        breaking(patch, output("blocks.1.mlp.fc1", NAN), at=(4,))


@pytest.mark.forks
@pytest.mark.parametrize("more", ["--graft svda", "--shard"])
def test_processes_stop_together_before_a_step_that_is_not_finite_in_one(tmp_path, capfd, more):
    folder = tmp_path / "run"
    done(f"{RECIPE} {more} --save-every 1 --out {folder}", codes={2}, change=not_a_number_in_the_second)
    said = capfd.readouterr().err.replace("\n", " ")
    assert said.count("error:") == 1
    assert "at step 4, in epoch 2" in said
    assert "it begins with the output of blocks.1.mlp.fc1 (Linear)" in said
    state = read_state(folder / "state/000000003.safetensors")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert len(read_state(folder / "not-finite.safetensors")["batch"][1]) == 16  # the parts of both


@pytest.mark.forks
def test_processes_go_back_together_and_leave_the_step_out(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    words = f"{WITH_PENALTIES} --rollbacks 1 --out"
    with pytest.MonkeyPatch.context() as patch:
        not_a_number_in_the_second(1, patch)
        assert main([*words.split(), str(one)]) == 0
    done(f"{words} {two}", change=not_a_number_in_the_second)
    assert (two / "not-finite.safetensors").exists()
    alike(two, one)


def losing(part):
    """`change(rank, patch)`: images of the first batch, once begun, cannot be read: those of that process, of two."""
    order = Order(41, 16, shuffle=True)
    order.epoch = 1
    rows = next(iter(order))[1]
    gone = {int(i) for rank in part for i in cut(rows, Team(rank, 2))}

    def change(rank, patch):
        attempt = Prepared.attempt

        def made(batches, epoch, indices):
            found, lost = attempt(batches, epoch, [i for i in indices if not (epoch == 1 and i in gone)])
            return found, lost | {i: "it is gone" for i in indices if epoch == 1 and i in gone}

        patch.setattr(Prepared, "attempt", made)
        patch.setattr(loader, "PAUSE", 0)

    return change


@pytest.mark.forks
def test_a_process_that_lost_its_whole_part_of_a_batch_goes_on(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.MonkeyPatch.context() as patch:
        losing([1])(0, patch)
        assert main([*WITH_PENALTIES.split(), "--out", str(one)]) == 0
    done(f"{WITH_PENALTIES} --out {two}", change=losing([1]))
    alike(two, one)
    assert sorted(read_rows(one / "quarantine.csv")) == sorted(read_rows(two / "quarantine.csv"))
    assert len(read_rows(two / "quarantine.csv")) == 8


@pytest.mark.forks
def test_processes_that_lost_all_of_a_batch_end_with_a_reason(tmp_path, capfd):
    done(f"{WITH_PENALTIES} --out {tmp_path / 'run'}", codes={2}, change=losing([0, 1]))
    said = capfd.readouterr().err.replace("\n", " ")
    assert said.count("error:") == 1
    assert "Found 8 images that can no longer be read, all of a batch among them" in said
    assert "it is gone" in said


@pytest.mark.forks
@pytest.mark.parametrize("fails", [False, True])
def test_one_process_downloads_for_all(tmp_path, capfd, fails):
    calls, place = tmp_path / "calls", tmp_path / "fashion"

    def change(rank, patch):
        def download(reader, root):
            with calls.open("a") as file:
                file.write(f"{rank} ")
            if fails:
                raise DataError("Found no way to download.")
            time.sleep(0.3)  # those that do not wait find nothing
            make_fashion(root)

        patch.setattr(named, "_download", download)

    words = f"train fashion-mnist:{place} --download --model-kwargs {' '.join(SMALL)} --epochs 1 --batch-size 8 --device cpu"
    done(f"{words} --out {tmp_path / 'run'}", codes={2 if fails else 0}, change=change)
    assert calls.read_text() == "0 "
    assert capfd.readouterr().err.count("error:") == fails


# -- killed, told to stop ------------------------------------------------------------------------------------------


def children(process: subprocess.Popen) -> list[int]:
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(word) for word in file.read().split()]


@pytest.mark.forks
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds its processes in /proc")
def test_a_killed_process_ends_the_run_which_goes_on_to_the_same_end(tmp_path):
    """Started by torchrun; resumed in forked processes; the same bytes as a run that nothing stopped."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    process = torchrun(f"{LONG} --out {folder}")
    while len(read_metrics(folder)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(children(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "vitreous/train/engine/loop.py" not in said  # torchrun shows a traceback of its own, we none
    assert list((folder / "state").glob("*.safetensors"))
    assert main(["resume", str(folder)]) == 2  # one process would not end as two
    done(f"resume {folder}")
    done(f"{LONG} --out {whole}")
    assert differing(folder, whole) == []
    assert not (folder / "state").exists()


@pytest.mark.forks
def test_a_signal_to_one_process_ends_all_after_the_same_step(alone, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    told = lambda rank, patch: at_step(patch, 2, lambda: rank and os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    done(f"{WITH_PENALTIES} --out {folder}", codes={143}, change=told)
    assert max(path.name for path in (folder / "state").iterdir()) == "000000002.safetensors"
    done(f"resume {folder}")
    done(f"{WITH_PENALTIES} --out {whole}")
    assert differing(folder, whole) == []


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


@pytest.mark.forks
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
        check_team(chosen := TrainSettings("cutouts", shard=True), chosen.parsed_task(), 1)
    with pytest.raises(SettingError, match="Expected at least 8"):
        check_team(chosen := TrainSettings("cutouts", batch_size=6, mixup=0.1), chosen.parsed_task(), 4)
    with pytest.raises(SettingError, match="Leave the number out"):
        Team(0, 2).device(torch.device("cuda:1"))


def test_checkpointing_is_refused_where_a_network_has_none(settings, quiet, monkeypatch):
    def none(*_):
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.set_grad_checkpointing", none)
    with pytest.raises(SettingError, match="Found --checkpointing for vit_tiny_patch16_224, which has none"):
        train(settings(checkpointing=True), quiet)
