"""Figures of runs, as papers print them: scores, seconds, and indicators in twelve panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitreous.base.errors import SettingError, VitreousError
from vitreous.base.files import write, write_text
from vitreous.train.study.courses import (
    EPOCH,
    INDICATORS,
    LAYER,
    Course,
    Key,
    arms_of,
    as_csv,
    as_markdown,
    check_arms,
    courses,
    missing,
    run_folders,
)

# Okabe and Ito's colours, which the colour-blind tell apart too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
DASHES = ("-", "--", "-.", ":")
STYLE = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E4E4E4", "grid.linewidth": 0.6, "axes.axisbelow": True, "svg.hashsalt": "vitreous", "svg.fonttype": "none",
}  # fmt: skip
NAMES = 24  # characters of arms that have none of a quantity; else they are counted
ARMS = len(COLOURS) * len(DASHES)
Arms = Mapping[str, Mapping[Key, Course]]


def write_figures(folders: Sequence[str | Path], out: Path, paper: bool = False) -> list[Path]:
    """Draw runs as training.* and indicators.* (.svg, .png), and write their tables, runs.*.

    folders: of runs, or of those that hold some. Runs of equal settings but for the seed are one
    arm: its line is their mean, its band reaches from the lowest to the highest. paper: indicators
    in the paper's form. Returns the files.

    Raises DataError for no runs, SettingError where there is nothing to draw, VitreousError without
    matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise VitreousError(
            'Found no package matplotlib; expected it, to draw figures. pip install "vitreous[figures]".'
        ) from error
    arms = {name: courses(runs, paper) for name, runs in arms_of(run_folders(folders)).items()}
    check_arms(arms)
    if len(arms) > ARMS:
        raise SettingError(f"Found {len(arms)} arms. Expected at most {ARMS} in one figure. Name fewer runs.")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with mpl.rc_context(STYLE):
        figures = {"training": training(Figure, arms, paper), "indicators": indicators(Figure, arms, paper)}
        for name, figure in figures.items():
            for kind, options in {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 160}}.items():
                path = out / f"{name}.{kind}"
                write(path, lambda to, f=figure, k=kind, o=options: f.savefig(to, format=k, **o))
                files.append(path)
    for name, text in {"runs.md": as_markdown(arms), "runs.csv": as_csv(arms)}.items():
        write_text(out / name, text)
        files.append(out / name)
    return files


def training(figure_of: Any, arms: Arms, paper: bool) -> Any:
    """The score of each test set, and seconds, over the epochs."""
    others = {indicator.title(paper) for indicator in INDICATORS}
    keys = [key for of in arms.values() for key in of if key[1] == EPOCH and key[0] not in others]
    return panels(figure_of, arms, [list(dict.fromkeys(keys))])


def indicators(figure_of: Any, arms: Arms, paper: bool) -> Any:
    """The six indicators over epochs (upper two rows) and over the layers of the last epoch."""
    halves = INDICATORS[:3], INDICATORS[3:]
    keys = [[(indicator.title(paper), over) for indicator in half] for over in (EPOCH, LAYER) for half in halves]
    return panels(figure_of, arms, keys)


def panels(figure_of: Any, arms: Arms, rows: Sequence[Sequence[Key]]) -> Any:
    """A figure with a panel for each quantity, and one legend above all."""
    columns = max(len(row) for row in rows)
    figure = figure_of(figsize=(2.6 * columns, 2.1 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, keys in zip(axes, rows, strict=True):
        for axis, key in zip(row, keys, strict=False):
            panel(axis, arms, key)
        for axis in row[len(keys) :]:
            axis.set_visible(False)
    lines = [axes[0][0].plot([], [], label=name, **style(i))[0] for i, name in enumerate(arms)]
    figure.legend(handles=lines, loc="outside upper left", ncols=min(len(arms), columns), frameon=False)
    return figure


def panel(axis: Any, arms: Arms, key: Key) -> None:
    """One quantity over epochs or layers, of every arm that shows it; the others are named."""
    for i, of in enumerate(arms.values()):
        if key not in of:
            continue
        at, points = list(of[key]), list(of[key].values())
        axis.plot(at, [one.mean for one in points], marker="o" if len(at) < 15 else None, markersize=2.5, **style(i))
        if any(one.runs > 1 for one in points):
            low, high = [one.low for one in points], [one.high for one in points]
            axis.fill_between(at, low, high, color=style(i)["color"], alpha=0.18, linewidth=0)
    axis.set_title(key[0].replace(", ", "\n"), loc="left")
    lacking = missing(arms, key)
    names = ", ".join(lacking) if len(", ".join(lacking)) < NAMES else f"{len(lacking)} of {len(arms)} arms"
    over = key[1] if key[1] == EPOCH else "layer, last epoch"
    axis.set_xlabel(over + (f"; none in {names}" if lacking else ""))
    axis.xaxis.get_major_locator().set_params(integer=True)


def style(number: int) -> dict[str, Any]:
    """Colour and dashes of the arm of this number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS)], "linewidth": 1.4}
