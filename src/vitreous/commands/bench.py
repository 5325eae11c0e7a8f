"""`vitreous bench`: from words on a command line to bench.json and its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from rich.console import Console
from tyro import conf

from vitreous import bench
from vitreous.bench.options import Comparison
from vitreous.commands import Command


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """How fast a model is, with grafts and against others: time, memory, operations.

    Latency, images per second, peak memory and operations, against the same model without grafts
    and against others. The models take turns, so that all meet the same machine; ratios come with
    95 % intervals.

    examples:
      vitreous bench vit_tiny_patch16_224 --graft svda --batch 1 16
      vitreous bench vit_small_patch16_224 --graft spc:after=11 --mode inference training
          --image-size 224 384
      vitreous bench runs/photos --against vit_tiny_patch16_224 deit3_small_patch16_224
          --device cuda --compile --dtype bf16
    """

    usage: ClassVar[str] = "MODEL"

    model: Annotated[
        conf.Positional[str], conf.arg(metavar="MODEL", help="A name of timm's (random weights), or a model folder")
    ]
    comparison: conf.OmitArgPrefixes[Comparison] = field(default_factory=Comparison)

    def settings(self) -> bench.BenchSettings:
        """The record of all options.

        Raises UnknownName, DataError or SettingError for what is wrong without building a model.
        """
        return bench.BenchSettings(self.model, **vars(self.comparison))

    def run(self) -> None:
        bench.bench(self.settings(), Console())
