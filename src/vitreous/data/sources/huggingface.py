"""Data sets of the Hugging Face library, saved to disk.

Their images are decoded by us, and nothing is ever downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitreous.base.errors import DataError, VitreousError
from vitreous.data.problems import Report, name_list, raised
from vitreous.data.sources.listing import PARTS, Listing
from vitreous.data.sources.table import inside


@dataclass(frozen=True)
class TableRow:
    """An image in a row of a table on disk, read when asked for."""

    table: Any  # datasets.Dataset whose image column is not decoded
    index: int
    column: str
    folder: Path
    outside: bool

    def read_bytes(self) -> bytes:
        """The bytes of the image file; raises ValueError for a row without an image, or with one
        elsewhere on the disk.
        """
        row = self.table[self.index][self.column]
        if row is None or not (row.get("bytes") or row.get("path")):
            raise ValueError("the row has no image")
        return row["bytes"] or inside(row["path"], self.folder, self.outside).read_bytes()

    def __len__(self) -> int:
        """Bytes of the image file."""
        return len(self.read_bytes())


def list_saved(path: Path, *, outside: bool = False, report: Report = raised) -> Listing:
    """The images of a data set that `datasets` saved to disk, by its features.

    Expected are one Image and one label (save_to_disk).

    Splits go by their names (train, val, test and synonyms); a set without, or with train alone, is
    split by content. The label is the one ClassLabel column, or the one called label or labels;
    classes go by name. Needs the extra vitreous[datasets].
    """
    try:
        import datasets
    except ImportError as error:
        raise VitreousError(
            'Found no package datasets; expected it, to read a data set of Hugging Face. pip install "vitreous[datasets]".'
        ) from error
    if not path.is_dir():
        raise DataError(f"Found no folder {str(path)!r}; expected a data set saved with save_to_disk. Check the path.")
    try:
        loaded = datasets.load_from_disk(str(path.resolve()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"Found {str(path)!r}, which datasets cannot read ({error}); expected one saved with save_to_disk. Save it so."
        ) from error
    tables = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    listing = Listing(path.resolve().name, {}, {}, {})
    for split, table in tables.items():
        if split.lower() not in PARTS:
            problem = DataError(
                f"Found the split {split!r} in {str(path)!r}; expected one of {', '.join(PARTS)}. Rename it or take it out."
            )
            report("structure", split, problem)
            continue
        image, label = columns(table, path, datasets)
        listing.own_order = listing.own_order or tuple(getattr(table.features[label], "names", None) or ())
        bare = table.cast_column(image, datasets.Image(decode=False)).select_columns([image])
        for i, name in labels(table, label, datasets, split, report):
            key = f"{split}/{i:06d}"
            listing.files[key] = TableRow(bare, i, image, path, outside)
            listing.classes[key], listing.parts[key] = name, PARTS[split.lower()]
    if not listing.files:
        raise DataError(f"Found no image in {str(path)!r}; expected rows with an image and a label. Check the data set.")
    if set(listing.parts.values()) == {"train"}:
        listing.parts = None
    return listing


def columns(table: Any, path: Path, datasets: Any) -> tuple[str, str]:
    """The columns of image and label. Raises DataError unless there is one of each."""
    features = dict(table.features)
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    chosen = named if len(named) == 1 else [name for name in ("label", "labels") if name in features]
    if len(images) != 1 or len(chosen) != 1:
        raise DataError(
            f"Found the columns {name_list(list(features))} in {str(path)!r}, of which images: {name_list(images) or 'none'}, "
            f"labels: {name_list(chosen or named) or 'none'}; expected one Image and one ClassLabel. Cast or remove columns."
        )
    return images[0], chosen[0]


def labels(table: Any, column: str, datasets: Any, split: str, report: Report) -> Iterator[tuple[int, str]]:
    """Row and class name of all rows that have a label; `report` is told of the others."""
    kind = table.features[column]
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    for i, value in enumerate(table[column]):
        if value is None or (names is not None and not 0 <= value < len(names)):
            problem = DataError(
                f"Found row {i} of {split} with the label {value!r}; expected one of its classes. Filter such rows out."
            )
            report("table", f"{split}, row {i}", problem)
            continue
        yield i, str(value) if names is None else names[value]
