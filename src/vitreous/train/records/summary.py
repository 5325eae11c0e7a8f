"""Results of a run for people, from its files alone: the line of an epoch, and summary.md."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitreous.base.files import write_text
from vitreous.base.metrics import Metric, metrics_of
from vitreous.base.statistics import of_mean
from vitreous.train.engine import early_stopping
from vitreous.train.records import alarms
from vitreous.train.records.run_folder import read_metrics, read_record

FILES = """\
- `metrics.jsonl`: one line per epoch; `readings/`: what it looked at, by epoch
{answers}
- `model.safetensors`, `config.json`, `mechanisms.json`: the model, of the last epoch unless it says otherwise above
- `run.json`: settings, versions, machine
"""
OF_CLASSES = "- `predictions.csv`: every test image; `classes.csv`: every class; `report.html`: the wrong answers, as pictures"
WITHOUT = "- `predictions.csv`: every test image; `report.html`: the run to look at"


def line(metrics: dict[str, Any], epochs: int, metric: Metric) -> str:
    """One epoch in one line."""
    scores = "  ".join(f"{name} {metric.text(scores[metric.name])}" for name, scores in metrics["tests"].items())
    return (
        f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  loss {metrics['losses']['total']:.4f}  {scores}"
        f"  {metrics['images_per_second']:,.0f} images/s"
    )


def warnings(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The alarms of these epochs, and those without a reading, a sentence for each epoch."""
    sentences = []
    for epoch in lines:
        if epoch.get("alarms"):
            sentences.append(alarms.sentence(epoch["epoch"], epoch["alarms"]))
        if "unread" in epoch:
            sentences.append(f"No reading after epoch {epoch['epoch']}: {epoch['unread']}")
    return sentences


def write(folder: Path) -> None:
    """Write summary.md of a run from its run.json and metrics.jsonl."""
    run, epochs = read_record(folder), read_metrics(folder)
    settings, model, metric = run["settings"], run["model"], metrics_of(run)[0]
    patient = settings.get("patience")
    spaced = {round(1 + i * (len(epochs) - 1) / 9) for i in range(10)}
    shown = sorted(spaced | {1, len(epochs), early_stopping.to_keep(epochs, patient, metric)["epoch"]})
    done = early_stopping.finished(epochs, settings["epochs"], patient, metric)
    classes = model.get("classes") != 0
    next_data, next_step = (
        (settings["data"], "trains it further") if classes else ("LABELLED", "goes on with images of classes")
    )
    going_on = f"vitreous resume {shlex.quote(str(folder))}"
    text = [
        f"# {model['architecture']} on {run['data']['name']}\n",
        f"Grafts: {', '.join(f'`{text}`' for text in model['mechanisms']) or 'none'}. Seed {run['seed']}. "
        f"{len(epochs)} of {settings['epochs']} epochs, {sum(line['seconds'] for line in epochs):,.0f} seconds on "
        f"{run['device']}, started {run['started']}.\n",
        *(f"{remark}\n" for remark in run["remarks"]),
        table(cells([epochs[number - 1] for number in shown], metric)),
        f"{early_stopping.why(epochs, settings['epochs'], patient, metric)}\n",
        *(f"{warning}\n" for warning in warnings(epochs)),
        FILES.format(answers=OF_CLASSES if classes else WITHOUT),
        *([] if done else [f"Not finished: `{going_on}` goes on.\n"]),
        f"Typed: `{run['command']}`\n",
        f"Next: `vitreous train {shlex.quote(next_data)} --model {shlex.quote(str(folder))}` {next_step}.\n",
    ]
    write_text(folder / "summary.md", "\n".join(text))


def cells(lines: Sequence[dict[str, Any]], metric: Metric) -> list[list[str]]:
    """Epochs as the rows of a table, its head first."""
    names = list(lines[0]["tests"])
    rows = [["epoch", "loss", *(f"{metric.label}: {name}" for name in names), "learning rate", "seconds"]]
    for line in lines:
        scores = (metric.text(line["tests"][name][metric.name]) for name in names)
        ends = f"{line['lr']:.2e}", f"{line['seconds']:.1f}"
        rows.append([str(line["epoch"]), f"{line['losses']['total']:.4f}", *scores, *ends])
    return rows


def write_seeds(folder: Path, runs: list[Path]) -> None:
    """Write summary.md of several seeds: the first metric of each, mean and deviation.

    The mean has a 95 % interval.
    """
    outcomes, metric = [outcome(run) for run in runs], run_metrics(runs[0])[0]
    names = list(outcomes[0])
    scores = {name: [tests[name][metric.name] for tests in outcomes] for name in names}

    def row(title: str, cell: Callable[[str], str]) -> list[str]:
        return [title, *map(cell, names)]

    def interval(name: str) -> str:
        low, high = of_mean(scores[name])
        return f"{metric.number(low)} to {metric.text(high)}"

    rows = [
        row("run", lambda name: f"{metric.label}: {name}"),
        *(row(run.name, lambda name, i=i: metric.text(scores[name][i])) for i, run in enumerate(runs)),
        row("mean", lambda name: metric.text(statistics.mean(scores[name]))),
        row("95 % interval of the mean", interval),
        row("standard deviation", lambda name: metric.number(statistics.stdev(scores[name]))),
    ]
    text = [
        f"# {len(runs)} seeds\n",
        table(rows),
        "The interval is Student's: where the mean of many more such runs would lie, on these test images.\n",
        "Each folder is a run of its own, with its own summary.\n",
    ]
    write_text(folder / "summary.md", "\n".join(text))


def outcome(folder: Path) -> dict[str, dict[str, float]]:
    """Scores by test set of the epoch whose weights a run keeps."""
    run = read_record(folder)
    return early_stopping.to_keep(read_metrics(folder), run["settings"].get("patience"), metrics_of(run)[0])["tests"]


def run_metrics(folder: Path) -> tuple[Metric, ...]:
    """The metrics of the run in a folder, by its run.json."""
    return metrics_of(read_record(folder))


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body]) + "\n"
