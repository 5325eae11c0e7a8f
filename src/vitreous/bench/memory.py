"""Peak memory of an arm: allocated on a GPU, resident in a process of its own on the CPU.

`python -m vitreous.bench.memory` is that process's parent. It imports what is needed, computes
nothing itself, and forks for every line it reads, so that each arm starts from the same clean state
and one that runs out of memory takes nobody along.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from vitreous.bench.arms import Arm, Cell

CALLS = 2  # the first leaves what the second finds: gradients, the optimizer's state
MIB = 2**20
STATUS = Path("/proc/self/status")
OUT = "out of memory"


def allocated(build: Callable[[], Callable[[], object]], device: str) -> tuple[Callable[[], object], float]:
    """(what `build` returns, peak MiB on the GPU while it is built and called twice).

    Weights are included.
    """
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    act = build()
    for _ in range(CALLS):
        act()
    torch.cuda.synchronize(device)
    return act, (torch.cuda.max_memory_allocated(device) - before) / MIB


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class Residents:
    """Peak resident memory, arm by arm, each measured in a process beside this one.

    `with Residents() as residents: residents.peak(...)`.
    """

    def __enter__(self) -> Residents:
        self.process = None
        if STATUS.exists():
            command = [sys.executable, "-m", "vitreous.bench.memory", str(torch.get_num_threads())]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, text=True, **pipes)
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()

    def peak(self, arm: Arm, cell: Cell) -> float | str:
        """Peak MiB of a process that builds the arm and calls it twice, above its start.

        Or in words why there is no number: memory ran out, or this system does not report it (Linux
        does). Compiled models are not measured: what the compiler holds cannot be told from what
        the model needs.
        """
        if self.process is None:
            return "not measured on this system"
        if cell.compile:
            return "not measured for compiled models"
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"arm": asdict(arm), "cell": asdict(cell)}) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith('{"peak": '):  # a network may print lines of its own
                    return json.loads(line)["peak"]
        return "not measured: the process beside ended"


def serve(threads: int) -> None:
    """Answer every line of standard input by one of standard output, from a fork."""
    for line in sys.stdin:
        request = json.loads(line)
        arm = request["arm"] | {name: tuple(request["arm"][name]) for name in ("grafts", "model_kwargs")}
        child = os.fork()
        if not child:
            torch.set_num_threads(threads)
            answer(resident(Arm(**arm), Cell(**request["cell"])))
            os._exit(0)  # without the clean-up at exit, which is the parent's
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            # where memory runs out, Linux kills the process that asks for most
            answer(OUT if code == -signal.SIGKILL else f"not measured: the process ended with {code}")


def answer(peak: float | str) -> None:
    sys.stdout.write(json.dumps({"peak": peak}) + "\n")
    sys.stdout.flush()


def resident(arm: Arm, cell: Cell) -> float | str:
    """MiB at most above the start, in this process; or why not."""
    try:
        settle(cell)
        before = resident_bytes("VmRSS")
        act = cell.act(arm.build(cell.size))
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # what building took for a moment is not what running needs
        for _ in range(CALLS):
            act()
        return (resident_bytes("VmHWM") - before) / MIB
    except Exception as error:
        return OUT if out_of_memory(error) else f"not measured: {type(error).__name__}: {str(error)[:200]}"


def settle(cell: Cell) -> None:
    """Call each kind of kernel once, small, and return the memory that it took.

    Code and threads are then there before anything is measured.
    """
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU())
    x = model(torch.rand(2, 3, 32, 32)).unflatten(-1, (4, 16))
    with torch.autocast("cpu", torch.bfloat16, enabled=cell.dtype == "bf16"):
        torch.nn.functional.scaled_dot_product_attention(x, x, x).float().softmax(-1).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(kind: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM at most."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(kind))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
