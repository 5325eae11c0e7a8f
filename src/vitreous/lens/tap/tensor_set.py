"""`TensorSet`: membership of tensors by identity, without keeping them alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class TensorSet:
    """A set of tensors by identity (not by value) that holds only weak references.

    `torch.utils.weak` runs several Python calls per lookup, and a pass looks up every argument of
    every call; a plain dictionary of addresses needs one.
    """

    def __init__(self):
        self.references: dict[int, weakref.ref[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.references)

    def __contains__(self, tensor: Tensor) -> bool:
        reference = self.references.get(id(tensor))
        return reference is not None and reference() is tensor  # an address is used again after its tensor is freed

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors."""
        for tensor in tensors:
            self.references[id(tensor)] = weakref.ref(tensor)

    def tidy(self) -> None:
        """Remove the entries of tensors that no longer exist."""
        self.references = {at: reference for at, reference in self.references.items() if reference() is not None}
