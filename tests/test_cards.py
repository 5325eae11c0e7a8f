"""Every mechanism has a card, and what a card names is there: code, tests, settings with their defaults."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from vitreous.base.text_form import written
from vitreous.mechanism import catalogue, mechanism_class

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "docs" / "cards"
SECTIONS = ["Equation, code, test", "Settings", "Where we differ, and what to know", "Claimed and found"]


def rows(text: str, section: str) -> list[list[str]]:
    """The body of a section's table, as cells."""
    body = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in body.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_cards_and_mechanisms_are_the_same_list():
    assert {path.stem for path in CARDS.glob("*.md")} == set(catalogue())


@pytest.mark.parametrize("name", catalogue())
def test_card(name):
    text, cls = (CARDS / f"{name}.md").read_text(), mechanism_class(name)
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    for word in (f"`{name}` · slot `{catalogue()[name].parent.name}`", "**Paper.**", "**Idea.**", "**Cost.**", "**Licence.**"):
        assert word in text, word
    module = importlib.import_module(cls.__module__)
    tests = (ROOT / "tests" / "mechanisms" / f"test_{name}.py").read_text()
    equations = rows(text, "Equation, code, test")
    assert equations
    for equation, code, test in equations:
        found = module
        for part in code.strip("`").split("."):
            assert hasattr(found, part), f"{equation}: no {code}"
            found = getattr(found, part)
        assert f"def {test.strip('`')}(" in tests, f"{equation}: no {test}"
    stated = {setting.strip("`"): default.strip("`") for setting, default, _ in rows(text, "Settings")}
    expected = {field.name: written(field.default) for field in dataclasses.fields(cls)}
    assert stated.keys() == expected.keys()
    wrong = {s: stated[s] for s in stated if expected[s] != "none" and stated[s] != expected[s]}
    assert not wrong
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", cls.paper):
        assert paper in text
