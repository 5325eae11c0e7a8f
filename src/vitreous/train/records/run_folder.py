"""A run folder: settings, data, results, model. Training writes it, reports read it.

    run.json         settings, versions, machine, data, model, command line
    metrics.jsonl    one line per epoch: losses by name and along the epoch, scores per test set,
                     learning rate, speed, gradient norms
    readings/        epoch-000/ (before training), ...: what it looks at on fixed test images
                     (`lens.reading`)
    predictions.csv  every test image: label, prediction, its probability, file, names of classes
    classes.csv      every class of every test set: how much of it is found
    mistakes.safetensors    small pictures of the wrong answers that the model is surest of
    foreground.safetensors    the direction of the model's foreground map (`lens.direction`), if
                     one was found
    summary.md       the same for people
    manifest.csv     every image of the start, by which `vitreous resume` sees what has changed
    state/, lock     while it is not finished: what it goes on from (`engine.state`), and the
                     process that writes
    model.safetensors, config.json, mechanisms.json    the model: of the last finished epoch, or
                     the best (--patience)

Files appear whole or not at all; only metrics.jsonl grows.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vitreous.base.environment import command_line, machine, versions
from vitreous.base.errors import DataError, SettingError
from vitreous.base.files import free_folder, write_text
from vitreous.base.metrics import Metric
from vitreous.train.engine import early_stopping
from vitreous.train.engine.state import States
from vitreous.train.settings import TrainSettings

FORMAT = 1
STUDY = "study.json"  # in the folder around the runs of a study (`train.study`)


def choose_folder(out: str | None, name: str, parent: str = "runs") -> Path:
    """The folder of a new run: `out`, new or empty, or the next free parent/NAME, NAME-2 ..."""
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise taken(folder)
        return folder
    return free_folder(Path(parent), re.sub(r"[^\w.+-]+", "-", name)[:60].strip("-."))


def taken(folder: Path) -> SettingError:
    """The error for a folder that a new run cannot have."""
    other = f", or go on with the run in it: vitreous resume {folder}" if (folder / "run.json").is_file() else ""
    return SettingError(f"Found something in {folder} already. Expected a new or empty folder. Choose another --out{other}.")


class Run:
    """The writer of one run folder; made: make the folder, as the first process does."""

    def __init__(self, folder: Path, made: bool = True):
        self.folder = folder
        self.states = States(folder)
        if not made:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(
                f"Cannot make the run folder {folder}: {error}. Expected a place to write. Choose another --out."
            ) from error

    def start(self, **metadata: Any) -> None:
        """Write run.json before training: metadata, time, command, versions and machine."""
        record = {"format": FORMAT, "started": datetime.now(UTC).isoformat(timespec="seconds"), "command": command_line()}
        self.text("run.json", json.dumps(record | metadata | {"versions": versions(), "machine": machine()}, indent=2) + "\n")

    def rewind(self, epoch: int, begun: bool) -> None:
        """Remove what belongs to `epoch` and later ones, which will be made again.

        begun: False removes the reading before training as well. Files that an interrupted write
        left go, too.
        """
        lines = [json.dumps(line) for line in read_metrics(self.folder) if line["epoch"] < epoch]
        if lines:
            self.text("metrics.jsonl", "\n".join(lines) + "\n")
        else:
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        for path in self.folder.glob("readings/epoch-*"):
            if not begun or int(path.name.removeprefix("epoch-")) >= epoch:
                shutil.rmtree(path)
        for path in [*self.folder.glob("*.partial"), *self.states.folder.glob("*.partial")]:
            path.unlink()

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one epoch to metrics.jsonl, synced, so that a crash loses none."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finished(self, settings: TrainSettings, metric: Metric) -> bool:
        """Whether nothing is left to train, by the epochs in metrics.jsonl."""
        return early_stopping.finished(read_metrics(self.folder), settings.epochs, settings.patience, metric)

    def reading(self, epoch: int) -> Path:
        """The folder of the reading after an epoch; 0 is before training."""
        return self.folder / "readings" / f"epoch-{epoch:03d}"

    def table(self, name: str, columns: list[str], lines: Iterable[Iterable[Any]]) -> None:
        """Write a CSV file."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)
        self.text(name, text.getvalue())

    def text(self, name: str, content: str) -> None:
        """Write a text file, at once or not at all."""
        write_text(self.folder / name, content)


def to_resume(folder: Path) -> Path:
    """What `vitreous resume` takes: the run folder, or that around several seeds or a study."""
    return folder.parent if read_record(folder).get("seeds") or (folder.parent / STUDY).is_file() else folder


def read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a run folder. Raises DataError if there is none."""
    if not (folder / "run.json").is_file():
        raise no_run(folder)
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def no_run(folder: Path) -> DataError:
    return DataError(f"Found no run.json in {folder}. Expected the folder of a run. Check the path.")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The epochs in a run folder's metrics.jsonl; a last line that was cut off is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, by column."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_rows(path: Path) -> list[tuple[str, ...]]:
    """The lines of a CSV file below its head; none if it is not there."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]
