"""`Layout`: where the queries and keys of an attention are, snapped to a grid.

`layout` makes one of raw coordinates, and tells windows from heads; `snap` finds the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

CLOSE = 1e-2  # pixels: places that differ by less are one
Factors = tuple[tuple[tuple[int, str], ...], ...]


@dataclass(frozen=True)
class Layout:
    """Places of one attention call in the image: W windows, N queries, M keys.

    size: (height, width) of the image in pixels.
    queries, keys: (W, N, 2), (W, M, 2) float64, centres (y, x) in pixels; NaN: no place (prefix,
        inserted, padding).
    grid, key_grid: (rows, cols) of all query (key) places over all windows; None: they are on no
        grid.
    prefix: how many leading queries have no place in any window (class token, registers).
    images: how many images have places of their own, in the order of the batch: queries, keys,
        cells and key_cells then have a first axis of so many; 0: all images have these places.
    windows, heads: into how many of each the leading axes divide.
    factors: (size, "W" | "H") of each leading axis, outermost first, for one image.
    note: why something is unknown, or "".
    """

    size: tuple[int, int]
    queries: Tensor = field(repr=False)
    keys: Tensor = field(repr=False)
    grid: tuple[int, int] | None
    key_grid: tuple[int, int] | None
    prefix: int
    windows: int
    heads: int
    factors: Factors = ()
    note: str = ""
    cells: Tensor | None = field(default=None, repr=False)  # (W, N) index into the grid, -1: none
    key_cells: Tensor | None = field(default=None, repr=False)
    images: int = 0

    def picture(self, values: Tensor) -> Tensor:
        """One value per query (..., W, N) -> (..., rows, cols) on `grid`; NaN where no query is.

        Where several queries are at one place (overlapping windows) their mean is taken.
        """
        return _picture(values, self.cells, self.grid, "queries")

    def key_picture(self, values: Tensor) -> Tensor:
        """One value per key (..., W, M) -> (..., rows, cols) of `key_grid`, like `picture`."""
        return _picture(values, self.key_cells, self.key_grid, "keys")

    @property
    def keys_per_place(self) -> int:
        """How many keys stand at every place, as tokens of channels do; 1 where it varies."""
        if self.key_cells is None or self.images or self.windows > 1:
            return 1
        counts = torch.bincount(self.key_cells[self.key_cells >= 0])
        return int(counts[0]) if len(counts) == math.prod(self.key_grid) and bool((counts == counts[0]).all()) else 1

    def key_pictures(self, values: Tensor) -> Tensor:
        """One value per key (..., 1, M) -> (..., G, rows, cols).

        G = `keys_per_place`: a picture of the first key at each place, one of the second, ...
        """
        cells = self.key_cells[0]
        order = cells.argsort(stable=True)[(cells < 0).sum() :]  # cell by cell, those of one in their order
        stacked = values[..., 0, order.to(values.device)].unflatten(-1, (math.prod(self.key_grid), self.keys_per_place))
        return stacked.mT.unflatten(-1, self.key_grid)


def _picture(values: Tensor, cells: Tensor | None, grid: tuple[int, int] | None, side: str) -> Tensor:
    """Values (..., W, N) averaged into the cells of a grid; side: for the message."""
    if cells is None or grid is None:
        raise ValueError(f"The {side} of this attention are on no grid. Expected a layout with one. Draw them as rows.")
    if cells.ndim > 2:  # of each image
        images = zip(values, cells, strict=False)
        return torch.stack([_picture(own, own_cells, grid, side) for own, own_cells in images])
    if tuple(values.shape[-2:]) != tuple(cells.shape):
        raise ValueError(
            f"Values of shape {tuple(values.shape)} do not fit {cells.shape[0]} windows of {cells.shape[1]} {side}. "
            f"Expected (..., {cells.shape[0]}, {cells.shape[1]}). Take them from the call that this layout belongs to."
        )
    flat, index = values.flatten(-2), cells.flatten().to(values.device)
    has_cell = index >= 0
    flat, index = flat[..., has_cell], index[has_cell]
    flat = flat if flat.is_floating_point() else flat.double()
    # a mean of what falls into each cell
    total = flat.new_zeros(*values.shape[:-2], grid[0] * grid[1]).index_add(-1, index, flat)
    count = torch.bincount(index, minlength=grid[0] * grid[1])
    return (total / count).unflatten(-1, grid)  # 0 / 0 = NaN where no token is


def layout(query: Tensor | None, key: Tensor | None, size: tuple[int, int], note: str = "") -> Layout | None:
    """Layout of an attention from raw coordinates, or None if neither side has any.

    query: (*leading, N, K, 2 or 4), key: (*leading, M, K, 2 or 4), as of `CoordinateTracer.of`: (y,
    x), and with 4 the variance and the mass too; None for a tensor without coordinates. Leading
    axes (those of one image) broadcast; K is the axis that the product sums. size: (height, width)
    of the image.
    """
    query, key = (None if places is None else _tokens(places) for places in (query, key))
    if query is None and key is None:
        return None
    query, key = _alike(query, key)
    factors, window_starts = _divide(query, key)
    query, key = _one_per_window(query, window_starts), _one_per_window(key, window_starts)  # (W, N, 4), (W, M, 4)
    # over all windows together, where a median token is more typical than within one
    query, key = _without_pooled(query, key)
    if not bool(query[..., 0].isfinite().any() or key[..., 0].isfinite().any()):
        return None
    grids = [snap(places, size) for places in (query, key)]
    absent = query[..., 0].isnan().all(0)
    prefix = int(absent.long().cumprod(0).sum())
    sizes = {kind: math.prod(n for axis in factors for n, k in axis if k == kind) for kind in "WH"}
    return Layout(
        size, query[..., :2].clone(), key[..., :2].clone(), grids[0][0], grids[1][0], prefix, sizes["W"], sizes["H"], factors,
        note, grids[0][1], grids[1][1],
    )  # fmt: skip


def image_layout(
    query: Tensor, key: Tensor, bring: Callable[[Tensor], Tensor], lead: Sequence[int], traced: Layout, full: Sequence[Layout]
) -> Layout:
    """The layout of a call in which each image of a batch has places of its own, or `traced`.

    query, key: as `layout` takes them, of a pass of the whole batch. bring: takes a tensor with the
    leading axes `lead` and two more to (B, W, H, ...). traced: of one image; it holds if all images
    have its places. full: layouts with every patch, one of which the tokens are looked up in;
    without it there is no grid.
    """
    query, key = _alike(_tokens(query), _tokens(key))
    sides = []
    for places in (query, key):
        if any(n not in (1, m) for n, m in zip(reversed(places.shape[:-2]), reversed(lead), strict=False)):
            return without_places(traced)
        sides.append(bring(places.expand(*lead, *places.shape[-2:]))[:, :, 0])  # (B, W, N, 4)
    query, key = (places[..., :2].contiguous() for places in _without_pooled(*sides))
    if all(
        places.shape[1:] == own.shape and _equal(places, own)
        for places, own in zip((query, key), (traced.queries, traced.keys), strict=True)
    ):
        return traced
    tables = [(*table, grid) for grid, *table in (_lookup(query, key, other) for other in full) if table]
    absent = query[..., 0].isnan().flatten(0, 1).all(0)
    cells, key_cells, grid = min(tables, key=lambda table: math.prod(table[2]), default=(None, None, None))
    return replace(
        traced, queries=query, keys=key, grid=grid, key_grid=grid, cells=cells, key_cells=key_cells, images=len(query),
        prefix=int(absent.long().cumprod(0).sum()), windows=query.shape[1],
    )  # fmt: skip


def without_places(traced: Layout) -> Layout:
    """The layout without places, where they are not the same in every image."""
    nowhere = (torch.full_like(places, torch.nan) for places in (traced.queries, traced.keys))
    queries, keys = nowhere
    return replace(traced, queries=queries, keys=keys, grid=None, key_grid=None, cells=None, key_cells=None)


def _equal(places: Tensor, one: Tensor) -> bool:
    """True if the places of all images (B, W, N, 2) are those of one (W, N, 2)."""
    difference = (places - one).nan_to_num(nan=0.0).abs()
    return bool((places.isnan() == one.isnan()).all()) and bool((difference <= CLOSE).all())


def _lookup(query: Tensor, key: Tensor, full: Layout) -> tuple[Any, ...]:
    """(grid, cells of queries, cells of keys) in a full layout; (grid,) if some are not in it."""
    centres = full.queries.flatten(0, 1).new_full((math.prod(full.grid), 2), torch.nan)
    index = full.cells.flatten()
    centres[index[index >= 0]] = full.queries.flatten(0, 1)[index >= 0]
    levels = [centres[:, axis].unflatten(0, full.grid).mean(1 - axis) for axis in range(2)]
    tables = []
    for places in (query, key):
        has_place = places[..., 0].isfinite()
        points = places[has_place]
        # the nearest row and column, and then whether the point is there
        row, column = ((points[:, axis, None] - levels[axis]).abs().argmin(1) for axis in range(2))
        cell = row * full.grid[1] + column
        if not bool(((centres[cell] - points).abs() <= CLOSE).all()):
            return (full.grid,)
        table = torch.full(has_place.shape, -1, dtype=torch.long)
        table[has_place] = cell
        tables.append(table)
    return full.grid, *tables


def is_full(traced: Layout) -> bool:
    """True if every cell of the layout's grid has a query."""
    return traced.grid is not None and len(traced.cells[traced.cells >= 0].unique()) == math.prod(traced.grid)


