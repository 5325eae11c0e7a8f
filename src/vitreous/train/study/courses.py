"""What runs come to over epochs and layers: mean and range over the seeds of each arm.

The numbers behind a paper's figures: scores of every test set, seconds, and the six indicators of
SVDA's paper, each over epochs and over the layers of the last epoch.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from vitreous.base.errors import DataError, SettingError
from vitreous.base.metrics import metrics_of
from vitreous.train.records.run_folder import read_metrics, read_record, read_table
from vitreous.train.records.summary import table

# settings that say how or where a run was made, not what was trained
ASIDE = {"seed", "seeds", "out", "download", "workers", "tracker", "save_every", "rollbacks", "rollback_lr", "device"}
EPOCH, LAYER = "epoch", "layer"


@dataclass(frozen=True)
class Indicator:
    """One of the paper's six: a measure of a reading's rows of one source."""

    measure: str
    source: str
    label: str

    def title(self, paper: bool) -> str:
        """For people; paper: of the form that was published."""
        return f"{self.label}, paper's form" if paper else self.label


INDICATORS = (
    Indicator("spectral_entropy", "learned", "spectral entropy (nats)"),
    Indicator("effective_rank", "learned", "effective rank (axes)"),
    Indicator("spectral_sparsity", "learned", "spectral sparsity"),
    Indicator("angular_alignment", "attention", "angular alignment (cosine)"),
    Indicator("selectivity", "attention", "selectivity index"),
    Indicator("perturbation_robustness", "attention", "change under noise"),
)
Key = tuple[str, str]  # a quantity and what it goes over, EPOCH or LAYER


@dataclass(frozen=True)
class Point:
    """Mean, lowest and highest over runs."""

    mean: float
    low: float
    high: float
    runs: int


Course = dict[int, Point]  # by epoch or layer


def run_folders(folders: Iterable[str | Path]) -> list[Path]:
    """The runs that folders are, or hold, as those of a study do. Raises DataError for none."""
    runs: list[Path] = []
    for folder in map(Path, folders):
        here = [folder] if (folder / "run.json").is_file() else sorted(file.parent for file in folder.glob("*/run.json"))
        if not here:
            raise DataError(
                f"Found no run in {str(folder)!r}. Expected a folder that `vitreous train` or `vitreous study` wrote. Check "
                "the path."
            )
        runs += [run for run in here if run not in runs]
    return runs


def arms_of(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs by arm: those of one arm have the same settings but for the seed.

    An arm is named by its grafts ("plain" for none), and by what else differs between arms.
    """
    groups: dict[str, list[Path]] = {}
    for run in runs:
        groups.setdefault(json.dumps(kept_settings(run), sort_keys=True), []).append(run)
    settings = [json.loads(text) for text in groups]
    different = [name for name in settings[0] if any(other.get(name) != settings[0].get(name) for other in settings)]
    names = [name_of(one, [name for name in different if name != "graft"]) for one in settings]
    return dict(zip(names, groups.values(), strict=True))


def kept_settings(run: Path) -> dict[str, Any]:
    """The settings of a run by which it belongs to an arm."""
    return {name: value for name, value in sorted(read_record(run)["settings"].items()) if name not in ASIDE}


def name_of(settings: Mapping[str, Any], different: Sequence[str]) -> str:
    grafts = " ".join(settings.get("graft") or ()) or "plain"
    others = [f"{name}={written(settings.get(name))}" for name in different]
    return ", ".join([grafts, *others])


