"""The commands: one in each file but `cli.py` and those with a leading underscore.

A command's file holds its settings, its help and its `run`. Only what the settings need is imported
at its top, and packages whose names are imported when first used; the rest, torch and timm among
it, in `run`: help and a mistyped option come at once, and `vitreous --help` imports no command at
all. Files with a leading underscore do the work of a command where no other part of the library
does it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import ClassVar, Self


class Command:
    """Base of the commands: a frozen dataclass of what can be typed.

    Its docstring is its help.

    usage: what follows the name, in the overview of `vitreous --help`. together: several processes
    of torchrun do it as one.
    """

    usage: ClassVar[str] = "[options]"
    together: ClassVar[bool] = False

    @classmethod
    def read(cls, words: Sequence[str]) -> Self:
        """The settings that a command line asks for.

        tyro exits with code 2 for a mistake, and 0 for --help.
        """
        import tyro  # not for commands that read their few words themselves

        help_text = f"{inspect.getdoc(cls)}\n"
        config = (tyro.conf.FlagCreatePairsOff,)
        return tyro.cli(cls, prog=f"vitreous {cls.name()}", description=help_text, args=words, config=config)

    @classmethod
    def name(cls) -> str:
        """What is typed: the name of the class's file."""
        return cls.__module__.rpartition(".")[2]

    def run(self) -> int | None:
        """Do what was asked; returns the exit code, None for 0.

        Raises VitreousError for a mistake that can be mended.
        """
        raise TypeError(f"{type(self).__name__} does not say what it does: define run(self).")
