"""What is wrong with data, how readers report it, and names from outside made harmless."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vitreous.base.errors import DataError

FORMULA = ("=", "+", "-", "@")  # a cell that begins so may be run as a formula by a spreadsheet
# Told by a reader of the kind of a problem, the file (or folder, or line) that has it, and the
# error. May raise it, or note it and let the reader go on without that file.
Report = Callable[[str, str, DataError], None]


def raised(kind: str, file: str, error: DataError) -> None:
    """The `Report` of a run: the first problem stops it."""
    raise error


def listed(names: Sequence[str]) -> str:
    """The first ten names, quoted so that they can be printed."""
    return ", ".join(repr(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def shown(text: str) -> str:
    """Text with control characters and undecodable bytes written out.

    What would act on a terminal cannot.

    Nothing is lost: a backslash is doubled, and the others become \\x1b, \\u202e or \\udce9.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\\", "\\\\"))


def cell(text: str) -> str:
    """Text for a CSV file that spreadsheets open: as `shown`, and never a formula.

    An apostrophe comes before what would be one.
    """
    safe = shown(text)
    return "'" + safe if safe.lstrip().startswith(FORMULA) else safe
