"""Vitreous: see what a vision transformer looks at, graft mechanisms into it, train it.

A graft comes out again, bit for bit.

The names below are imported when first used, so that `import vitreous` costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from vitreous.base.after_import import after_import, late_names

if TYPE_CHECKING:
    from vitreous.folding import fold
    from vitreous.grafting import (
        Graft,
        Removal,
        calibrate,
        check,
        graft,
        grafts,
        new_parameters,
        no_weight_decay,
        plan,
        ungraft,
    )
    from vitreous.hosts.host import embed, finish, host_of, run
    from vitreous.hosts.stream_ends import collect_terms
    from vitreous.lens.direction import Direction, find_direction
    from vitreous.lens.foreground import foreground
    from vitreous.lens.look import look
    from vitreous.lens.reading import Reading, read
    from vitreous.mechanism import Mechanism, catalogue, parse
    from vitreous.models.model_folder import load, save
    from vitreous.models.weights import load_weights
    from vitreous.reducer import Reducer

__version__ = "0.1.0"
__all__ = [
    "Direction", "Graft", "Mechanism", "Reading", "Reducer", "Removal", "calibrate", "catalogue", "check", "collect_terms",
    "embed", "find_direction", "finish", "fold", "foreground", "graft", "grafts", "host_of", "load", "load_weights", "look",
    "new_parameters", "no_weight_decay", "parse", "plan", "read", "run", "save", "ungraft",
]  # fmt: skip
HOMES = {  # where each name stands; the imports for type checkers above say the same
    "vitreous.folding": ("fold",),
    "vitreous.grafting": (
        "Graft", "Removal", "calibrate", "check", "graft", "grafts", "new_parameters", "no_weight_decay", "plan",
        "ungraft",
    ),
    "vitreous.hosts.host": ("embed", "finish", "host_of", "run"),
    "vitreous.hosts.stream_ends": ("collect_terms",),
    "vitreous.lens.direction": ("Direction", "find_direction"),
    "vitreous.lens.foreground": ("foreground",),
    "vitreous.lens.look": ("look",),
    "vitreous.lens.reading": ("Reading", "read"),
    "vitreous.mechanism": ("Mechanism", "catalogue", "parse"),
    "vitreous.models.model_folder": ("load", "save"),
    "vitreous.models.weights": ("load_weights",),
    "vitreous.reducer": ("Reducer",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """A public name, a module, or a mechanism by its class name.

    As in `from vitreous import SVDA`.
    """
    if name not in __all__ and not name.startswith("_"):
        if importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        if mechanism := importlib.import_module("vitreous.mechanism").class_by_name(name):
            return mechanism
    return late_names(__name__, HOMES)(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# timm.create_model knows our networks as soon as both packages are imported, in either order
after_import("timm", lambda: importlib.import_module("vitreous.architectures"))
