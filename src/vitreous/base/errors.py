"""The errors of Vitreous, in three parts: what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitreousError(Exception):
    """A mistake that the user can mend.

    The command line prints its text without a traceback and exits with code 2.
    """


class HostError(VitreousError):
    """The model is not a host for this graft."""


class GraftError(VitreousError):
    """A graft cannot be put in, or taken out, as things stand."""


class NotReached(VitreousError):
    """A forward pass did not go through a graft."""


class MaskError(VitreousError):
    """An attention mask, or causal attention, does not fit inserted or merged tokens."""


class SettingError(VitreousError):
    """A setting has a value that it cannot take."""


class DataError(VitreousError):
    """Images, labels or weights that cannot be read, or do not fit."""


class ContractError(VitreousError):
    """A mechanism, task or probe breaks a law of its kind (`vitreous.testing`)."""


class UnknownName(VitreousError):
    """A name that is not known; the message offers the nearest ones.

    name: what was given; kind: what it should name ("model", "mechanism", "setting"); valid: the
    names that there are.
    """

    def __init__(self, name: str, kind: str, valid: Iterable[str], hint: str = ""):
        valid = sorted(valid)
        near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
        if near:
            offer = "Did you mean " + " or ".join(repr(other) for other in near) + "?"
        elif len(valid) <= 20:
            offer = "Known: " + ", ".join(valid) + "."
        else:
            offer = f"{len(valid)} are known."
        super().__init__(f"Unknown {kind} {name!r}. {offer}" + (f" {hint}" if hint else ""))


def brief(error: BaseException, without: str | None = None) -> str:
    """The kind of an error and its first line, without its full stop: "KeyError: 'x'".

    without: lines that hold this text are passed over.
    """
    lines = [line.strip() for line in str(error).splitlines() if not (without and without in line)]
    return f"{type(error).__name__}: {next(filter(None, lines), 'no reason given')[:300].rstrip('.')}"
