"""What a run came to, for people: the line of an epoch and summary.md, made from the files of the run folder alone."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitreous.base.files import write_text
from vitreous.base.statistics import of_mean
from vitreous.train.engine import early_stopping
from vitreous.train.records import alarms
from vitreous.train.records.run_folder import read_metrics

FILES = """\
- `metrics.jsonl`: one line per epoch; `readings/`: what it looked at, by epoch; `predictions.csv`: every test image
- `model.safetensors`, `config.json`, `mechanisms.json`: the model, of the last epoch unless it says otherwise above
- `run.json`: settings, versions, machine
"""


def line(metrics: dict[str, Any], epochs: int) -> str:
    """One epoch in one line."""
    scores = "  ".join(f"{name} {100 * found['accuracy']:.2f} %" for name, found in metrics["tests"].items())
    return (
        f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  loss {metrics['losses']['total']:.4f}  {scores}"
        f"  {metrics['images_per_second']:,.0f} images/s"
    )


def warnings(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The alarms of these epochs, and those without a reading, a sentence for each epoch."""
    found = []
    for epoch in lines:
        if epoch.get("alarms"):
            found.append(alarms.sentence(epoch["epoch"], epoch["alarms"]))
        if "unread" in epoch:
            found.append(f"No reading after epoch {epoch['epoch']}: {epoch['unread']}")
    return found


def write(folder: Path) -> None:
    """Write summary.md of a run from its run.json and metrics.jsonl."""
    run, epochs = json.loads((folder / "run.json").read_text(encoding="utf-8")), read_metrics(folder)
    settings, model = run["settings"], run["model"]
    patient = settings.get("patience")
    spaced = {round(1 + i * (len(epochs) - 1) / 9) for i in range(10)}
    shown = sorted(spaced | {1, len(epochs), early_stopping.kept(epochs, patient)["epoch"]})
    going_on = f"vitreous resume {shlex.quote(str(folder))}"
    text = [
        f"# {model['architecture']} on {run['data']['name']}\n",
        f"Grafts: {', '.join(f'`{text}`' for text in model['mechanisms']) or 'none'}. Seed {run['seed']}. "
        f"{len(epochs)} of {settings['epochs']} epochs, {sum(found['seconds'] for found in epochs):,.0f} seconds on "
        f"{run['device']}, started {run['started']}.\n",
        *(f"{remark}\n" for remark in run["remarks"]),
        table(cells([epochs[number - 1] for number in shown])),
        f"{early_stopping.why(epochs, settings['epochs'], patient)}\n",
        *(f"{warning}\n" for warning in warnings(epochs)),
        FILES,
        *([] if early_stopping.finished(epochs, settings["epochs"], patient) else [f"Not finished: `{going_on}` goes on.\n"]),
        f"Typed: `{run['command']}`\n",
        f"Next: `vitreous train {shlex.quote(settings['data'])} --model {shlex.quote(str(folder))}` trains it further.\n",
    ]
    write_text(folder / "summary.md", "\n".join(text))


def cells(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Epochs as the rows of a table, its head first."""
    names = list(lines[0]["tests"])
    rows = [["epoch", "loss", *(f"accuracy: {name}" for name in names), "learning rate", "seconds"]]
    for found in lines:
        scores = (f"{100 * found['tests'][name]['accuracy']:.2f} %" for name in names)
        ends = f"{found['lr']:.2e}", f"{found['seconds']:.1f}"
        rows.append([str(found["epoch"]), f"{found['losses']['total']:.4f}", *scores, *ends])
    return rows


def write_seeds(folder: Path, runs: list[Path]) -> None:
    """Write summary.md of several seeds: each one's accuracies, their mean, its 95 % interval, and their standard deviation."""
    found = [outcome(run) for run in runs]
    names = list(found[0])
    scores = {name: [100 * tests[name]["accuracy"] for tests in found] for name in names}
    ends = {name: of_mean(scores[name]) for name in names}
    rows = [["run", *(f"accuracy: {name}" for name in names)]]
    rows += [[run.name, *(f"{scores[name][i]:.2f} %" for name in names)] for i, run in enumerate(runs)]
    rows += [["mean", *(f"{statistics.mean(scores[name]):.2f} %" for name in names)]]
    rows += [["95 % interval of the mean", *(f"{ends[name][0]:.2f} to {ends[name][1]:.2f} %" for name in names)]]
    rows += [["standard deviation", *(f"{statistics.stdev(scores[name]):.2f}" for name in names)]]
    text = [
        f"# {len(runs)} seeds\n",
        table(rows),
        "The interval is Student's: where the mean of many more such runs would lie, on these test images.\n",
        "Each folder is a run of its own, with its own summary.\n",
    ]
    write_text(folder / "summary.md", "\n".join(text))


def outcome(folder: Path) -> dict[str, dict[str, float]]:
    """Scores by test set of the epoch whose weights a run keeps."""
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    return early_stopping.kept(read_metrics(folder), settings.get("patience"))["tests"]


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body]) + "\n"
