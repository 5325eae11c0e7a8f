"""Every mechanism, network or item with a paper has a card, whose code, tests, settings and defaults are there."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from pathlib import Path
from types import ModuleType

import pytest

from test_house import SRC, imported
from vitreous.base.catalogue import Catalogue
from vitreous.base.text_form import Settings, written
from vitreous.mechanism import catalogue, mechanism_class

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "docs" / "cards"
SECTIONS = ["Equation, code, test", "Settings", "Where we differ, and what to know", "Claimed and found"]


def rows(text: str, section: str) -> list[list[str]]:
    """The body of a section's table, as cells."""
    body = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in body.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def catalogues() -> dict[str, Catalogue]:
    """{module.NAME: it} of every catalogue in the package, found by how one is made."""
    found = {}
    for path in SRC.rglob("*.py"):
        module = ".".join(("vitreous", *path.relative_to(SRC).with_suffix("").parts))
        for name in re.findall(r"^([A-Z_]+) = Catalogue\(", path.read_text(), re.M):
            found[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    return found


def items() -> dict[str, type[Settings]]:
    """{module: class} of every item of every catalogue."""
    classes = [catalogue.item(name) for catalogue in catalogues().values() for name in catalogue.files]
    return {cls.__module__: cls for cls in classes}


def leaning(sources: dict[str, str], prototypes: set[str]) -> set[str]:
    """The modules {name without `vitreous.`: source} that import a prototype and are none."""
    return {
        name
        for name, source in sources.items()
        if name not in prototypes
        for target in imported(source, Path(*name.split(".")))
        if target in prototypes or target.rpartition(".")[0] in prototypes
    }


def networks() -> dict[str, dict[str, type]]:
    """{file's stem: {name for timm: class}} of the networks that the package registers."""
    found = {}
    for path in sorted((SRC / "architectures").glob("[!_]*.py")):
        module = importlib.import_module(f"vitreous.architectures.{path.stem}")
        names = re.findall(r"^@register_model\ndef (\w+)\(", path.read_text(), re.M)
        found[path.stem] = {name: typing.get_type_hints(getattr(module, name))["return"] for name in names}
    return found


def of_a_paper() -> dict[str, tuple[str, type[Settings]]]:
    """{name: (noun, class)} of the tasks, updates, probes and others that stand on a paper."""
    found = {}
    for name, others in catalogues().items():
        if name != "vitreous.mechanism.MECHANISMS":
            found |= {stem: (others.noun, others.item(stem)) for stem in others.files}
    return {stem: (noun, cls) for stem, (noun, cls) in found.items() if getattr(cls, "paper", "")}


def check_page(text: str, module: ModuleType, tests: Path, header: str) -> None:
    """The parts that every card has, and each row's code and test are there."""
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    for word in (header, "**Paper.**", "**Idea.**", "**Cost.**", "**Licence.**"):
        assert word in text, word
    equations, source = rows(text, "Equation, code, test"), tests.read_text()
    assert equations
    for equation, code, test in equations:
        found = module
        for part in code.strip("`").split("."):
            assert hasattr(found, part), f"{equation}: no {code}"
            found = getattr(found, part)
        assert f"def {test.strip('`')}(" in source, f"{equation}: no {test}"


def test_cards_and_items_are_the_same_list():
    assert {path.stem for path in CARDS.glob("*.md")} == {*catalogue(), *networks(), *of_a_paper()}


def check_item(name: str, cls: type[Settings], header: str, tests: Path) -> None:
    """The card of an item: its page, its stage, each setting with its default, and its papers."""
    text = (CARDS / f"{name}.md").read_text()
    check_page(text, importlib.import_module(cls.__module__), tests, header)
    assert ("**Stage.** Prototype" in text) == (cls.stage == "prototype")
    stated = {setting.strip("`"): default.strip("`") for setting, default, _ in rows(text, "Settings")}
    expected = {field.name: written(field.default) for field in dataclasses.fields(cls)}
    assert stated.keys() == expected.keys()
    wrong = {s: stated[s] for s in stated if expected[s] != "none" and stated[s] != expected[s]}
    assert not wrong
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", cls.paper):
        assert paper in text


@pytest.mark.parametrize("name", catalogue())
def test_card(name):
    header = f"`{name}` · slot `{catalogue()[name].parent.name}`"
    check_item(name, mechanism_class(name), header, ROOT / "tests" / "mechanisms" / f"test_{name}.py")


@pytest.mark.parametrize("name", of_a_paper())
def test_card_of_an_item_with_a_paper(name):
    """Its tests stand in the one `test_NAME.py` below the folder of `tests` that is called like its own of `src`."""
    noun, cls = of_a_paper()[name]
    (tests,) = (ROOT / "tests" / cls.__module__.split(".")[1]).rglob(f"test_{name}.py")
    check_item(name, cls, f"`{name}` · {noun}", tests)


OF_EVERY_NETWORK = {"self", "num_classes", "in_chans", "drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}


@pytest.mark.parametrize("stem", networks())
def test_card_of_a_network(stem):
    """Names, code, tests and settings; a default that differs between the names is written `by name`."""
    text, variants = (CARDS / f"{stem}.md").read_text(), networks()[stem]
    module = importlib.import_module(f"vitreous.architectures.{stem}")
    header = ", ".join(f"`{name}`" for name in variants) + " · network"
    check_page(text, module, ROOT / "tests" / "architectures" / f"test_{stem}.py", header)
    takes: dict[str, inspect.Parameter] = {}
    for cls in set(variants.values()):
        for base in reversed(cls.__mro__):
            takes |= inspect.signature(base.__init__).parameters if "__init__" in vars(base) and base is not object else {}
        own = inspect.signature(cls.__init__).parameters if "__init__" in vars(cls) else {}
    stated = {setting.strip("`"): default.strip("`") for setting, default, _ in rows(text, "Settings")}
    named = {name for name, p in own.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    assert stated.keys() <= takes.keys(), "a setting that the network does not take"
    assert named - OF_EVERY_NETWORK <= stated.keys(), "a setting that the card leaves out"
    wrong = {s: d for s, d in stated.items() if d != "by name" and d != str(takes[s].default).strip("()")}
    assert not wrong
    papers = re.findall(r"arXiv (\d{4}\.\d{5})", " ".join(cls.__doc__ or "" for cls in variants.values()))
    assert papers
    assert set(papers) <= set(re.findall(r"\d{4}\.\d{5}", text))


# -- stable and prototype ----------------------------------------------------------------------------------------------


def test_every_item_is_stable_or_a_prototype():
    assert {"vitreous.mechanism.MECHANISMS", "vitreous.lens.probe.PROBES"} <= set(catalogues())
    assert {cls.stage for cls in items().values()} <= {"stable", "prototype"}


def test_a_stable_item_that_leans_on_a_prototype_is_found():
    sources = {
        "mechanisms.attn.stable": "from vitreous.mechanisms.mixer.early import step",
        "mechanisms.attn.other": "def f():\n    import vitreous.mechanisms.mixer.early",
        "mechanisms.attn.dots": "from ..mixer import early",
        "mechanisms.mixer.early": "from vitreous.mechanisms.mixer import earlier",
        "mechanisms.mixer.earlier": "from vitreous import slots",
    }
    prototypes = {"mechanisms.mixer.early", "mechanisms.mixer.earlier"}
    assert leaning(sources, prototypes) == {"mechanisms.attn.stable", "mechanisms.attn.other", "mechanisms.attn.dots"}
    assert leaning(sources, set()) == set()


def test_nothing_leans_on_a_prototype():
    """A prototype's text form and numbers may change, so only prototypes may import one."""
    sources = {".".join(path.relative_to(SRC).with_suffix("").parts): path.read_text() for path in SRC.rglob("*.py")}
    prototypes = {module.removeprefix("vitreous.") for module, cls in items().items() if cls.stage == "prototype"}
    assert leaning(sources, prototypes) == set()
