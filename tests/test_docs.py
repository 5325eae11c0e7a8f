"""What the how-to pages show works: their Python runs, their commands parse, their links lead somewhere.

A Python block whose first line is a comment with a file's name is added to that file; any other is run where it stands.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vitreous
from test_cards import SECTIONS
from vitreous.commands.bench import Bench
from vitreous.commands.resume import Resume
from vitreous.commands.study import Study
from vitreous.commands.train import Train
from vitreous.train.study.study import arm_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def file_and_text(block: str) -> tuple[str | None, str]:
    """("name.py", the rest) for a block that belongs into a file, (None, the block) for another."""
    first, _, rest = block.partition("\n")
    named = re.fullmatch(r"# (\w+\.py)", first)
    return (named[1], rest) if named else (None, block)


def sample_of_cases(test: Callable) -> list[tuple]:
    """The arguments of a test's calls: none, or with one parameter some of its values, no more than twelve, far apart."""
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    if not marks:
        return [()]
    values = list(marks[0].args[1])
    return [(value,) for value in values[:: len(values) // 12 + 1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_runs_and_its_tests_pass(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict = {}
    for name, text in map(file_and_text, blocks(page, "python")):
        if name is None:
            exec(compile(text, page.name, "exec"), namespace)
        else:
            monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
            with (tmp_path / name).open("a") as file:
                file.write(text + "\n\n")
    for file in sorted(tmp_path.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"{page.stem}.{file.stem}", file)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        tests = [value for name, value in vars(module).items() if name.startswith("test_")]
        assert tests
        for test in tests:
            for arguments in sample_of_cases(test):
                test(*arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_links(page):
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line)
        if words[:1] == ["torchrun"]:
            words = words[words.index("vitreous") :]
        if words[:2] == ["vitreous", "resume"]:
            assert Resume.read(words[2:]).folder
        if words[:2] == ["vitreous", "train"]:
            assert Train.read(words[2:]).settings().data
        if words[:2] == ["vitreous", "study"]:
            study = Study.read(words[2:])
            assert arm_settings(study.settings(), study.arm)
        if words[:2] == ["vitreous", "bench"]:
            assert Bench.read(words[2:]).settings().arms()
        for path in (word for word in words if word.startswith("tests/")):
            assert (ROOT / path).exists(), line
    for link in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_walk_through_shows_the_shipped_mechanism_and_the_cards_sections():
    """What the reader builds is what is in the catalogue, word for word, so the page cannot fall behind."""
    page = ROOT / "docs" / "how-to" / "add-a-mechanism.md"
    shipped = vitreous.catalogue()["adaptformer"].read_text()
    parts = [text for name, text in map(file_and_text, blocks(page, "python")) if name == "adaptformer.py"]
    assert len(parts) == 2
    for text in "\n\n\n".join(parts).strip().split("\n\n\n"):
        assert text.strip() in shipped, text
    card = "".join(blocks(page, "markdown"))
    assert re.findall(r"^## (.*)$", card, re.M) == SECTIONS


def test_the_page_on_the_engine_names_its_files_and_functions():
    page, engine = (ROOT / "docs" / "engine.md").read_text(), ROOT / "src" / "vitreous" / "train" / "engine"
    assert {path.name for path in engine.glob("[!_]*.py")} <= set(re.findall(r"`(\w+\.py)`", page))
    source = "".join(path.read_text() for path in engine.rglob("*.py"))
    for name in re.findall(r"`([a-z]+_[a-z_]+|[A-Z]\w+)`", page):
        assert re.search(rf"\b{name}\b", source), name
    for link in re.findall(r"\]\(([^)#]+)", page):
        assert (ROOT / "docs" / link).exists(), link


# --- the tree, twice ---------------------------------------------------------------------------------------------------

SRC = ROOT / "src" / "vitreous"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def folders(deep: bool) -> set[str]:
    """Folders with Python files below the package, and its own files; deep: those two floors down as well."""
    paths = {path.parent.relative_to(SRC).parts for path in SRC.rglob("*.py")} | {("weights",)}
    listed = {parts[:2] if deep and parts[0] in ("lens", "train", "data") else parts[:1] for parts in paths if parts}
    files = {path.name for path in SRC.glob("*.py") if not path.name.startswith("__")}
    return {"/".join(parts) + "/" for parts in listed} | files


@pytest.mark.parametrize(
    ("text", "pattern", "deep"),
    [
        ((ROOT / "README.md").read_text().split("```\nsrc/vitreous/", 1)[-1], r"^  (\S+) ", False),
        (ARCHITECTURE.split(" floor  src/vitreous/", 1)[-1], r"^ +[\d-]+ +(\S+) ", True),
    ],
    ids=["README", "architecture"],
)
def test_the_trees_show_the_folders_that_are_there(text, pattern, deep):
    assert set(re.findall(pattern, text.split("```", 1)[0], re.M)) == folders(deep)


def test_what_architecture_names_is_there():
    for word in re.findall(r"`([\w/]+(?:/|\.py))`", ARCHITECTURE):
        assert (SRC / word).exists() or (ROOT / word).exists(), word
    for link in re.findall(r"\]\(((?!http)[^)#]+)", ARCHITECTURE):
        assert (ROOT / "docs" / link).exists(), link