def channel(query: Tensor | None, key: Tensor | None) -> bool:
    """True if channels attend to channels.

    Places (*leading, N, K, 2 or 4) then differ along K, which is summed, and not along N.
    """
    present = [places for places in (query, key) if places is not None]
    return bool(present) and all(_differs(places, -2) and not _differs(places, -3) for places in present)


def _differs(places: Tensor, axis: int) -> bool:
    """True if places differ along an axis by more than CLOSE."""
    if places.shape[axis] == 1 or places.stride(axis) == 0:
        return False
    points = places[..., :2]
    low, high = points.nan_to_num(nan=torch.inf).amin(axis), points.nan_to_num(nan=-torch.inf).amax(axis)
    return bool((high - low > CLOSE).any())


def _tokens(places: Tensor) -> Tensor:
    """(*leading, N, K, 2 or 4) -> (*leading, N, 4): the mean over the summed axis."""
    places = places.double()
    if places.shape[-1] == 2:
        # without variance and mass: single pixels, one token each
        rest = torch.tensor([0.0, 1.0], dtype=torch.float64, device=places.device).expand(places.shape)
        places = torch.cat([places, rest], dim=-1)
    if places.stride(-2) == 0:
        return places[..., 0, :]
    return places.nanmean(-2)


def _alike(query: Tensor | None, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sides with the same leading axes; an absent side is NaN.

    Fewer key heads than query heads are repeated (grouped-query attention).
    """
    if query is None or key is None:
        side = query if key is None else key
        none = side[..., :1, :].mul(torch.nan)
        return (none, side) if query is None else (side, none)
    while query.ndim < key.ndim:
        query = query[None]
    while key.ndim < query.ndim:
        key = key[None]
    for axis in range(query.ndim - 2):
        a, b = query.shape[axis], key.shape[axis]
        if a != b and a % b == 0:
            key = key.repeat_interleave(a // b, axis)
        elif a != b and b % a == 0:
            query = query.repeat_interleave(b // a, axis)
    return query, key


def _divide(query: Tensor, key: Tensor) -> tuple[Factors, list[Tensor]]:
    """Factors of each leading axis, and the indices at which its windows start."""
    factors, window_starts = [], []
    for axis in range(query.ndim - 2):
        count = query.shape[axis]
        # heads share their places, windows do not: equal patterns are heads
        ids = _patterns(query, key, axis)
        distinct = int(ids.max()) + 1
        first = torch.tensor([int((ids == i).nonzero()[0]) for i in range(distinct)])
        if count == 1:
            factors.append(())
        elif distinct == 1:
            factors.append(((count, "H"),))
        # patterns repeat in turn: heads outside, windows inside
        elif count % distinct == 0 and torch.equal(ids, torch.arange(distinct).repeat(count // distinct)):
            factors.append(tuple(pair for pair in ((count // distinct, "H"), (distinct, "W")) if pair[0] > 1))
        # each pattern several times in a row: windows outside, heads inside
        elif count % distinct == 0 and torch.equal(ids, torch.arange(distinct).repeat_interleave(count // distinct)):
            factors.append(((distinct, "W"), (count // distinct, "H")))
        else:  # windows that look alike, such as those of padding only
            factors.append(((count, "W"),))
            first = torch.arange(count)
        window_starts.append(first)
    return tuple(factors), window_starts


def _patterns(query: Tensor, key: Tensor, axis: int) -> Tensor:
    """For each index along a leading axis the number of its pattern of places.

    Counted in order of appearance: indices with equal places have equal numbers.
    """
    count = query.shape[axis]
    rows = []
    for places in (query, key):
        # a side with stride 0 is the same for all and tells nothing
        if places.stride(axis) != 0:
            points = places.movedim(axis, 0)[..., :2].reshape(count, -1)
            rows.append((points / CLOSE).round().nan_to_num(nan=-1e9))
    if not rows:
        return torch.zeros(count, dtype=torch.long)
    _, ids = torch.cat(rows, dim=1).unique(dim=0, return_inverse=True)
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(i, len(numbers)) for i in ids.tolist()])


def _one_per_window(places: Tensor, window_starts: Sequence[Tensor]) -> Tensor:
    """(*leading, N, 4) -> (W, N, 4): one head of each window."""
    for axis, index in enumerate(window_starts):
        places = places.index_select(axis, index)
    return places.reshape(-1, *places.shape[-2:])


def _without_pooled(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Remove the places of tokens that stand for much of the image.

    A pooled mean is not the patch in the middle. The variance of the pixels that a token stands for
    is compared with that of the median token beside it: the mean of all tokens exceeds it by the
    variance of their places. Tokens that are all at one place are compared with those of the other
    side; if all tokens of both sides are at one place, as those that were pooled before, none has
    a place.
    """
    points = [places.flatten(0, -2)[places[..., 0].flatten().isfinite()] for places in (query, key)]
    spreads = [(float(p[:, 2].median()), float(p[:, :2].var(0, correction=0).sum())) for p in points if len(p)]
    if max(map(len, points)) > 1 and all(width <= CLOSE for _, width in spreads):
        return torch.full_like(query, torch.nan), torch.full_like(key, torch.nan)
    sides = []
    for places, own in zip((query, key), points, strict=True):
        if len(own):
            middle, width = float(own[:, 2].median()), float(own[:, :2].var(0, correction=0).sum())
            if width <= CLOSE:
                middle, width = max(spreads, key=lambda pair: pair[1])
            places = torch.where(places[..., 2:3] > middle + max(0.75 * width, CLOSE), torch.nan, places)
        sides.append(places)
    return sides[0], sides[1]


# --- grids ----------------------------------------------------------------------------------------


def snap(places: Tensor, size: tuple[int, int]) -> tuple[tuple[int, int] | None, Tensor | None]:
    """(rows, cols) and the cell of each of (W, N, 4) places, or (None, None) without a grid.

    By rank, not by distance: convolutions with padding pull places at the border inward. Where
    places are missing (dropped tokens) the pitch of the others gives the grid; merged tokens make
    no such grid.
    """
    flat = places.reshape(-1, 4)
    has_place = flat[:, 0].isfinite()
    points = flat[has_place]
    if not len(points):
        return None, None
    extent = [float(points[:, i].max() - points[:, i].min()) for i in range(2)]
    # if n places filled the extent evenly, each would have a square of this side
    pitch = ((extent[0] + 1) * (extent[1] + 1) / len(points)) ** 0.5
    # strictly first; then within an eighth of the pitch, as padding shifts places at the border
    for close in (CLOSE, pitch / 8):
        ranks = [_ranks(points[:, i], close) for i in range(2)]
        grid = tuple(len(levels) for _, levels in ranks)
        index = ranks[0][0] * grid[1] + ranks[1][0]
        # a grid has each combination of a row and a column
        full = len(index.unique()) == grid[0] * grid[1]
        if full and all(_covers(levels, length) for (_, levels), length in zip(ranks, size, strict=True)):
            return grid, _cells(index, has_place, places)
    lattice = _lattice(points, size)
    return (None, None) if lattice is None else (lattice[0], _cells(lattice[1], has_place, places))


def _cells(index: Tensor, has_place: Tensor, places: Tensor) -> Tensor:
    """(W, N) index into the grid, -1 where there is no place."""
    cells = torch.full(has_place.shape, -1, dtype=torch.long)
    cells[has_place] = index
    return cells.reshape(places.shape[:-1])


def _ranks(values: Tensor, close: float) -> tuple[Tensor, Tensor]:
    """Rank of each value among the levels, and the levels.

    Levels are the sorted values, merged where neighbours are close.
    """
    order = values.argsort(stable=True)
    steps = torch.cat([torch.zeros(1, dtype=torch.long), (values[order].diff() > close).long()]).cumsum(0)
    ranks = torch.empty_like(steps)
    ranks[order] = steps
    count = torch.zeros(int(steps[-1]) + 1, dtype=torch.float64).index_add(0, ranks, torch.ones_like(values))
    return ranks, torch.zeros_like(count).index_add(0, ranks, values) / count


def _covers(levels: Tensor, length: int) -> bool:
    """True if levels go from border to border without a gap.

    The margins of both sides together are one step, or nearly two where a filter laid its outputs
    twice as dense.
    """
    if len(levels) < 2:
        return True
    gaps = levels.diff()
    margins = length - float(levels[-1] - levels[0])
    return bool(gaps.max() < 1.75 * gaps.median()) and margins < 2.25 * float(gaps.max())


def _lattice(points: Tensor, size: tuple[int, int]) -> tuple[tuple[int, int], Tensor] | None:
    """Grid and cells of places some of which are missing, or None.

    All must lie on multiples of one pitch, the same for both axes.
    """
    ranks = [_ranks(points[:, i], CLOSE) for i in range(2)]
    pitches = [float(levels.diff().min()) if len(levels) > 1 else None for _, levels in ranks]
    pitch = min((pitch for pitch in pitches if pitch), default=0.0)
    # merged tokens differ in variance or mass; their means lie between the places of a grid
    merged = (points[:, 2].max() - points[:, 2].min() > pitch**2 / 2) | (points[:, 3].max() - points[:, 3].min() > CLOSE)
    if merged or pitches == [None, None] or (None not in pitches and abs(pitches[0] - pitches[1]) > 0.05 * pitches[0]):
        return None
    grid, index = [], torch.zeros(len(points), dtype=torch.long)
    for (rank, levels), pitch, other, length in zip(ranks, pitches, pitches[::-1], size, strict=True):
        pitch = pitch or other
        steps = (levels - levels[0]) / pitch
        # 5 % of the pitch: beyond, places are on no lattice
        if float((steps - steps.round()).abs().max()) > 0.05:
            return None
        steps = steps.round().long() + int(float(levels[0]) / pitch)
        count = max(int(steps[-1]) + 1, int(length // pitch))
        index = index * count + steps[rank]
        grid.append(count)
    return (tuple(grid), index) if len(index.unique()) * 20 >= grid[0] * grid[1] else None
