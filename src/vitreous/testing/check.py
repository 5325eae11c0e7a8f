"""A check: one law, held against one item (in one host); it passes or says what broke it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vitreous.base.errors import ContractError
from vitreous.base.text_form import summary

# found, expected, what to do
THREE_PARTS = re.compile(r"^\S.+?\. Expected .+?\. \S.+\.$", re.DOTALL)


@dataclass(frozen=True)
class Check:
    """One law for one item.

    law: a function of the item, and of a host's name where there is one; its docstring says it."""

    law: Callable[..., None]
    item: Any
    host: str | None = None

    @property
    def name(self) -> str:
        """The law's name, with the host's behind a dash."""
        return self.law.__name__ + (f"-{self.host}" if self.host else "")

    def run(self) -> None:
        """Raises ContractError if the law does not hold; the global random state stays as it is."""
        try:
            with torch.random.fork_rng(devices=()):
                self.law(self.item, *filter(None, [self.host]))
        except Exception as error:
            found = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            where = f" in the host {self.host}" if self.host else ""
            raise ContractError(
                f"{self.name} does not hold for {self.item}{where}: {type(error).__name__}: {found}. Expected: "
                f"{summary(self.law).rstrip('.')}. Correct the item, or what it claims in its class constants."
            ) from error


class Broken(Exception):
    """What a law found; `Check.run` adds which law, and what was expected."""


def holds(true: bool, found: str) -> None:
    """Raise Broken with what was found unless the condition is true."""
    if not true:
        raise Broken(found)


def close(here: Any, there: Any, what: str, tolerance: float = 0.0) -> None:
    """Raise unless two tensors agree, absolutely or relatively; tolerance 0: in every bit."""
    text = partial("{}: {}".format, what)
    torch.testing.assert_close(here, there, atol=tolerance, rtol=tolerance, msg=text)
