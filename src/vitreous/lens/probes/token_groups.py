"""Which patches share a token, and which have none, where tokens were merged or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitreous.layers.stream import Assignment
from vitreous.lens.coordinates.layout import Layout
from vitreous.lens.probe import Observer, Probe
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates


class GroupsObserver(Observer):
    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        layout = where.layout
        if not where.merged or layout is None or layout.grid is None or layout.windows > 1 or layout.keys_per_place > 1:
            return
        tokens = token_of_places(where.assignment, layout, self.batch.count)
        self.readout.others[f"tokens/{where.layer}"] = tokens.to(torch.int32)


@dataclass(frozen=True, kw_only=True)
class TokenGroups(Probe):
    """The token of each patch in an attention behind a reduction, -1 where it was dropped.

    Of soft assignments the token to which a patch gives most. `Reading.tokens` has them.
    """

    order: ClassVar[int] = 140
    observer: ClassVar[type[Observer]] = GroupsObserver


def token_of_places(assignment: Assignment | None, layout: Layout, count: int) -> Tensor:
    """(count, *grid) int64: the number of the token that stands for each place, -1 for none.

    assignment: of original tokens; None: those of the layout were chosen for each image.
    """
    cells = layout.cells[:count, 0] if layout.images else layout.cells  # (images or 1, N)
    cells = cells.expand(count, -1)
    if assignment is None:
        index = torch.arange(cells.shape[1]).expand(count, -1)
    elif assignment.weights is None:
        index = assignment.index[:count].cpu()
    else:
        weights = assignment.weights[:count].cpu()
        index = weights.argmax(1).masked_fill(weights.sum(1) == 0, -1)
    tokens = torch.full((count, 1 + layout.grid[0] * layout.grid[1]), -1)
    return tokens.scatter(1, cells.cpu() + 1, index[:, : cells.shape[1]])[:, 1:].unflatten(1, layout.grid)
