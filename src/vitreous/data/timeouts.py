"""Read files with a timeout.

A drive that does not answer must not stop a run for ever, and without a message.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from vitreous.base.errors import VitreousError

PATIENCE = 60.0  # seconds for one file
STALLS = 3  # files without an answer, none in between that had one, after which the drive is taken to be gone


class Stalled(OSError):
    """A file of which nothing was heard in time."""


class DriveGone(VitreousError):
    """Several files in a row of which nothing was heard in time."""


class Reader:
    """A thread that reads for one other, and is abandoned where a read hangs.

    It ends with the thread that it reads for.
    """

    def __init__(self):
        self.asked: queue.SimpleQueue = queue.SimpleQueue()
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=answer, args=(self.asked, self.answers), daemon=True)  # no exit waits for it
        self.thread.start()

    def read(self, work: Callable[[], bytes]) -> bytes:
        """What `work` gives, or raises. Raises queue.Empty if that takes too long."""
        self.asked.put(work)
        content, error = self.answers.get(timeout=PATIENCE)
        if error is not None:
            raise error
        return content

    def __del__(self):
        self.asked.put(None)


def answer(asked: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    while (work := asked.get()) is not None:
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))


READERS = threading.local()  # each thread's own
STALLED: list[str] = []  # names of files since the last that answered


def read_in_time(work: Callable[[], bytes], name: str) -> bytes:
    """What `work`, which reads the file `name`, gives or raises.

    Raises Stalled after a minute without an answer, DriveGone at the third file in a row.
    """
    reader = getattr(READERS, "one", None)
    if reader is None or not reader.thread.is_alive():  # none yet, or this process is a fork of the one that it was in
        reader = Reader()
    READERS.one = None  # what is interrupted here is not asked again: its answer would be taken for another's
    try:
        content = reader.read(work)
    except queue.Empty:
        STALLED.append(name)
        if len(STALLED) >= STALLS:
            raise DriveGone(
                f"Found no answer within {PATIENCE:g} s from {', '.join(map(repr, STALLED[-STALLS:]))}. Expected a drive that "
                "answers. See that it is mounted and not overloaded, then start again; a run goes on with resume."
            ) from None
        raise Stalled(f"no answer within {PATIENCE:g} s") from None
    except OSError:
        READERS.one = reader
        STALLED.clear()
        raise
    READERS.one = reader
    STALLED.clear()
    return content
