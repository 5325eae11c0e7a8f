"""Settings with a text form, such as `svda:scale=one,layers=6-11`: frozen dataclasses.

    name:setting=value,...        layers are 0-based, ranges inclusive, joined by +

`Settings` is the base of every item of a catalogue (`base/catalogue.py`): mechanisms, tasks,
updates, probes.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from vitreous.base.errors import SettingError, UnknownName


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all that is chosen by a text: frozen, keyword-only dataclasses.

    All settings have defaults.

    stage: "prototype" where its reference numbers are not yet reproduced; then its text form may
    change. Raises SettingError for a value that does not fit its type.
    """

    stage: ClassVar[Literal["stable", "prototype"]] = "stable"

    def __post_init__(self):
        for name, kind in settings(type(self)).items():
            object.__setattr__(self, name, checked(self, name, kind, getattr(self, name)))

    @property
    def name(self) -> str:
        """The name in text and files: the file's stem; of a foreign class its dotted path."""
        module = type(self).__module__
        ours = module.startswith("vitreous.")
        return module.rsplit(".", 1)[-1] if ours else f"{module}.{type(self).__qualname__}"

    def text(self) -> str:
        """The text form, with the settings that differ from their defaults."""
        words = [
            f"{field.name}={written(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(words) if words else "")

    def full_text(self) -> str:
        """The text form with every setting, so that later defaults do not change what was saved."""
        return f"{self.name}:{','.join(f'{name}={written(getattr(self, name))}' for name in settings(type(self)))}"

    def __str__(self) -> str:
        return self.text()


@cache
def settings(cls: type[Settings]) -> dict[str, Any]:
    """{setting: type} of a class of settings."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def summary(cls: type) -> str:
    """The first line of a class's docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def values_of(cls: type[Settings], name: str, words: str) -> dict[str, Any]:
    """{setting: value} of "setting=value,...", read as the types of `cls`.

    name: quoted in errors. Raises UnknownName for a setting that `cls` does not have, SettingError
    for a value that does not fit.
    """
    kinds = settings(cls)
    values: dict[str, Any] = {}
    for word in filter(None, words.split(",")):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise SettingError(
                f"Found {word!r} in {f'{name}:{words}'!r}. Expected setting=value, separated by commas (a list is joined "
                "by +, as in layers=3+6+9). Write for example svda:scale=one,layers=6-11."
            )
        if not kinds:
            raise SettingError(
                f"Found {word!r} for {name}, which has no settings. Expected its name alone. Leave the rest out."
            )
        if key not in kinds:
            raise UnknownName(key, f"setting of {name}", kinds)
        if key in values:
            raise SettingError(f"Found {key} twice in {f'{name}:{words}'!r}. Expected each setting once. Remove one.")
        values[key] = read(kinds[key], value, f"{name}:{key}")
    return values


# -- one setting: from text, to text, and whether a value is of its type --------------------------


def written(value: Any) -> str:
    """A value as text.

    Numbers and words as they are, None as none, a tuple joined by +, runs of integers as a-b.
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        if len(value) > 2 and all(type(v) is int for v in value) and value == tuple(range(value[0], value[-1] + 1)):
            return f"{value[0]}-{value[-1]}"
        return "+".join(written(v) for v in value)
    return repr(value).replace("e+", "e") if isinstance(value, float) else str(value)  # + joins a list


def read(kind: Any, text: str, where: str) -> Any:
    """A value of type `kind` from text.

    Raises SettingError that names `where`, what was found and what fits.
    """
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
        return text  # the settings themselves check the choice
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() in words:
            return words[text.lower()]
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise SettingError(f"Found {where}={text!r}. Expected {type_words(kind)}. Give such a value.")


def spread(part: str, where: str) -> list[str]:
    """ "6-8" as ["6", "7", "8"]; anything else as it is."""
    first, dash, last = part.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        return [part]
    if max(len(first), len(last)) > 5:
        raise SettingError(f"Found the range {part[:40]} in {where}. Expected numbers of up to 5 digits. Give a shorter one.")
    if int(last) < int(first):
        raise SettingError(f"Found the range {part} in {where}. Expected first-last, both included. Swap them.")
    return [str(i) for i in range(int(first), int(last) + 1)]


def checked(owner: Settings, name: str, kind: Any, value: Any) -> Any:
    """The value, as the setting's type (lists and ranges become tuples).

    Raises SettingError if it does not fit.
    """
    where = f"{type(owner).__name__}({name}={value!r})"
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
        return tuple(checked(owner, name, k, v) for k, v in zip(kinds, value, strict=True))
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool) or (kind is float and math.isnan(value)):
        raise SettingError(f"Found {where}. Expected {type_words(kind)}. Give such a value.")
    if isinstance(value, str) and set(value) & set(",:="):
        raise SettingError(f"Found {where}. Expected text without , : and =, which the text form needs. Rename it.")
    return kind(value)


def optional(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind)


def type_words(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
