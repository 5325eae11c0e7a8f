"""A mechanism is one published idea: a frozen dataclass of settings that says what it changes in a model.

The catalogue is the folder listing of `mechanisms/`: a file's stem is the mechanism's name, and exactly one `Mechanism`
is in it. Settings hold text and numbers only, so that they can be written down, compared and read back:

    svda:scale=one,layers=6-11        name:setting=value,...; layers are 0-based, ranges inclusive, joined by +
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vitreous.errors import SettingError, UnknownName

FOLDER = Path(__file__).parent / "mechanisms"


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Base of all mechanisms. Subclasses are frozen, keyword-only dataclasses whose settings all have defaults.

    paper: authors, year, arXiv id. needs: what a host must have, else it is refused: "tokens" that may come and go,
    "class_token", known "attention", known "halves" of its blocks, a head that can "read" inserted tokens, a head that
    reads no patches ("class_head"), one whose "pool" has no weights. keeps_weights: a plain checkpoint of the host still
    loads. exact_at_init: the grafted model equals the host before training. static_shapes: token counts do not depend on
    the data. onnx: the grafted model exports. no_decay: names of parameters that weight decay must leave alone. examples:
    further settings, in text form, that the laws are tested with. Where a setting decides, needs and exact_at_init are
    properties.
    """

    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    keeps_weights: ClassVar[bool] = True
    exact_at_init: ClassVar[bool] = False
    static_shapes: ClassVar[bool] = True
    onnx: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        for name, kind in settings(type(self)).items():
            object.__setattr__(self, name, checked(self, name, kind, getattr(self, name)))

    def changes(self, model: nn.Module) -> dict[str, Any]:
        """{dotted path: new value}: what this mechanism puts where. Pure: the model is read, never written.

        Raises HostError if the model is no host for it, SettingError if a setting does not fit the model.
        """
        raise TypeError(f"{type(self).__name__} does not say what it changes: define changes(self, model).")

    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """Fit what this mechanism put into the model to images (B, C, H, W). Most have nothing to fit."""

    @property
    def name(self) -> str:
        """The name in text and checkpoints: the file's stem, or the dotted path of a class from elsewhere."""
        module = type(self).__module__
        in_catalogue = module.startswith("vitreous.mechanisms.")
        return module.rsplit(".", 1)[-1] if in_catalogue else f"{module}.{type(self).__qualname__}"

    def text(self) -> str:
        """The text form, with the settings that differ from their defaults; `parse` reads it back."""
        words = [
            f"{field.name}={written(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(words) if words else "")

    def __str__(self) -> str:
        return self.text()


def parse(text: str, *, foreign: bool = False) -> Mechanism:
    """A mechanism from its text form.

    foreign: also import a dotted third-party name, `package.module.Class`. That runs the package's code, so a name that
    comes from a file is refused unless the user asks for it. Raises UnknownName, SettingError.
    """
    name, _, rest = text.partition(":")
    name = name.strip()
    cls = foreign_class(name) if foreign and "." in name else mechanism_class(name)
    kinds = settings(cls)
    given: dict[str, Any] = {}
    for word in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise SettingError(
                f"Found {word!r} in {text!r}. Expected setting=value, separated by commas (a list is joined by +, as in "
                "layers=3+6+9). Write for example svda:scale=one,layers=6-11."
            )
        if key not in kinds:
            raise UnknownName(key, f"setting of {name}", kinds)
        if key in given:
            raise SettingError(f"Found {key} twice in {text!r}. Expected each setting once. Remove one.")
        given[key] = read(kinds[key], value, f"{name}:{key}")
    return cls(**given)


@cache
def catalogue() -> dict[str, Path]:
    """{name: file} of every mechanism, sorted by name."""
    found: dict[str, Path] = {}
    for file in sorted(FOLDER.glob("*/*.py"), key=lambda file: file.stem):
        if file.stem in found:
            raise RuntimeError(f"Two mechanisms are called {file.stem}: {found[file.stem]} and {file}. Rename one.")
        found[file.stem] = file
    return found


@cache
def mechanism_class(name: str) -> type[Mechanism]:
    """The mechanism of that name in the catalogue. Raises UnknownName."""
    if name not in catalogue():
        raise UnknownName(name, "mechanism", catalogue(), hint="`vitreous list` shows them all.")
    module = importlib.import_module(f"vitreous.mechanisms.{catalogue()[name].parent.name}.{name}")
    mine = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Mechanism) and value.__module__ == module.__name__
    ]
    if len(mine) != 1:
        raise RuntimeError(f"{catalogue()[name]} holds {len(mine)} mechanisms. Expected one. Split the file.")
    return mine[0]


