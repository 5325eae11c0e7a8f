"""Arms of a study: means over seeds, and paired differences from the first arm.

They are compared by the first metric of their task. Two intervals stand beside each difference,
since two things are left to chance:

    by seed     Student's, over the differences of runs with the same seed: would other seeds
                (weights, order, augmentation) show it too, on these test images? Needs two seeds.
    by image    a bootstrap over test images, of their mean difference over the seeds: would other
                images show it too, with these very weights?

Both are wide enough that all comparisons of a study with its first arm hold together, on one test
set, in 95 of 100 studies (Bonferroni: 1 - 0.05 / comparisons each). Neither stands for both kinds
of chance at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.base.metrics import Metric
from vitreous.base.statistics import MARGIN, bootstrap, of_mean, wilson
from vitreous.base.statistics import verdict as verdict_of
from vitreous.train.records.predictions import by_image
from vitreous.train.records.run_folder import read_metrics, read_record, read_rows
from vitreous.train.records.summary import outcome, run_metrics, table
from vitreous.train.study.undecided import ENOUGH, what_it_takes

LEVEL = 0.95
DRAWS = 10_000  # of the bootstrap over test images
BY = ("interval_by_seed", "interval_by_image")


def compare(arms: dict[str, Sequence[Path]]) -> dict[str, Any]:
    """Results of a study, each arm against the first.

    arms: {name: its finished run folders, in the order of the seeds}.

    Returns level: of the intervals of differences. tests: by test set, "arms" and "differences" by
    name, all as parts of 1, with the verdict and what would decide an undecided one. cost: by arm,
    seconds of training per image over those of the first arm, seed by seed and their geometric
    mean, and the number of parameters.
    """
    first, *others = arms
    level = 1 - (1 - LEVEL) / max(len(others), 1)
    metric = run_metrics(arms[first][0])[0]
    outcomes = {name: [outcome(run) for run in runs] for name, runs in arms.items()}
    images = {name: [by_image(run, metric) for run in runs] for name, runs in arms.items()}
    same = alike(arms[first])
    tests = {}
    for test in outcomes[first][0]:
        scores = {name: [tests[test][metric.name] for tests in of_seeds] for name, of_seeds in outcomes.items()}
        answers = {name: [values.get(test, {}) for values in of_seeds] for name, of_seeds in images.items()}
        tests[test] = {
            "arms": {name: one_arm(metric, values, answers[name][0]) for name, values in scores.items()},
            "differences": {
                name: one_difference(scores[name], scores[first], answers[name], answers[first], level, same) for name in others
            },
        }
        for difference in tests[test]["differences"].values():
            difference["verdict"] = verdict(difference, metric)
            undecided = difference["verdict"] == "undecided"
            difference["takes"] = what_it_takes(difference, metric, level) if undecided else ""
    costs = {name: cost(arms[name], arms[first]) for name in arms}
    return {"first": first, "level": level, "metric": asdict(metric), "tests": tests, "cost": costs}


def one_arm(metric: Metric, scores: list[float], answers: dict[int, float]) -> dict[str, Any]:
    """Scores by seed, their mean and its interval.

    The interval is Student's over seeds, or Wilson's over the images of a single seed, if each is
    right or wrong; else there is none.
    """
    interval = None
    if len(scores) > 1:
        interval = list(of_mean(scores, LEVEL))
    elif answers and set(answers.values()) <= {0.0, 1.0}:
        interval = list(wilson(sum(answers.values()), len(answers)))
    return {metric.name: scores, "mean": statistics.mean(scores), "interval": interval}


def one_difference(
    ours: list[float], theirs: list[float], answers: list[dict], base: list[dict], level: float, same: bool
) -> dict[str, Any]:
    """Paired difference of two arms with both intervals; same: all seeds have the same images."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    units: dict[Any, list[float]] = {}  # by test image, the bootstrap's unit: its seeds belong together
    for seed, (a, b) in enumerate(zip(answers, base, strict=True)):
        for image in a.keys() & b.keys():
            units.setdefault(image if same else (seed, image), []).append(a[image] - b[image])
    per_image = np.array([statistics.mean(units[key]) for key in sorted(units)])
    interval = list(bootstrap(per_image, level, draws=DRAWS, few_values=True)[1:]) if len(per_image) else None
    return {
        "by_seed": differences,
        "mean": statistics.mean(differences),
        "interval_by_seed": list(of_mean(differences, level)) if len(differences) > 1 else None,
        "interval_by_image": interval,
        "images": len(per_image),
    }


