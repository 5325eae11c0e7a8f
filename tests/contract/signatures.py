"""What a mechanism does to a model, so that of many that do the same kind of thing one stands for all.

The number of pairs of mechanisms grows with the square of their number, the number of kinds of doing does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from torch import nn

from vitreous import Mechanism, grafts
from vitreous.grafting import Change
from vitreous.hosts.block import STATIONS, Block
from vitreous.layers.stream import Stream
from vitreous.slots import prefix
from vitreous.testing.hosts import HOSTS, SIZE, build, grafted, images, lacks, per_place


class Signature(NamedTuple):
    """places: what it exchanges ("blocks.*.attn"), and where a step stands in a block ("blocks.*:after").

    requires: of the host. overrides: methods of our adopted modules. inserts, removes: tokens come, or leave. per_place: tokens
    for each place.
    """

    places: frozenset[str]
    requires: frozenset[str]
    overrides: frozenset[str]
    inserts: bool
    removes: bool
    per_place: Fraction


def overrides(module: object) -> set[str]:
    """The methods ("Attention.scores") of a class in `vitreous.hosts` that the module's class has one of its own for."""
    order = type(module).__mro__
    base = next((cls for cls in order if cls.__module__.startswith("vitreous.hosts.")), None)
    if base is None:
        return set()
    above = order[: order.index(base)]
    return {f"{base.__name__}.{name}" for cls in above for name in vars(cls) if hasattr(base, name) and name[0] != "_"}


def signature(mechanism: Mechanism) -> Signature:
    """Measured in the first small host that takes the mechanism, by what it exchanges and by one pass."""
    host = next(name for name in HOSTS if not lacks(name, mechanism))
    model = grafted(mechanism, host)
    changes = grafts(model)[-1].changes
    counts, inserted = [], []

    def note(block: nn.Module, arguments, out) -> None:
        counts.append((out.x if isinstance(out, Stream) else out).shape[1])
        inserted.append(out.state.inserted if isinstance(out, Stream) else 0)

    for block in model.blocks:
        block.register_forward_hook(note)
    model(images())
    entered = plain_count(host, per_place(model))
    stations = {f"blocks.*:{name}" for change in changes for name in STATIONS if added(change, name)}
    return Signature(
        places=frozenset(re.sub(r"\d+", "*", change.path) for change in changes) | stations,
        requires=frozenset(mechanism.requires),
        overrides=frozenset().union(*(overrides(change.new) for change in changes)),
        inserts=any(inserted),
        removes=any(count - new < entered for count, new in zip(counts, inserted, strict=True)),
        per_place=per_place(model),
    )


def added(change: Change, station: str) -> bool:
    """True if the change brings a step to the station of a block."""
    return isinstance(change.new, Block) and len(change.new.steps(station)) > len(getattr(change.old, station, ()))


def plain_count(host: str, per: Fraction) -> Fraction:
    """The tokens that enter the first block, with so many for each place."""
    return prefix(build(host)) + per * (SIZE // 8) ** 2


def representatives(mechanisms: Iterable[Mechanism]) -> dict[Signature, Mechanism]:
    """The first mechanism of each signature, in order."""
    first: dict[Signature, Mechanism] = {}
    for mechanism in mechanisms:
        first.setdefault(known_signature(mechanism), mechanism)
    return first


known_signature = cache(signature)
