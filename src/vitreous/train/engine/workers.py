"""The worker processes of a loader: how one's death shows, and how all of them end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Process
from multiprocessing.util import Finalize

from vitreous.base.errors import DataError


def tells_of_a_death(error: Exception) -> bool:
    """Whether this was raised because a worker process is gone, and not by what it was doing."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    if "in DataLoader worker process" in str(error):  # what it stumbled on, sent here
        return False
    return isinstance(error, (EOFError, ConnectionError, FileNotFoundError))  # it died before it handed over a batch's memory


def kill(workers: list[Process]) -> None:
    """Kill what is left of the workers: one that waits for what a dead one held would wait for
    ever, deaf to SIGTERM.
    """
    for worker in workers:
        worker.kill()


def kill_at_exit(batches: Iterator) -> None:
    """Kill the workers that are there when the program ends.

    torch sends them SIGTERM, which they ignore, and waits.
    """
    if getattr(batches, "_workers", None) and not hasattr(batches, "killing"):  # persistent ones come here every epoch
        batches.killing = Finalize(batches, kill, (batches._workers,), exitpriority=1)


@contextmanager
def child_signals_as_they_are() -> Iterator[None]:
    """Take back torch's handler of a worker's death, which raises wherever the program is; the
    loader finds out anyway.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def worker_killed(workers: int) -> DataError:
    return DataError(
        f"Found a worker process killed, twice in one pass, of --workers {workers}. Expected them to live: the usual cause is "
        "too little memory, or too little in /dev/shm. Lower --workers or --batch-size, then resume the run."
    )
