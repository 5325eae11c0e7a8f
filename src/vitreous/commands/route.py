"""`vitreous route`: of an elastic model the largest sub-network that is fast enough here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.commands import Command
from vitreous.commands._arguments import RunFolder


@dataclass(frozen=True, kw_only=True)
class Route(Command):
    """Cut out of an elastic run the largest sub-network that is fast enough on this machine.

    All sub-networks that `--task elastic` trained are timed on one image, in turns. The one of the
    most operations within the limit is written as a model folder, which every command takes.
    A prototype.

    example:
      vitreous train photos/ --task elastic --out runs/elastic
      vitreous route runs/elastic --limit 4 --out runs/elastic-4ms
    """

    usage: ClassVar[str] = "RUN"

    run_folder: RunFolder
    limit: float
    """Milliseconds of a forward pass of one image, at most (median)."""
    out: str
    """Folder to write; it must be new."""
    rounds: int = 10
    """How often each is timed."""
    device: str = "cpu"
    """cpu | cuda | cuda:1 ..."""

    def run(self) -> None:
        from pathlib import Path

        from vitreous.base.errors import SettingError
        from vitreous.base.files import check_new
        from vitreous.bench.route import choose, measured
        from vitreous.hosts.subnetwork import cut_out
        from vitreous.models import model_folder
        from vitreous.tasks import TASKS
        from vitreous.train.records.run_folder import read_record

        check_new(Path(self.out))
        text = read_record(Path(self.run_folder)).get("task", {}).get("text", "classification")
        task = TASKS.parse(text)
        if not hasattr(task, "subnetworks"):
            raise SettingError(
                f"Found {self.run_folder}, a run of --task {text}. Expected one of --task elastic, whose sub-networks have "
                "learned. Train such a run."
            )
        model = model_folder.load(self.run_folder)
        route = choose(measured(model, task.subnetworks(model), self.rounds, self.device), self.limit / 1e3)
        names = model.pretrained_cfg.get("label_names") or ()
        model_folder.save(cut_out(model, route.part), self.out, classes=names)
        part = route.part
        print(f"{part.heads} heads, {part.hidden} hidden features, {part.depth} blocks: {1e3 * route.seconds:.3g} ms.")
        print(f"Done: {self.out}")
