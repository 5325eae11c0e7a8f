"""Numbers of made attention against whole-map formulas, closed forms and loops; blocks, windows, noise and the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lens import whole_maps
from lens.passes import NUMBERS, measured
from vitreous.base.errors import DataError, NotReached, SettingError
from vitreous.layers.stream import Assignment
from vitreous.lens.formulas import indicators
from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.probe import BatchInfo, Rows, chosen, records, table
from vitreous.lens.probes.rank_collapse import RankCollapse

SIDE = 5  # a grid of 5 x 5 places, 8 pixels apart


@dataclass
class Shown:
    """An attention as a tap shows it, from its tensors: maps (B, W, H, N, M) are given, or those of q and k."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    maps: Tensor | None = None
    altered: Tensor | None = None
    layout: Any = None
    name: str = "attn"
    call_index: int = 0
    kind: str = "token"
    scale: float | None = 1.0
    stochastic: bool = True
    assignment: Assignment | None = None
    inserted: int = 0
    sizes: list = field(default_factory=list)

    def __post_init__(self):
        if self.maps is None:
            self.maps = (self.q @ self.k.mT).softmax(dim=-1)
        self.output = self.maps @ self.v

    @property
    def mixed(self):
        return self.altered is not None

    def rows(self, size=256, effective=False):
        maps = self.altered if effective else self.maps
        for start in range(0, maps.shape[3], size):
            self.sizes.append(size)
            rows = slice(start, min(start + size, maps.shape[3]))
            yield rows, maps[..., rows, :].float().contiguous()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shown(batch=2, windows=1, heads=3, n=SIDE * SIDE + 1, width=4, seed=0, **more):
    q, k, v = (random(batch, windows, heads, n, width, seed=seed + i) for i in range(3))
    return Shown(q, k, v, **more)


def of_maps(maps, **more):
    return Shown(None, None, torch.ones(*maps.shape[:3], maps.shape[4], 2, dtype=maps.dtype), maps, **more)


def grid(prefix=1, side=SIDE, pitch=8.0):
    """A layout of side x side places after `prefix` tokens without one."""
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) * pitch
    places = torch.cat([torch.full((prefix, 2), torch.nan), torch.cartesian_prod(axis, axis)])[None].double()
    return SimpleNamespace(queries=places, keys=places, images=0, prefix=0)


def column(table, name, source="attention", kind="token", together=False):
    """The values of a column as (images, heads)."""
    rows = (table["source"] == source) & (table["kind"] == kind) & ((table["head"] < 0) == together)
    heads = len(set(table["head"][rows].tolist()))
    return torch.from_numpy(table[name][rows]).unflatten(0, (-1, heads))


