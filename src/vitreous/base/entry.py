"""An item of a catalogue, read from its file as text.

Nothing is imported, so that listing takes no time.

A catalogue's file holds one class, called as the file ("token_merging.py": TokenMerging); its
docstring, constants and settings are found in the syntax tree, those of its base classes in their
own files.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vitreous.base.text_form import written

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Entry:
    """One item of a catalogue, as its file describes it.

    doc: its docstring, cleaned. constants: class constants, such as paper and stage, where literal.
    defaults, types: {setting: text}, in the order of the class; a setting without a default is in
    types alone.
    """

    name: str
    class_name: str
    doc: str
    constants: dict[str, Any]
    defaults: dict[str, str]
    types: dict[str, str]

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.doc.partition("\n")[0]


def item_files(folder: Path, nested: bool = False) -> dict[str, Path]:
    """{name: file} of the items in a folder, sorted by name.

    Nested: they stand one folder deeper, sorted by kind.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*/[!_]*.py" if nested else "[!_]*.py"), key=lambda file: file.stem):
        if file.stem in files:
            raise RuntimeError(f"Two items are called {file.stem}: {files[file.stem]} and {file}. Rename one.")
        files[file.stem] = file
    return files


def read_entry(file: Path) -> Entry:
    """The entry of the item in a file.

    Raises RuntimeError where no class is called as the file.
    """
    wanted = file.stem.replace("_", "")
    name = next((node.name for node in classes(file) if node.name.lower() == wanted), None)
    if name is None:
        raise RuntimeError(
            f"{file} holds no class called as the file. Expected one, in CamelCase. Rename the class or the file."
        )
    constants, defaults, types = {}, {}, {}
    for source, node in reversed(list(ancestors(file, name))):
        for field in node.body:
            if isinstance(field, ast.Assign):
                constants[ast.unparse(field.targets[0])] = literal(field.value, source)
            elif isinstance(field, ast.AnnAssign):
                key, kind = ast.unparse(field.target), ast.unparse(field.annotation)
                if kind.startswith("ClassVar"):
                    constants[key] = literal(field.value, source)
                    continue
                types[key] = kind
                if field.value is not None:
                    defaults[key] = written(literal(field.value, source))
    own = next(node for node in classes(file) if node.name == name)
    return Entry(file.stem, name, ast.get_docstring(own) or "", constants, defaults, types)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def classes(file: Path) -> list[ast.ClassDef]:
    """The classes of a file."""
    return [node for node in tree(file).body if isinstance(node, ast.ClassDef)]


def ancestors(file: Path, name: str) -> Iterator[tuple[Path, ast.ClassDef]]:
    """A class with its file, then its bases and theirs, as far as this package defines them."""
    for node in classes(file):
        if node.name == name:
            yield file, node
            for base in node.bases:
                yield from ancestors(home(ast.unparse(base), file), ast.unparse(base))


def home(name: str, file: Path) -> Path:
    """The file of this package from which `file` imports a name.

    The file itself for its own and for all others.
    """
    for node in tree(file).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitreous.") and not node.level:
            path = PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
            if name in (alias.name for alias in node.names) and path.is_file():
                return path
    return file


def literal(node: ast.expr | None, file: Path) -> Any:
    """The value of a literal or of a constant of the file; the text of any other expression."""
    if isinstance(node, ast.Name):
        values = (s.value for s in tree(file).body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == node.id)
        node = next(values, node)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ast.unparse(node) if node is not None else None
