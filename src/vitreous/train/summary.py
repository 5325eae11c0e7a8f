"""What a run came to, for people: the line of an epoch and summary.md, made from the files of the run folder alone."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from vitreous.files import write_text
from vitreous.train.run import read_metrics

FILES = """\
- `metrics.jsonl`: one line per epoch; `readings/`: what it looked at, by epoch; `predictions.csv`: every test image
- `model.safetensors`, `config.json`, `mechanisms.json`: the model after the last finished epoch
- `run.json`: settings, versions, machine
"""


def line(metrics: dict[str, Any], epochs: int) -> str:
    """One epoch in one line."""
    scores = "  ".join(f"{name} {100 * found['accuracy']:.2f} %" for name, found in metrics["tests"].items())
    return (
        f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  loss {metrics['losses']['total']:.4f}  {scores}"
        f"  {metrics['images_per_second']:,.0f} images/s"
    )


def write(folder: Path) -> None:
    """Write summary.md of a run from its run.json and metrics.jsonl."""
    run, epochs = json.loads((folder / "run.json").read_text(encoding="utf-8")), read_metrics(folder)
    settings, last, model = run["settings"], epochs[-1], run["model"]
    left = settings["epochs"] - len(epochs)
    shown = sorted({1, len(epochs)} | {round(1 + i * (len(epochs) - 1) / 9) for i in range(10)})
    names = list(last["tests"])
    rows = [["epoch", "loss", *(f"accuracy: {name}" for name in names), "learning rate", "seconds"]]
    rows += [
        [
            str(found["epoch"]),
            f"{found['losses']['total']:.4f}",
            *(f"{100 * found['tests'][name]['accuracy']:.2f} %" for name in names),
            f"{found['lr']:.2e}",
            f"{found['seconds']:.1f}",
        ]
        for found in (epochs[number - 1] for number in shown)
    ]
    text = [
        f"# {model['architecture']} on {run['data']['name']}\n",
        f"Grafts: {', '.join(f'`{text}`' for text in model['mechanisms']) or 'none'}. Seed {run['seed']}. "
        f"{len(epochs)} of {settings['epochs']} epochs, {sum(found['seconds'] for found in epochs):,.0f} seconds on "
        f"{run['device']}, started {run['started']}.\n",
        *(f"{remark}\n" for remark in run["remarks"]),
        table(rows),
        "Accuracy is of the last epoch; none was picked by its score.\n",
        FILES,
        *([f"Not finished: `vitreous resume {shlex.quote(str(folder))}` goes on.\n"] if left else []),
        f"Typed: `{run['command']}`\n",
        f"Next: `vitreous train {shlex.quote(settings['data'])} --model {shlex.quote(str(folder))}` trains it further.\n",
    ]
    write_text(folder / "summary.md", "\n".join(text))


def write_seeds(folder: Path, runs: list[Path]) -> None:
    """Write summary.md of several seeds: each one's last accuracies, their mean and standard deviation."""
    last = [read_metrics(run)[-1]["tests"] for run in runs]
    names = list(last[0])
    scores = {name: [100 * found[name]["accuracy"] for found in last] for name in names}
    rows = [["run", *(f"accuracy: {name}" for name in names)]]
    rows += [[run.name, *(f"{scores[name][i]:.2f} %" for name in names)] for i, run in enumerate(runs)]
    rows += [["mean", *(f"{statistics.mean(scores[name]):.2f} %" for name in names)]]
    rows += [["standard deviation", *(f"{statistics.stdev(scores[name]):.2f}" for name in names)]]
    text = [f"# {len(runs)} seeds\n", table(rows), "Each folder is a run of its own, with its own summary.\n"]
    write_text(folder / "summary.md", "\n".join(text))


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body]) + "\n"
