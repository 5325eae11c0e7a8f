"""Laws about two mechanisms in one model: they stack, or refuse each other with a reason; last in, first out.

One mechanism per signature meets every other, in both orders, each pair in one kind of host and each of the two in every kind;
every further mechanism meets one of these first and one last. `pytest --full` runs all pairs in all of these hosts.
"""

from __future__ import annotations

import itertools

import torch

from contract.covering import covering_rows
from contract.hosts import PRIMARY, TEXTS, anatomy, build, fit, folder, grafted, images, refused, stand_ins, stem
from contract.signatures import known_signature
from vitreous import check, graft, grafts, new_parameters, parse, ungraft
from vitreous.base.errors import VitreousError

PAIR_HOSTS = ("plain", "test_vit2", "test_vit3", "distilled", "res_post", PRIMARY)
Row = tuple[str, str, str]  # first mechanism, second, host


def fits(row: Row) -> bool:
    return row[2] not in refused(row[0]) | refused(row[1])


def pairs(full: bool) -> list[Row]:
    """The pairs that are put together, and where."""
    if full:
        return list(filter(fits, itertools.product(TEXTS, TEXTS, PAIR_HOSTS)))
    chosen = stand_ins()
    rest = [text for text in TEXTS if text not in chosen]
    turns = list(zip(rest, itertools.cycle(chosen), itertools.cycle(chosen[1:])))  # the shortest ends it
    more = [row for text, one, other in turns for row in ((text, one, PRIMARY), (other, text, PRIMARY))]
    return covering_rows((chosen, chosen, PAIR_HOSTS), fits) + more


def pytest_generate_tests(metafunc):
    if "pair" in metafunc.fixturenames:
        metafunc.parametrize("pair", pairs(metafunc.config.getoption("full")), ids="-".join)


def rivals(first: str, second: str) -> bool:
    """True if both want the same thing, so that one may refuse the other: all other pairs have to stack."""
    a, b = known_signature(parse(first)), known_signature(parse(second))
    classes = [{name.partition(".")[0] for name in each.overrides} for each in (a, b)]
    alone = {"attn_pool", "blocks.*:between", "patch_embed.proj"}  # where there is room for one
    # a linear layer, the end of a branch
    alone |= {place for place in a.places if place.startswith(("blocks.*.attn.", "blocks.*.mlp.", "blocks.*.drop_path"))}
    patches = any("Embed.patches" in one.overrides and "patch_embed.proj" in other.places for one, other in ((a, b), (b, a)))
    pool = any("attn_pool" in one.places and "class_head" in other.requires for one, other in ((a, b), (b, a)))
    displaced = any(  # a mixer takes attention away, and with it whatever stands on it
        "Mixer" in mine and any(place.startswith("blocks.*.attn") for place in other.places)
        for mine, other in ((classes[0], b), (classes[1], a))
    )
    within = any(  # a block that merges tokens before a step would read their queries and keys
        "Block.attention_step" in one.overrides and "blocks.*:between" in other.places for one, other in ((a, b), (b, a))
    )
    rivalry = pool or patches or displaced or within
    return bool(classes[0] & classes[1]) or bool(a.places & b.places & alone) or rivalry


def nested(first: str, second: str) -> bool:
    """True if one exchanges a part of what the other exchanges, so that they may go together in one order alone."""
    a, b = (known_signature(parse(text)).places for text in (first, second))
    return any(inner.startswith(f"{outer}.") for mine, other in ((a, b), (b, a)) for inner in mine for outer in other)


def sets_grid(text: str) -> bool:
    """True if it changes the grid of patches, which others may be made for: it has to be the first in a model."""
    return "patch_embed.grid_size" in known_signature(parse(text)).places


def stacked(first: str, second: str, host: str = PRIMARY) -> torch.nn.Module | None:
    """Both, in this order; None if the second refuses in good order: with a reason, and the first untouched."""
    model = grafted(first, host)
    before = anatomy(model, records=True)
    try:
        return graft(model, second)
    except VitreousError as error:
        assert " Expected " in str(error)
        assert anatomy(model, records=True) == before
        return None


def test_a_pair_stacks_or_is_rivals(pair):
    """Removal of the second gives back the first alone; after training both, removal gives back the host; bit for bit."""
    first, second, host = pair
    model, fewer = stacked(first, second, host), known_signature(parse(first)).per_place < 1
    if model is None:  # its settings may ask for more places than the first leaves
        assert rivals(first, second) or sets_grid(second) or fewer
        assert stacked(second, first, host) is None or nested(first, second) or sets_grid(second)
        return
    check(model, images())
    both, alone = model(images()), grafted(first, host)
    assert both.isfinite().all()
    # a window may hold all of so few places, as the host does
    assert parse(second).exact_at_init or fewer or not torch.equal(both, alone(images()))
    if folder(first) != folder(second):  # in different slots the order means nothing
        other = stacked(second, first, host)
        if other is None:
            assert nested(first, second) or sets_grid(first)
        else:
            torch.testing.assert_close(both, other(images()), atol=1e-5, rtol=1e-5)
            other.load_state_dict(model.state_dict())
    assert ungraft(model).changed == ()
    check(model, images())
    assert torch.equal(model(images()), alone(images()))
    assert [record.mechanism for record in grafts(model)] == [parse(first)]
    check(graft(model, second).train(), images())
    fit(model, new_parameters(model).values())
    check(model.eval(), images())
    removal = ungraft(model, all=True)
    assert removal.changed == ()
    assert removal.mechanisms == (parse(second), parse(first))
    assert torch.equal(model(images()), build(host)(images()))
    assert set(model.state_dict()) == set(build(host).state_dict())


def test_what_is_in_can_be_put_in_again_or_is_refused(text):
    """Itself on itself is a pair like any other, with parameters of its own."""
    model = stacked(text, text)
    if model is None:
        return
    once = set(new_parameters(grafted(text)))
    assert len(new_parameters(model)) == 2 * len(once)
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


def test_training_two_leaves_each_others_parameters(text):
    """Removal of the later one keeps what the earlier one learned."""
    other = "extra_tokens:kind=register,tokens=2" if stem(text) != "extra_tokens" else "svda"
    model = stacked(text, other)
    fit(model, model.parameters())
    mine = {name for name in grafted(text).state_dict() if name not in build(PRIMARY).state_dict()}
    learned = {name: value.clone() for name, value in model.state_dict().items() if name in mine}
    ungraft(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in learned.items())


def test_every_pair_of_stand_ins_and_every_other_text_is_there():
    """And the number of pairs does not grow with the square of the texts: each further one of a known kind brings two."""
    chosen, rows = stand_ins(), pairs(full=False)
    assert {row[:2] for row in rows} >= set(itertools.product(chosen, repeat=2))
    assert {text for row in rows for text in row[:1]} == {text for row in rows for text in row[1:2]} == set(TEXTS)
    assert len(rows) <= len(chosen) ** 2 + 2 * (len(TEXTS) - len(chosen))
    assert len(pairs(full=True)) > len(TEXTS) ** 2
