"""`vitreous bench`: models in turns, cell by cell, into bench.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from timm.models import get_model_input_config

from vitreous.base.environment import command_line, machine, versions
from vitreous.base.errors import SettingError, VitreousError, brief
from vitreous.base.files import writable, write_text
from vitreous.bench.arms import Arm, Cell, own_size
from vitreous.bench.memory import OUT, Residents, allocated, out_of_memory
from vitreous.bench.operation_count import operations
from vitreous.bench.settings import BenchSettings
from vitreous.bench.timing import MOST, interval, ratio, rounds
from vitreous.grafting import check, grafts
from vitreous.report.speed import write as write_report
from vitreous.train.records.run_folder import choose_folder

FORMAT = 1
WARMUP = 3


def bench(settings: BenchSettings, console: Console | None = None) -> Path:
    """Time, measure and count; write bench.json and report.html, and return their folder.

    Every cell (mode, image size, batch) is written when it is done. A model that runs out of memory
    has a row that says so. Raises VitreousError for models, grafts and settings that do not fit,
    before anything is written.
    """
    console = console or Console(quiet=True)
    arms = settings.arms()
    first = arms[0].build()
    cells = settings.cells(max(own_size(first)))
    for size in dict.fromkeys(cell.size for cell in cells):
        for arm in arms:
            probe(arm, size, settings.mode)
    folder = choose_folder(settings.out, Path(settings.model).resolve().name, "bench")
    result = {
        "format": FORMAT,
        "name": arms[0].name,
        "command": command_line(),
        "settings": asdict(settings),
        "machine": machine(),
        "versions": versions(),
        "rows": [],
        "ratios": [],
    }
    with ExitStack() as stack:
        residents = stack.enter_context(Residents()) if cells[0].device == "cpu" else None
        columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TextColumn("{task.fields[cell]}"))
        bar = stack.enter_context(Progress(*columns, console=console, transient=True, disable=not console.is_terminal))
        task = bar.add_task("rounds", total=len(cells) * (settings.rounds + WARMUP), cell="")
        for number, cell in enumerate(cells):
            bar.update(task, cell=str(cell))
            start = number * (settings.rounds + WARMUP)
            step = lambda done, of, start=start: bar.update(task, completed=start + done)  # noqa: E731
            rows = measure(arms, cell, settings.rounds, residents, step)
            result["rows"] += rows
            result["ratios"] += compared(rows)
            with writable(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / "bench.json", json.dumps(result, indent=1) + "\n")
                write_report(folder, folder / "report.html")
            console.print(table(rows, ratios := compared(rows), cell))
            for line in what_it_takes(ratios):
                console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True, highlight=False, markup=False)
    return folder


def probe(arm: Arm, size: int, modes: Sequence[str]) -> None:
    """Build the arm once; raises VitreousError where a graft is not reached, or a mode fails."""
    model = arm.build(size)
    for mode in modes:
        Cell(mode, 1, size).act(model)
    if grafts(model):
        channels = get_model_input_config(model)["input_size"][0]
        check(model, torch.zeros(1, channels, size, size))


def measure(
    arms: Sequence[Arm], cell: Cell, count: int, residents: Residents | None, progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """A row for each arm: seconds of every round, peak memory, operations; failed: why not."""
    rows, acts = [], {}
    torch.compiler.reset()  # torch compiles only so many forms, those for other cells among them
    for arm in arms:
        row = {"mode": cell.mode, "batch": cell.batch, "image_size": cell.size, "arm": arm.name, "failed": None}
        rows.append(row)
        try:
            peak = residents.peak(arm, cell) if residents else None
            if peak == OUT:
                row["failed"] = OUT
                continue
            acts[arm.name] = prepared(arm, cell, row)
            row.setdefault("peak_mib", peak)
        except VitreousError:
            raise
        except Exception as error:  # a network may refuse an image size or a batch in words of its own
            row["failed"] = OUT if out_of_memory(error) else f"cannot run: {brief(error)}"
    if not acts:
        return rows
    try:
        seconds = rounds(acts, count, warmup=WARMUP, device=cell.device, progress=progress)
    except Exception as error:
        if out_of_memory(error):
            return [row | {"failed": row["failed"] or "out of memory beside the others"} for row in rows]
        if cell.compile:
            raise SettingError(
                f"torch.compile fails: {brief(error)}. Expected models it can compile. Leave out --compile."
            ) from error
        raise
    for row in rows:
        if not row["failed"]:
            times = seconds[row["arm"]]
            median, low, high, *_ = interval(times)
            row["latency"] = {"median": median, "low": low, "high": high}
            row["images_per_second"] = cell.batch / median
            row["seconds"] = [float(f"{value:.5g}") for value in times]
    return rows


def prepared(arm: Arm, cell: Cell, row: dict[str, Any]) -> Callable[[], object]:
    """What is timed of the arm; parameters, operations and memory on a GPU go into the row."""
    counted = operations(replace(cell, compile=False).act(arm.build(cell.size)))
    row |= {"operations": counted.total, "by_kind": counted.by_kind, "uncounted": list(counted.uncounted)}

    def build() -> Callable[[], object]:  # a model that was not run before, so that all its memory is counted
        model = arm.build(cell.size)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        return cell.act(model)

    if torch.device(cell.device).type != "cuda":
        return build()
    act, row["peak_mib"] = allocated(build, cell.device)
    return act


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row's time over that of each other, where both were timed."""
    ours, *others = rows
    ratios = []
    for base in others:
        if not ours["failed"] and not base["failed"]:
            timed = ratio(ours["seconds"], base["seconds"])
            place = {name: ours[name] for name in ("mode", "batch", "image_size")}
            found = {"verdict": timed.verdict, "rounds_to_decide": timed.rounds_to_decide}
            ratios.append({**place, "ours": ours["arm"], "base": base["arm"], **asdict(timed), **found})
    return ratios


def what_it_takes(ratios: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each undecided ratio: how many rounds would decide it."""
    lines = []
    for entry in ratios:
        if entry["verdict"] == "undecided":
            needed = entry["rounds_to_decide"]
            takes = f"about {needed} rounds (--rounds {needed})" if needed else f"more than {MOST} times the rounds"
            lines.append(f"{entry['ours']} beside {entry['base']}: if the ratio stays, it would take {takes} to decide it.")
    return lines


def table(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]], cell: Cell) -> Table:
    """One cell for the terminal."""
    by_base = {entry["base"]: entry for entry in ratios}
    sheet = Table(title=str(cell), title_justify="left", box=None, padding=(0, 2, 0, 0))
    sheet.add_column("model", overflow="fold")
    for name in ("ms", "images/s", "MiB", "G ops", "first over this"):
        sheet.add_column(name, justify="right")
    sheet.add_column("it is")
    for row in rows:
        if row["failed"]:
            sheet.add_row(escape(row["arm"]), escape(row["failed"]))
            continue
        entry, peak = by_base.get(row["arm"]), row["peak_mib"]
        sheet.add_row(
            escape(row["arm"]),
            f"{1000 * row['latency']['median']:.4g}",
            f"{row['images_per_second']:.4g}",
            "–" if isinstance(peak, str) else f"{peak:.0f}",
            ("over " if row["uncounted"] else "") + f"{row['operations'] / 1e9:.3f}",
            f"{entry['median']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]" if entry else "",
            entry["verdict"] if entry else "",
        )
    return sheet
