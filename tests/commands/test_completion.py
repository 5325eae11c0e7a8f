"""Tab completion, in the shell that it is for."""

import re
import shutil
import subprocess

import pytest

from vitreous import catalogue
from vitreous.commands.cli import COMMANDS, command_class, main
from vitreous.commands.completion import flags


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"list"}))
def test_options_are_those_of_the_help(name, capsys):
    with pytest.raises(SystemExit):
        command_class(name).read(["check", "--help"] if name == "data" else ["--help"])
    shown = set(re.findall(r"(?m)^(?:\S | {2})(?:-\w, )?(--[a-z][a-z-]*)", capsys.readouterr().out)) - {"--help"}
    assert set(flags(command_class(name))) == shown


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words):
        typed = " ".join(f"'{word}'" for word in words)
        ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _vitreous; echo ${{COMPREPLY[*]}}"
        return subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, check=True).stdout.split()

    assert completed("vitreous", "pre") == ["predict"]
    assert set(completed("vitreous", "")) == set(COMMANDS)
    assert completed("vitreous", "train", "cutouts", "--clip") == ["--clip-grad"]
    assert completed("vitreous", "train", "cutouts", "--graft", "sv") == ["svda"]
    assert set(completed("vitreous", "study", "cutouts", "--arm", "")) == set(catalogue())
    assert completed("vitreous", "look", "model", "pho") == []  # files, which bash itself completes


def test_zsh_gets_the_same_with_its_reader_of_such_scripts(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == "autoload -U +X bashcompinit && bashcompinit\n" + script
