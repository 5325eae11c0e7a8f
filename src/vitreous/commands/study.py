"""`vitreous study`: arms that are trained on the same seeds and compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tyro import conf

from vitreous.commands.train import Train, report_runs
from vitreous.train.options import Repeated, Running


@dataclass(frozen=True, kw_only=True)
class Study(Train):
    """Train arms that differ in grafts or network, and compare them with paired intervals.

    Seeds, data, order and recipe are the same for all; the first arm is what the others are
    compared with. Given again, the command goes on where it was stopped.

    example:
      vitreous study photos/ --arm plain --arm svda:scale=sqrt --arm "svda spc:after=11"
          --seeds 3 --pretrained --recipe auto
      vitreous study cutouts --model-kwargs patch_size=4 --arm plain --arm qk_norm=True
          --arm "model=vit_small_patch16_224 patch_size=4 depth=3"
    """

    usage: ClassVar[str] = "DATA"

    arm: Repeated = ()
    """The grafts of an arm, with spaces between, or plain for none; name=value is an argument of
    the network, model=NAME another network (--model-kwargs are then not used).
    The others are compared with the first arm."""
    running: conf.OmitArgPrefixes[Running] = field(default_factory=lambda: Running(seeds=3))

    def run(self) -> None:
        from vitreous.train.study.study import study

        report_study(study(self.settings(), self.arm))


def report_study(folder: Path) -> None:
    """Say where the summary of a study is, and write its report: what the arms come to.

    Below, the first runs side by side.
    """
    from vitreous.train.study.study import first_runs

    report_runs(folder, first_runs(folder), of=[folder])
