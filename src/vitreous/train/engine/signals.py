"""Stopping: SIGTERM and Ctrl-C wait for the end of a step, so that the state can be saved."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitreous.base.processes import ALONE, Lost, Team

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """While it is entered, signals are noted for `end`; a second Ctrl-C ends the run at once.

    folder: what to give to `vitreous resume`, of which `say` prints a line. Only the main thread of
    a program receives signals; in another one this does nothing.
    """

    def __init__(self, folder: Path, say: Callable[[str], Any]):
        self.folder, self.say = folder, say
        self.heard: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.hear) for number in STOP_SIGNALS}
            self.hook, sys.unraisablehook = sys.unraisablehook, self.unraisable
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.before:
            sys.unraisablehook = self.hook
        if self.heard is not None and isinstance(error, Lost):  # another process had stopped already
            self.say(str(error))
            raise SystemExit(128 + self.heard) from error

    def hear(self, number: int, _: Any) -> None:
        if self.heard is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.heard is None:
            self.heard = number

    def unraisable(self, ignored: Any) -> None:
        """A second Ctrl-C in a `__del__`, where Python ends nothing and prints a traceback.

        The run then ends after its step, by the first one.
        """
        if not (self.heard and issubclass(ignored.exc_type, KeyboardInterrupt)):
            self.hook(ignored)

    def agree(self, team: Team) -> bool:
        """Collective: whether any process of the team has received a signal."""
        return team.most(self.heard or 0) > 0

    def end(self, team: Team = ALONE) -> None:
        """Collective: KeyboardInterrupt after Ctrl-C, SystemExit(143) after SIGTERM, else nothing.

        To be called once the state is saved. Prints how to go on, which is the text of the
        KeyboardInterrupt as well.
        """
        self.heard = team.most(self.heard or 0) or None
        if self.heard is None:
            return
        message = f"Stopped as told; the state is saved. To go on: vitreous resume {self.folder}"
        self.say(message)
        if self.heard == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + self.heard)


def leave_to_parent(_: int = 0) -> None:
    """In a worker process: ignore the signals, which a terminal or a cluster sends to all."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C wait; a worker that is started meanwhile inherits that.

    So it is safe from them even before it runs `leave_to_parent`.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
