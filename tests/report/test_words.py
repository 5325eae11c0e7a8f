"""Every measure that a reading can hold is explained on the page, and in the how-to, under the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitreous.lens import measures
from vitreous.lens.formulas import scores
from vitreous.report import words

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "read-a-report.md"


@pytest.mark.parametrize("name", [name for name in measures.COLUMNS if not name.endswith("_paper")])
def test_every_measure_has_words(name):
    label, unit, about = words.MEASURES[name]
    assert unit
    assert about.endswith(".")
    assert f"| {label} | " in PAGE.read_text()


@pytest.mark.parametrize("name", scores.MEASURES)
def test_every_score_has_words(name):
    label, unit, about = words.SCORES[name]
    assert unit
    assert about.endswith(".")
    assert f"| {label} | " in PAGE.read_text()


def test_every_baseline_and_source_has_words():
    assert set(words.BASELINES) == set(scores.BASELINES)
    assert set(words.SOURCES) == set(measures.SOURCES)
