"""Vitreous: see what a vision transformer looks at, graft mechanisms into it, train it, and take them out again."""

from __future__ import annotations

from typing import Any

import vitreous.architectures  # noqa: F401  (timm.create_model knows our networks)
from vitreous.grafting import Graft, Removal, calibrate, check, graft, grafts, new_parameters, no_weight_decay, ungraft
from vitreous.lens.direction import Direction, find_direction
from vitreous.lens.foreground import foreground
from vitreous.lens.look import look
from vitreous.lens.reading import Reading, read
from vitreous.mechanism import Mechanism, catalogue, class_by_name, parse

__version__ = "0.1.0"
__all__ = [
    "Direction",
    "Graft",
    "Mechanism",
    "Reading",
    "Removal",
    "calibrate",
    "catalogue",
    "check",
    "find_direction",
    "foreground",
    "graft",
    "grafts",
    "look",
    "new_parameters",
    "no_weight_decay",
    "parse",
    "read",
    "ungraft",
]


def __getattr__(name: str) -> Any:
    """Every mechanism of the catalogue, by its class name: `from vitreous import SVDA`."""
    found = None if name.startswith("_") else class_by_name(name)
    if found is None:
        raise AttributeError(f"module 'vitreous' has no attribute {name!r}")
    return found
