"""A module of ours made of a host's own children: same parameters, same names, same hooks."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
M = TypeVar("M", bound=nn.Module)


def adopt(cls: type[M], host: nn.Module) -> M:
    """A `cls` that holds the host's children, parameters, buffers, flags and hooks under their own names.

    Only the four registries are copied, so that the new module can gain entries without the host seeing them. The hook
    dictionaries stay shared: a user's hook lives on, and his `handle.remove()` still finds it. No `__init__` runs.
    """
    new = cls.__new__(cls)
    new.__dict__ = dict(host.__dict__)
    for name in REGISTRIES:
        new.__dict__[name] = host.__dict__[name].copy()
    return new
