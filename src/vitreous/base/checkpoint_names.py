"""Names of tensors in the released code of a network, turned into ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def renamed(tensors: Mapping[str, T], patterns: Mapping[str, str | Callable[[re.Match], str]]) -> dict[str, T]:
    """The tensors under new names.

    patterns: {regular expression: replacement, as in `re.sub`}, applied to each name one after the
        other. Of several tensors that get one name, the last counts.
    """
    names = {}
    for name, tensor in tensors.items():
        for pattern, replacement in patterns.items():
            name = re.sub(pattern, replacement, name)
        names[name] = tensor
    return names
