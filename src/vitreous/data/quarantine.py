"""Images that cannot be read, found by decoding every file once before training.

They are left out, and written down.

A run leaves them out from the start, so that the same files give the same batches; a look at
headers alone would let a file that is cut short change a batch in the middle of a run. The same
pass takes digests, by which a tree is split.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from vitreous.data.decoding import (
    BROKEN,
    ORIENTATION,
    Source,
    Unreadable,
    contents,
    converted,
    cropped,
    opened,
    remarks,
    rows_left,
    unreadable,
)
from vitreous.data.problems import cell, shown

THREADS = 16  # at most; each holds one image
SLICE = 1024  # files handed to the threads at once, after which progress is said
COLUMNS = ["file", "class", "split", "reason"]
Progress = Callable[[int, int], None]  # (done, of)


@dataclass(frozen=True)
class Quarantined:
    """An image that a run leaves out: its name, class, part and the reason.

    The part is "" before a split.
    """

    file: str
    label: str
    split: str
    reason: str

    def cells(self) -> tuple[str, ...]:
        """One line of quarantine.csv, in the order of COLUMNS."""
        return tuple(cell(value) for value in (self.file, self.label, self.split, self.reason))


@dataclass(frozen=True)
class Examined:
    """What decoding a file showed. reason: why it cannot be used, "" if it can.

    notes: conversions that it needs.

    contents: digest of its bytes, "" if there were none to read. pixels: digest of size and pixels,
    if asked for.
    """

    reason: str = ""
    notes: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)  # width, height, turned as EXIF says
    contents: str = ""
    pixels: str = ""


def examine(
    files: dict[str, Source], channels: int = 3, *, pixels: bool = False, progress: Progress | None = None
) -> dict[str, Examined]:
    """Decode every file once, in threads, and keep what that showed, by name."""
    found: dict[str, Examined] = {}
    names = iter(files)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        while some := list(islice(names, SLICE)):
            found |= zip(some, pool.map(lambda name: examined(files[name], name, channels, pixels), some), strict=True)
            if progress is not None:
                progress(len(found), len(files))
    return found


def examined(source: Source, name: str, channels: int, pixels: bool) -> Examined:
    """What decoding one file shows."""
    try:
        raw = contents(source, name)
    except Unreadable as error:
        return Examined(error.reason)
    digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
    try:
        with opened(raw) as image:
            notes, size = remarks(image, name), image.size
            if pixels:
                whole = cropped(converted(image, name, channels), source, name)
                of_pixels = hashlib.blake2b(repr(whole.size).encode() + whole.tobytes(), digest_size=16).hexdigest()
                return Examined("", notes, whole.size, digest, of_pixels)
            image.draft(None, (1, 1))  # a JPEG is read to its end, but only an eighth of a side is made of it
            converted(image, name, channels)
            width, height = size[::-1] if image.getexif().get(ORIENTATION, 1) > 4 else size
            return Examined("", notes, (width, rows_left(height, source, name)), digest)
    except Unreadable as error:
        return Examined(error.reason, contents=digest)
    except BROKEN as error:
        return Examined(unreadable(name, error).reason, contents=digest)


def lines(quarantined: Iterable[Quarantined], counts: Counter[tuple[str, str]]) -> list[str]:
    """Lines about quarantined images for the start, with the counts of (split, class)."""
    quarantined = list(quarantined)
    if not quarantined:
        return []
    lost = Counter((bad.split, bad.label) for bad in quarantined)
    groups = [f"{key[0]} {shown(key[1])}".strip() + f" {n} of {counts[key]}" for key, n in sorted(lost.items())]
    more = f" and {len(groups) - 20} classes more" if len(groups) > 20 else ""
    return [
        f"Quarantined: {len(quarantined):,} of {counts.total():,} images, see quarantine.csv: {', '.join(groups[:20])}{more}.",
        *(f"  {shown(bad.file)}: {shown(bad.reason)}" for bad in quarantined[:3]),
        *([f"  and {len(quarantined) - 3} more"] if len(quarantined) > 3 else []),
    ]
