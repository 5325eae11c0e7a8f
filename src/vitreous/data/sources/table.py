"""Tables of images: a CSV file that names each image, its class, its part if any, and its boxes or mask if any."""

from __future__ import annotations

import csv
import io
from pathlib import Path, PureWindowsPath

from vitreous.base.errors import DataError
from vitreous.data.decoding import contents
from vitreous.data.object_boxes import Box, Foreground
from vitreous.data.problems import Report, listed, raised
from vitreous.data.sources.listing import PARTS, Listing

SIDES = ("x0", "y0", "x1", "y1")
KNOWN = ("file", "label", "split", "mask", *SIDES)


def list_table(path: Path, *, outside: bool = False, report: Report = raised) -> Listing:
    """The images that a CSV file with the columns file and label names; `report` is told of lines that do not fit.

    Optional columns: split (train, val or test, or a synonym; in every line or in none, then by content), mask (a .png) and
    x0, y0, x1, y1 (pixels, both ends included; empty where there is none; several lines of one file hold several boxes).
    Others are not read. Paths are relative to the table's folder, slashes between their parts; one that leads out of it, by
    `..`, as an absolute path or through a link, is refused unless outside is set. A file that is not there is no mistake of
    the table: it is quarantined as unreadable.
    """
    listing = Listing(path.stem, {}, {}, {})
    boxes: dict[str, list[Box]] = {}
    if not (lines := rows(path)):
        raise DataError(f"Found no image in {str(path)!r}; expected a line for each, below file,label. Check the table.")
    for line, row in lines:
        try:
            take(row, path.parent, outside, listing, boxes)
        except ValueError as error:
            problem = DataError(f"Found line {line} of {str(path)!r}: {error}")
            problem.__cause__ = error
            report("table", f"line {line}", problem)
    listing.foregrounds |= boxes
    if not any(listing.parts.values()):
        listing.parts = None
    elif lacking := [name for name, part in listing.parts.items() if not part]:
        problem = DataError(
            f"Found {len(lacking)} lines of {str(path)!r} without a split, such as that of {lacking[0]!r}; expected one in "
            "every line, or in none. Fill the column, or empty it for a split by content."
        )
        report("table", lacking[0], problem)
        for name in lacking:
            del listing.files[name], listing.classes[name], listing.parts[name]
    return listing


def rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines of a CSV file by column, with their numbers. Raises DataError if it has no columns file and label."""
    text = contents(path, str(path)).decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = reader.fieldnames or []
        if not {"file", "label"} <= set(columns) or len(set(columns)) < len(columns):
            raise DataError(
                f"Found the columns {listed(columns)} in {str(path)!r}; expected file and label, each once, and any of "
                f"{', '.join(KNOWN[2:])}, separated by commas. Name them so in the first line."
            )
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(
            f"Found {str(path)!r}, which is no table ({error}, line {reader.line_num}); expected comma-separated text."
        ) from error


def take(row: dict[str, str], folder: Path, outside: bool, listing: Listing, boxes: dict[str, list[Box]]) -> None:
    """Add one line to the listing. Raises ValueError saying what was found, expected and to be done."""
    if None in row or None in row.values():
        raise ValueError("it has more or fewer cells than the first line. Expected as many. Put names with commas in quotes.")
    name, label, split = row["file"], row["label"], row.get("split", "")
    if not name or not label:
        raise ValueError("it lacks a file or a label. Expected both. Fill them in, or take the line out.")
    if split and split.lower() not in PARTS:
        raise ValueError(f"the split {split!r}. Expected one of {', '.join(PARTS)}. Mend it.")
    part = PARTS[split.lower()] if split else ""
    box = box_of(row)
    source = inside(name, folder, outside)
    mask = inside(row["mask"], folder, outside) if row.get("mask") else None
    if name in listing.files:
        if (label, part) != (listing.classes[name], listing.parts[name]):
            raise ValueError(f"{name!r} once more, with another label or split. Expected one of each. Take one line out.")
        if box is None or name not in boxes:
            raise ValueError(f"{name!r} once more. Expected each image once, or a box in each of its lines. Take one out.")
    listing.files[name], listing.classes[name], listing.parts[name] = source, label, part
    if box is not None:
        boxes.setdefault(name, []).append(box)
    elif mask is not None:
        foreground: Foreground = (row["mask"], mask)
        listing.foregrounds[name] = foreground


def box_of(row: dict[str, str]) -> Box | None:
    """The box in a line, None where its cells are empty or there are no such columns."""
    cells = [row.get(side, "") for side in SIDES]
    if not any(cells):
        return None
    try:
        x0, y0, x1, y1 = (int(value) for value in cells)
        if not (0 <= x0 <= x1 and 0 <= y0 <= y1):
            raise ValueError
    except ValueError:
        raise ValueError(f"the box {', '.join(map(repr, cells))}. Expected numbers x0 <= x1, y0 <= y1. Mend it.") from None
    return x0, y0, x1, y1


def inside(name: str, folder: Path, outside: bool) -> Path:
    """The file of that name in the folder. Raises ValueError for one that leads out of it, unless that is allowed."""
    if "\0" in name:
        raise ValueError(f"the file {name!r}. Expected a name without a zero byte. Mend it.")
    path = folder / name
    elsewhere = Path(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name  # whatever machine reads it
    try:
        left = elsewhere or not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long
        raise ValueError(f"the file {name!r} ({error}). Expected a path that can be followed. Mend it.") from error
    if left and not outside:
        raise ValueError(
            f"the file {name!r}, which leads out of the table's folder. Expected paths inside it. Move the files there, or, if "
            "you trust the table, allow it with --outside (in Python: outside=True)."
        )
    return path
