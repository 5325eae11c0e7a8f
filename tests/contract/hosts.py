"""The mechanisms that the laws are held against, and in which of the small hosts: all that fits, or a covering array.

On each push one mechanism per slot and effect on the tokens meets every law in one host of each kind of head and attention;
beyond that every mechanism meets every host that takes it, and every law; every law meets every host. One mechanism per
signature (`signatures.py`) stands for all of its kind in pairs, precisions and graphs. `pytest --full` runs the whole product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from torch import Tensor, nn

import vitreous
from contract.covering import covering_rows
from contract.signatures import known_signature, representatives
from vitreous import parse
from vitreous.base.errors import MaskError
from vitreous.mechanism import mechanism_class
from vitreous.testing import Check, contract_checks
from vitreous.testing import hosts as small
from vitreous.testing.contract import laws, laws_everywhere
from vitreous.testing.hosts import (  # noqa: F401  (for the tests of this suite)
    CLASSES,
    HOSTS,
    SMALL,
    anatomy,
    build,
    fit,
    images,
    loss,
    per_place,
)

PRIMARY = "dinov2"  # for laws that take long: class token, registers, LayerScale, any image size
KINDS = (PRIMARY, "plain", "test_vit2", "class_map_all", "distilled", "res_post", "dinov3")  # of head and attention
GRAPHS = ("compiles", "exports")
ROTARY_KINDS = ("eva02", "dinov3")  # where attention is compiled and exported, too

# The hosts that lack what a mechanism may require, written by hand. Any refusal beside these is a mistake.
ROTARY = frozenset({"eva", "eva02", "dinov3", "rope_mixed", "grouped"})
PARALLEL = frozenset({"parallel_scaling", "parallel_things"})
LACKING = {
    "stream": frozenset(),
    "grid": frozenset(),
    "linear": frozenset(),
    "insert": ROTARY,
    "remove": ROTARY,
    "class_token": frozenset({"test_vit2", "test_vit3", "test_vit4"}),
    "attention": PARALLEL | {"diff_attention"},
    "projections": PARALLEL | {"diff_attention"},
    "halves": PARALLEL,
    "reads_inserted": frozenset({"max"}),
    "class_head": frozenset({"test_vit2", "test_vit3", "test_vit4", "class_avg", "class_map", "class_map_all", "prr", "max"}),
    "classifier": frozenset({"distilled"}),
    "poolable": frozenset({"distilled", "test_vit3", "class_map", "class_map_all", "prr"}),
}

# A mechanism that needs another graft in its host is held against the contract in its own test.
TEXTS = [
    text
    for stem in vitreous.catalogue()
    for text in (stem, *mechanism_class(stem).examples)
    if "decaying_mixer" not in parse(text).requires
]


def stem(text: str) -> str:
    return text.partition(":")[0]


def folder(text: str) -> str:
    """The slot of a mechanism."""
    return vitreous.catalogue()[stem(text)].parent.name


def refused(text: str) -> frozenset[str]:
    """The hosts that have to refuse the mechanism."""
    return frozenset().union(*(LACKING[word] for word in parse(text).requires))


def refuses_sizes(text: str, model: nn.Module, *others: Tensor) -> bool:
    """Whether the mechanism claims one image size; then images of any other size have to be refused."""
    if parse(text).any_size:
        return False
    for x in others:
        with pytest.raises(MaskError, match="Expected"):
            model(x)
    return True


def grafted(text: str, host: str = PRIMARY) -> nn.Module:
    return small.grafted(text, host)


def stand_ins() -> list[str]:
    """One mechanism per signature: the first in the list of texts."""
    first = {mechanism: text for text, mechanism in reversed([(text, parse(text)) for text in TEXTS])}
    return [first[mechanism] for mechanism in representatives(map(parse, TEXTS)).values()]


def of_each_effect() -> list[str]:
    """Of the stand-ins one per slot and effect on the tokens: whether they become more, fewer, or several for each place."""
    chosen: dict[tuple, str] = {}
    for text in stand_ins():
        effect = known_signature(parse(text))
        chosen.setdefault((folder(text), effect.inserts, effect.removes, effect.per_place), text)
    return list(chosen.values())


def law_rows(full: bool) -> set[tuple[str, str, str]]:
    """(text, host, law) that are checked, of the laws that hold everywhere."""
    factors = TEXTS, list(HOSTS), [law.__name__ for law in laws(laws_everywhere)]
    takes = {text: set(HOSTS) - refused(text) for text in TEXTS}

    def allowed(row: tuple[str, str, str]) -> bool:
        return row[1] in takes[row[0]]

    given = list(filter(allowed, itertools.product(TEXTS if full else of_each_effect(), HOSTS if full else KINDS, factors[2])))
    return {*given, *([] if full else covering_rows(factors, allowed, given))}


def law_checks(full: bool) -> Iterator[tuple[str, Check]]:
    """(text, check): the contract of each mechanism, thinned as the module says; what is refused is checked for all."""
    rows, everywhere, chosen = law_rows(full), laws(laws_everywhere), stand_ins()
    for text in TEXTS:
        for check in contract_checks(text):
            name = check.law.__name__
            taken = (
                (text, check.host, name) in rows if check.law in everywhere else full or text in chosen or name not in GRAPHS
            )
            if taken:
                yield text, check
        if text in chosen and folder(text) == "attn":
            for host in ROTARY_KINDS:
                yield from (
                    (text, one) for one in contract_checks(text, hosts=[host]) if one.law.__name__ in ("compiles", "exports")
                )


def cases(full: bool) -> list[tuple[str, str]]:
    """(text, host) for the laws of this suite alone: one mechanism per effect in one host of each kind, and all in one."""
    chosen = TEXTS if full else of_each_effect()
    hosts = {text: (HOSTS if full else KINDS) if text in chosen else (PRIMARY,) for text in TEXTS}
    return [(text, host) for text in TEXTS for host in hosts[text] if host not in refused(text)]