def close(found, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block", [1, 500, 1 << 20])
def test_blocks_give_what_the_whole_map_gives(block):
    call = shown(batch=4, layout=grid())
    table = measured(call, noisy=True, block=block)
    clean, noisy = call.maps[:2, 0], call.maps[2:, 0]
    far = whole_maps.distances(call.layout.queries[0], call.layout.keys[0])
    wanted = {
        "attention_entropy": whole_maps.attention_entropy(clean),
        "effective_tokens": whole_maps.effective_tokens(clean),
        "selectivity": whole_maps.selectivity(clean),
        "mean_distance": whole_maps.mean_distance(clean, far),
        "attention_width": whole_maps.attention_width(clean, far),
        "angular_alignment": indicators.angular_alignment(call.q[:2, 0], call.k[:2, 0]),
        "angular_alignment_paper": indicators.angular_alignment(call.q[2:, 0], call.k[2:, 0]),
        "head_redundancy": indicators.head_redundancy(whole_maps.head_gram(clean)),
        "perturbation_robustness": whole_maps.relative_change(clean, noisy),
    }
    for name, value in wanted.items():
        close(column(table, name), value)
    close(column(table, "selectivity_paper", together=True)[:, 0], whole_maps.selectivity(clean).mean(dim=1))
    paper = whole_maps.perturbation_robustness(clean, noisy)
    close(column(table, "perturbation_robustness_paper", together=True)[:, 0], paper)


def test_no_more_rows_are_asked_for_than_the_buffers_hold():
    maps = random(2, 1, 3, 300, 40).softmax(dim=-1)
    call = of_maps(maps)
    table = measured(call, block=5000)
    assert set(call.sizes) == {5000 // (2 * 3 * 40)}
    close(column(table, "attention_entropy"), whole_maps.attention_entropy(maps[:, 0]))
    close(column(table, "head_redundancy"), indicators.head_redundancy(whole_maps.head_gram(maps[:, 0])))


# -- closed forms: every measure of planted attention ------------------------------------------------------------------


def line(n, pitch=8.0):
    """A layout of n places in a row."""
    places = torch.stack([torch.zeros(n), pitch * torch.arange(n)], dim=-1)[None].double()
    return SimpleNamespace(queries=places, keys=places, images=0, prefix=0)


N, FAR = 12, 200.0  # FAR: a score that leaves nothing to the others, in float32
EYE = torch.eye(N, dtype=torch.float64)
GROUPS = EYE[:3].repeat_interleave(4, dim=0)  # token i is in group i // 4, of three
PLANTED = {  # q, k of one head: (N, K)
    "uniform": (0 * EYE, 0 * EYE),
    "identity": (FAR * EYE, EYE),
    "one token for all": (FAR * torch.ones(N, 1).double(), EYE[:, :1]),
    "cyclic": (FAR * EYE, EYE.roll(1, dims=0)),
    "three groups": (FAR * GROUPS, GROUPS),
}
EXPECTED = {
    "uniform": {
        "attention_entropy": np.log(N),
        "effective_tokens": N,
        "selectivity": 1 - 1 / N,
        "mean_distance": 8 * (N**2 - 1) / (3 * N),  # mean of |i - j|
        "attention_width": 8 * np.sqrt((N**2 - 1) / 12),  # mean of (i - j)^2 is (N^2 - 1) / 6
        "angular_alignment": 0,
        "effective_rank": 1,  # of a spectrum of zeros
        "spectral_sparsity": 1,
    },
    "identity": {
        "attention_entropy": 0,
        "effective_tokens": 1,
        "selectivity": 0,
        "mean_distance": 0,
        "attention_width": 0,
        "angular_alignment": 1,
        "effective_rank": N,
        "spectral_sparsity": 0,
    },
    "one token for all": {
        "attention_entropy": 0,
        "effective_tokens": 1,
        "selectivity": 0,
        "mean_distance": 8 * (N - 1) / 2,
        "attention_width": 8 * np.sqrt((N - 1) * (2 * N - 1) / 12),  # mean of i^2 is (N - 1)(2 N - 1) / 6
        "angular_alignment": 1 / N,  # q is 1 throughout, k is 1 at the first token and 0 elsewhere
        "effective_rank": 1,
        "spectral_sparsity": 0,  # of the one axis there is
    },
    "cyclic": {
        "attention_entropy": 0,
        "effective_tokens": 1,
        "selectivity": 0,
        "mean_distance": 8 * 2 * (N - 1) / N,  # N - 1 steps of one, one of N - 1
        "attention_width": 8 * np.sqrt(((N - 1) + (N - 1) ** 2) / N / 2),
        "angular_alignment": 0,
        "effective_rank": N,
        "spectral_sparsity": 0,
    },
    "three groups": {
        "attention_entropy": np.log(4),
        "effective_tokens": 4,
        "selectivity": 1 - 1 / 4,
        "mean_distance": 8 * 15 / 12,  # within four: (4^2 - 1) / (3 * 4)
        "attention_width": 8 * np.sqrt(15 / 12),
        "angular_alignment": 1,
        "effective_rank": 3,  # scores have three equal singular values of twelve
        "spectral_sparsity": 9 / 12,
    },
}


def planted(*names):
    """A call whose heads are planted, widths filled up with zeros where they differ."""
    width = max(PLANTED[name][0].shape[1] for name in names)
    q, k = (
        torch.stack([torch.nn.functional.pad(PLANTED[name][i], (0, width - PLANTED[name][i].shape[1])) for name in names])
        for i in (0, 1)
    )
    return Shown(q[None, None], k[None, None], torch.ones(1, 1, len(names), N, 2).double(), layout=line(N))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_attention_has_the_known_value_of_every_measure(name):
    table = measured(planted(name))
    wanted = EXPECTED[name]
    for measure in ("attention_entropy", "effective_tokens", "selectivity", "mean_distance", "attention_width"):
        close(column(table, measure), wanted[measure])
    close(column(table, "angular_alignment"), wanted["angular_alignment"])
    rank = wanted["effective_rank"]
    close(column(table, "effective_rank", "score"), rank)
    close(column(table, "effective_rank_l1", "score"), rank)
    close(column(table, "spectral_entropy", "score"), np.log(rank))
    close(column(table, "effective_rank_paper", "score"), rank, 1e-4)
    close(column(table, "spectral_entropy_paper", "score"), np.log(rank), 1e-5)
    close(column(table, "spectral_sparsity", "score"), wanted["spectral_sparsity"])
    close(column(table, "spectral_sparsity_paper", "score"), wanted["spectral_sparsity"])


def test_planted_heads_are_redundant_as_far_as_they_share_tokens():
    found = column(measured(planted("identity", "cyclic", "three groups", "uniform", "uniform")), "head_redundancy")[0]
    # cosines: identity and a group 1/2 (4 rows of 1/4 against 1: 3/sqrt(12 * 3)), and with uniform 1/sqrt(N)
    one, group = 1 / np.sqrt(N), np.sqrt(4 / N)
    cyclic = 9 / 12 * 1 / 2  # three quarters of the steps stay within their group
    wanted = [
        (0 + 1 / 2 + 2 * one) / 4,
        (0 + cyclic + 2 * one) / 4,
        (1 / 2 + cyclic + 2 * group) / 4,
        (2 * one + group + 1) / 4,
        (2 * one + group + 1) / 4,
    ]
    close(found, torch.tensor(wanted, dtype=torch.float64))
    assert column(measured(planted("identity")), "head_redundancy").isnan().all()  # there is no other head


def test_robustness_of_planted_change():
    both = [planted("identity", "cyclic"), planted("cyclic", "cyclic")]
    call = Shown(*(torch.cat([getattr(each, part) for each in both]) for part in ("q", "k", "v")), layout=line(N))
    table = measured(call, noisy=True)
    close(column(table, "perturbation_robustness")[0], torch.tensor([np.sqrt(2), 0.0]).double())
    close(column(table, "perturbation_robustness_paper", together=True), np.sqrt(2 * N) / (2 * N * N))
    close(column(table, "angular_alignment")[0], torch.tensor([1.0, 0.0]).double())
    close(column(table, "angular_alignment_paper")[0], 0.0)  # of the noisy image


@pytest.mark.parametrize("width", [8.0, 20.0])
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_planted_gaussian_head_returns_its_width(width, prefix):
    """Queries in the middle of a grid that is large against the width, with weight on prefix tokens that have no place."""
    places = grid(prefix, side=41)
    queries = grid(0, side=41).queries.unflatten(1, (41, 41))[:, 18:23, 18:23].flatten(1, 2)
    far = whole_maps.distances(queries[0], places.keys[0])
    scores = torch.where(far.isnan(), 2.0, -far.square() / (2 * width**2))
    maps = scores.softmax(dim=-1).expand(1, 1, 2, -1, -1)
    call = of_maps(maps, layout=SimpleNamespace(queries=queries, keys=places.keys, images=0, prefix=0))
    table = measured(call)
    close(column(table, "attention_width"), width, 1e-4)
    close(column(table, "mean_distance"), width * np.sqrt(np.pi / 2), 0.03)  # a sum on a grid is not quite the integral
    close(whole_maps.attention_width(maps[0], far), width, 1e-4)


def test_rank_collapse_of_planted_tokens():
    batch = BatchInfo(torch.zeros(2, 3, 4, 4), 2, None)
    spread = torch.stack([torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])])  # half its energy is in the mean
    for tokens, wanted in ((torch.ones(2, 6, 3), 0.0), (torch.eye(2).repeat(2, 1, 1) - 0.5, 1.0), (spread, np.sqrt(0.5))):
        observer = RankCollapse().start(None, batch)
        stream = tokens if tokens.ndim == 3 else tokens.expand(2, -1, -1)
        observer.on_layer(LayerFeatures(0, ("attn", 0), "token", stream=stream))
        close(column(table(observer.finish().rows, [RankCollapse()]), "rank_collapse", together=True), wanted)


