"""Which folders a page is made of: readings, or runs with a reading per epoch.

And their text files.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitreous.base.errors import DataError

RUN_FIELDS = ("command", "seed", "device", "task", "model", "data", "settings", "versions", "machine", "remarks")
EPOCHS = 60  # of one run on a page


@dataclass(frozen=True)
class ReportInput:
    """What can be chosen on the page: one reading, or a run with one reading per epoch.

    A run whose attention cannot be read has no readings. folder: of a run.
    """

    name: str
    epochs: list[int] | None
    readings: list[Path]
    run: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] | None = None
    left_out: int = 0  # epochs that have a reading but no room
    folder: Path | None = None


def open_folders(folders: Sequence[Path]) -> list[ReportInput]:
    """What the folders hold.

    Raises DataError for one that is neither a reading nor a run, or is not complete.
    """
    if not folders:
        raise DataError("Found no folder. Expected a reading or a run. Name at least one.")
    sources = [_open(Path(folder)) for folder in folders]
    if len({source.run is None for source in sources}) > 1:
        raise DataError(
            f"Found readings and runs together ({', '.join(source.name for source in sources)}). Expected folders of one kind. "
            "Name a reading inside the run, such as RUN/readings/epoch-005."
        )
    if len({bool(source.readings) for source in sources}) > 1:
        unread = next(source.name for source in sources if not source.readings)
        raise DataError(
            f"Found no reading in {unread}, and some in the others. Expected runs of one kind. Make a page of each kind."
        )
    return [replace(source, name=name) for source, name in zip(sources, unique_names(sources, folders), strict=True)]


def open_study(folder: Path) -> tuple[dict[str, Any], list[Path]] | None:
    """What a page needs of study.json, and the first run of each arm; None for no study."""
    path = folder / "study.json"
    if not path.is_file():
        return None
    record = read_json(path)
    try:
        runs = [folder / f"{arm['folder']}-seed-{record['seeds'][0]}" for arm in record["arms"]]
        study = {name: record[name] for name in ("command", "seeds", "results")} | {"data": record["settings"]["data"]}
        # in lists, since the keys of the page's data are sorted
        return study | {"arms": list(study["results"]["cost"]), "tests": list(study["results"]["tests"])}, runs
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"Found a study in {folder} without results ({error!r}). Expected a finished one. Give its command again: it goes "
            "on where it stopped."
        ) from error


def unique_names(sources: Sequence[ReportInput], folders: Sequence[Path]) -> list[str]:
    """Names; to equal ones so much of their folder's path is added as differs."""
    names = [source.name for source in sources]
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        longer = [f"{source.name} ({'/'.join(path[-count:])})" for source, path in zip(sources, parts, strict=True)]
        names = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
        if len(set(names)) == len(names) or len(set(parts)) < len(parts):
            break
    return names


def _open(folder: Path) -> ReportInput:
    if (folder / "reading.json").is_file():
        title = read_json(folder / "reading.json").get("title")
        return ReportInput(str(title or folder.resolve().name), None, [folder])
    if (folder / "run.json").is_file():
        return _open_run(folder)
    problem = "no such folder" if not folder.is_dir() else "neither reading.json nor run.json"
    raise DataError(
        f"Found {problem}: {folder}. Expected a folder that `vitreous look` or `vitreous train` has finished. "
        "Check the path; a reading that was interrupted goes on when the same command is given again."
    )


def _open_run(folder: Path) -> ReportInput:
    run = read_json(folder / "run.json")
    by_epoch = {}
    for path in (folder / "readings").glob("epoch-*"):
        number = path.name.removeprefix("epoch-")
        if number.isdecimal() and (path / "reading.json").is_file():
            by_epoch[int(number)] = path
    if not by_epoch and not (folder / "predictions.csv").is_file():
        raise DataError(
            f"Found no reading of any epoch in {folder / 'readings'}, and no predictions.csv. Expected folders epoch-000, ... "
            "Look at the run's model instead: `vitreous look RUN PHOTOS --out FOLDER`."
        )
    metrics = []
    if (folder / "metrics.jsonl").is_file():
        for number, line in enumerate(_text(folder / "metrics.jsonl").rstrip("\n").split("\n"), 1):
            if line:
                metrics.append(parsed(line, folder / "metrics.jsonl", f"line {number}"))
    epochs = sorted(by_epoch)
    shown = epochs
    if len(epochs) > EPOCHS:
        shown = sorted({epochs[round(i * (len(epochs) - 1) / (EPOCHS - 1))] for i in range(EPOCHS)})
    return ReportInput(
        folder.resolve().name, shown, [by_epoch[n] for n in shown], {key: run.get(key) for key in RUN_FIELDS}, metrics,
        len(epochs) - len(shown), folder,
    )  # fmt: skip


def read_json(path: Path, kind: type = dict) -> Any:
    """The object, or the list, in a JSON file. Raises DataError if there is none."""
    value = parsed(_text(path), path, "the file")
    if not isinstance(value, kind):
        raise DataError(
            f"Found a {type(value).__name__} in {path}. Expected a {kind.__name__}, as Vitreous writes it. Make it again."
        )
    return value


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file by column; none if there is no such file."""
    if not path.is_file():
        return []
    lines = list(csv.DictReader(io.StringIO(_text(path), newline="")))
    if any(value is None or key is None for line in lines for key, value in line.items()):
        raise DataError(f"Found lines of unlike length in {path}. Expected a whole table. Look again with the same command.")
    return lines


def parsed(text: str, path: Path, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"Cannot read {path}: {what} is no JSON ({error}). Expected a file as Vitreous writes it. Give the command that "
            "made the folder again, with a new --out."
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path} ({error}). Expected a text file in UTF-8. Look again with a new --out.") from error
