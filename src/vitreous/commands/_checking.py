"""What `vitreous data check` does: a table of what is wrong with images."""

from __future__ import annotations

import json
import sys
from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from vitreous.data.problems import shown
from vitreous.data.validate import Findings, check_data

LINES = 40  # problems, and classes, that the tables show


def check(data: str, as_json: bool, outside: bool) -> int:
    """Check and print; returns the exit code: 1 where something is wrong, else 0."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading files", total=None)
        findings = check_data(data, outside=outside, progress=lambda done, of: bar.update(task, completed=done, total=of))
    if as_json:
        print(json.dumps(findings.record(), indent=2))
    else:
        show(findings, Console())
    return 1 if findings.problems else 0


def show(findings: Findings, console: Console) -> None:
    """Tables for people: images by class and part, then every problem."""
    parts = list(findings.counts)
    totals = {part: sum(classes.values()) for part, classes in findings.counts.items()}
    counted = ", ".join(f"{count:,} {part}".strip() for part, count in totals.items())
    lines = [f"{shown(findings.name)}: {counted} images in {len({c for p in parts for c in findings.counts[p]})} classes."]
    if findings.sizes:
        small, middle, large = (f"{width} x {height}" for width, height in findings.sizes)
        lines.append(f"Sizes: {small} (smallest), {middle} (median), {large} (largest).")
    if findings.masks:
        lines.append(f"Masks or boxes: of {findings.masks:,} images.")
    lines += [f"{count:,} images: {note}." for note, count in findings.notes.items()]
    if len(findings.suffixes) > 1:
        lines.append(f"Suffixes: {', '.join(f'{count:,} {shown(suffix)}' for suffix, count in findings.suffixes.items())}.")
    lines += findings.remarks
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table("class", *(part or "images" for part in parts))
    labels = sorted({label for classes in findings.counts.values() for label in classes})
    for label in labels[:LINES]:
        table.add_row(escape(shown(label)), *(f"{findings.counts[part].get(label, 0):,}" for part in parts))
    console.print(table)
    more("classes", len(labels), console)
    if not findings.problems:
        console.print("Nothing is wrong with them.", highlight=False)
        return
    table = Table("problem", "where", "what")
    for problem in findings.problems[:LINES]:
        table.add_row(problem.kind, escape(shown(problem.file)), escape(shown(problem.what)))
    console.print(table)
    more("problems", len(findings.problems), console)
    counts = Counter(problem.kind for problem in findings.problems)
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    console.print(f"Problems: {kinds}.", markup=False, highlight=False, soft_wrap=True)


def more(what: str, count: int, console: Console) -> None:
    if count > LINES:
        console.print(f"and {count - LINES} {what} more; --json lists them all", highlight=False)
