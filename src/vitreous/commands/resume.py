"""`vitreous resume`: go on with an interrupted run or study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from vitreous.base.errors import SettingError
from vitreous.commands import Command
from vitreous.commands._arguments import RunFolder
from vitreous.commands.study import report_study
from vitreous.commands.train import report_run
from vitreous.train.options import Images, Network, Optimisation, Repeated, Running, Usual, flag


@dataclass(frozen=True, kw_only=True)
class Resume(Command):
    """Go on with a run that was stopped, killed, or ran out of disk.

    It ends with the very weights and numbers that it would have ended with: on the same machine, on
    the CPU. What does not bear on that can be given anew.

    example:
      vitreous resume runs/cutouts-plain
    """

    usage: ClassVar[str] = "RUN"
    together: ClassVar[bool] = True

    folder: RunFolder
    allow_changes: bool = False
    """Go on though settings, data, grafts or versions have changed; the differences are shown."""
    workers: int | None = None
    """Processes that read and augment (default: as before; so for what follows)."""
    save_every: int | None = None
    """Updates after which the state is saved."""
    rollbacks: int | None = None
    """How often it may go back to the last good state after a step that is not finite,
    and leave that step out."""
    rollback_lr: float | None = None
    """Factor on the learning rate after each such return."""
    tracker: Repeated = ()
    """Who gets the numbers of every epoch
    (default: as before, but for code of other packages, to be named again)."""

    @classmethod
    def read(cls, words: Sequence[str]) -> Self:
        """As for any command.

        Raises SettingError for a setting of training that a begun run keeps.
        """
        fixed = {flag(field.name) for group in (Usual, Images, Network, Optimisation, Running) for field in fields(group)}
        fixed -= {flag(field.name) for field in fields(cls)}
        for word in words:
            if (name := word.partition("=")[0]) in fixed:
                raise SettingError(
                    f"Found {name} for a run that has begun. Expected it to keep its settings, so that it ends as it would "
                    f"have. Leave {name} out; or train further what it has come to: `vitreous train DATA --model RUN {name} "
                    "...`."
                )
        return super().read(words)

    def changes(self) -> dict[str, Any]:
        """The settings to be given anew, None where they stay as they were."""
        changes = vars(self) | {"tracker": self.tracker or None}
        return {name: value for name, value in changes.items() if name not in ("folder", "allow_changes")}

    def run(self) -> None:
        from vitreous.train.engine.resume import resume
        from vitreous.train.records.run_folder import STUDY
        from vitreous.train.study.study import again

        folder, changes = Path(self.folder), self.changes()
        if not (folder / STUDY).is_file():
            report_run(resume(folder, self.allow_changes, **changes))
            return
        if self.allow_changes or any(value is not None for value in changes.values()):
            raise SettingError(
                f"Found options for the study in {folder}. Expected none: its runs go on as they were begun. Leave them out, "
                "or resume one of its runs with them."
            )
        report_study(again(folder))
