"""Which test images a run gets right: predictions.csv, classes.csv, mistakes.safetensors.

predictions.csv has a row for each test image, in columns of the task, then its file and the names
of its classes; classes.csv a row for each class of a test set; mistakes.safetensors small pictures
of the wrong answers that the model is surest of.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image

from vitreous.base.errors import DataError
from vitreous.base.files import write
from vitreous.base.metrics import Metric
from vitreous.data import Samples
from vitreous.data.problems import cell
from vitreous.tasks import Outputs
from vitreous.train.engine.session import Session
from vitreous.train.records.run_folder import Run, read_table

FILE, CLASSES, MISTAKES = "predictions.csv", "classes.csv", "mistakes.safetensors"
PICTURES = 36  # of each test set, at most
SIDE, QUALITY = 128, 80  # of a picture, in pixels, and of its JPEG: about 4 kB each


def write_predictions(run: Run, session: Session, outcomes: dict[str, Outputs]) -> None:
    """Write a row for each test image that could be read, and for each class.

    Nothing for a task without columns. outcomes: outputs by test set.
    """
    objective, classes = session.tested, session.data.classes
    lines, of_classes, head = [], [], []
    for name, outputs in outcomes.items() if objective.columns else ():
        loader = session.tests[name]
        indices = (i for i in count() if i not in loader.missing)
        for i, row in zip(indices, objective.rows(outputs), strict=False) if outputs else ():
            cells = dict(zip(objective.columns, row, strict=True))
            named = (class_names(cells[column], classes) for column in objective.class_columns)
            lines.append((name, i, *row, cell(loader.name(i)), *named))
        if outputs and (columns := objective.by_class(outputs)):
            head = ["set", "class", "name", *columns]
            values = zip(*columns.values(), strict=True)
            of_classes += [(name, k, class_names(k, classes), *row) for k, row in enumerate(values)]
    if objective.columns:
        names = [f"{column}_class" for column in objective.class_columns]
        run.table(FILE, ["set", "index", *objective.columns, "file", *names], lines)
    if of_classes:
        run.table(CLASSES, head, of_classes)


def class_names(numbers: object, classes: Sequence[str]) -> str:
    """The names of classes by number, "; " between several."""
    return "; ".join(cell(classes[int(number)]) for number in str(numbers).split() if int(number) < len(classes))


def write_mistakes(run: Run, session: Session) -> None:
    """Write pictures of wrong answers, by predictions.csv.

    Nothing for a task without classes. Of each test set those of the highest probability, or,
    where an image may show several classes, of the highest loss, as JPEG bytes under "SET/INDEX".
    An image that can no longer be read has none.
    """
    pictures: dict[str, np.ndarray] = {}
    columns = set(session.tested.columns)
    sure = next((name for name in ("probability", "loss") if name in columns and {"wrong", "label"} & columns), "")
    rows = read_table(run.folder / FILE) if sure else []
    for name, loader in session.tests.items():
        wrong = [row for row in rows if row["set"] == name and is_wrong(row)]
        wrong.sort(key=lambda row: -float(row[sure]))
        for row in wrong[:PICTURES]:
            data = thumbnail(loader.images, int(row["index"]))
            if data is not None:
                pictures[f"{name}/{row['index']}"] = data
    if pictures:
        write(run.folder / MISTAKES, lambda path: safetensors.numpy.save_file(pictures, path))
    else:
        (run.folder / MISTAKES).unlink(missing_ok=True)


def is_wrong(row: dict[str, str]) -> bool:
    """Whether the class, or any labelled class of several, is another than predicted."""
    return bool(row["wrong"]) if "wrong" in row else row["label"] != row["predicted"]


def thumbnail(images: Samples, i: int) -> np.ndarray | None:
    """The bytes of a JPEG of at most SIDE x SIDE pixels; None where there is no picture."""
    try:
        image = images.image(i)
    except DataError:
        return None
    if not isinstance(image, Image.Image):
        return None
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return np.frombuffer(file.getvalue(), np.uint8)


def by_image(run: Path, metric: Metric) -> dict[str, dict[int, float]]:
    """{test set: {image: value}} of a run, by the column with the name of the metric.

    Without one, by the columns label and predicted: 1 where they agree. Empty without these.
    """
    values: dict[str, dict[int, float]] = {}
    for row in read_table(run / FILE) if (run / FILE).is_file() else ():
        if metric.name in row:
            value = float(row[metric.name])
        elif "label" in row and "predicted" in row:
            value = float(row["label"] == row["predicted"])
        else:
            continue
        values.setdefault(row["set"], {})[int(row["index"])] = value
    return values
