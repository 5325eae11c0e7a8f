"""What must come at once comes at once: no torch, no timm; and what is put off until then is what it was."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import vitreous
from vitreous.base.after_import import after_import, late_names
from vitreous.base.entry import PACKAGE, item_files, read_entry
from vitreous.base.text_form import written
from vitreous.commands.cli import COMMANDS, PIPE_CLOSED
from vitreous.commands.list import SHELVES, networks
from vitreous.lens.probe import PROBES
from vitreous.mechanism import MECHANISMS
from vitreous.tasks import TASKS
from vitreous.train.updates import UPDATES

CATALOGUES = (MECHANISMS, TASKS, UPDATES, PROBES)
HEAVY = ("torch", "torchvision", "timm", "numpy")


def python(code: str, *words: str) -> subprocess.CompletedProcess:
    """A fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


LIGHT = ["", "--help", "--version", "list", "list svda", "list scratch_vit_patch8_224", "trian", "list svdaa"]


@pytest.mark.parametrize("words", LIGHT)
def test_light_commands_import_neither_torch_nor_timm(words):
    code = f"""
import sys
from vitreous.commands.cli import main
code = main(sys.argv[1:])
print(code, *sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""
    done = python(code, *words.split())
    mistake = words in ("trian", "list svdaa")
    assert done.stderr.splitlines()[-1] == ("2" if mistake else "0")
    assert mistake or done.stdout


MISTYPED = ("train cutouts --epochz 3", "study", "resume run --lr 3", "bench vit --rounds x", "look", "export run --to x")


def test_help_and_usage_errors_of_every_command_import_neither_torch_nor_timm():
    code = f"""
import contextlib, io, sys
from vitreous.commands.cli import main
for words in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(words.split())
    print(code, *sorted(set({HEAVY}) & set(sys.modules)))
"""
    done = python(code, *(f"{name} --help" for name in COMMANDS), *MISTYPED)
    assert done.stdout.split("\n") == ["0"] * len(COMMANDS) + ["2"] * len(MISTYPED) + [""], done.stderr


@pytest.mark.parametrize("package", ["vitreous.train", "vitreous.bench"])
def test_names_of_a_package_that_are_imported_late(package):
    """They are no names of modules in the package: an import of such a module would take the name's place."""
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
        assert importlib.util.find_spec(f"{package}.{name}") is None
    assert not hasattr(module, "nothing")


def test_a_late_name_is_imported_when_it_is_used():
    get = late_names("some.package", {"json": ("loads",), "no_such_module": ("other",)})
    assert get("loads") is json.loads
    with pytest.raises(ModuleNotFoundError):
        get("other")
    with pytest.raises(AttributeError, match=r"module 'some\.package' has no attribute 'nothing'"):
        get("nothing")


def test_import_vitreous_imports_nothing_and_what_it_puts_off_works():
    """Names are there, and timm, imported later, knows our networks, also where somebody asks for its spec before."""
    code = f"""
import sys, vitreous
from importlib.util import find_spec
print(*sorted(set({HEAVY}) & set(sys.modules)))
assert set(vitreous.__all__) <= set(dir(vitreous))
assert find_spec("timm").origin
from timm.models import create_model
print(type(create_model("scratch_vit_patch4_28")).__name__)
print(vitreous.look.__module__, vitreous.SVDA.__module__, vitreous.data.__name__, hasattr(vitreous, "nothing"))
from vitreous import *
print(Mechanism.__name__)
"""
    done = python(code)
    assert done.stdout.splitlines() == [
        "", "ScratchViT", "vitreous.lens.look vitreous.mechanisms.attn.svda vitreous.data False", "Mechanism",
    ], done.stderr  # fmt: skip


