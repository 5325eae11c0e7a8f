"""A lock on a run folder, so that no two processes write into it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitreous.base.errors import SettingError
from vitreous.train.engine.state import writing

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

NAME = "lock"


@contextmanager
def locked(folder: Path, say: Callable[[str], Any]) -> Iterator[None]:
    """Hold the lock of a folder.

    The system lets go of it when the process ends, however it ends.

    Raises SettingError if another process has it. What a dead process left is taken over, and said.
    """
    if fcntl is None:
        say("This system has no file locks. See to it that no other process works in this folder.")
        yield
        return
    path = folder / NAME
    with writing(folder):
        descriptor = take(path)
    if descriptor is None:
        raise SettingError(
            f"Found {folder} in use by {owner(path)}. Expected one process in a run folder. Wait for it, or stop it."
        )
    try:
        if os.fstat(descriptor).st_size:
            say(f"Took over the lock of {owner(path, descriptor)}, which is gone.")
        with writing(folder):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"process": os.getpid(), "machine": platform.node()}).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def take(path: Path) -> int | None:
    """An open file that is locked and still the one of that name.

    None if another process has it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, it does not pass on to workers
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:  # its last owner removed it between opening and locking
            pass
        os.close(descriptor)


def owner(path: Path, descriptor: int | None = None) -> str:
    """Who wrote the lock, in words."""
    try:
        text = path.read_bytes() if descriptor is None else os.pread(descriptor, 10_000, 0)
        record = json.loads(text)
        return f"process {record['process']} on {record['machine']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
