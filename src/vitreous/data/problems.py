"""What is wrong with data, how readers report it, and names from outside made harmless."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vitreous.base.errors import DataError

HEIF_EXTRA = 'HEIC is read with pip install "vitreous[heic]"'
FORMULA = ("=", "+", "-", "@")  # a cell that begins so may be run as a formula by a spreadsheet
# Told by a reader of the kind of a problem, the file (or folder, or line) that has it, and the
# error. May raise it, or note it and let the reader go on without that file.
Report = Callable[[str, str, DataError], None]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its kind, the file, folder, class or line, and a sentence.

    kind: unreadable, duplicate, leak (a copy in another part), contradiction (a copy in another
    class), class, size, mask, box, suffix (images that are passed over), empty (a folder without
    an image), folder (one that cannot be read), table or structure.
    """

    kind: str
    file: str
    what: str


def raised(kind: str, file: str, error: DataError) -> None:
    """The `Report` of a run: the first problem stops it."""
    raise error


def conversions(notes: Iterable[str]) -> list[str]:
    """One line that counts what decoding did beside decoding; none where it did nothing."""
    counts = [f"{count:,} {note}" for note, count in sorted(Counter(notes).items())]
    return [f"Files: {'; '.join(counts)}."] if counts else []


def passed_over(suffixes: Mapping[str, int]) -> list[str]:
    """One line that counts files by a suffix that is not read; none where there is none."""
    counts = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(suffixes.items()))
    extra = f" {HEIF_EXTRA}." if {".heic", ".heif", ".hif"} & suffixes.keys() else ""
    return [f"Passed over, since their suffix is not that of an image read here: {shown(counts)}.{extra}"] if counts else []


def order_remark(classes: Sequence[str]) -> list[str]:
    """A line on classes in text order to which timm's readers of folders give other numbers.

    They sort naturally: 9 before 10, without regard to case. None where both orders agree, or the
    classes are not in the order of texts.
    """
    natural = sorted(classes, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name.lower())])
    if list(classes) != sorted(classes) or natural == list(classes):
        return []
    ours, theirs = (", ".join(shown(name) for name in names[:4]) for names in (classes, natural))
    return [
        f"Class order: that of texts ({ours}, ...), as torchvision has it. timm numbers the same folders in natural order "
        f"({theirs}, ...): compare classes by name (label_names in config.json), not by number."
    ]


def name_list(names: Sequence[str]) -> str:
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
