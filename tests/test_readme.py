"""What the README shows runs, and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tyro

from vitreous.bench.settings import from_words as bench_words
from vitreous.commands import looking
from vitreous.train.settings import from_words

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
    settings = from_words(shlex.split(line)[2:])
    assert settings.data


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("vitreous bench")])
def test_bench_commands_parse(line):
    assert bench_words(shlex.split(line)[2:]).arms()


@pytest.mark.parametrize("line", LOOKING)
def test_looking_commands_parse(line):
    command, *words = shlex.split(line)[1:]
    parser = {"look": looking.look_words, "compare": looking.compare_words, "calibrate": looking.calibrate_words}[command]
    assert tyro.cli(parser, args=words, config=looking.CONFIG)


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
