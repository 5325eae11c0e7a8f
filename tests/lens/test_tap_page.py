"""docs/tap.md: every file, class and method that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LENS = ROOT / "src" / "vitreous" / "lens"
FILES = [*LENS.glob("tap/*.py"), *LENS.glob("coordinates/*.py"), LENS / "preserve_state.py"]
OTHERS = {"TokenState": "vitreous/layers/stream.py", "scaled_dot_product_attention": "", "multi_head_attention_forward": ""}


def defined() -> set[str]:
    """Names of the files' constants, functions, classes, methods, attributes and parameters; methods as Class.method too."""
    names = {"on_attention(call)", "on_output(name, call_index, output)"}
    for path in FILES:
        names |= {path.name, f"lens/{path.parent.name}"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
            names |= {
                getattr(node, field) for field in ("name", "attr", "id", "arg") if isinstance(getattr(node, field, None), str)
            }
    return names


TEXT = re.sub(r"```.*?```", "", (ROOT / "docs" / "tap.md").read_text(), flags=re.DOTALL)
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", TEXT)))


def missing(spans: list[str]) -> list[str]:
    names = defined()
    paths = {span for span in spans if span.startswith("tests/") and (ROOT / span).is_file()}
    return [span for span in spans if span not in names | paths | OTHERS.keys()]


def test_every_name_of_the_page_exists():
    assert missing(SPANS) == []
    assert len(SPANS) > 50


@pytest.mark.parametrize("name", ["capture_passes.py", "Tap.check_input", "CoordinateTracer.move", "tests/lens/test_taps.py"])
def test_a_wrong_name_is_found(name):
    assert missing([name]) == [name]


def test_every_file_is_on_the_page():
    named = set(SPANS)
    assert [path.name for path in FILES if path.name not in named | {"__init__.py", "tensor_set.py", "preserve_state.py"}] == []
