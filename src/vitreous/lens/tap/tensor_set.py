"""Tensors that were seen, without holding them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class TensorSet:
    """A set of tensors, each itself and no other of equal values, that keeps none of them alive.

    What torch has for this asks and tells in Python several times per tensor; a pass asks for each argument of each call.
    """

    def __init__(self):
        self.references: dict[int, weakref.ref[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.references)

    def __contains__(self, tensor: Tensor) -> bool:
        reference = self.references.get(id(tensor))
        return reference is not None and reference() is tensor  # another may have come to the address of one that is gone

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Take in tensors."""
        for tensor in tensors:
            self.references[id(tensor)] = weakref.ref(tensor)

    def tidy(self) -> None:
        """Forget those that are gone."""
        self.references = {at: reference for at, reference in self.references.items() if reference() is not None}
