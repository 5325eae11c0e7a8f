"""`vitreous replay`: the step again at which a run stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.commands import Command
from vitreous.commands._arguments import RunFolder


@dataclass(frozen=True, kw_only=True)
class Replay(Command):
    """Run the step again at which a run stopped since a number was not finite.

    It starts from the state and the batch that the run kept, and names the first module whose
    output or gradient is not finite. Changes nothing.

    example:
      vitreous replay runs/cutouts-plain
    """

    usage: ClassVar[str] = "RUN"

    folder: RunFolder

    def run(self) -> None:
        from vitreous.train.engine.resume import replay

        replay(self.folder)
