"""The machine around a run: little of it is needed, none of it shows in the bytes; and the page of faults keeps its word."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vitreous.commands.cli import main

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TINY = "cutouts:train=16,test=8,size=16 --model-kwargs patch_size=4 depth=1 embed_dim=24 num_heads=2 --epochs 1 --device cpu"
BARE = {"HOME": "/nonexistent", "NO_COLOR": "1", "COLUMNS": "20", "LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7"}


def run(words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vitreous", *words.split()]
    given = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=given, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)


def test_a_bare_environment_changes_no_byte(tmp_path):
    """No home, no terminal, a locale without UTF-8, another time zone and hash seed."""
    usual = run(f"train {TINY} --out {tmp_path}/usual", PYTHONHASHSEED="1")
    bare = run(f"train {TINY} --out {tmp_path}/bare", **BARE)
    for done in (usual, bare):
        assert "\x1b" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    for name in ("model.safetensors", "config.json", "predictions.csv", "manifest.csv"):
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "usual" / name).read_bytes(), name


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/run")):
        assert main([*f"train {TINY} --out".split(), str(out)]) == 2
        assert "Cannot make the run folder" in capsys.readouterr().err


def test_no_code_of_others_is_ever_enabled():
    """No source asks for remote code, reads a pickle that may hold code, or runs text."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert "trust_remote_code" not in given, path
            assert given.get("weights_only", "True") == "True", path
            name = ast.unparse(call.func)
            if name == "pickle.loads" and ast.unparse(call.args[0]).startswith("pickle.dumps("):
                continue  # its own bytes
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"), (path, name)
            if name == "torch.load":
                assert "weights_only" in given, path


# -- the page of faults --------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/faults.md").read_text()
ROWS = {row[0]: row[3] for line in PAGE.splitlines() if len(row := [c.strip() for c in line.strip("| ").split(" | ")]) == 4}
PROMISED = [*range(1, 12), *range(22, 27), *range(31, 41), *range(43, 46)]


def named_in(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("number", PROMISED)
def test_every_fault_has_a_test_that_is_there(number):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", ROWS[f"F{number}"])
    assert named
    for file, name in named:
        assert name in named_in(ROOT / "tests" / file), f"{file}::{name}"
