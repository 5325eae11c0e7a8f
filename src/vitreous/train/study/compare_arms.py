"""Arms of a study compared: accuracies over seeds, and paired differences from the first arm, from run folders alone.

Two intervals stand beside each difference, since two things are left to chance:

    by seed     Student's, over the differences of runs with the same seed: would other seeds (weights, order, augmentation)
                show it too, on these test images? Needs two seeds.
    by image    a bootstrap over test images, of their mean difference over the seeds: would other images show it too, with
                these very weights?

Both are wide enough that all comparisons of a study with its first arm hold together, on one test set, in 95 of 100 studies
(Bonferroni: 1 - 0.05 / comparisons each). Neither stands for both kinds of chance at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.base.statistics import of_images, of_mean, wilson
from vitreous.train.records.run_folder import read_metrics, read_rows, read_table
from vitreous.train.records.summary import outcome, table

LEVEL = 0.95


def compare(arms: dict[str, Sequence[Path]]) -> dict[str, Any]:
    """Results of a study. arms: {name: its finished run folders, in the order of the seeds}; the first is compared with.

    level: of the intervals of differences. tests: by test set, "arms" and "differences" by name, all as parts of 1. cost: by
    arm, seconds of training per image over those of the first arm, seed by seed and their geometric mean.
    """
    first, *others = arms
    level = 1 - (1 - LEVEL) / max(len(others), 1)
    outcomes = {name: [outcome(run) for run in runs] for name, runs in arms.items()}
    right = {name: [correct(run) for run in runs] for name, runs in arms.items()}
    same = alike(arms[first])
    tests = {}
    for test in outcomes[first][0]:
        scores = {name: [found[test]["accuracy"] for found in of_seeds] for name, of_seeds in outcomes.items()}
        answers = {name: [found[test] for found in of_seeds] for name, of_seeds in right.items()}
        tests[test] = {
            "arms": {name: one_arm(values, answers[name][0]) for name, values in scores.items()},
            "differences": {
                name: one_difference(scores[name], scores[first], answers[name], answers[first], level, same) for name in others
            },
        }
    return {"first": first, "level": level, "tests": tests, "cost": {name: cost(arms[name], arms[first]) for name in arms}}


def one_arm(scores: list[float], answers: dict[int, bool]) -> dict[str, Any]:
    """Accuracies by seed, their mean and its interval: Student's over seeds, or Wilson's over the images of a single seed."""
    several = len(scores) > 1
    interval = of_mean(scores, LEVEL) if several else wilson(sum(answers.values()), len(answers))
    return {"accuracy": scores, "mean": statistics.mean(scores), "interval": list(interval)}


def one_difference(
    ours: list[float], theirs: list[float], answers: list[dict], base: list[dict], level: float, same: bool
) -> dict[str, Any]:
    """Paired difference of two arms with both intervals. same: whether all seeds were tested on the same images."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    units: dict[Any, list[int]] = {}  # by test image
    for seed, (a, b) in enumerate(zip(answers, base, strict=True)):
        for image in a.keys() & b.keys():
            units.setdefault(image if same else (seed, image), []).append(int(a[image]) - int(b[image]))
    per_image = np.array([statistics.mean(units[key]) for key in sorted(units)])
    _, low, high = of_images(per_image, level)
    return {
        "by_seed": differences,
        "mean": statistics.mean(differences),
        "interval_by_seed": list(of_mean(differences, level)) if len(differences) > 1 else None,
        "interval_by_image": [low, high],
    }


def cost(runs: Sequence[Path], base: Sequence[Path]) -> dict[str, Any]:
    """Seconds of training per image over those of the first arm; of each run the median over its epochs."""

    def rate(run: Path) -> float:
        return statistics.median(line["images_per_second"] for line in read_metrics(run))

    ratios = [rate(theirs) / rate(ours) for ours, theirs in zip(runs, base, strict=True)]
    return {"by_seed": ratios, "mean": math.exp(statistics.mean(map(math.log, ratios)))}


def correct(run: Path) -> dict[str, dict[int, bool]]:
    """{test set: {image: whether it was recognised}} of a run."""
    found: dict[str, dict[int, bool]] = {}
    for line in read_table(run / "predictions.csv"):
        found.setdefault(line["set"], {})[int(line["index"])] = line["label"] == line["predicted"]
    return found


def alike(runs: Sequence[Path]) -> bool:
    """True if all the runs were tested on the same images; made data are drawn by the seed."""
    tested = [[row for row in read_rows(run / "manifest.csv") if row[0] != "train"] for run in runs]
    return all(rows == tested[0] for rows in tested)


def verdict(found: dict[str, Any]) -> str:
    """What a difference comes to: "better" or "worse" where no interval holds 0, else "no difference shown"."""
    ends = [found["interval_by_image"], *([found["interval_by_seed"]] if found["interval_by_seed"] else [])]
    if all(low > 0 for low, _ in ends):
        return "better"
    return "worse" if all(high < 0 for _, high in ends) else "no difference shown"


def tables(results: dict[str, Any]) -> list[str]:
    """The results as Markdown: a table for each test set, and what its intervals mean."""
    first, seeds = results["first"], len(results["cost"][results["first"]]["by_seed"])
    text = []
    for test, found in results["tests"].items():
        rows = [["arm", "accuracy", "95 % interval", f"to {first}", "by seed", "by image", "", "cost"]]
        for name, arm in found["arms"].items():
            cells = [name, f"{100 * arm['mean']:.2f} %", span(arm["interval"], " %")]
            if other := found["differences"].get(name):
                by_seed = span(other["interval_by_seed"]) if other["interval_by_seed"] else ""
                cells += [f"{100 * other['mean']:+.2f}", by_seed, span(other["interval_by_image"]), verdict(other)]
            else:
                cells += [""] * 4
            rows.append([*cells, f"{results['cost'][name]['mean']:.2f}"])
        text += [f"## {test}\n", table(rows)]
    many = len(results["cost"]) - 1
    over = "Student's over the seeds" if seeds > 1 else "Wilson's over the test images, since there is one seed"
    each = f"{100 * results['level']:.1f} % each, so that all {many} comparisons of a test set hold at 95 % (Bonferroni)"
    text.append(
        f"{seeds} seed{'s' if seeds > 1 else ''}; runs of one seed have the same data, order, recipe and starting weights. "
        f"Intervals of an accuracy are {over}. Differences are in points, paired: *by seed* asks whether other seeds would "
        "show them on these images, *by image* whether other images would with these weights; neither covers both. They "
        f"hold at {each if many > 1 else '95 %'}. Better or worse is said where no interval holds 0. Cost is seconds of "
        "training per image, relative to the first arm, as it came while training: `vitreous bench` measures it in turns.\n"
    )
    return text


def span(ends: Sequence[float], unit: str = "") -> str:
    """An interval of parts of 1 in points."""
    return f"{100 * ends[0]:{'.2f' if unit else '+.2f'}} to {100 * ends[1]:{'.2f' if unit else '+.2f'}}{unit}"