def test_something_is_run_after_an_import_whoever_imports(tmp_path, monkeypatch):
    (tmp_path / "waited_for").mkdir()
    (tmp_path / "waited_for/__init__.py").write_text("import waited_for.part\n\ncomplete = True\n")
    (tmp_path / "waited_for/part.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    calls = []
    after_import("waited_for", lambda: calls.append(sys.modules["waited_for"].complete))
    assert importlib.util.find_spec("waited_for").origin  # looking for it is not importing it
    assert calls == []
    importlib.import_module("waited_for.part")
    assert calls == [True]
    after_import("waited_for", lambda: calls.append("at once"))
    assert calls == [True, "at once"]
    after_import("not_there", lambda: calls.append("never"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("not_there")
    assert calls == [True, "at once"]


@pytest.mark.parametrize("name", vitreous.__all__)
def test_a_public_name_is_what_its_home_says(name):
    home = next(module for module, names in vitreous.HOMES.items() if name in names)
    assert getattr(vitreous, name) is getattr(importlib.import_module(home), name)
    assert getattr(vitreous, name).__module__ in (home, "vitreous.base.catalogue")


def test_type_checkers_read_the_same_homes():
    tree = ast.parse(Path(vitreous.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for_checkers = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert for_checkers == vitreous.HOMES
    assert sorted(name for names in vitreous.HOMES.values() for name in names) == sorted(vitreous.__all__)


# -- entries, read as text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "name"), [(items, name) for items in CATALOGUES for name in items.files])
def test_an_entry_says_what_importing_the_item_says(items, name):
    entry, cls = read_entry(items.files[name]), items.item(name)
    fields = dataclasses.fields(cls)
    assert (entry.name, entry.class_name, entry.doc) == (name, cls.__name__, inspect.getdoc(cls))
    assert entry.types == {field.name: str(field.type) for field in fields}
    assert entry.defaults == {field.name: written(field.default) for field in fields}
    assert (entry.constants.get("paper", ""), entry.constants["stage"]) == (getattr(cls, "paper", ""), cls.stage)


def test_every_catalogue_is_listed():
    assert {items.folder for items in CATALOGUES} <= {PACKAGE / shelf.folder for shelf in SHELVES}


def test_networks_are_those_that_timm_knows():
    files = item_files(PACKAGE / "architectures")
    registered = [name for file in files for name in timm.list_models(module=file)]
    assert networks() == {name: inspect.getdoc(timm.model_entrypoint(name)) for name in registered}


def test_an_entry_of_constants_bases_and_settings_without_defaults(tmp_path):
    file = tmp_path / "two_words.py"
    file.write_text(
        "from vitreous.mechanism import Mechanism\nWIDTH = 3\n\n\nclass Base(Mechanism):\n    deep: float = -1e-5\n\n\n"
        'class TwoWords(Base):\n    """First.\n\n    More.\n    """\n\n    stage: ClassVar[str] = "prototype"\n'
        "    bare: str\n    width: int = WIDTH\n    layers: tuple[int, ...] | None = None\n"
    )
    entry = read_entry(file)
    assert (entry.summary, entry.doc, entry.constants["stage"]) == ("First.", "First.\n\nMore.", "prototype")
    assert entry.defaults == {"deep": "-1e-05", "width": "3", "layers": "none"}
    assert list(entry.types) == ["deep", "bare", "width", "layers"]
    file.rename(tmp_path / "other.py")
    with pytest.raises(RuntimeError, match="holds no class called as the file"):
        read_entry(tmp_path / "other.py")


def test_a_prototype_is_called_one(tmp_path, monkeypatch, capsys):
    from vitreous.commands import list as command

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/trial.py").write_text(
        'class Trial:\n    """A trial [of] something."""\n\n    stage: ClassVar[str] = "prototype"\n    size: int = 2\n'
    )
    monkeypatch.setattr(command, "PACKAGE", tmp_path)
    (tmp_path / "architectures").mkdir()
    command.List().run()
    shown = capsys.readouterr().out
    assert "Tasks" in shown
    assert "(prototype)" in shown
    assert "A trial [of] something." in shown
    assert "size=2" in shown
    command.List(item="trial").run()
    shown = capsys.readouterr().out
    assert "trial (task)" in shown
    assert "A prototype" in shown
    assert "vitreous train cutouts --task trial:size=2" in shown


# -- a closed pipe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["--help", "list", "list svda", "data check --help"])
def test_a_closed_pipe_ends_quietly(words):
    """`vitreous WORDS | head -1`, with nobody left to read from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vitreous", *words.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, "")


def test_a_pipe_that_is_read_in_part_ends_quietly():
    done = subprocess.run(
        f"{sys.executable} -m vitreous list | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("Mechanisms", "")


def test_another_broken_pipe_is_no_closed_output(monkeypatch):
    from vitreous.commands import cli

    def fails(words):
        raise BrokenPipeError("a worker process")

    monkeypatch.setattr(cli, "answer", fails)
    with pytest.raises(BrokenPipeError, match="a worker process"):
        cli.main(["list"])


def test_the_stored_measurement_is_within_its_limits():
    calls = json.loads((Path(__file__).parents[1] / "benchmarks/start_up/result.json").read_text())["calls"]
    limited = {call: sides for call, sides in calls.items() if "limit" in sides}
    assert len(limited) == 5
    for sides in limited.values():
        assert sides.get("to_torch", sides["ratio"]) <= sides["limit"]
