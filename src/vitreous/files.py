"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
