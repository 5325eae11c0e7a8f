"""The worker processes of a loader: how one's death shows, and how all of them end."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Process
from multiprocessing.util import Finalize

from vitreous.base.errors import DataError


def tells_of_a_death(error: Exception) -> bool:
    """Whether an error means that a worker process is gone, and not that its work failed."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    if "in DataLoader worker process" in str(error):  # an error of its work, raised again here
        return False
    # it died before this process had opened the shared memory of a batch
    return isinstance(error, (EOFError, ConnectionError, FileNotFoundError))


def kill(workers: list[Process]) -> None:
    """Kill the workers that are left.

    One that waits for a lock that a dead one held would wait for ever, and they ignore SIGTERM.
    """
    for worker in workers:
        worker.kill()


def kill_at_exit(batches: Iterator) -> None:
    """Kill the workers when the program ends.

    torch would send SIGTERM, which they ignore, and wait for them.
    """
    # persistent workers come here every epoch
    if getattr(batches, "_workers", None) and not hasattr(batches, "killing"):
        batches.killing = Finalize(batches, kill, (batches._workers,), exitpriority=1)


@contextmanager
def child_signals_as_they_are() -> Iterator[None]:
    """In the body, torch cannot install its handler of a worker's death.

    It raises wherever the program is, in the middle of writing a file, say; `Loader` finds out when
    it asks for the next batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", None) == "torch.utils.data._utils.signal_handling":
        # torch sets it once for the whole program: a loader used earlier has left it behind
        before = inspect.getclosurevars(before).nonlocals["previous_handler"]
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def worker_killed(workers: int) -> DataError:
    """The error for a pass in which workers were killed twice."""
    return DataError(
        f"Found a worker process killed, twice in one pass, of --workers {workers}. Expected them to live: the usual cause is "
        "too little memory, or too little in /dev/shm. Lower --workers or --batch-size, then resume the run."
    )
