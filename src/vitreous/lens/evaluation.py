"""How good the maps of a reading are: against masks, and against what the model itself depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitreous.data.views import View
from vitreous.lens import faithfulness
from vitreous.lens.formulas import scores
from vitreous.lens.reading import Columns, joined

FRACTIONS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the patches, in insertion and deletion
MARKS = ("artifacts",)  # no maps
LATER = ("u2", "u3")  # vectors whose sign is seldom known: which patches come first would be chance


def against_masks(maps: Mapping[str, Tensor], views: Sequence[View], first: int, seed: int) -> Columns:
    """Rows of the table of scores: every map, and its mean over heads (head -1), beside maps that look at no image.

    maps: {"attention/6": (B, H, rows, cols), "u1/6": (B, rows, cols), ...}. first: number of the first image. Baselines
    have layer -1; layers on another grid than the first one have baselines of their own, too.
    """
    have = [i for i, view in enumerate(views) if view.mask is not None]
    numbers = [first + i for i in have]
    covers: dict[tuple[int, int], Tensor] = {}
    tables: list[Columns] = []
    compared: set[int] = set()  # layers that have baselines

    def add(component: str, layer: int, head: int, values: Tensor, cover: Tensor) -> None:
        keys = {"layer": layer, "head": head, "image": np.array(numbers)}
        table = {name: np.broadcast_to(np.asarray(value, np.int64), len(have)) for name, value in keys.items()}
        table |= {"component": np.full(len(have), component)}
        tables.append(table | {name: found.numpy() for name, found in scores.scores(values, cover).items()})

    for name, values in judged(maps).items():
        component, layer, grid = *split(name), tuple(values.shape[-2:])
        values = values[have].flatten(-2).float().cpu()
        if grid not in covers:
            covers[grid] = torch.stack([scores.coverage(views[i].mask, grid) for i in have])
        at = -1 if grid == next(iter(covers)) else layer
        if at not in compared:
            compared.add(at)
            for baseline, blind in scores.baselines(grid, numbers, seed).items():
                add(baseline, at, -1, blind, covers[grid])
        if values.ndim == 3:
            for head in range(values.shape[1]):
                add(component, layer, head, values[:, head], covers[grid])
            values = values.mean(1)
        add(component, layer, -1, values, covers[grid])
    return joined(tables)


def against_model(
    model: nn.Module,
    views: Sequence[View],
    maps: Mapping[str, Tensor],
    shuffled: Mapping[str, Tensor],
    seed: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Insertion and deletion curves of every map but LATER, heads averaged, and how like it is to that of shuffled weights."""
    images = torch.stack([view.pixels for view in views])
    options = {"fractions": FRACTIONS, "seed": seed, "batch_size": batch_size}
    by_grid: dict[tuple[int, int], list[str]] = {}
    for name, values in judged(maps, but=(*MARKS, *LATER)).items():
        by_grid.setdefault(tuple(values.shape[-2:]), []).append(name)
    found = []
    for grid, names in by_grid.items():
        centre = scores.centre_prior(grid).float().expand(len(views), -1)
        ours = torch.stack([*(flat(maps[name]) for name in names), centre], dim=1)  # (B, M + 1, P)
        blind = faithfulness.random_maps(grid, range(len(views)), seed=seed)
        random = faithfulness.curves(model, images, blind, grid, **options)
        curves = faithfulness.curves(model, images, ours, grid, **options)
        for number, name in enumerate(names):
            component, layer = split(name)
            entry = faithfulness.record(curves.of(number), random, curves.of(len(names)), seed=seed)
            like = likeness(component, ours[:, number], shuffled.get(name))
            found.append({"component": component, "layer": layer, "randomised": like, **entry})
    return found


def likeness(component: str, ours: Tensor, theirs: Tensor | None) -> float | None:
    """Mean rank correlation of maps (B, P) with those of shuffled weights; of singular vectors, whichever way they point."""
    if theirs is None:
        return None
    found = faithfulness.rank_correlation(ours, flat(theirs))
    return (found.abs() if component[0] in "uk" else found).nanmean().item()


def judged(maps: Mapping[str, Tensor], but: Sequence[str] = MARKS) -> dict[str, Tensor]:
    return {name: values for name, values in maps.items() if split(name)[0] not in but}


def split(name: str) -> tuple[str, int]:
    """ "u1/6" -> ("u1", 6)."""
    component, _, layer = name.partition("/")
    return component, int(layer)


def flat(maps: Tensor) -> Tensor:
    """(B, rows, cols) or (B, H, rows, cols) -> (B, P), heads averaged, on the CPU."""
    maps = maps.flatten(-2).float().cpu()
    return maps.mean(1) if maps.ndim == 3 else maps
