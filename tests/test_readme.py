"""What the README shows runs, and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vitreous.commands.bench import Bench
from vitreous.commands.cli import command_class
from vitreous.commands.train import Train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
LOOKING = [line for line in COMMANDS if line.startswith(("vitreous look", "vitreous compare", "vitreous calibrate"))]
TRAINING = [line for line in COMMANDS if line.startswith("vitreous train")]


def test_python_runs(capsys):
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec"), {})
    assert "the host's tensors are as they were" in capsys.readouterr().out


@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_parse(line):
    settings = Train.read(shlex.split(line)[2:]).settings()
    assert settings.data


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("vitreous bench")])
def test_bench_commands_parse(line):
    assert Bench.read(shlex.split(line)[2:]).settings().arms()


@pytest.mark.parametrize("line", LOOKING)
def test_looking_commands_parse(line):
    command, *words = shlex.split(line)[1:]
    assert command_class(command).read(words)


def test_both_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


def test_tree_and_links_are_there():
    tree = README.split("```\nsrc/vitreous/", 1)[1].split("```", 1)[0]
    for name in re.findall(r"^  (\S+)", tree, re.M):
        assert (ROOT / "src" / "vitreous" / name).exists(), name
    for name in re.findall(r"^(\S+)/? ", tree, re.M):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / link).exists(), link
