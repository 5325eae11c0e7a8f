"""One mechanism per signature: a new kind of doing gets a stand-in of its own, another setting of a known kind does not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from contract.hosts import TEXTS, law_rows, refused, stand_ins
from contract.signatures import known_signature, representatives
from contract.tempered import Tempered, TemperedAttention
from vitreous import parse
from vitreous.layers.stream import PLAIN


class Sharpened(TemperedAttention):
    """Another step of attention."""

    def normalize(self, scores, state=PLAIN):
        return super().normalize(2 * scores, state)


@dataclass(frozen=True, kw_only=True)
class Sharper(Tempered):
    """Overrides two steps of attention."""

    attention = Sharpened


def test_a_new_kind_of_doing_is_its_own_representative():
    catalogue = [parse(text) for text in TEXTS]
    before = representatives(catalogue)
    after = representatives([*catalogue, Tempered(), Tempered(start=3.0), Sharper()])
    assert list(after.values()) == [*before.values(), Tempered(), Sharper()]
    assert known_signature(Tempered()).overrides == {"Attention.scores"}
    assert known_signature(Sharper()).overrides == {"Attention.scores", "Attention.normalize"}


@pytest.mark.parametrize(
    ("shipped", "inserts", "removes", "per_place"),
    [
        ("svda", False, False, 1),
        ("extra_tokens", True, False, 1),
        ("token_merging", False, True, 1),
        ("evit", False, True, 1),
        ("channelvit", False, False, 3),
    ],
)
def test_what_the_shipped_ones_do(shipped, inserts, removes, per_place):
    found = known_signature(parse(shipped))
    assert (found.inserts, found.removes, found.per_place) == (inserts, removes, per_place)


def test_all_stand_ins_differ_and_every_text_has_one():
    signatures = [known_signature(parse(text)) for text in stand_ins()]
    assert len(set(signatures)) == len(signatures) < len(TEXTS)
    assert {known_signature(parse(text)) for text in TEXTS} == set(signatures)


def test_on_each_push_every_mechanism_meets_every_host_and_every_law():
    rows = law_rows(full=False)
    laws = {law for _, _, law in rows}
    taken = {(text, host) for text, host, _ in law_rows(full=True)}
    assert {(text, host) for text, host, _ in rows} == taken
    assert {(text, law) for text, _, law in rows} == {(text, law) for text in TEXTS for law in laws}
    assert {(host, law) for _, host, law in rows} == {(host, law) for _, host in taken for law in laws}
    assert all(host not in refused(text) for text, host in taken)
    assert len(rows) < len(law_rows(full=True)) / 2


def test_the_signature_is_measured_without_a_trace():
    state = torch.get_rng_state()
    known_signature.__wrapped__(Tempered())
    assert torch.equal(torch.get_rng_state(), state)