def cost(runs: Sequence[Path], base: Sequence[Path]) -> dict[str, Any]:
    """Parameters; seconds of training per image (median over epochs) over the first arm's."""

    def rate(run: Path) -> float:
        return statistics.median(line["images_per_second"] for line in read_metrics(run))

    ratios = [rate(theirs) / rate(ours) for ours, theirs in zip(runs, base, strict=True)]
    parameters = read_record(runs[0]).get("model", {}).get("parameters")
    return {"by_seed": ratios, "mean": math.exp(statistics.mean(map(math.log, ratios))), "parameters": parameters}


def alike(runs: Sequence[Path]) -> bool:
    """True if all the runs were tested on the same images; made data are drawn by the seed."""
    tested = [[row for row in read_rows(run / "manifest.csv") if row[0] != "train"] for run in runs]
    return all(rows == tested[0] for rows in tested)


def verdict(difference: dict[str, Any], metric: Metric) -> str:
    """What a difference comes to; "no difference" is said from three seeds on."""
    intervals = [sorted(metric.sign * np.array(difference[name])) for name in BY if difference[name]]
    enough = len(difference["by_seed"]) >= ENOUGH
    return verdict_of(intervals, MARGIN if metric.unit == "%" and enough else None)


def tables(results: dict[str, Any]) -> list[str]:
    """The results as Markdown: a table for each test set, and what its intervals mean."""
    first, seeds = results["first"], len(results["cost"][results["first"]]["by_seed"])
    metric, text = Metric(**results["metric"]), []
    for test, result in results["tests"].items():
        rows = [["arm", metric.label, "95 % interval", f"to {first}", "by seed", "by image", "", "cost", "parameters"]]
        for name, arm in result["arms"].items():
            cells = [name, metric.text(arm["mean"]), span(metric, arm["interval"], signed=False)]
            if difference := result["differences"].get(name):
                by_seed, by_image = (span(metric, difference[interval]) for interval in BY)
                cells += [metric.number(difference["mean"], "+"), by_seed, by_image, verdict(difference, metric)]
            else:
                cells += [""] * 4
            spent = results["cost"][name]
            count = spent.get("parameters")
            rows.append([*cells, f"{spent['mean']:.2f}", "" if count is None else f"{count:,}"])
        text += [f"## {test}\n", table(rows)]
        undecided = {name: one["takes"] for name, one in result["differences"].items() if one["takes"]}
        text += [f"{name} is undecided. {takes}\n" for name, takes in undecided.items()]
    many = len(results["cost"]) - 1
    over = "Student's over the seeds" if seeds > 1 else "Wilson's over the test images, since there is one seed"
    each = f"{100 * results['level']:.1f} % each, so that all {many} comparisons of a test set hold at 95 % (Bonferroni)"
    article = "an" if metric.label[0] in "aeiou" else "a"
    text.append(
        f"{seeds} seed{'s' if seeds > 1 else ''}; runs of one seed have the same data, order, recipe and starting weights. "
        f"Intervals of {article} {metric.label} are {over}. Differences are in {unit(metric)}, paired: *by seed* asks whether "
        "other seeds would show them on these images, *by image* whether other images would with these weights; neither "
        f"covers both. They hold at {each if many > 1 else '95 %'}. Better or worse is said where no interval holds 0, "
        + ("no difference where from three seeds on both lie within one point, " if metric.unit == "%" else "")
        + "else undecided: more seeds and test images narrow them. Cost is "
        "seconds of training per image, relative to the first arm, as it came while training: `vitreous bench` measures it in "
        "turns.\n"
    )
    return text


def unit(metric: Metric) -> str:
    """The unit of a difference, for people."""
    return "points" if metric.unit == "%" else metric.unit or f"units of the {metric.label}"


def span(metric: Metric, ends: Sequence[float] | None, signed: bool = True) -> str:
    """An interval as text, "" for None; signed: of a difference, without unit."""
    if ends is None:
        return ""
    low, high = (metric.number(value, "+" if signed else "") for value in ends)
    return f"{low} to {high}" + ("" if signed else f" {metric.unit}")
