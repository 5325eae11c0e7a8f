"""`vitreous train`: from words on a command line to a run folder and its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from tyro import conf

from vitreous import train
from vitreous.commands import Command
from vitreous.train.options import Images, Network, Optimisation, Running, Usual

DataText = Annotated[
    conf.Positional[str],
    conf.arg(
        metavar="DATA",
        help="cutouts (made scenes), fashion-mnist:PATH, cifar10:PATH, cifar100:PATH, "
        "cub-200-2011:PATH, fgvc-aircraft:PATH, stanford-cars:PATH, food-101:PATH, or the PATH of such files, of a folder "
        "or tar of class folders, or of an .npz",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train or fine-tune a vision transformer, with mechanisms grafted into it.

    Weights, numbers, a reading of every epoch and a report go into a run folder.

    examples:
      vitreous train cutouts --model-kwargs patch_size=4 --graft svda --epochs 3
      vitreous train fashion-mnist:PATH --model scratch_vit_patch4_28 --graft svda
          --opt adam --lr 3e-4 --sched none --epochs 100
      vitreous train photos/ --pretrained --graft svda:start=import,layers=10-11
          --freeze blocks.0-9 --lr 2e-5
    """

    usage: ClassVar[str] = "DATA"
    together: ClassVar[bool] = True

    data: DataText
    usual: conf.OmitArgPrefixes[Usual] = field(default_factory=Usual)
    images: conf.OmitArgPrefixes[Images] = field(default_factory=Images)
    network: conf.OmitArgPrefixes[Network] = field(default_factory=Network)
    optimisation: conf.OmitArgPrefixes[Optimisation] = field(default_factory=Optimisation)
    running: conf.OmitArgPrefixes[Running] = field(default_factory=Running)

    def settings(self) -> train.TrainSettings:
        """The record of all options.

        Raises UnknownName or SettingError for what can be seen to be wrong without data or model.
        """
        groups = (self.usual, self.images, self.network, self.optimisation, self.running)
        return train.TrainSettings(self.data, **{name: value for group in groups for name, value in vars(group).items()})

    def run(self) -> None:
        report_run(train.train(self.settings()))


def report_run(folder: Path) -> None:
    """Say where the summary of a run is, and write its report, or that of its seeds."""
    report_runs(folder, sorted(folder.glob("seed-*")) or [folder])


def report_runs(folder: Path, runs: list[Path], of: list[Path] | None = None) -> None:
    """Say where the summary of runs is, and write one report of them, or of the folders `of`.

    In the first process alone.
    """
    from vitreous.base.processes import launched
    from vitreous.report.page import write

    if not launched().first:
        return
    print(f"Done: {folder}/summary.md")
    read = [(run / "readings").is_dir() for run in runs]  # none where the model shows no attention; the summary says why
    if all(read) or (not any(read) and all((run / "predictions.csv").is_file() for run in runs)):
        print(f"Report: {write(of or runs, folder / 'report.html')}")
