"""`vitreous list`: the items to choose from, read from the files as text.

So it comes at once.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitreous.base.entry import PACKAGE, Entry, item_files, read_entry, tree
from vitreous.base.errors import UnknownName
from vitreous.commands import Command

HELP = """usage: vitreous list [NAME]

The mechanisms and networks there are, or one with all its settings. The name of a slot (attn, mixer)
or of a kind (networks, mechanisms, tasks, updates, probes) lists what there is of it."""


@dataclass(frozen=True)
class Shelf:
    """A folder of items.

    title: of its table; noun: one item; use: a command with the text form of one in it.
    """

    title: str
    folder: str
    noun: str
    use: str = ""
    nested: bool = False

    def files(self) -> dict[str, Path]:
        """{name: file}; nothing where there is no such folder."""
        return item_files(PACKAGE / self.folder, self.nested)


MECHANISMS = Shelf("Mechanisms", "mechanisms", "mechanism", "vitreous train cutouts --graft {}", nested=True)
SHELVES = (
    MECHANISMS,
    Shelf("Tasks", "tasks", "task", "vitreous train cutouts --task {}"),
    Shelf("Updates", "train/updates", "update", "vitreous train cutouts --update {}"),
    Shelf("Compression", "compress", "compression"),
    Shelf("Probes", "lens/probes", "probe"),
)


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """Show the mechanisms and networks there are, or one of them with its settings."""

    usage: ClassVar[str] = "[NAME]"

    item: str | None = None

    @classmethod
    def read(cls, words: Sequence[str]) -> Self:
        """The first word is a name; read without tyro, whose import takes longer than the list."""
        if words[:1] in (["-h"], ["--help"]):
            print(HELP)
            raise SystemExit
        return cls(item=words[0] if words else None)

    def run(self) -> None:
        """Print everything, or what is called so. Raises UnknownName."""
        console = Console()
        if self.item is not None and (table := table_of(self.item)):
            console.print(table)
        elif self.item is None:
            for shelf in SHELVES:
                if shelf.files():
                    console.print(items(shelf))
                if shelf is MECHANISMS:
                    console.print(network_table())
            console.print("`vitreous list NAME` says more. Any other network of timm's can be named as well.", highlight=False)
        else:
            show(self.item, console)


def table_of(kind: str) -> Table | None:
    """The table of a kind of items, such as "tasks", or of the mechanisms of one slot."""
    if kind == "networks":
        return network_table()
    named = next((shelf for shelf in SHELVES if shelf.title.lower() == kind and shelf.files()), None)
    if named:
        return items(named)
    return items(MECHANISMS, kind) if kind in slots() else None


def slots() -> set[str]:
    """The slots that have mechanisms."""
    return {file.parent.name for file in MECHANISMS.files().values()}


def items(shelf: Shelf, slot: str | None = None) -> Table:
    """One line for each item: name, slot, summary, paper.

    And its settings with their defaults. slot: of those alone that stand there.
    """
    column = ("slot",) if shelf.nested else ()
    title = f"{shelf.title} of the slot {slot}" if slot else shelf.title
    table = Table("name", *column, "what it is", title=title, title_justify="left", show_lines=True)
    files = {name: file for name, file in shelf.files().items() if slot in (None, file.parent.name)}
    for name, file in files.items():
        entry = read_entry(file)
        settings = ", ".join(f"{key}={value}" for key, value in entry.defaults.items())
        details = "\n".join(filter(None, [entry.constants.get("paper"), settings]))
        text = escape(entry.summary) + (f"\n[dim]{escape(details)}[/]" if details else "")
        table.add_row(name + stage(entry), *(file.parent.name for _ in column), text)
    return table


def stage(entry: Entry) -> str:
    """A line for an item whose reference numbers are not yet reproduced."""
    return "\n(prototype)" if entry.constants.get("stage") == "prototype" else ""


def network_table() -> Table:
    """Whole networks, by the name that timm knows them by."""
    table = Table("name", "what it is", title="Networks", title_justify="left")
    for name, doc in networks().items():
        table.add_row(name, escape(doc))
    return table


def networks() -> dict[str, str]:
    """{name: docstring} of the functions of `architectures/` that register with timm."""
    functions = [
        node
        for file in item_files(PACKAGE / "architectures").values()
        for node in tree(file).body
        if isinstance(node, ast.FunctionDef) and "register_model" in map(ast.unparse, node.decorator_list)
    ]
    return {node.name: ast.get_docstring(node) or "" for node in functions}


def show(name: str, console: Console) -> None:
    """What is called so: its docstring, and every setting with its default.

    Raises UnknownName.
    """
    shelves = [shelf for shelf in SHELVES if name in shelf.files()]
    for shelf in shelves:
        show_item(shelf, read_entry(shelf.files()[name]), console)
    if name in networks():
        console.print(networks()[name], markup=False, highlight=False)
    elif not shelves:
        nouns = ", ".join(shelf.noun for shelf in SHELVES if shelf.files())
        names = {
            *networks(),
            *slots(),
            "networks",
            *(name for shelf in SHELVES for name in (shelf.title.lower(), *shelf.files())),
        }
        raise UnknownName(name, f"{nouns}, network, slot or kind", names)


def show_item(shelf: Shelf, entry: Entry, console: Console) -> None:
    """One item: its docstring and every setting with its default."""
    kind = shelf.files()[entry.name].parent.name if shelf.nested else shelf.noun
    console.print(f"{entry.name} ({kind})\n", style="bold", highlight=False)
    if stage(entry):
        console.print("A prototype: its reference numbers are not yet reproduced, and its text form may change.\n")
    console.print(entry.doc, markup=False, highlight=False, soft_wrap=True)
    if entry.types:
        table = Table("setting", "default", "type", title="\nSettings", title_justify="left")
        for key, kind in entry.types.items():
            table.add_row(key, entry.defaults.get(key, ""), escape(kind.replace("Literal", "one of ")))
        console.print(table)
    if shelf.use:
        settings = ",".join(f"{key}={value}" for key, value in list(entry.defaults.items())[:2])
        text = entry.name + (f":{settings}" if settings else "")
        console.print(f"\n{shelf.use.format(text)}", highlight=False, soft_wrap=True)
