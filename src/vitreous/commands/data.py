"""`vitreous data check`: what is wrong with images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from tyro import conf

from vitreous.base.errors import UnknownName
from vitreous.commands import Command


@dataclass(frozen=True, kw_only=True)
class Data(Command):
    """Look for what is wrong with images before training on them. Nothing is changed.

    Files that cannot be read, copies within and across parts, classes of one image, names that
    clash, masks that do not fit.

    Exit code: 0 nothing found, 1 something found, 2 nothing could be checked.

    examples:
      vitreous data check photos/
      vitreous data check table.csv --json
    """

    usage: ClassVar[str] = "check DATA"

    data: Annotated[
        conf.Positional[str],
        conf.arg(metavar="DATA", help="A folder, tar archive, .csv table or hf:PATH, as for train"),
    ]
    json: Annotated[bool, conf.arg(help="Print everything as JSON")] = False
    outside: Annotated[bool, conf.arg(help="Let a table name files outside its folder")] = False

    @classmethod
    def name(cls) -> str:
        return "data check"

    @classmethod
    def read(cls, words: Sequence[str]) -> Self:
        """As for any command, behind the word check; raises UnknownName for another."""
        if words and words[0] not in ("check", "-h", "--help"):
            raise UnknownName(words[0], "command after data", ["check"], hint="Write vitreous data check DIR.")
        return super().read(words[1:] if words[:1] == ["check"] else ["--help"])

    def run(self) -> int:
        from vitreous.commands._checking import check

        return check(self.data, self.json, self.outside)
