"""Does an interrupted run end with the very bytes of one that was not? The long form of tests/train/test_resume.py.

    python benchmarks/resume/run.py        about 15 minutes on two cores

moments: a run is cut off by SIGKILL at the moments it has (before and after every optimizer step, sync and rename, in the
    middle of every write of tensors and of every line of metrics, before tests, look and saved model), each time from its
    start, resumed once, and compared file by file: at every one without worker processes, at every fifth with two.
processes: `vitreous train`, then `vitreous resume` again and again in processes of their own, killed after seconds drawn at
    random, until 20 kills and the end of the run.

Finished parts of result.json are not done again; names of parts on the command line choose some.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "tests")]
from common import write  # noqa: E402

from train.interrupting import Moments, differing, in_child  # noqa: E402
from vitreous.train import TrainSettings, train  # noqa: E402
from vitreous.train.engine.resume import resume  # noqa: E402

NETWORK = ("patch_size=4", "depth=2", "embed_dim=24", "num_heads=2")
RECIPE = {
    "graft": ("svda",),
    "batch_size": 8,
    "lr": 2e-3,
    "warmup_epochs": 0.5,
    "clip_grad": 1.0,
    "mixup": 0.3,
    "cutmix": 0.5,
    "drop_path": 0.2,
    "aug": "pad",
    "model_ema": 0.9,
    "model_kwargs": NETWORK,
    "device": "cpu",
}
SHORT = {"data": "cutouts:train=40,test=24,size=16", "epochs": 2, "save_every": 2}
LONG = {"data": "cutouts:train=400,test=60,size=16", "epochs": 40, "save_every": 7}
KILLS, QUIET = 20, Console(quiet=True)


def moments(folder: Path, workers: int, stride: int) -> dict[str, int]:
    """Cut off at every so-manieth moment, resume, compare."""

    def begin(out: Path):
        return lambda: train(TrainSettings(**RECIPE, **SHORT, workers=workers, out=str(out)), QUIET)

    with pytest.MonkeyPatch.context() as patch:
        counted = Moments(patch)
        begin(folder / "whole")()
    equal, killed = 0, 0
    for at in range(1, counted.count + 1, stride):
        out = folder / "cut"
        with pytest.MonkeyPatch.context() as patch:
            Moments(patch, at)
            killed += in_child(begin(out)) == -signal.SIGKILL
        if (out / "run.json").exists():
            resume(out, console=QUIET)
        else:  # nothing was begun: there is nothing to lose
            shutil.rmtree(out)
            begin(out)()
        found = differing(out, folder / "whole")
        equal += not found
        print(f"moment {at} of {counted.count}: {found or 'equal'}", flush=True)
        shutil.rmtree(out)
    return {"moments": counted.count, "kills": killed, "runs": killed, "equal": equal}


def processes(folder: Path, workers: int, threads: int) -> dict[str, int]:
    """Kill a run in processes of its own at random times until there were KILLS; then let it end, and compare."""
    draw = random.Random(workers)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    settings = RECIPE | LONG | {"workers": workers}
    data, graft = settings.pop("data"), settings.pop("graft")[0]
    words = [data, "--graft", graft, "--model-kwargs", *settings.pop("model_kwargs")]
    words += [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    vitreous = [sys.executable, "-m", "vitreous"]
    with open(folder / "log", "a", encoding="utf-8") as log:
        run = {"stdout": log, "stderr": log, "env": environment}
        subprocess.run([*vitreous, "train", *words, "--out", str(folder / "whole")], check=True, **run)
        kills, inside_saves, runs, equal, out = 0, 0, 0, 0, folder / "cut"
        command = [*vitreous, "train", *words, "--out", str(out)]
        while True:
            process = subprocess.Popen(command, **run)
            while not (out / "state").is_dir() and process.poll() is None:  # before, there is nothing to lose
                time.sleep(0.01)
            if kills < KILLS:
                try:
                    process.wait(draw.uniform(3, 10))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    inside_saves += bool(list(out.rglob("*.partial")))
            command = [*vitreous, "resume", str(out)]
            if process.wait() == 0:
                runs += 1
                equal += not differing(out, folder / "whole")
                if kills >= KILLS:
                    return {"kills": kills, "inside a write": inside_saves, "runs": runs, "equal": equal}
                shutil.rmtree(out)
                command = [*vitreous, "train", *words, "--out", str(out)]
            print(f"{kills} kills, {runs} runs ended, {equal} equal", flush=True)


PARTS = {
    "moments-0-workers": partial(moments, workers=0, stride=1),
    "moments-2-workers": partial(moments, workers=2, stride=5),
    "processes-0-workers": partial(processes, workers=0, threads=1),
    "processes-2-workers": partial(processes, workers=2, threads=1),
    "processes-2-workers-2-threads": partial(processes, workers=2, threads=2),
}


def main() -> None:
    torch.set_num_threads(1)
    path = HERE / "result.json"
    for name in sys.argv[1:] or PARTS:
        if path.exists() and name in json.loads(path.read_text()):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[name](Path(folder))
        write(path, (json.loads(path.read_text()) if path.exists() else {}) | {name: found})
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
