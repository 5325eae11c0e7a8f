"""What each patch looks at: the rows of all queries of each map, of the first images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitreous.lens.probe import Observer, Probe, Readout
from vitreous.lens.stored_maps import packed_rows
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates

KEY = "queries"


class QueriesObserver(Observer):
    def initialise(self) -> None:
        self.bytes = 0  # of one image, of the layers so far
        self.limit = self.batch.choices.get(KEY)  # images of the look that have rows, once it is known

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        if self.count() < 1:
            return
        name, reason = f"{KEY}/{where.layer}", why_not(call, where)
        if reason:
            self.readout.details[name] = {"reason": reason}
            return
        queries, keys = math.prod(where.layout.grid), math.prod(where.grid)
        self.bytes += call.output.shape[2] * queries * (keys + 4)
        count = self.count()
        if count:
            rows = rows_on_grid(call, where, count).cpu().numpy()
            self.readout.others[name], self.readout.others[f"{name}/scale"] = map(torch.from_numpy, packed_rows(rows))
        for key, value in self.readout.others.items():
            self.readout.others[key] = value[:count]

    def count(self) -> int:
        """How many images of the batch fit into the budget, as far as the layers are known."""
        fitting = self.batch.query_budget * 1e6 // self.bytes if self.bytes else math.inf if self.batch.query_budget else 0
        return max(0, int(min(self.batch.count, (fitting if self.limit is None else int(self.limit)) - self.batch.first)))

    def finish(self) -> Readout:
        if self.limit is None and self.bytes:
            fitting = int(self.batch.query_budget * 1e6 // self.bytes)
            self.batch.choices[KEY] = str(fitting)
            self.readout.details[KEY] = {"bytes": str(self.bytes)}
        self.readout.others = {key: value for key, value in self.readout.others.items() if len(value)}
        return self.readout


@dataclass(frozen=True, kw_only=True)
class Queries(Probe):
    """Attention of every patch to every place, for as many images as the budget holds.

    Quantised; the budget is `query_budget` of `look`. Only of attention without windows, between
    tokens that are on grids of two dimensions. Where tokens were merged, each place has the row of
    its token, and its share of the attention to it.
    """

    order: ClassVar[int] = 130
    observer: ClassVar[type[Observer]] = QueriesObserver


def why_not(call: AttentionCall, where: TokenCoordinates) -> str:
    """Why a call has no row for each patch; "" if it has."""
    layout = where.layout
    if call.kind != "token":
        return f"its attention is of kind {call.kind}, not between patches"
    if layout is None or layout.grid is None or layout.key_grid is None:
        return (layout.note if layout is not None else "") or "where its queries or keys are in the image is not known"
    if call.output.shape[1] > 1:
        return "it attends in windows"
    if len(layout.grid) != 2 or len(layout.key_grid) != 2:
        return "its patches are on a grid of three dimensions"
    present = (call.output.shape[3], call.v.shape[3])
    original = tuple(x.shape[-2] + where.inserted for x in (layout.queries, layout.keys))
    if where.assignment is None and present != original:
        return "where its tokens are in the image is not known"
    return ""


def rows_on_grid(call: AttentionCall, where: TokenCoordinates, count: int) -> Tensor:
    """(count, H, *grid of queries, *grid of keys) float32 of the first images of a call.

    NaN where no query is; 0 where its token was dropped.
    """
    blocks = [block[:count, 0].clone() for _, block in where.map_rows(call, 256, call.stochastic)]
    rows = torch.cat(blocks, dim=2)  # (count, H, N, M)
    n, m = (size - where.inserted for size in rows.shape[2:])
    # where no key is, there is no attention; (count, H, N, *grid of keys)
    pictures = where.layout.key_picture(rows[:, :, :n, None, :m]).nan_to_num()
    return where.layout.picture(pictures.movedim(2, -1)[..., None, :]).movedim((-2, -1), (2, 3))
