"""Where the tokens of each attention are on the image.

Also where grafts of ours merged, dropped or inserted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from vitreous.layers.stream import Assignment
from vitreous.lens.coordinates.layout import Layout
from vitreous.lens.formulas.row_statistics import Points, same_points
from vitreous.lens.tap.attention_call import POOLED, AttentionCall


@dataclass(frozen=True)
class TokenCoordinates:
    """Where the tokens of one attention are.

    layer: its number among the attentions of the pass. points: (y, x) in pixels of queries and
    keys, NaN for tokens without a place; None: unknown, or not of tokens; where tokens were merged,
    those of the original ones, as in `map_rows`. layout: of the original tokens; None: unknown.
    assignment, inserted: as in `TokenState`, for a call of our own token grafts. images: how many
    of the batch count, from the first on. has_class: whether a class token attends to all others.
    """

    layer: int
    points: Points | None = None
    layout: Layout | None = None
    assignment: Assignment | None = None
    inserted: int = 0
    images: int = 0
    has_class: bool = False

    @property
    def merged(self) -> bool:
        """Whether tokens were merged, dropped or chosen before this attention."""
        return self.assignment is not None or self.chosen

    @property
    def chosen(self) -> bool:
        """Whether the model chose tokens, so that each image has places of its own."""
        return self.layout is not None and self.layout.images > 0

    @property
    def recorded(self) -> bool:
        """Whether tokens were merged, dropped or inserted."""
        return self.merged or self.inserted > 0

    @property
    def prefix(self) -> int:
        """How many tokens without a place come first."""
        return 0 if self.layout is None else self.layout.prefix

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Of the keys; None where it is not known."""
        return None if self.layout is None else self.layout.key_grid

    def steady(self, layout: Layout) -> bool:
        """Whether as many copies of the images behind them have the same tokens chosen."""
        return all(same_points(x[: self.images], x[self.images :]) for x in (layout.queries, layout.keys))

    @property
    def loose_queries(self) -> int:
        """How many queries attend to a grid, if none of several has a place in the image."""
        count = 0 if self.layout is None or self.grid is None else self.layout.queries.shape[-2]
        return count if count > 1 and self.layout.windows == 1 and self.prefix == count else 0

    @cached_property
    def same(self) -> bool:
        """Whether queries and keys are the same tokens, as far as their places tell."""
        return self.points is None or same_points(*self.points)

    def picture(self, values: Tensor, *, shared: bool = False) -> Tensor:
        """One value per key (B, ..., W, M) -> (B, ..., *grid); 0 where a token was dropped.

        Each place has the value of its token; shared: its share of it, for attention, of which a
        token that stands for many places gets as much as they together.
        """
        return self.layout.key_picture(self.per_place(values, shared))

    def per_place(self, values: Tensor, shared: bool) -> Tensor:
        """Values of present keys (B, ..., W, M) as those of the original ones: see `picture`."""
        if self.inserted:
            values = values[..., : values.shape[-1] - self.inserted]
        if self.assignment is not None:
            flat, assignment = values.flatten(1, -2).mT, first(self.assignment, self.images)  # (B, M, ...)
            flat = assignment.share(flat) if shared else assignment.restore(flat)
            values = flat.mT.unflatten(1, values.shape[1:-1])
        return values

    def counts(self, call: AttentionCall) -> Tensor:
        """(B or 1, N): how many places each query stands for; 1 for those without one."""
        if self.assignment is None or not one_sequence(call):
            return call.output.new_ones(1, call.output.shape[3], dtype=torch.float32)
        tokens = call.output.shape[3] - self.inserted
        return self.assignment.extended(tokens, self.inserted).counts(tokens + self.inserted).float()

    def map_rows(self, call: AttentionCall, size: int, effective: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of at most `size` rows of the map, as `AttentionCall.rows`, (B, W, H, n, M).

        Where tokens were merged or dropped: of the map between the original tokens, with the
        inserted ones behind. Each has the row of its token; the attention to a token is shared out
        among those that it stands for. Rows and columns of dropped ones are 0.
        """
        tokens = call.v.shape[3] - self.inserted
        if self.assignment is None or not one_sequence(call):
            yield from call.rows(size, effective)
            return
        assignment, maps = self.assignment.extended(tokens, self.inserted), call.map(effective)[:, 0]  # (B, H, n, n)
        queries = maps.transpose(1, 2).flatten(2)  # (B, n, H n)
        for start in range(0, assignment.places, size):
            rows = slice(start, min(start + size, assignment.places))
            part = assignment.at(rows).restore(queries).unflatten(2, maps.shape[1::2])  # (B, rows, H, n)
            shared = assignment.share(part.flatten(1, 2).mT).mT.unflatten(1, part.shape[1:3])  # (B, rows, H, N)
            yield rows, shared.transpose(1, 2)[:, None]


def one_sequence(call: AttentionCall) -> bool:
    """Whether queries and keys are one sequence of tokens, not in windows."""
    return call.output.shape[1] == 1 and call.output.shape[3] == call.v.shape[3]


class Locator:
    """Finds the coordinates of each attention of one pass, in the order of the calls.

    images: how many of the batch count. class_token: as of `has_class_token`.
    """

    def __init__(self, images: int, class_token: bool = True):
        self.images, self.class_token, self.count = images, class_token, 0
        self.layout: Layout | None = None  # of the original tokens, for calls of our own token grafts
        self.points: Tensor | None = None  # of the latest call whose tokens were not merged

    def locate(self, call: AttentionCall) -> TokenCoordinates:
        """Where the tokens of the next call are.

        Merged, dropped and inserted tokens go by what our grafts recorded.
        """
        layer, self.count = self.count, self.count + 1
        if self.layout is None and call.layout is not None and not call.layout.images:
            self.layout = without_last(call.layout, call.inserted)
        if call.kind == "channel":
            return TokenCoordinates(layer)
        layout = self.layout if call.assignment is not None or call.inserted > 0 else call.layout
        return TokenCoordinates(
            layer,
            self.points_of(call),
            layout,
            call.assignment,
            call.inserted,
            self.images,
            class_comes_first(call, layout, self.class_token),
        )

    def points_of(self, call: AttentionCall) -> Points | None:
        """(y, x) of queries and keys.

        Where tokens were merged or dropped: of the original ones, and of the inserted ones behind.
        """
        windows, n, m = *call.output.shape[1:4:2], call.v.shape[3]
        if call.assignment is not None:
            if self.points is None or len(self.points) != call.assignment.places or not one_sequence(call):
                return None
            points = torch.cat([self.points, self.points.new_full((call.inserted, 2), torch.nan)])[None, None]
            return points, points
        layout = call.layout
        if layout is not None and layout.images:
            return layout.queries[: self.images], layout.keys[: self.images]
        if layout is None or layout.queries.shape[:2] != (windows, n) or layout.keys.shape[:2] != (windows, m):
            return None
        if windows == 1 and not call.inserted:
            self.points = layout.queries[0]
        return layout.queries[None], layout.keys[None]


def first(assignment: Assignment, images: int) -> Assignment:
    """The assignment of the first images of a batch."""
    parts = {name: value[:images] for name in ("index", "weights") if (value := getattr(assignment, name)) is not None}
    return replace(assignment, **parts)


def has_class_token(model: nn.Module) -> bool:
    """True if a parameter of the model is named like a class token."""
    return any(is_class_name(name) for name, _ in model.named_parameters())


def is_class_name(name: str) -> bool:
    """True for the name of a class token, such as "cls_token" or "class_embedding"."""
    module, _, last = name.lower().rpartition(".")
    if last == "weight" and "emb" in (module := module.rpartition(".")[2]):  # of nn.Embedding
        last = module
    return "pos" not in last and ("cls" in last or "class" in last)


def class_comes_first(call: AttentionCall, layout: Layout | None, named: bool) -> bool:
    """Whether the first query of a call is a class token.

    It attends to itself and to a grid, beside queries on a grid or alone, and comes from a
    parameter of that name, or is pooled from all others; object queries, latents, prompts and
    registers are not. named: as of `has_class_token`, where the parameter is not known.
    """
    if layout is None or not layout.prefix or layout.windows > 1 or layout.key_grid is None:
        return False
    joined = layout.queries.shape[-2] == 1 or layout.grid is not None
    if not joined or bool(layout.keys[..., 0, 0].isfinite().any()):
        return False
    return call.first_token == POOLED or (is_class_name(call.first_token) if call.first_token else named)


def without_last(layout: Layout, count: int) -> Layout:
    """The layout without the last `count` tokens, those that a graft inserted."""
    if not count:
        return layout
    queries, keys = layout.queries.shape[1] - count, layout.keys.shape[1] - count
    return replace(
        layout,
        queries=layout.queries[:, :queries],
        keys=layout.keys[:, :keys],
        cells=None if layout.cells is None else layout.cells[:, :queries],
        key_cells=None if layout.key_cells is None else layout.key_cells[:, :keys],
    )
