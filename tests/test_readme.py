"""What the README shows runs, and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from vitreous.commands.bench import Bench
from vitreous.commands.cli import command_class
from vitreous.commands.list import networks
from vitreous.commands.study import Study
from vitreous.commands.train import Train
from vitreous.models.create import create_model
from vitreous.train.study.study import arm_settings

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


@pytest.mark.parametrize("line", [line for line in TRAINING if " cutouts:size=64 " in line])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_networks_take_made_scenes_and_one_channel(line, channels):
    settings = Train.read(shlex.split(line)[2:]).settings()
    assert settings.model in networks()
    model = create_model(
        settings.model, classes="abcdef", channels=channels, image_size=(64, 64), **settings.network_arguments()
    )
    assert model(torch.zeros(2, channels, 64, 64)).shape == (2, 6)
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000


def test_every_family_of_networks_has_its_line():
    files = {path.stem for path in (ROOT / "src/vitreous/architectures").glob("[!_]*.py")} - {"scratch_vit"}
    named = " ".join(line for line in TRAINING if " cutouts:size=64 " in line)
    assert files
    assert not [stem for stem in files if f"--model {stem}_" not in named]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("vitreous study")])
def test_study_commands_parse(line):
    command = Study.read(shlex.split(line)[2:])
    assert arm_settings(command.settings(), command.arm)


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