def written(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def courses(runs: Sequence[Path], paper: bool = False) -> dict[Key, Course]:
    """The courses of one arm, of epochs and layers that all of its runs have.

    paper: indicators in the form of the paper. What a run does not show, such as the learned
    spectrum of plain attention, has no course.
    """
    values = [course_of(run, paper) for run in runs]
    joined: dict[Key, Course] = {}
    for key in values[0]:
        if all(key in one for one in values):
            shared = sorted(set.intersection(*(set(one[key]) for one in values)))
            joined[key] = {at: point([one[key][at] for one in values]) for at in shared}
    return {key: course for key, course in joined.items() if course}


def point(values: Sequence[float]) -> Point:
    return Point(mean(values), min(values), max(values), len(values))


def course_of(run: Path, paper: bool) -> dict[Key, dict[int, float]]:
    """What one run came to, by quantity; scores and indicators in the units of their labels."""
    first, *_ = metrics_of(read_record(run))
    values: dict[Key, dict[int, float]] = {}
    for line in read_metrics(run):
        for test, scores in line["tests"].items():
            values.setdefault((f"{test} {first.label} {first.unit}".rstrip(), EPOCH), {})[line["epoch"]] = (
                first.scale * scores[first.name]
            )
        values.setdefault(("seconds per epoch", EPOCH), {})[line["epoch"]] = line["seconds"]
    readings = {int(path.name.removeprefix("epoch-")): path for path in (run / "readings").glob("epoch-*")}
    for epoch in sorted(readings):
        for indicator, by_layer in indicators_of(readings[epoch] / "table.csv", paper).items():
            title = indicator.title(paper)
            values.setdefault((title, EPOCH), {})[epoch] = mean(by_layer.values())
            values[title, LAYER] = by_layer  # of the last epoch that is left
    return values


def indicators_of(path: Path, paper: bool) -> dict[Indicator, dict[int, float]]:
    """Each indicator by layer, its mean over images and heads; those that a reading has."""
    sums: dict[Indicator, dict[int, list[float]]] = {}
    for row in read_table(path) if path.is_file() else ():
        for indicator in INDICATORS:
            cell = row.get(f"{indicator.measure}_paper" if paper else indicator.measure)
            if cell and row["source"] == indicator.source and row["kind"] == "token":
                sums.setdefault(indicator, {}).setdefault(int(row["layer"]), []).append(float(cell))
    return {indicator: {layer: mean(values) for layer, values in sorted(of.items())} for indicator, of in sums.items()}


# -- tables ----------------------------------------------------------------------------------------


def as_record(arms: Mapping[str, Mapping[Key, Course]]) -> dict[str, list[dict[str, Any]]]:
    """For JSON: of each arm its quantities, with points [at, mean, lowest, highest]."""
    return {
        arm: [
            {"quantity": quantity, "over": over, "points": [[at, *rounded(one)] for at, one in course.items()]}
            for (quantity, over), course in of.items()
        ]
        for arm, of in arms.items()
    }


def rounded(one: Point) -> list[float]:
    return [float(f"{value:.7g}") for value in (one.mean, one.low, one.high)]


def as_csv(arms: Mapping[str, Mapping[Key, Course]]) -> str:
    """All courses, one line for each arm, quantity and epoch or layer."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "quantity", "over", "at", "mean", "lowest", "highest", "runs"])
    for arm, of in arms.items():
        for (quantity, over), course in of.items():
            for at, one in course.items():
                writer.writerow([arm, quantity, over, at, *(f"{value:.7g}" for value in rounded(one)), one.runs])
    return text.getvalue()


def as_markdown(arms: Mapping[str, Mapping[Key, Course]]) -> str:
    """What the last epoch came to: a line for each arm."""
    names = list(dict.fromkeys(quantity for of in arms.values() for quantity, over in of if over == EPOCH))
    rows = [["arm", "runs", *names]]
    for arm, of in arms.items():
        last = {name: of[name, EPOCH][max(of[name, EPOCH])] for name in names if (name, EPOCH) in of}
        rows.append([arm, str(max(one.runs for one in last.values())), *(cell(last.get(name)) for name in names)])
    return (
        f"{table(rows)}\nOf the last epoch: mean over runs that differ in their seed alone, and lowest to highest. Indicators "
        "are means over images, heads and layers. An empty cell: the arm does not show it.\n"
    )


def cell(one: Point | None) -> str:
    if one is None:
        return ""
    spread = f" ({one.low:.4g} to {one.high:.4g})" if one.runs > 1 else ""
    return f"{one.mean:.4g}{spread}"


def missing(arms: Mapping[str, Mapping[Key, Course]], key: Key) -> list[str]:
    """The arms that do not show a quantity."""
    return [arm for arm, of in arms.items() if key not in of]


def check_arms(arms: Mapping[str, Mapping[Key, Course]]) -> None:
    """Raise SettingError if no run has anything to show."""
    if empty := [arm for arm, of in arms.items() if not of]:
        raise SettingError(
            f"Found no finished epoch in the runs of {', '.join(empty)}. Expected one at least. Let them train on "
            "(`vitreous resume`), or leave them out."
        )
