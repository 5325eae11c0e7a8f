"""How good the maps of a reading are: against masks, and against the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitreous.data.views import View
from vitreous.layers.geometry import centre_prior
from vitreous.lens import faithfulness
from vitreous.lens.formulas import scores
from vitreous.lens.probe import Component, Measure, Source
from vitreous.lens.tables import Columns, joined

SCORES = (
    Measure("energy_inside", "Energy inside", "", 0, 1, "higher",
            "Share of the map's mass that lies on the object. By chance: the object's area."),
    Measure("auroc", "AUROC", "", 0, 1, "higher",
            "Chance that a patch of the object scores above one of the background. By chance: 0.5."),
    Measure("average_precision", "Average precision", "", 0, 1, "higher",
            "Precision over all thresholds. By chance: the object's area."),
    Measure("pointing", "Pointing game", "", 0, 1, "higher",
            "How often the highest patch lies on the object. By chance: the object's area."),
    Measure("iou_otsu", "IoU at Otsu's threshold", "", 0, 1, "higher",
            "Overlap with the mask when the map is cut without looking at the mask."),
    Measure("iou_best", "IoU at the best threshold", "", 0, 1, "higher",
            "Overlap at the threshold that suits the mask best: an upper bound."),
)  # fmt: skip
BASELINES = (Source("centre", "Centre prior"), Source("random", "Random map"), Source("area", "Object's area"))


def against_masks(
    maps: Mapping[str, Tensor], components: Mapping[str, Component], views: Sequence[View], first: int, seed: int
) -> Columns:
    """Rows of the table of scores: every map, and its mean over heads (head -1).

    Beside them stand maps that look at no image.

    maps: {"attention/6": (B, H, rows, cols), "u1/6": (B, rows, cols), ...}. first: number of the
    first image. Baselines have layer -1; layers on another grid than the first one have baselines
    of their own, too.
    """
    have = [i for i, view in enumerate(views) if view.mask is not None]
    numbers = [first + i for i in have]
    covers: dict[tuple[int, int], Tensor] = {}
    tables: list[Columns] = []
    compared: set[int] = set()  # layers that have baselines

    def add(component: str, layer: int, head: int, values: Tensor, cover: Tensor) -> None:
        keys = {"image": np.array(numbers), "component": component, "layer": layer, "head": head}
        table = {name: np.broadcast_to(np.asarray(value), len(have)) for name, value in keys.items()}
        tables.append(table | {name: score.numpy() for name, score in scores.scores(values, cover).items()})

    for name, values in flat_maps(maps, components, "scored").items():
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
    components: Mapping[str, Component],
    seed: int,
    batch_size: int,
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Insertion and deletion curves of maps, and their likeness to those of shuffled weights.

    Heads are averaged. options: fill, fractions and black of `faithfulness.curves`.
    """
    images = torch.stack([view.pixels for view in views])
    options = {"seed": seed, "batch_size": batch_size} | options
    by_grid: dict[tuple[int, int], list[str]] = {}
    for name, values in flat_maps(maps, components, "curves").items():
        by_grid.setdefault(tuple(values.shape[-2:]), []).append(name)
    records = []
    for grid, names in by_grid.items():
        centre = centre_prior(grid).float().expand(len(views), -1)
        ours = torch.stack([*(flat(maps[name]) for name in names), centre], dim=1)  # (B, M + 1, P)
        blind = faithfulness.random_maps(grid, range(len(views)), seed=seed)
        random = faithfulness.curves(model, images, blind, grid, **options)
        curves = faithfulness.curves(model, images, ours, grid, **options)
        for number, name in enumerate(names):
            component, layer = split(name)
            entry = faithfulness.record(curves.of(number), random, curves.of(len(names)), seed=seed)
            like = likeness(components[component].signed, ours[:, number], shuffled.get(name))
            records.append({"component": component, "layer": layer, "randomised": like, **entry})
    return records


def likeness(either_way: bool, ours: Tensor, theirs: Tensor | None) -> float | None:
    """Mean rank correlation of maps (B, P) with those of shuffled weights.

    Of signed ones, whichever way they point.
    """
    if theirs is None:
        return None
    correlation = faithfulness.rank_correlation(ours, flat(theirs))
    return (correlation.abs() if either_way else correlation).nanmean().item()


def flat_maps(maps: Mapping[str, Tensor], components: Mapping[str, Component], purpose: str) -> dict[str, Tensor]:
    """The maps over an image whose component has `scored` or `curves`.

    There are no masks of volumes.
    """
    records = {name: components[split(name)[0]] for name in maps}
    return {
        name: values
        for name, values in maps.items()
        if getattr(records[name], purpose) and values.ndim == 3 + records[name].per_head
    }


def split(name: str) -> tuple[str, int]:
    """ "u1/6" -> ("u1", 6)."""
    component, _, layer = name.partition("/")
    return component, int(layer)


def flat(maps: Tensor) -> Tensor:
    """(B, rows, cols) or (B, H, rows, cols) -> (B, P), heads averaged, on the CPU."""
    maps = maps.flatten(-2).float().cpu()
    return maps.mean(1) if maps.ndim == 3 else maps
