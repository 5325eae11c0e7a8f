"""Signals that a terminal or a cluster sends to all processes of a run at once: it saves and ends, its workers silently."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from train.conftest import SMALL
from train.interrupting import differing
from train.test_resume import RECIPE
from vitreous.train import TrainSettings, train
from vitreous.train.engine.resume import resume
from vitreous.train.engine.signals import Stopping

QUIET = Console(quiet=True)
SETTINGS = RECIPE | {"epochs": 8, "model_kwargs": SMALL, "device": "cpu", "save_every": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not interrupted."""
    return train(TrainSettings(**SETTINGS, out=str(tmp_path_factory.mktemp("whole") / "run")), QUIET)


def begun(folder) -> subprocess.Popen:
    """`vitreous train` with two workers, the leader of a process group of its own, after its third update."""
    settings = SETTINGS | {"workers": 2, "out": str(folder)}
    data, graft = settings.pop("data"), settings.pop("graft")[0]
    words = [data, "--graft", graft, "--model-kwargs", *settings.pop("model_kwargs")]
    words += [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "vitreous", "train", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, start_new_session=True, env=environment, **pipes)
    while not any(path.stem >= "000000003" for path in folder.glob("state/*.safetensors")) and run.poll() is None:
        time.sleep(0.01)
    return run


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("numbers", "code"), [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)]
)
def test_a_signal_to_the_whole_group(numbers, code, tmp_path, whole):
    """Workers leave it to their parent; what was done is saved, and the run ends as if nothing had been."""
    folder = tmp_path / "run"
    run = begun(folder)
    try:
        for number in numbers:
            os.killpg(run.pid, number)
            time.sleep(0.002)
        out, said = run.communicate(timeout=60)
    finally:
        gone = not alive(run.pid)
        if not gone:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == code, said
    assert gone  # no worker is left
    assert "Traceback" not in said + out
    assert not (folder / "lock").exists()
    saved = f"the state is saved. To go on: vitreous resume {folder}\n" in out
    assert saved or (len(numbers) == 2 and "To go on: `vitreous resume RUN`" in said)
    assert "To go on" not in said or len(numbers) == 2  # it is said once
    resume(folder, console=QUIET, workers=0)
    assert differing(folder, whole) == []


def test_a_program_that_ends_does_not_wait_for_its_workers():
    """Though a pass is still held by something when Python exits; workers are deaf to the SIGTERM that they then get."""
    text = """
from vitreous.data import Cutouts
from vitreous.data.preprocess import Preprocess
from vitreous.train.engine.loader import loader
batches = loader(Cutouts(4, size=16), Preprocess((3, 16, 16), (0, 0, 0), (1, 1, 1)), 2, aug="crop", shuffle=True, workers=2)
held = iter(batches)
next(held)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=40, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_second_interrupt_in_a_del_is_no_traceback(monkeypatch):
    """Python cannot raise there: it would print one and go on. Other errors are printed as ever."""
    printed = []
    hook = lambda ignored: printed.append(ignored.exc_type)  # noqa: E731
    monkeypatch.setattr(sys, "unraisablehook", hook)

    class Dropped:
        def __init__(self, act):
            self.act = act

        def __del__(self):
            self.act()

    with Stopping(Path("runs/one"), print) as stopping:
        signal.raise_signal(signal.SIGINT)
        Dropped(lambda: signal.raise_signal(signal.SIGINT))
        assert stopping.heard == signal.SIGINT
        assert printed == []
        Dropped(lambda: 1 / 0)
    assert printed == [ZeroDivisionError]
    assert sys.unraisablehook is hook
