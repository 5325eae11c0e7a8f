"""Files: written whole or not at all, free names, and JSON from untrusted sources."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vitreous.base.errors import DataError, SettingError

BYTES = 16 << 20  # of a JSON file: names and descriptions of 21,841 classes take a tenth
DEPTH = 20  # of lists and objects inside one another


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer` write a temporary file, sync it, and move it to `path` in one step."""
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
def writable(folder: Path, advice: str = "Mend --out.") -> Iterator[None]:
    """In the body, errors of writing to a folder or file become a SettingError.

    advice: the last part of its text, what to do.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise SettingError(f"Cannot write {folder} ({why}). Expected a place to write to, with space. {advice}") from error


def free_folder(parent: Path, name: str) -> Path:
    """The next free parent/NAME, NAME-2, ..."""
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def check_new(path: Path) -> None:
    """Raise SettingError unless `path` is free, and in a folder that is there."""
    if path.exists() or path.is_symlink():
        raise SettingError(f"Found {path} already. Expected a new file. Choose another --out, or move that one away.")
    if not path.parent.is_dir():
        raise SettingError(f"Found no folder {path.parent}. Expected one for {path.name}. Make it, or choose another --out.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which may come from an untrusted source.

    Raises DataError for a file that is missing, too long or too deep, no JSON, or no object, and
    for numbers that are no JSON (NaN) and keys that stand there twice.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        if path.stat().st_size > BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, the limit is {BYTES:,}")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_number, object_pairs_hook=unique_keys)
        check_depth(value)
    except (OSError, ValueError, RecursionError) as error:
        reason = "lists or objects too deep inside one another" if isinstance(error, RecursionError) else error
        raise DataError(
            f"Found no readable {path} ({reason}). Expected a folder that save() or timm wrote. Check the path."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"Found {path} holding a {type(value).__name__}. Expected a JSON object. Get the file again.")
    return value


def no_number(text: str) -> None:
    """Refuse NaN and infinities."""
    raise ValueError(f"{text} is no number in JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its pairs.

    Raises ValueError for a key that occurs twice, of which readers choose differently.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands there twice")
    return value


def check_depth(value: Any) -> None:
    """Raise ValueError for lists and objects too deep inside one another."""
    level = [value]
    for _ in range(DEPTH):
        inner = [item for part in level for item in (part.values() if isinstance(part, dict) else part)]
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"lists or objects more than {DEPTH} deep inside one another")
