"""What `vitreous look` and `calibrate` do with a model and images.

One ends in a reading and its report, one in a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from torch import nn

from vitreous.base.environment import torch_device
from vitreous.base.errors import DataError, SettingError
from vitreous.base.files import free_folder, writable
from vitreous.base.processes import ALONE, Team, connected
from vitreous.commands._arguments import ModelSource
from vitreous.data import Samples
from vitreous.data.sources.unlabelled import check_paths, unlabelled
from vitreous.grafting import grafts
from vitreous.lens.direction import FILE, Direction, find_direction
from vitreous.lens.look import look
from vitreous.lens.query_rows import queries_note
from vitreous.lens.reading import Reading
from vitreous.models.classes import class_index
from vitreous.models.load import weights_source
from vitreous.report.page import write as write_report

CLASS_MAPS = ("relevance", "grad_attention")  # probes of a class


def run_look(name: str, images: Sequence[str], source: ModelSource, options: dict[str, Any]) -> None:
    """Look, save, report, by a team of processes, the first of which reports.

    options: the others of the command, by name.
    """
    check_paths(images)
    with connected(torch_device(source.device)) as team:
        console = team.console(Console())
        with team.together():
            model, metadata = open_on_device(name, source, console, team)
        out = options["out"]
        folder = team.tell(Path(out) if out else free_folder(Path("readings"), Path(name).resolve().name))
        own = {"direction": read_direction(name, options["direction"]), "out": folder}
        wanted = [options.pop(word) for word in ("probes", "class_maps", "for_class", "modules")]
        own["probes"] = probes_of(model, *wanted)
        reading = look(model, list(images), console=console, about=metadata, team=team, **options | own)
        if team.first:
            with writable(folder):
                write_report([folder], folder / "report.html")
            for line in remarks(reading):
                console.print(line, soft_wrap=True, highlight=False, markup=False)
            for table in overview(reading):
                console.print(table)
            print(f"Report: {folder / 'report.html'}")


def calibrate(name: str, photos: Sequence[str], out: str | None, source: ModelSource) -> None:
    """Find the direction of a model and save it.

    In the model's folder unless `out` names a file.
    """
    console = Console()
    path = Path(out) if out else Path(name) / FILE
    if not path.parent.is_dir() or path.is_dir():
        raise SettingError(f"Found no folder for a file {path}. Expected a place for it. Give --out FILE.safetensors.")
    check_paths(photos)
    model, _ = open_on_device(name, source, console)
    images = only_readable(unlabelled(list(photos)), console)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("photographs, twice")
        direction = find_direction(model, images, progress=lambda done, of: progress.update(task, completed=done, total=of))
    with writable(path):
        direction.save(path)
    print(f"Done: {path}")


# -- the parts ------------------------------------------------------------------------------------


def open_on_device(name: str, source: ModelSource, console: Console, team: Team = ALONE) -> tuple[nn.Module, dict]:
    """The model in eval mode on its device, and what a reading records of it."""
    model = source.open(name, lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False))
    weights = weights_source(name, source.weights, source.random_weights)
    shown = Path(name).resolve().name if weights == "run" else name
    metadata = {"name": shown, "weights": weights, "mechanisms": [str(record.mechanism) for record in grafts(model)]}
    return model.to(team.device(torch_device(source.device))), metadata


def probes_of(
    model: nn.Module, named: Sequence[str], class_maps: bool, for_class: str | None, modules: Sequence[str]
) -> list[str] | None:
    """The probes that were asked for, as texts; None: all that need no passes of their own."""
    mixing = [f"mixing:modules={'+'.join(modules)}"] if modules else []
    if not class_maps and for_class is None:
        return [*(named or ["all"]), *mixing] if mixing else list(named) or None
    target = "" if for_class is None else f":target={class_index(model, for_class)}"
    named = [text for text in named or ["all"] if text not in CLASS_MAPS]
    return [*named, *mixing, *(f"{name}{target}" for name in CLASS_MAPS)]


def only_readable(images: Samples, console: Console) -> Samples:
    """The images that can be decoded; the others are named. Raises DataError if there is none."""
    readable, reasons = [], []
    for i in track(range(len(images)), "reading", console=console, transient=True, disable=not console.is_terminal):
        try:
            images.image(i)
            readable.append(i)
        except DataError as error:
            reasons.append(str(error))
    for reason in reasons:
        console.print(f"skipped: {reason}", soft_wrap=True, highlight=False, markup=False)
    if not readable:
        raise DataError(f"Found no readable photograph among {len(images)}. {reasons[0]}")
    return images.subset(readable)


def read_direction(name: str, file: str | None) -> Direction | None:
    """The direction in a file, or else in the model's folder; None where there is none."""
    path = Path(name) / FILE if file is None else Path(file)
    return Direction.load(path) if file is not None or path.is_file() else None