# -- windows, kinds, effective maps ------------------------------------------------------------------------------------


def test_windows_count_evenly():
    """A batch of windows gives the mean of its windows as images; heads are compared over all of them."""
    call = shown(batch=2, windows=3, n=9)
    split = Shown(*(getattr(call, part).flatten(0, 1)[:, None] for part in ("q", "k", "v")))
    together, apart = measured(call), measured(split)
    for name in ("attention_entropy", "effective_tokens", "selectivity", "angular_alignment"):
        close(column(together, name), column(apart, name).unflatten(0, (2, 3)).mean(dim=1))
    for name in ("spectral_entropy", "effective_rank_l1"):
        close(column(together, name, "score"), column(apart, name, "score").unflatten(0, (2, 3)).mean(dim=1))
    gram = whole_maps.head_gram(call.maps.transpose(1, 2).flatten(2, 3))
    close(column(together, "head_redundancy"), indicators.head_redundancy(gram))


def test_each_window_has_its_own_places_and_padding_has_none():
    call = shown(windows=2, n=4)
    places = torch.tensor([[[0, 0], [0, 8], [8, 0], [8, 8]], [[0, 16], [8, 16], [0, 0], [0, 0]]]).double()
    places[1, 2:] = torch.nan
    call.layout = SimpleNamespace(queries=places, keys=places, images=0, prefix=0)
    found = column(measured(call), "mean_distance")
    for image in range(2):
        for head in range(3):
            rows = []
            for window in range(2):
                there = [i for i in range(4) if not places[window, i].isnan().any()]
                for i in there:
                    weights = call.maps[image, window, head, i, there]
                    far = [float((places[window, i] - places[window, j]).norm()) for j in there]
                    rows.append(sum(w * d for w, d in zip(weights.tolist(), far, strict=True)) / float(weights.sum()))
            close(found[image, head], sum(rows) / len(rows))


