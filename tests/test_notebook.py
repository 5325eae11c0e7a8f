"""The notebook for a class: its cells run in order, show what its words say, and it is kept without outputs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "teach.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def run(source: str, names: dict) -> object:
    """Run a cell; the value of its last line if that is an expression, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


def test_it_is_kept_without_outputs():
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert NOTEBOOK.stat().st_size < 20_000
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_every_cell_runs_and_what_its_words_say_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, shown = {"__name__": "__main__"}, []
    for cell in CELLS:
        if cell["cell_type"] == "code":
            value = run("".join(cell["source"]), names)
            shown += [] if value is None else [value]
    assert sum(isinstance(value, Image.Image) for value in shown) == 5
    assert any(hasattr(value, "_repr_html_") and "data:image/png" in value._repr_html_() for value in shown)
    printed = capsys.readouterr().out
    assert "bit for bit: True" in printed
    moved = float(re.search(r"move by up to (\S+)", printed)[1])
    assert moved > 0.1
    assert float(re.search(r"of the two maps: (\S+)", printed)[1]) < 0.5  # "other patches"
    learned = printed.partition("rank, learned")[2].partition("rank, weight")[0]
    ranks = [float(value) for value in re.findall(r"\d+\.\d", learned)]
    assert len(ranks) == 16
    assert min(ranks) > 15.5  # "nearly flat: all 16 directions"
    assert any(tmp_path.iterdir()) is False


def test_its_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in CELLS)
    for path in re.findall(r"`(docs/\S+)`", text):
        assert (ROOT / path).is_file(), path
