"""predictions.csv of a run: the outputs for each test image, in columns of its task."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from vitreous.base.metrics import Metric
from vitreous.tasks import Outputs
from vitreous.train.engine.session import Session
from vitreous.train.records.run_folder import Run, read_table

FILE = "predictions.csv"


def write_predictions(run: Run, session: Session, outcomes: dict[str, Outputs]) -> None:
    """Write a row for each test image that could be read; nothing for a task without columns.

    outcomes: outputs by test set.
    """
    objective, lines = session.tested, []
    if not objective.columns:
        return
    for name, outputs in outcomes.items():
        missing = session.tests[name].missing
        indices = (i for i in count() if i not in missing)
        rows = zip(indices, objective.rows(outputs), strict=False) if outputs else ()
        lines += [(name, i, *row) for i, row in rows]
    run.table(FILE, ["set", "index", *objective.columns], lines)


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
