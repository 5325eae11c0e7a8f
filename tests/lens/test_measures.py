"""Measures against the whole-map formulas, closed forms and loops; blocks, windows, noise and the table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitreous.errors import DataError, NotReached
from vitreous.lens import indicators
from vitreous.lens.measures import COLUMNS, KEYS, Measures, averaged

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
    number: int = 0
    kind: str = "token"
    scale: float | None = 1.0
    stochastic: bool = True
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
    return SimpleNamespace(queries=places, keys=places)


def measured(*calls, **settings):
    measures = Measures(settings.pop("model", nn.Identity()), **settings)
    for call in calls:
        measures.see(call)
    return measures.columns()


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
    far = indicators.distances(call.layout.queries[0], call.layout.keys[0])
    wanted = {
        "attention_entropy": indicators.attention_entropy(clean),
        "effective_tokens": indicators.effective_tokens(clean),
        "selectivity": indicators.selectivity(clean),
        "mean_distance": indicators.mean_distance(clean, far),
        "attention_width": indicators.attention_width(clean, far),
        "angular_alignment": indicators.angular_alignment(call.q[:2, 0], call.k[:2, 0]),
        "angular_alignment_paper": indicators.angular_alignment(call.q[2:, 0], call.k[2:, 0]),
        "head_redundancy": indicators.head_redundancy(indicators.head_gram(clean)),
        "perturbation_robustness": indicators.relative_change(clean, noisy),
    }
    for name, value in wanted.items():
        close(column(table, name), value)
    close(column(table, "selectivity_paper", together=True)[:, 0], indicators.selectivity(clean).mean(dim=1))
    paper = indicators.perturbation_robustness(clean, noisy)
    close(column(table, "perturbation_robustness_paper", together=True)[:, 0], paper)
    assert max(call.sizes) == min(26, max(1, block // (4 * 3 * 26)))
