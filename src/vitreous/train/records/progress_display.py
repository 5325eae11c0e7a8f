"""Progress of a run: on a terminal a table and a bar, elsewhere a line for each epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from vitreous.base.metrics import Metric
from vitreous.train.records import summary

T = TypeVar("T")
ROWS = 12  # epochs that the table shows, so that it fits a small terminal


class Shown:
    """Shows one run while entered. epochs: at most. metric: what is shown of a test."""

    def __init__(self, console: Console, epochs: int, metric: Metric):
        self.console, self.epochs, self.metric, self.say = console, epochs, metric, speaker(console)
        self.bar = Progress(console=console)
        self.table: Table | None = None
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Shown:
        if self.live:
            self.live.start(refresh=True)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.stop()

    def render(self) -> Group:
        """What is on the terminal now."""
        return Group(*([self.table] if self.table else []), *([self.bar] if self.bar.tasks else []))

    def batches(self, batches: Iterable[T], total: int, epoch: int) -> Iterator[T]:
        """The batches of an epoch, with a bar of its progress. total: how many are left."""
        task = self.bar.add_task(f"epoch {epoch}/{self.epochs}", total=total)
        if self.live:
            self.live.refresh()  # an epoch may be over before the next one is due
        try:
            for batch in batches:
                yield batch
                self.bar.advance(task)
        finally:
            self.bar.remove_task(task)

    def epoch(self, lines: list[dict[str, Any]]) -> None:
        """Show the last epoch. lines: those of metrics.jsonl, its own the last."""
        if not self.console.is_terminal:
            self.say(summary.line(lines[-1], self.epochs, self.metric))
            return
        head, *rows = summary.cells(lines[-ROWS:], self.metric)
        self.table = Table(*head[:1], header_style="bold")
        for name in head[1:]:
            self.table.add_column(name, justify="right")
        for row in rows:
            self.table.add_row(*row)


def speaker(console: Console) -> partial:
    """`console.print` for plain sentences."""
    return partial(console.print, soft_wrap=True, highlight=False, markup=False)
