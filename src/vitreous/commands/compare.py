"""`vitreous compare`: two readings or runs in one report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro import conf

from vitreous.base.errors import SettingError
from vitreous.base.files import free_folder, writable
from vitreous.commands import Command


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Two readings or runs side by side, in one report.html.

    Two models, or one before and after, on the same images; without an image in common, by name,
    they are refused.

    example:
      vitreous compare reading-a/ reading-b/ --out comparison/
    """

    usage: ClassVar[str] = "A B"

    a: Annotated[conf.Positional[str], conf.arg(metavar="A", help="A reading or run folder")]
    b: Annotated[conf.Positional[str], conf.arg(metavar="B", help="Another")]
    out: Annotated[str | None, conf.arg(help="Folder of the report (default: the next free readings/comparison)")] = None

    def run(self) -> None:
        from vitreous.report.page import check_common, write

        folder = Path(self.out) if self.out else free_folder(Path("readings"), "comparison")
        if (folder / "report.html").exists():
            raise SettingError(f"Found {folder / 'report.html'} already. Expected a new folder. Choose another --out.")
        check_common(Path(self.a), Path(self.b))
        with writable(folder):
            write([Path(self.a), Path(self.b)], folder / "report.html")
        print(f"Report: {folder / 'report.html'}")
