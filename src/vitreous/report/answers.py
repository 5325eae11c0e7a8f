"""Test images of a run from its files: which are wrong, and how well each class goes.

Of predictions.csv, classes.csv and mistakes.safetensors; those of older runs have no names of
files, which are then numbers, and no pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vitreous.base.errors import DataError
from vitreous.base.statistics import wilson
from vitreous.report import packing
from vitreous.report.folders import read_csv, read_json

MATRIX = 30  # classes up to which a page has the whole confusion matrix
PAIRS = 300  # the most frequent confusions of more classes
LISTED = 1000  # mistakes on a page, the surest first
PARTS = ("images", "present", "average_precision")  # of a class, where an image may show several


def answers(folder: Path, pictures: dict[str, int]) -> dict[str, dict[str, Any]]:
    """{test set: its answers} of a run; empty where its task has none by class.

    pictures: {data address: number}, filled here. Raises DataError for files that do not fit.
    """
    rows = read_csv(folder / "predictions.csv")
    try:
        images, by_set = read_pictures(folder / "mistakes.safetensors"), {}
        for row in rows:
            by_set.setdefault(row["set"], []).append(row)
        if rows and {"label", "predicted", "probability"} <= set(rows[0]):
            names = label_names(folder, rows)
            return {test: single(some, names, images, pictures) for test, some in by_set.items()}
        found = several(read_csv(folder / "classes.csv"))
        wrong = {test: several_wrong(by_set.get(test, []), images, pictures) for test in found}
        return {test: entry | wrong[test] for test, entry in found.items()}
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(
            f"Found tables of predictions in {folder} that do not fit ({type(error).__name__}: {error}). Expected those "
            "of a run. Train again, or take predictions.csv and classes.csv away."
        ) from error


def label_names(folder: Path, rows: Sequence[dict[str, str]]) -> dict[int, str]:
    """{class: its name}: as predictions.csv has them, else config.json, else numbers."""
    numbers = {int(row[column]) for row in rows for column in ("label", "predicted")}
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    listed = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names") or []
    names = {k: str(listed[k]) if k < len(listed) else str(k) for k in numbers}
    for row in rows if "label_class" in rows[0] else ():
        names |= {int(row[column]): row[f"{column}_class"] for column in ("label", "predicted")}
    return names


def read_pictures(path: Path) -> dict[str, bytes]:
    """JPEG files by "SET/INDEX"; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"Cannot read {path} ({error}). Expected pictures of mistakes. Delete it; the page does without."
        ) from error


def single(
    rows: list[dict[str, str]], names: dict[int, str], images: dict[str, bytes], pictures: dict[str, int]
) -> dict[str, Any]:
    """Answers where an image has one class.

    names: of classes, by number on the page. classes: [class, images, right, low, high], shares
    0 to 1. pairs: [class, predicted, images], all of them or the most frequent confusions.
    mistakes: [file, class, predicted, probability, picture]; count: of all mistakes.
    """
    numbers = sorted(names)
    place = {number: i for i, number in enumerate(numbers)}
    pairs = Counter((place[int(row["label"])], place[int(row["predicted"])]) for row in rows)
    images_of, right_of = Counter(), Counter()
    for (label, predicted), count in pairs.items():
        images_of[label] += count
        right_of[label] += count if label == predicted else 0
    classes = [[k, n, right_of[k], *rounded(wilson(right_of[k], n))] for k, n in sorted(images_of.items())]
    whole = len(numbers) <= MATRIX
    some = sorted(pairs.items()) if whole else [item for item in pairs.most_common() if item[0][0] != item[0][1]][:PAIRS]
    wrong = sorted((row for row in rows if row["label"] != row["predicted"]), key=lambda row: -float(row["probability"]))
    mistakes = []
    for row in wrong[:LISTED]:
        address = packing.picture(images.get(f"{row['set']}/{row['index']}", b""))
        number = pictures.setdefault(address, len(pictures)) if address else None
        pair = [place[int(row[column])] for column in ("label", "predicted")]
        mistakes.append([row.get("file") or f"image {row['index']}", *pair, float(row["probability"]), number])
    return {
        "names": [names[number] for number in numbers],
        "images": len(rows),
        "right": sum(right_of.values()),
        "interval": rounded(wilson(sum(right_of.values()), len(rows))),
        "classes": classes,
        "whole": whole,
        "pairs": [[*pair, count] for pair, count in some],
        "mistakes": mistakes,
        "count": len(wrong),
    }


def several(rows: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Answers where an image may show several classes: [class, images, present, precision]."""
    by_set: dict[str, dict[str, Any]] = {}
    for row in rows if rows and set(PARTS) <= set(rows[0]) else ():
        entry = by_set.setdefault(row["set"], {"names": [], "parts": []})
        precision = float(row["average_precision"]) if row["average_precision"] else None
        entry["parts"].append([len(entry["names"]), int(row["images"]), int(row["present"]), packing.number(precision)])
        entry["names"].append(row["name"] or row["class"])
    return by_set


def several_wrong(rows: list[dict[str, str]], images: dict[str, bytes], pictures: dict[str, int]) -> dict[str, Any]:
    """Images of a test set where any labelled class is wrong, the highest loss first.

    mistakes: [file, present, predicted, wrong (lists of classes), loss, picture]. Nothing of a run
    whose predictions.csv does not say what is wrong.
    """
    if not rows or not {"wrong", "loss"} <= set(rows[0]):
        return {}
    wrong = sorted((row for row in rows if row["wrong"]), key=lambda row: -float(row["loss"]))
    mistakes = []
    for row in wrong[:LISTED]:
        address = packing.picture(images.get(f"{row['set']}/{row['index']}", b""))
        number = pictures.setdefault(address, len(pictures)) if address else None
        classes = [[int(k) for k in row[column].split()] for column in ("present", "predicted", "wrong")]
        mistakes.append([row.get("file") or f"image {row['index']}", *classes, packing.number(float(row["loss"]), 4), number])
    return {"images": len(rows), "count": len(wrong), "mistakes": mistakes}


def rounded(interval: Sequence[float]) -> list[float | int | None]:
    return [packing.number(value, 4) for value in interval]