def remarks(reading: Reading) -> list[str]:
    """What a reader must know first: notes, and what was refused or skipped."""
    attends = any(layer["kind"] != "mixing" for layer in reading.layers)
    what = "What each patch looks at" if attends else "What moves each patch"
    lines = [*reading.facts["notes"], *queries_note(reading.facts.get("queries"), what)]
    for word in ("refused", "skipped"):
        records = reading.facts[word]
        lines += [f"{word}: {record['name']}: {record['reason']}" for record in records[:5]]
        if len(records) > 5:
            lines.append(f"{word}: {len(records) - 5} more, listed in the report")
    return lines


def overview(reading: Reading) -> list[Table]:
    """A table of layers with attention, one of those with mixing maps, where there are any.

    And one for what is of the whole model.

    By layer, means over heads and images of measures with a short heading. The report says what
    each means.
    """
    parts = ([layer for layer in reading.layers if (layer["kind"] == "mixing") is mixing] for mixing in (False, True))
    return [overview_of(reading, layers) for layers in parts if layers] + overview_of_model(reading)


def overview_of_model(reading: Reading) -> list[Table]:
    """A table of measures that are of no layer, a row for each kind; where there are some."""
    columns = reading.table()
    here = columns["layer"] == -1
    headings = {name: record["short"] for name, record in reading.measures.items() if record["short"]}
    shown = [name for name in headings if name in columns and np.isfinite(columns[name][here]).any()]
    if not shown:
        return []
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("whole model", *(headings[name] for name in shown)):
        table.add_column(name, justify="left" if name == "whole model" else "right")
    for kind in dict.fromkeys(columns["kind"][here].tolist()):
        values = [columns[name][here & (columns["kind"] == kind)] for name in shown]
        if any(np.isfinite(value).any() for value in values):
            table.add_row(kind, *(f"{np.nanmean(value):.3g}" if np.isfinite(value).any() else "" for value in values))
    return [table]


def overview_of(reading: Reading, layers: Sequence[dict]) -> Table:
    """The table of these layers, with the measures that they have."""
    columns = reading.table()
    headings = {name: record["short"] for name, record in reading.measures.items() if record["short"]}
    rows = [(columns["layer"] == layer["layer"]) & (columns["kind"] == layer["kind"]) for layer in layers]
    here = np.logical_or.reduce(rows)
    shown = [name for name in headings if name in columns and np.isfinite(columns[name][here]).any()]
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    for name in ("kind", "heads", "grid", *(headings[name] for name in shown)):
        table.add_column(name, justify="left" if name == "kind" else "right", overflow="fold")
    for layer, row in zip(layers, rows, strict=True):
        values = [columns[name][row] for name in shown]
        means = [f"{np.nanmean(value):.3g}" if np.isfinite(value).any() else "" for value in values]
        grid = "x".join(map(str, layer["grid"])) if layer["grid"] else ""
        table.add_row(f"{layer['layer']} {layer['name']}", layer["kind"], str(layer["heads"]), grid, *means)
    return table
