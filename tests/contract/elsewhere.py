"""A mechanism outside the catalogue, for a text form with a dotted name."""

from __future__ import annotations

from dataclasses import dataclass

from vitreous import Mechanism


@dataclass(frozen=True, kw_only=True)
class Nothing(Mechanism):
    """Changes nothing."""

    count: int = 1

    def changes(self, model):
        return {}
