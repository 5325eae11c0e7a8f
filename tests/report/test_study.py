"""The page of a study answers: does arm B beat arm A? Written by hand, so that the page is not asked by what made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from report.made import write_run
from report.test_browser import FAINT, cells, visit
from vitreous.base.errors import DataError
from vitreous.report.page import write

TAKES = "If the difference stays at +0.50 points, as scattered as here, 9 seeds would show: better."


def difference(verdict: str, mean: float, half: float, takes: str = "") -> dict:
    ends = [mean - half, mean + half]
    return {
        "by_seed": [mean - half / 2, mean, mean + half / 2], "mean": mean, "interval_by_seed": ends,
        "interval_by_image": [mean - 0.8 * half, mean + 0.8 * half], "images": 400, "verdict": verdict, "takes": takes,
    }  # fmt: skip


def write_study(folder: Path, readings: bool = True, **metric) -> Path:
    """An arm that is better, one that is undecided."""
    arms = {"plain": 0.7, "svda": 0.75, "<b>spc</b>": 0.705}
    for name in ("plain", "svda", "spc"):
        run = write_run(folder / f"{name}-seed-5", epochs=1, name=name, images=1)
        if not readings:
            shutil.rmtree(run / "readings")
            (run / "predictions.csv").write_text("set,index,label,predicted,probability\ntest,0,0,0,0.9\n")
    results = {
        "first": "plain", "level": 0.975,
        "metric": {"name": "accuracy", "unit": "%", "better": "higher", "label": "accuracy"} | metric,
        "tests": {
            "test": {
                "arms": {
                    name: {"accuracy": [mean - 0.01, mean, mean + 0.01], "mean": mean, "interval": [mean - 0.02, mean + 0.02]}
                    for name, mean in arms.items()
                },
                "differences": {
                    "svda": difference("better", 0.05, 0.03),
                    "<b>spc</b>": difference("undecided", 0.005, 0.02, TAKES),
                },
            }
        },
        "cost": {name: {"by_seed": [1.0] * 3, "mean": 1.0} for name in arms},
        "courses": {
            name: [
                {"quantity": "test accuracy %", "over": "epoch", "points": [[1, 60.0, 58.0, 61.5], [2, 100 * mean, 70, 76]]},
                *([{"quantity": "effective rank (axes)", "over": "layer", "points": [[0, 5.0, 4.0, 6.0]]}] * (name == "svda")),
            ]
            for name, mean in arms.items()
        },
    }  # fmt: skip
    record = {
        "format": 1, "command": "vitreous study photos", "seeds": [5, 6, 7], "settings": {"data": "photos"}, "results": results,
        "arms": [{"name": name, "folder": folder} for name, folder in zip(arms, ("plain", "svda", "spc"), strict=True)],
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def page_of_study(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    return write([write_study(root / "study")], root / "study.html")


def test_does_arm_b_beat_arm_a(browser, page_of_study):
    with visit(browser, page_of_study) as page:
        assert page.locator("h1").text_content() == "2 arms against plain"
        verdicts = page.locator("#verdicts .card")
        assert verdicts.locator(".verdict-word").all_text_contents() == ["Better", "Undecided"]
        assert "+5.00 points to plain; by seed +2.00 to +8.00, by image +2.60 to +7.40." in verdicts.first.text_content()
        assert verdicts.last.locator(".quiet").text_content() == TAKES
        assert verdicts.first.locator(".quiet").count() == 0
        assert cells(page, "#arm-table")[1][:7] == ["svda", "test", "75.00", "73.00 to 77.00", "74.00", "75.00", "76.00"]
        assert page.locator("#nav a").first.text_content() == "Does an arm beat plain?"
        assert page.locator("#maps").is_visible()  # the first runs, below


def test_the_forest_plot_stands_where_the_numbers_are(browser, page_of_study):
    """Places in the plot are linear in the values of all rows; zero is the dashed line."""
    ends = """row => [...row.querySelectorAll('line')].map(
        line => ['class', 'x1', 'x2'].map(name => line.getAttribute(name)).map((value, i) => i ? Number(value) : value))"""
    with visit(browser, page_of_study) as page:
        rows = page.locator("#forest li[data-row]")
        assert rows.evaluate_all("rows => rows.map(row => row.dataset.row)") == [
            "svda/test/by seed", "svda/test/by image", "<b>spc</b>/test/by seed", "<b>spc</b>/test/by image"]  # fmt: skip
        drawn = [rows.nth(i).evaluate(ends) for i in range(4)]
        zero, unit = drawn[0][0][1], (drawn[0][1][2] - drawn[0][1][1]) / 0.06
        places = [(0.02, 0.08, 0.05), (0.026, 0.074, 0.05), (-0.015, 0.025, 0.005), (-0.011, 0.021, 0.005)]
        for lines, (low, high, mean) in zip(drawn, places, strict=True):
            assert lines[0][1] == zero
            assert lines[1][1:] == pytest.approx([zero + unit * low, zero + unit * high], abs=0.03)
            assert lines[-1][1] == pytest.approx(zero + unit * mean, abs=0.03)
        assert [line[1] for line in drawn[0][2:5]] == pytest.approx([zero + unit * v for v in (0.035, 0.05, 0.065)], abs=0.03)
        assert "a" in drawn[0][1][0].split()
        assert "even" in drawn[2][1][0].split()


def test_courses_of_the_arms_are_drawn_with_the_range_of_their_seeds(browser, page_of_study):
    with visit(browser, page_of_study) as page:
        charts = page.locator("#courses .chart")
        assert charts.locator(".chart-title").all_text_contents() == ["Test accuracy %", "Effective rank (axes)"]
        assert [charts.nth(i).locator("polyline").count() for i in range(2)] == [3, 0]  # a line each; one layer is a dot
        assert [charts.nth(i).locator(".whisker").count() for i in range(2)] == [6, 1]
        assert charts.last.locator(".about").text_content() == "None in plain, <b>spc</b>."
        charts.last.locator("svg").press("ArrowRight")
        assert charts.last.locator(".readout").text_content() == "Layer, last epoch 0, svda: 5, seeds from 4 to 6"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_study_on_a_phone(browser, page_of_study, scheme):
    with visit(browser, page_of_study, viewport={"width": 360, "height": 740}, is_mobile=True, color_scheme=scheme) as page:
        assert page.evaluate("[document.documentElement.scrollWidth, visualViewport.width]") == [360, 360]
        assert page.evaluate(FAINT) == []


def test_a_study_of_models_without_attention(browser, tmp_path):
    path = write([write_study(tmp_path / "study", readings=False)], tmp_path / "study.html")
    with visit(browser, path) as page:
        assert page.locator(".verdict-word").all_text_contents() == ["Better", "Undecided"]
        assert page.locator("#maps").count() == 0
        assert page.locator("#mistakes").count() == 1


def test_a_study_of_an_older_version_or_without_results(browser, tmp_path):
    folder = write_study(tmp_path / "study")
    record = json.loads((folder / "study.json").read_text())
    for one in record["results"]["tests"]["test"]["differences"].values():
        del one["verdict"], one["takes"], one["images"]
    del record["results"]["courses"]
    (folder / "study.json").write_text(json.dumps(record))
    with visit(browser, write([folder], tmp_path / "study.html")) as page:
        assert page.locator(".verdict-word").all_text_contents() == ["Not judged", "Not judged"]
    del record["results"]
    (folder / "study.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="Expected a finished one"):
        write([folder], tmp_path / "study.html")
