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
    """Hold the lock of a folder; the system frees it when the process ends, however it ends.

    Raises SettingError if another process has it. The lock of a dead process is taken over, with a
    line about it.
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
        if os.fstat(descriptor).st_size:  # it is free, and yet its owner did not remove it
            say(f"Took over the lock of {owner(path)}, which is gone.")
        with writing(folder):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"process": os.getpid(), "machine": platform.node()}).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: see `take`
        os.close(descriptor)


def take(path: Path) -> int | None:
    """An open, locked file, still the one of that name; None if another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by workers
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:  # its last owner removed it between opening and locking
            pass
        os.close(descriptor)


def owner(path: Path) -> str:
    """Who wrote the lock, in words."""
    try:
        record = json.loads(path.read_bytes())
        return f"process {record['process']} on {record['machine']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
