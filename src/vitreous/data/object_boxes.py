"""Foregrounds of images in files: masks in a folder beside them, or boxes in a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Container

import numpy as np

from vitreous.base.errors import DataError
from vitreous.data.decoding import Source
from vitreous.data.masks import decode_mask
from vitreous.data.problems import Report, raised

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, both ends included
MaskFile = tuple[str, Source]  # name and file
ObjectBoxes = MaskFile | list[Box]


class LooseBoxes(list[Box]):
    """Boxes as a published set has them: what reaches beyond the image is cut off, no mistake."""


def part_masks(files: dict[str, Source]) -> tuple[dict[str, Source], dict[str, MaskFile]]:
    """Images, and masks by the stem of their image, from one list of files.

    An `images` folder beside `masks` is left out of the images' names.
    """
    masks, beside = {}, set()
    for name, source in files.items():
        parts = name.split("/")
        if "masks" in parts[:2] and len(parts) > parts.index("masks") + 1:
            at = parts.index("masks")
            masks["/".join(parts[:at] + parts[at + 1 :]).rpartition(".")[0]] = (name, source)
            beside.add("/".join([*parts[:at], "images", ""]))
    mask_names = {name for name, _ in masks.values()}
    images = {}
    for name, source in files.items():
        if name not in mask_names:
            prefix = next((prefix for prefix in beside if name.startswith(prefix)), "")
            images[prefix.removesuffix("images/") + name.removeprefix(prefix)] = source
    return images, masks


def match_masks(masks: dict[str, MaskFile], files: dict[str, Source], report: Report = raised) -> dict[str, MaskFile]:
    """Masks by the name of their image; `report` is told of a mask without one."""
    stems = {name.rpartition(".")[0]: name for name in files}
    strangers = [name for stem, (name, _) in masks.items() if stem not in stems or not name.lower().endswith(".png")]
    for name in strangers:
        problem = DataError(
            f"Found {len(strangers)} files in `masks` that no image goes with, such as {name!r}; expected .png "
            "files of the images' relative names. Rename them or, if `masks` is a class, rename that folder."
        )
        report("mask", name, problem)
    return {stems[stem]: mask for stem, mask in masks.items() if stem in stems and mask[0].lower().endswith(".png")}


def read_boxes(raw: bytes, files: Container[str], report: Report = raised, *, others: bool = False) -> dict[str, list[Box]]:
    """Boxes from a table with the columns file, x0, y0, x1, y1.

    Split and class (or wnid) may stand before the file's own name.

    files: names of the images. others: pass over the boxes of images that are not among them.
    """
    boxes: dict[str, list[Box]] = {}
    rows = csv.DictReader(io.StringIO(raw.decode("utf-8-sig", "replace")))
    for line, row in enumerate(rows, start=2):
        try:
            parts = [row[key] for key in ("split", "class", "wnid", "file") if row.get(key)]
            box = tuple(int(row[key]) for key in ("x0", "y0", "x1", "y1"))
            name = "/".join(parts).replace("\\", "/")  # as Windows writes them
            if others and parts and name not in files:
                continue
            if name not in files or not (0 <= box[0] <= box[2] and 0 <= box[1] <= box[3]):
                raise ValueError(name)
        except (KeyError, TypeError, ValueError) as error:
            problem = DataError(
                f"Found {row!r} in line {line} of boxes.csv; expected the file (a path, or beside split and class "
                "columns) of an image there is, and whole numbers x0 <= x1, y0 <= y1. Mend the line."
            )
            problem.__cause__ = error
            report("box", f"boxes.csv, line {line}", problem)
            continue
        boxes.setdefault(name, []).append(box)
    return boxes


def foreground_mask(foreground: ObjectBoxes, name: str, width: int, height: int) -> tuple[np.ndarray, str]:
    """The (height, width) bool mask of an image, from its mask file or its boxes.

    Beside it how the file was read, as `decode_mask` says; empty for boxes.
    """
    if isinstance(foreground, tuple):
        mask, note = decode_mask(foreground[1], foreground[0])
        if mask.shape != (height, width):
            raise DataError(
                f"Found the mask {foreground[0]!r} of {mask.shape[1]} x {mask.shape[0]} pixels; expected "
                f"{width} x {height} as its image. Make both the same size."
            )
        return mask, note
    mask = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in foreground:
        if (x1 >= width or y1 >= height) and not isinstance(foreground, LooseBoxes):
            raise DataError(
                f"Found the box {(x0, y0, x1, y1)} for {name!r}, which has {width} x {height} pixels; "
                "expected a box inside the image. Mend its line in boxes.csv."
            )
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask, ""
