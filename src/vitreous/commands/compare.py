"""`vitreous compare`: two readings or runs in one report, or runs in a paper's figures."""

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
    """Two readings or runs in one report.html, or any runs in figures and tables.

    Two models, or one before and after, on the same images; without an image in common, by name,
    they are refused. Figures are of runs alone, by arm: mean over the seeds, lowest to highest.

    examples:
      vitreous compare reading-a/ reading-b/ --out comparison/
      vitreous compare runs/plain runs/svda --figures figures/
    """

    usage: ClassVar[str] = "A B, or RUN... --figures F"

    folders: Annotated[
        conf.Positional[tuple[str, ...]],
        conf.arg(metavar="FOLDER...", help="Two reading or run folders; for --figures runs, or folders that hold some"),
    ]
    out: Annotated[str | None, conf.arg(help="Folder of the report (default: the next free readings/comparison)")] = None
    figures: Annotated[
        str | None,
        conf.arg(help="Folder for figures (.svg, .png) and tables (.md, .csv) of the runs, in place of the report"),
    ] = None
    paper: Annotated[bool, conf.arg(help="Indicators of --figures in the form that was published")] = False

    def run(self) -> None:
        if self.figures is not None:
            self.draw(Path(self.figures))
            return
        if len(self.folders) != 2 or self.paper:
            raise SettingError(
                f"Found {len(self.folders)} folders{' and --paper' if self.paper else ''} without --figures. Expected two, "
                "for a report of both. Name two, or ask for --figures FOLDER."
            )
        from vitreous.report.page import check_common, write

        a, b = map(Path, self.folders)
        folder = Path(self.out) if self.out else free_folder(Path("readings"), "comparison")
        if (folder / "report.html").exists():
            raise SettingError(f"Found {folder / 'report.html'} already. Expected a new folder. Choose another --out.")
        check_common(a, b)
        with writable(folder):
            write([a, b], folder / "report.html")
        print(f"Report: {folder / 'report.html'}")

    def draw(self, folder: Path) -> None:
        """Write the figures, and say where they are."""
        from vitreous.train.study.figures import write_figures

        if self.out is not None:
            raise SettingError("Found --out and --figures. Expected one of them: a report, or figures. Leave one out.")
        with writable(folder, "Mend --figures."):
            files = write_figures(self.folders, folder, self.paper)
        print(f"Figures: {', '.join(str(file) for file in files)}")