def test_channels_and_pooling_have_only_what_makes_sense():
    channel = measured(shown(kind="channel", layout=grid(), n=26))
    for name in ("mean_distance", "attention_width", "angular_alignment"):
        assert column(channel, name, kind="channel").isnan().all()
    for name in ("attention_entropy", "effective_tokens", "selectivity", "head_redundancy"):
        assert column(channel, name, kind="channel").isfinite().all()
    assert column(channel, "effective_rank", "score", kind="channel").isfinite().all()
    pooling = measured(of_maps(random(2, 1, 3, 1, 26).softmax(dim=-1), kind="pooling"))
    assert column(pooling, "effective_tokens", kind="pooling").isfinite().all()
    assert column(pooling, "angular_alignment", kind="pooling").isnan().all()
    assert set(pooling["source"]) == {"attention"}


def test_effective_maps_have_rows_of_their_own():
    call = shown(layout=grid())
    call.altered, call.stochastic = call.maps - 0.5 * call.maps.roll(1, dims=2), False
    table = measured(call)
    close(column(table, "attention_entropy"), whole_maps.attention_entropy(call.maps[:, 0]))
    gram = whole_maps.head_gram(call.altered[:, 0])
    close(column(table, "head_redundancy", kind="effective"), indicators.head_redundancy(gram))
    for name in ("attention_entropy", "selectivity", "mean_distance", "angular_alignment"):
        assert column(table, name, kind="effective").isnan().all()

    call.altered, call.stochastic = call.maps.roll(1, dims=2), True
    table = measured(call)
    close(column(table, "mean_distance", kind="effective"), column(table, "mean_distance").roll(1, dims=1))
    close(column(table, "attention_entropy", kind="effective"), column(table, "attention_entropy").roll(1, dims=1))


