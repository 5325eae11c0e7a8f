"""CSV tables of images: each with its class or set of classes.

Where there are such columns also its part, boxes or mask.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path, PureWindowsPath

from vitreous.base.errors import DataError
from vitreous.data.decoding import contents
from vitreous.data.object_boxes import Box
from vitreous.data.problems import Report, name_list, raised
from vitreous.data.sources.listing import PARTS, Listing

SIDES = ("x0", "y0", "x1", "y1")
KNOWN = ("file", "label", "split", "mask", *SIDES)
SET = "label:"  # before the name of a class, in the head of a column of a class set
PRESENCE = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "": math.nan}  # 1.0 and 0.0 are how pandas writes them


def list_table(path: Path, *, outside: bool = False, report: Report = raised) -> Listing:
    """The images that a CSV file names; `report` is called for lines that do not fit.

    Columns: file, and label (the class) or, where an image may have several classes, one column
    `label:NAME` for each class: 1 present, 0 absent, empty not known. Optional: split (train, val
    or test, or a synonym; in every line or in none, then by content), mask (a .png) and x0, y0, x1,
    y1 (pixels, both ends included; empty where there is none; several lines of one file hold
    several boxes). Others are not read. Paths are relative to the table's folder, slashes or
    backslashes between their parts; one that leads out of it, by `..`, as an absolute path or
    through a link, is refused unless outside is set. A file that is not there is no mistake of the
    table: it is quarantined as unreadable.

    Raises DataError for a table without such columns, or with both label and label:NAME.
    """
    listing = Listing(path.stem, {}, {}, {})
    boxes: dict[str, list[Box]] = {}
    lines, listing.set_classes = read_rows(path)
    if not lines:
        raise DataError(f"Found no image in {str(path)!r}; expected a line for each, below file,label. Check the table.")
    for line, row in lines:
        try:
            add_row(row, path.parent, outside, listing, boxes)
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


def read_rows(path: Path) -> tuple[list[tuple[int, dict[str, str]]], tuple[str, ...]]:
    """The lines of a CSV file by column, with their numbers; and the classes of its columns
    label:NAME.

    Raises DataError for columns that do not say what each image is.
    """
    text = contents(path, str(path)).decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = list(reader.fieldnames or [])
        set_classes = tuple(name.removeprefix(SET) for name in columns if name.startswith(SET))
        if "label" in columns and set_classes:
            raise DataError(
                f"Found the column label and {name_list([SET + name for name in set_classes])} in {str(path)!r}; expected one "
                "class per image (label), or a set of classes (label:NAME for each). Take one of them out."
            )
        unnamed = "file" not in columns or not ("label" in columns or set_classes) or "" in set_classes
        if unnamed or len(set(columns)) < len(columns):
            raise DataError(
                f"Found the columns {name_list(columns)} in {str(path)!r}; expected file and label (or label:NAME for each of "
                f"several classes), each once, and any of {', '.join(KNOWN[2:])}, separated by commas. Name them so in the "
                "first line."
            )
        return [(reader.line_num, row) for row in reader], set_classes
    except csv.Error as error:
        raise DataError(
            f"Found {str(path)!r}, which is no table ({error}, line {reader.line_num}); expected comma-separated text."
        ) from error


def add_row(row: dict[str, str], folder: Path, outside: bool, listing: Listing, boxes: dict[str, list[Box]]) -> None:
    """Add one line to the listing.

    Raises ValueError saying what was found, expected and to be done.
    """
    if None in row or None in row.values():
        raise ValueError("it has more or fewer cells than the first line. Expected as many. Put names with commas in quotes.")
    name, split = slashes(row["file"]), row.get("split", "")
    present = tuple(presence(row, label) for label in listing.set_classes)
    label = "+".join(label for label, value in zip(listing.set_classes, present, strict=True) if value == 1)
    label = label if listing.set_classes else row["label"]
    if not name or not (label or present):
        raise ValueError("it lacks a file or a label. Expected both. Fill them in, or take the line out.")
    if present and all(map(math.isnan, present)):
        raise ValueError("nothing is known of its classes. Expected 1 or 0 for one at least. Fill in, or take the line out.")
    if split and split.lower() not in PARTS:
        raise ValueError(f"the split {split!r}. Expected one of {', '.join(PARTS)}. Mend it.")
    part = PARTS[split.lower()] if split else ""
    box = box_of(row)
    source = inside(name, folder, outside)
    mask_name = slashes(row.get("mask") or "")
    mask = inside(mask_name, folder, outside) if mask_name else None
    if name in listing.files:
        if (label, part, present) != (listing.classes[name], listing.parts[name], listing.sets.get(name, ())):
            raise ValueError(f"{name!r} once more, with another label or split. Expected one of each. Take one line out.")
        if box is None or name not in boxes:
            raise ValueError(f"{name!r} once more. Expected each image once, or a box in each of its lines. Take one out.")
    listing.files[name], listing.classes[name], listing.parts[name] = source, label, part
    if present:
        listing.sets[name] = present
    if box is not None:
        boxes.setdefault(name, []).append(box)
    elif mask is not None:
        listing.foregrounds[name] = (mask_name, mask)


def slashes(name: str) -> str:
    """A path with slashes between its parts, where it was written on Windows.

    A share and a drive stay as they are, and are refused by `inside`.
    """
    return name if name.startswith("\\") or PureWindowsPath(name).drive else name.replace("\\", "/")


def presence(row: dict[str, str], label: str) -> float:
    """1, 0 or NaN of a class in a line. Raises ValueError for another value."""
    text = row[SET + label].strip()
    if text not in PRESENCE:
        raise ValueError(f"{text!r} for {SET}{label}. Expected 1 (present), 0 (absent) or nothing (not known). Mend it.")
    return PRESENCE[text]


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
    """The file of that name in the folder.

    Raises ValueError for one that leads out of it, unless that is allowed.
    """
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