def class_by_name(name: str) -> type[Mechanism] | None:
    """The mechanism class called `name` ("SVDA"), or None: a file's stem is the class name in small letters."""
    for stem in catalogue():
        if stem.replace("_", "") == name.lower():
            return mechanism_class(stem)
    return None


def foreign_class(path: str) -> type[Mechanism]:
    """Import `package.module.Class`. Raises UnknownName if it is not there or is no Mechanism."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnknownName(path, "mechanism", catalogue(), hint=f"Importing it failed: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Mechanism)):
        raise UnknownName(path, "mechanism", catalogue(), hint="What it names is not a vitreous.Mechanism.")
    return found


@cache
def settings(cls: type[Mechanism]) -> dict[str, Any]:
    """{setting: type} of a mechanism."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def summary(cls: type[Mechanism]) -> str:
    """The first line of a mechanism's docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


# -- one setting: from text, to text, and whether a value is of its type --------------------------------------------


def written(value: Any) -> str:
    """A value as text: numbers and words as they are, None as none, a tuple joined by +, runs of integers as a-b."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        if len(value) > 2 and all(type(v) is int for v in value) and value == tuple(range(value[0], value[-1] + 1)):
            return f"{value[0]}-{value[-1]}"
        return "+".join(written(v) for v in value)
    return repr(value).replace("e+", "e") if isinstance(value, float) else str(value)  # + joins a list


def read(kind: Any, text: str, where: str) -> Any:
    """A value of type `kind` from text. Raises SettingError that names `where`, what was found and what fits."""
    if optional(kind):
        if text.lower() == "none":
            return None
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    if typing.get_origin(kind) is tuple:
        items = [item for part in text.split("+") for item in spread(part.strip(), where)]
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(items)
        if len(items) != len(kinds):
            raise SettingError(f"Found {where}={text!r}, {len(items)} values. Expected {len(kinds)}, joined by +.")
        return tuple(read(k, item, where) for k, item in zip(kinds, items, strict=True))
    if typing.get_origin(kind) is Literal:
        return text  # the mechanism itself checks the choice
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() in words:
            return words[text.lower()]
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise SettingError(f"Found {where}={text!r}. Expected {said(kind)}. Give such a value.")


def spread(part: str, where: str) -> list[str]:
    """"6-8" as ["6", "7", "8"]; anything else as it is."""
    first, dash, last = part.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        return [part]
    if max(len(first), len(last)) > 5:
        raise SettingError(f"Found the range {part[:40]} in {where}. Expected numbers of up to 5 digits. Give a shorter one.")
    if int(last) < int(first):
        raise SettingError(f"Found the range {part} in {where}. Expected first-last, both included. Swap them.")
    return [str(i) for i in range(int(first), int(last) + 1)]


def checked(mechanism: Mechanism, name: str, kind: Any, value: Any) -> Any:
    """The value, as the setting's type (lists and ranges become tuples); raises SettingError if it does not fit."""
    where = f"{type(mechanism).__name__}({name}={value!r})"
    if value is None and optional(kind):
        return None
    if optional(kind):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise SettingError(f"Found {where}. Expected one of {', '.join(map(repr, choices))}. Choose one of them.")
        return value
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            return read(kind, value, where)
        if isinstance(value, int):
            value = (value,)
        if not isinstance(value, (tuple, list, range)) or not value:
            raise SettingError(f"Found {where}. Expected a tuple of numbers. Give for example {name}=(6, 7, 8).")
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(value) != len(kinds):
            raise SettingError(f"Found {where}, {len(value)} values. Expected {len(kinds)}. Give one for each.")
        return tuple(checked(mechanism, name, k, v) for k, v in zip(kinds, value, strict=True))
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool) or (kind is float and math.isnan(value)):
        raise SettingError(f"Found {where}. Expected {said(kind)}. Give such a value.")
    if isinstance(value, str) and set(value) & set(",:="):
        raise SettingError(f"Found {where}. Expected text without , : and =, which the text form needs. Rename it.")
    return kind(value)


def optional(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind)


def said(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
