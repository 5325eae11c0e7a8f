"""`adopt`: a module of ours from a host's children: same parameters, names and hooks."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
M = TypeVar("M", bound=nn.Module)


def adopt(cls: type[M], host: nn.Module) -> M:
    """A `cls` that holds the host's children, parameters, buffers, flags and hooks.

    All keep their names. Only the four registries are copied, so that the new module can gain
    entries without changing the host. The hook dictionaries stay shared: a user's hook still runs,
    and its `handle.remove()` still works. No `__init__` runs.
    """
    new = cls.__new__(cls)
    new.__dict__ = dict(host.__dict__)
    for name in REGISTRIES:
        new.__dict__[name] = host.__dict__[name].copy()
    return new
