"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vitreous.base.errors import SettingError


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer` write a temporary file beside `path`, sync it, and put it in the place of `path` in one step."""
    temporary = path.with_name(path.name + ".partial")
    try:
        writer(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 with plain line ends."""
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """What goes wrong in writing to a folder or file, as a SettingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingError(f"Cannot write {folder} ({why}). Expected a place to write to, with space. Mend --out.") from error


def free_folder(parent: Path, name: str) -> Path:
    """The next free parent/NAME, NAME-2, ..."""
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder
