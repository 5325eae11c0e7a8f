"""Where the subject of an image is, without training and without masks.

One map per image, higher meaning more foreground where a direction tells the sign.

    with a direction                      blur(G(z(Zw)))
    with a direction and a class token    blur(G(a + z(Zw)))
    with a class token                    blur(G(a))
    with neither                          blur(G(z(border distance)))

G is the Gram filter of `lens.maps`, Z and w are those of `lens.direction`, a the logarithm of the
class token's attention, z(.) standardises over the patches. Everything follows from what
`lens.layer_features` shows of each layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitreous.base.errors import DataError, HostError
from vitreous.layers.spectral import unit_rows
from vitreous.lens.direction import Direction, Feature, batches
from vitreous.lens.formulas.maps import (
    blurred,
    border_distance,
    gram_filter,
    log_attention,
    resampled,
    standardised,
)
from vitreous.lens.layer_features import FEATURES, LayerFeatures, layer_features
from vitreous.lens.probe import BatchInfo
from vitreous.lens.tap import trace
from vitreous.report.unsigned import WITHOUT_DIRECTION

# Without a direction: the depths, as shares of all layers, where ViT-Tiny/16 keeps its subject. A
# guess for other models.
USUAL = {"k": (6 / 12, 9 / 12), "o": (5 / 12, 8 / 12)}
PAIR = (7 / 12, 9 / 12)


@dataclass(frozen=True)
class Foreground:
    """maps (B, rows, cols), zero on average, of any scale; rule: what they were made from."""

    maps: Tensor
    rule: str

    @property
    def sign_known(self) -> bool:
        """Whether higher means more foreground; without a direction it may mean less."""
        return WITHOUT_DIRECTION not in self.rule

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the patches."""
        return tuple(self.maps.shape[1:])


def foreground(
    model: nn.Module, images: Any, direction: Direction | None = None, *, class_token: bool = True, batch: int = 16
) -> Foreground:
    """The foreground map of each image, on the model's grid of patches.

    `result.maps` are (B, rows, cols).

    images: a tensor (B, C, h, w), normalised for the model, or what `look` takes: a folder, paths,
    images. direction: of this model, from `find_direction` or `Direction.load`; without one
    nothing tells which side of the map is the subject (`result.sign_known` is False).
    class_token=False leaves the class token's attention out. Raises HostError for another model
    than the direction's, and for one without keys or outputs on a grid; DataError for no images.
    """
    if direction is not None:
        direction.check(model)
    layouts, parts = None, []
    for _, part in batches(model, images, batch):
        layouts = trace(model, part) if layouts is None else layouts
        parts.append(foreground_of(references(layer_features(model, part, layouts), direction, class_token)))
    if not parts:
        raise DataError("Found no images. Expected at least one. Give a tensor (B, C, h, w), a folder or paths.")
    return Foreground(torch.cat([part.maps for part in parts]), parts[0].rule)


@dataclass(frozen=True)
class References:
    """Numbers per patch that tend to be high on the subject, for the signs of maps.

    Each is (B, P) on `grid`, standardised, or None: see `maps.signed`.

    rows: the unit, centred rows (B, P, D_f) of the features that they were made from.
    """

    grid: tuple[int, int]
    fixed: Tensor | None
    attention: Tensor | None
    border: Tensor | None
    rows: tuple[Tensor, ...]

    def on(self, grid: tuple[int, int]) -> dict[str, Tensor | None]:
        """fixed, attention and border on the grid of another layer, as `maps.signed` takes them."""
        parts = {name: getattr(self, name) for name in ("fixed", "attention", "border")}
        return {name: x if x is None else resampled(x, self.grid, grid) for name, x in parts.items()}


class BatchReferences:
    """The references of one batch, for all probes that need them.

    `add` every layer, then ask for the `result`.

    Features that nothing needs later are released.
    """

    def __init__(self, batch: BatchInfo):
        self.direction = batch.direction
        self.needed = set(wanted(len(batch.layouts.calls), self.direction)[0])
        self.layers: dict[int, LayerFeatures] = {}
        self.answer: References | HostError | None = None

    def add(self, features: LayerFeatures) -> None:
        """Take in one layer; again does nothing."""
        if features.layer not in self.layers:
            needless = {name: None for letter, name in FEATURES.items() if (features.layer, letter) not in self.needed}
            self.layers[features.layer] = replace(features, stream=None, queries=None, by_channel=None, **needless)

    def result(self) -> References:
        """What `references` says of these layers, computed once. Raises HostError as it does."""
        if self.answer is None:
            try:
                self.answer = references(list(self.layers.values()), self.direction)
            except HostError as error:
                self.answer = error
        if isinstance(self.answer, HostError):
            raise self.answer
        return self.answer


def references(layers: Sequence[LayerFeatures], direction: Direction | None = None, class_token: bool = True) -> References:
    """The references of a batch from the features of all layers.

    Features that `wanted` does not name may be missing.

    class_token=False leaves the class token's attention out. Raises HostError if the features
    needed are not there.
    """
    by_number = {layer.layer: layer for layer in layers}
    features, pair = wanted(len(layers), direction)
    grids = {f: grid for f in features if f[0] in by_number and (grid := grid_of(by_number[f[0]], f[1])) is not None}
    grid = Counter(grids.values()).most_common(1)[0][0] if grids else None
    usable = [f for f in features if f in grids and grids[f] == grid]
    if not usable or (direction is not None and len(usable) < len(features)):
        missing = ", ".join(f"{kind}{layer}" for layer, kind in features if (layer, kind) not in usable)
        raise HostError(
            f"Found no places, or nothing at all, of the features {missing}. Expected them on one grid of patches. "
            "A foreground map needs layers whose keys or outputs lie on one; calibrate to let others be found."
        )
    values = [by_number[layer].feature(kind) for layer, kind in usable]
    rows = tuple(unit_rows(x) for x in values)
    fixed = None if direction is None else standardised(direction.along(rows))
    attention = attention_of([by_number[n] for n in pair if n in by_number], grid) if class_token else None
    keys = [x for f, x in zip(usable, values, strict=True) if f[1] == "k"] or values
    border = standardised(sum(standardised(border_distance(x, grid)) for x in keys))
    return References(grid, fixed, attention, border, rows)


def wanted(layers: int, direction: Direction | None = None) -> tuple[tuple[Feature, ...], tuple[int, ...]]:
    """The features and the layers of class attention that a map needs.

    layers: how many the model has.
    """
    if direction is not None:
        return direction.features, direction.attention
    middle = [(n + 0.5) / layers for n in range(layers)]
    features = []
    for kind, (low, high) in USUAL.items():
        inside = [n for n in range(layers) if low < middle[n] < high]
        nearest = min(range(layers), key=lambda n: abs(middle[n] - (low + high) / 2))
        features += [(n, kind) for n in inside or [nearest]]
    pair = sorted({max(round(share * layers), 1) - 1 for share in PAIR})
    return tuple(sorted(features)), tuple(pair)


def attention_of(layers: Sequence[LayerFeatures], grid: tuple[int, int]) -> Tensor | None:
    """a (B, P): the mean log attention of the class token over layers, standardised.

    None where none has a class token.
    """
    maps = [
        resampled(log_attention(layer.attention), layer.grid, grid)
        for layer in layers
        if layer.has_class and layer.attention is not None and layer.grid is not None
    ]
    return standardised(sum(maps)) if maps else None


def grid_of(layer: LayerFeatures, kind: str) -> tuple[int, int] | None:
    """The grid of a feature; None where the layer lacks the feature or its places."""
    return None if layer.feature(kind) is None else layer.grid if kind == "k" else layer.token_grid


def foreground_of(references: References) -> Foreground:
    """The foreground maps that follow from the references of a batch.

    Nothing else of the model is needed.
    """
    parts = {"direction": references.fixed, "class attention": references.attention}
    parts = {name: x for name, x in parts.items() if x is not None}
    rule = " and ".join(parts)
    if references.fixed is None:
        parts = parts or {"border distance of keys": references.border}
        rule = f"{next(iter(parts))}, {WITHOUT_DIRECTION}"
    maps = blurred(gram_filter(references.rows, sum(parts.values())), references.grid)
    return Foreground(maps.unflatten(1, references.grid), rule)