def test_rows_that_are_masked_out_do_not_count():
    maps = random(2, 1, 3, 6, 6).softmax(dim=-1)
    masked = maps.clone()
    masked[:, :, :, 4:] = 0
    found, wanted = measured(of_maps(masked)), measured(of_maps(maps[:, :, :, :4]))
    for name in ("attention_entropy", "effective_tokens", "selectivity", "head_redundancy"):
        close(column(found, name), column(wanted, name))


def test_alignment_is_of_tokens_with_themselves():
    call = shown()
    call.layout = grid()
    call.layout.keys = call.layout.keys.roll(1, dims=1)
    assert column(measured(call), "angular_alignment").isnan().all()


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_is_tidy():
    calls = [shown(batch=4, name=name, seed=seed) for seed, name in enumerate("ba")]
    found = measured(*calls, noisy=True, first=3)
    columns = list(records(chosen(NUMBERS), "measures"))
    assert list(found) == ["layer", "head", "image", "source", "kind", *columns]
    assert {len(values) for values in found.values()} == {2 * 2 * (3 + 1 + 3)}
    keys = list(zip(*(found[name].tolist() for name in list(found)[:5]), strict=True))
    assert len(set(keys)) == len(keys)
    assert keys[:5] == [(0, head, 3, "attention", "token") for head in (-1, 0, 1, 2)] + [(0, -1, 4, "attention", "token")]
    assert all(found[name].dtype == np.float64 for name in columns)
    assert np.isfinite(found["selectivity_paper"]).tolist() == (found["head"] < 0).tolist()
    one = measured(shown(batch=4, name="b", seed=0), noisy=True, first=3)
    for name in found:  # the first in the order of the pass, whatever it is called
        np.testing.assert_array_equal(found[name][found["layer"] == 0], one[name])


def test_rows_of_several_probes_become_one_and_undeclared_measures_are_refused():
    collapse = [Rows(0, "attention", "token", {"rank_collapse": torch.tensor([[0.5]])}, 0, together=True)]
    selective = [Rows(0, "attention", "token", {"selectivity_paper": torch.tensor([[0.25]])}, 0, together=True)]
    probes = chosen(("attention_rows", "rank_collapse"))
    found = table(collapse + selective, probes)
    assert len(found["layer"]) == 1
    assert (found["rank_collapse"][0], found["selectivity_paper"][0], found["head"][0]) == (0.5, 0.25, -1)
    with pytest.raises(SettingError, match=r"values of rank_collapse in a readout\. Expected.*Add them"):
        table(collapse, chosen("attention_rows"))
    with pytest.raises(SettingError, match="values of score"):
        table([Rows(0, "score", "token", {"rank_collapse": torch.ones(1, 1)})], probes)


def test_only_what_is_asked_for():
    assert set(measured(shown(), probes="attention_rows")["source"]) == {"attention"}
    assert set(measured(shown(), probes="spectra")["source"]) == {"score"}
    assert len(measured(shown(), probes="spectra:scores=false")["source"]) == 0


def test_an_image_that_is_not_finite_spoils_its_own_rows_alone():
    call = shown(batch=3, layout=grid())
    wanted = measured(call)
    call.q[1], call.maps[1] = torch.nan, torch.nan
    found = measured(call)
    of_map = [(name, "attention") for name in ("attention_entropy", "mean_distance", "head_redundancy")]
    for name, source in [*of_map, ("effective_rank", "score")]:
        values = column(found, name, source)
        assert values[1].isnan().all()
        close(values[[0, 2]], column(wanted, name, source)[[0, 2]])


def test_bad_batches_are_refused():
    with pytest.raises(DataError, match=r"batch of 3 in attn.*noise=0"):
        measured(shown(batch=3), noisy=True)
    with pytest.raises(NotReached, match="b saw 2 of 4 images"):
        measured(shown(name="a", batch=4), shown(name="b"))


def test_autocast_does_not_reach_the_measures():
    call = shown()
    call.q, call.k, call.v = call.q.float(), call.k.float(), call.v.float()
    wanted = measured(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measured(call)
    for name in ("attention_entropy", "head_redundancy", "effective_rank"):
        np.testing.assert_array_equal(found[name], wanted[name])
