"""A catalogue: the classes of a folder, one in each file.

It is found by listing the folder; a file is imported when its item is first used.

Adding an item is adding its file: there is no registry to edit. The file's stem is the item's name.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from vitreous.base.entry import PACKAGE, item_files
from vitreous.base.errors import UnknownName
from vitreous.base.text_form import Settings, values_of

S = TypeVar("S", bound=Settings)


class Catalogue(Generic[S]):
    """The items of `vitreous/FOLDER`, subclasses of `base`.

    noun: what one is called in errors. nested: whether the files stand one folder deeper, sorted by
    kind.
    """

    def __init__(self, folder: str, base: type[S], noun: str, nested: bool = False):
        self.folder, self.base, self.noun, self.nested = PACKAGE / folder, base, noun, nested

    @cached_property
    def files(self) -> dict[str, Path]:
        """{name: file} of every item, sorted by name. Nothing is imported."""
        return item_files(self.folder, self.nested)

    def item(self, name: str) -> type[S]:
        """The class of that name, its file imported. Raises UnknownName."""
        if name not in self.files:
            raise UnknownName(name, self.noun, self.files, hint="`vitreous list` shows them all.")
        path = self.files[name].relative_to(PACKAGE).with_suffix("")
        module = importlib.import_module(".".join(("vitreous", *path.parts)))
        mine = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, self.base) and value.__module__ == module.__name__
        ]
        if len(mine) != 1:
            raise RuntimeError(f"{self.files[name]} holds {len(mine)} items. Expected one {self.noun}. Split the file.")
        return mine[0]

    def by_class_name(self, name: str) -> type[S] | None:
        """The class called `name` ("SVDA"), or None; the file's stem is that in small letters."""
        return next((self.item(stem) for stem in self.files if stem.replace("_", "") == name.lower()), None)

    def foreign(self, path: str) -> type[S]:
        """Import `package.module.Class`. Raises UnknownName if it is not there or is no item."""
        module, _, name = path.rpartition(".")
        try:
            value = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UnknownName(path, self.noun, self.files, hint=f"Importing it failed: {error}.") from error
        if not (isinstance(value, type) and issubclass(value, self.base)):
            raise UnknownName(path, self.noun, self.files, hint=f"What it names is not a vitreous.{self.base.__name__}.")
        return value

    def parse(self, text: str, *, foreign: bool = False) -> S:
        """An item from its text form, `name:setting=value,...`.

        foreign: also import a dotted third-party name, `package.module.Class`. That runs the
        package's code, so a name that comes from a file is refused unless the user asks for it.
        Raises UnknownName, SettingError.
        """
        name, _, words = text.partition(":")
        name = name.strip()
        cls = self.foreign(name) if foreign and "." in name else self.item(name)
        return cls(**values_of(cls, name, words))
