"""Tables by column: joined, in order, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WHOLE = ("layer", "head", "image")  # columns of whole numbers, of which -1 means none in particular
WORDS = ("source", "kind", "component", "measure")
Columns = dict[str, np.ndarray]


def joined(tables: Sequence[Columns]) -> Columns:
    """Tables of the same columns under one another; a column that one lacks is NaN there."""
    tables = [table for table in tables if table]
    names = list(dict.fromkeys(name for table in tables for name in table))
    counts = [len(next(iter(table.values()))) for table in tables]
    blank = [np.full(count, np.nan) for count in counts]
    return {
        name: np.concatenate([table.get(name, empty) for table, empty in zip(tables, blank, strict=True)]) for name in names
    }


def in_order(table: Columns, *values: np.ndarray) -> Columns:
    """The rows of a table sorted by these values, the first ones first.

    Whatever batches they came from.
    """
    order = np.lexsort(values[::-1])
    return {name: column[order] for name, column in table.items()}


def without_nan(value: Any) -> Any:
    """A tree of lists and dicts with None in place of numbers that are not finite.

    JSON knows no other.
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(columns: Mapping[str, Any]) -> str:
    """Columns as CSV text; NaN, and -1 of `head`, `image`, `layer`, are empty.

    What a spreadsheet would run is quoted.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    lists = [cells(name, np.asarray(column).tolist()) for name, column in columns.items()]
    writer.writerows(zip(*lists, strict=True))
    return text.getvalue()


def from_csv(text: str) -> Columns:
    """The columns that `as_csv` wrote.

    -1 for empty cells of `head`, `image`, `layer`, NaN for other empty ones.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    columns: Columns = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        if name in WHOLE:
            columns[name] = np.array([int(value or -1) for value in values])
        elif name in WORDS:
            columns[name] = np.array(values)
        else:
            columns[name] = np.array([float(value or "nan") for value in values])
    return columns


def cells(name: str, values: list[Any]) -> list[Any]:
    if name in WHOLE:
        return ["" if value == -1 else value for value in values]
    return ["" if value != value else f"{value:.7g}" if isinstance(value, float) else harmless(value) for value in values]


def harmless(value: Any) -> Any:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
