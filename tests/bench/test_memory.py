"""Peak memory: a process beside measures what an arm takes, and outlives one that takes too much."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from vitreous.bench import memory
from vitreous.bench.arms import Arm, Cell
from vitreous.bench.memory import MIB, OUT, Residents, allocated, out_of_memory, resident

LINUX = pytest.mark.skipif(not memory.STATUS.exists(), reason="resident memory is read from /proc")
TINY = Arm("tiny", "test_vit")


@LINUX
@pytest.mark.forks
def test_a_known_amount_is_found(monkeypatch):
    """An arm that holds 96 MiB of weights and, at most, 64 MiB more in a call."""

    class Known:
        def build(self, size):
            return torch.ones(24 * MIB)

    def act(cell, weights):
        return lambda: torch.ones(16 * MIB).sum() + weights[0]

    monkeypatch.setattr(Cell, "act", act)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, str(resident(Known(), Cell("inference", 1, 160))).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert float(os.read(reader, 100)) == pytest.approx(160, abs=6)


@LINUX
def test_the_process_beside_answers_for_every_arm():
    with Residents() as residents:
        small = residents.peak(TINY, Cell("inference", 1, 160))
        large = residents.peak(TINY, Cell("training", 32, 160))
        assert 1 < small < 60
        assert large > small + 30
        assert residents.peak(TINY, Cell("inference", 10**7, 160)) == OUT
        assert "UnknownName" in residents.peak(Arm("no", "no_such_model"), Cell("inference", 1, 160))
        assert "compiled" in residents.peak(TINY, Cell("inference", 1, 160, compile=True))
        again = residents.peak(TINY, Cell("inference", 1, 160))
        assert again == pytest.approx(small, abs=8)


@LINUX
@pytest.mark.forks
@pytest.mark.parametrize(
    ("end", "said"), [(signal.SIGKILL, OUT), (signal.SIGUSR1, f"not measured: the process ended with {-signal.SIGUSR1}")]
)
def test_an_arm_that_the_system_ends_is_out_of_memory(end, said, monkeypatch, capsys):
    monkeypatch.setattr(memory, "resident", lambda arm, cell: os.kill(os.getpid(), end))
    arm, cell = {"name": "a", "source": "b", "grafts": [], "model_kwargs": []}, {"mode": "inference", "batch": 1, "size": 8}
    line = json.dumps({"arm": arm, "cell": cell})
    monkeypatch.setattr(memory.sys, "stdin", [line])
    memory.serve(1)
    assert capsys.readouterr().out == json.dumps({"peak": said}) + "\n"


def test_errors_that_say_that_memory_ran_out():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert out_of_memory(error.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))


def test_a_gpu_is_asked_for_what_it_allocated(monkeypatch):
    held = SimpleNamespace(now=100 * MIB, peak=0)

    def take(count):
        held.now += count * MIB
        held.peak = max(held.peak, held.now)

    def act():
        take(50)
        take(-50)

    def build():
        take(30)
        return act

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(held, "peak", held.now))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert allocated(build, "cuda") == (act, 80)
