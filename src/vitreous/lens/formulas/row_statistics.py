"""Sums over the rows of an attention map, block by block.

`RowStatistics` of one map, `RowChange` between two.

`RowBlock` is some rows of one map, with what several sums share, so that each is computed once per
block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vitreous.lens.formulas import indicators
from vitreous.lens.tap.attention_call import Buffers

Points = tuple[Tensor, Tensor]  # (y, x) of queries (B or 1, W, N, 2) and of keys (B or 1, W, M, 2); NaN for none


class Distances:
    """Distances between tokens, in buffers.

    The latest ones are kept, since the layers of a model mostly share them.
    """

    def __init__(self):
        self._buffers = Buffers()
        self._points: Points | None = None
        self._factors: tuple[Tensor, Tensor] | None = None

    def between(self, queries: Tensor, keys: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which queries have a place, (..., n) bool, and factors (..., n, 3, M) to sum keys with.

        The three factors are 1, distance, its square.

        queries (..., n, 2), keys (..., M, 2): (y, x), NaN for none; keys without a place are summed
        with 0.
        """
        same = self._points is not None and all(map(same_points, self._points, (queries, keys)))
        if not same or self._factors[0].device != device:
            self._points = queries, keys
            seen, there = (points.isfinite().all(dim=-1).to(device) for points in (queries, keys))
            queries, keys = (points.nan_to_num().to(device, torch.float32) for points in (queries, keys))
            shape = (*queries.shape[:-1], 3, keys.shape[-2])
            factors, x = self._buffers.take(0, shape, device), self._buffers.take(1, (*shape[:-2], shape[-1]), device)
            one, distance, square = factors.unbind(-2)
            torch.sub(queries[..., 0, None], keys[..., None, :, 0], out=square).square_()
            torch.sub(queries[..., 1, None], keys[..., None, :, 1], out=x).square_()
            one.copy_(there[..., None, :])
            torch.sqrt(square.add_(x).mul_(one), out=distance)
            self._factors = seen, factors
        return self._factors


@dataclass
class RowBlock:
    """The query rows `rows` of one attention's map, valid during the callback that gets it.

    maps: (B, W, H, n, M), float32, of the images that are measured; noisy: of their noisy copies,
    or None. effective: the weights that multiplied V, where the model changes them behind the
    softmax. Where tokens were merged or dropped before, maps are those between the original tokens:
    see `TokenCoordinates.map_rows`. stochastic: rows are distributions. points: where the tokens of
    the whole map are; None: unknown. buffers, distances: shared by all blocks.
    """

    rows: slice
    maps: Tensor
    noisy: Tensor | None
    effective: bool
    stochastic: bool
    points: Points | None
    buffers: Buffers
    distances: Distances

    @property
    def scratch(self) -> Tensor:
        """A buffer as large as `maps`; what it holds is lost when anyone else takes it."""
        return self.buffers.take(0, self.maps.shape, self.maps.device)

    @cached_property
    def squares(self) -> Tensor:
        """(B, W, H, n): the sum of squares of each row."""
        return torch.linalg.vector_norm(self.maps, dim=-1).square_()


class Sums:
    """Named float64 sums over blocks."""

    def __init__(self):
        self.values: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self.values[name] = self.values[name] + value if name in self.values else value

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


class RowStatistics:
    """Entropy, effective tokens, selectivity, distances and redundancy of one map.

    The map A is (B, W, H, N, M); its blocks are added. Means are over rows i, those that are masked
    out altogether left out:

        attention_entropy    - sum_j A_ij log A_ij, in nats, 0 to log M; 0 log 0 = 0
        effective_tokens     1 / sum_j A_ij^2, 1 to M
        selectivity          1 - sum_j A_ij^2 / (1 + eps), the Gini-Simpson index: **high is
                             diffuse**, low is selective, the reverse of what the name suggests; the
                             paper's form takes all heads of a batch in one
        mean_distance        sum_j A_ij d_ij / sum_j A_ij, in pixels. Sums run over keys with a
                             place, so weight on a class token neither shortens nor lengthens a
                             head's reach; rows without a place, or with all weight on keys without
                             one, are left out. Source: Dosovitskiy et al. 2021, arXiv 2010.11929;
                             what becomes of the class token is our choice
        attention_width      sqrt(mean square distance / 2), root taken last: s for a head with
                             weights exp(-d^2 / (2 s^2)), whose distance is s sqrt(pi / 2)
        head_redundancy      from the inner products of the heads' maps: `indicators`
    """

    def __init__(self):
        self.sums = Sums()
        self.stochastic = self.located = False

    def add(self, block: RowBlock) -> None:
        """Take in some rows."""
        maps, squares = block.maps, block.squares
        self.stochastic, self.located = block.stochastic, block.points is not None
        rows_of = {"squares": squares}
        flat = maps.flatten(0, 1).flatten(2)  # (B W, H, n M)
        self.sums.add("gram", (flat @ flat.mT).unflatten(0, maps.shape[:2]).sum(dim=1))
        if self.stochastic:
            live = squares > 0  # not masked out
            rows_of |= {"live": live.float(), "tokens": torch.where(live, squares.reciprocal(), 0.0)}
            scratch = block.scratch
            torch.clamp_min(maps, torch.finfo(maps.dtype).tiny, out=scratch)  # 0 log 0 = 0
            rows_of["entropy"] = scratch.log_().mul_(maps).sum(dim=-1).neg_()
            if self.located:
                self._add_distances(block)
        sums = torch.stack([*rows_of.values()]).sum(dim=(2, 4), dtype=torch.float64)  # over windows and rows
        for name, value in zip(rows_of, sums, strict=True):
            self.sums.add(name, value)

    def values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Measures {name: value}, per image and head (B, H), and of all heads together (B, 1)."""
        s = self.sums
        heads, together = {"head_redundancy": indicators.head_redundancy(s["gram"])}, {}
        if self.stochastic:
            heads["attention_entropy"] = s["entropy"] / s["live"]
            heads["effective_tokens"] = s["tokens"] / s["live"]
            heads["selectivity"] = 1 - s["squares"] / s["live"] / (1 + indicators.PAPER_EPS)
            together["selectivity_paper"] = heads["selectivity"].mean(dim=1, keepdim=True)
            if self.located:
                heads["mean_distance"] = s["distance"] / s["placed"]
                heads["attention_width"] = (s["square_distance"] / s["placed"] / 2).sqrt()
        return heads, together

    def _add_distances(self, block: RowBlock) -> None:
        """Mean distance and square distance under each row's weights on keys with a place."""
        maps, (queries, keys) = block.maps, block.points
        seen, factors = block.distances.between(queries[..., block.rows, :], keys, maps.device)
        shared = len(factors) == 1  # images share the places, unless the model chose tokens
        turned = maps.permute(1, 3, 0, 2, 4) if shared else maps.permute(0, 1, 3, 2, 4)  # (W, n, B, H, M), (B, W, n, H, M)
        lead = factors.shape[:-2].numel()  # rows that differ in places
        if maps.shape[1] > 1 or not shared:  # else a view will do
            turned = block.scratch.view(turned.shape).copy_(turned)
        sums = torch.bmm(factors.flatten(0, -3), turned.reshape(lead, -1, maps.shape[-1]).mT)  # (rows, 3, images and heads)
        mass, far, farther = sums.unbind(1)
        valid = (mass > 0) & seen.reshape(lead, 1)
        each = torch.where(valid, torch.stack([valid.float(), far / mass, farther / mass]), 0)
        each = each.view(3, len(factors), -1, sums.shape[-1]).sum(dim=2, dtype=torch.float64)
        for name, value in zip(("placed", "distance", "square_distance"), each, strict=True):
            self.sums.add(name, value.view(maps.shape[0], maps.shape[2]))


class RowChange:
    """How far a map A moves to A' when its image is made noisy, from blocks that hold both.

    perturbation_robustness: |A' - A|_F / |A|_F per head, 0 is untouched; comparable across token
    counts. Paper's form: |A' - A|_F / (H N^2), all heads of a layer together; at the same relative
    change it shrinks with the number of tokens and of heads. **Low is robust.**
    """

    def __init__(self):
        self.sums = Sums()
        self.entries = 0  # of one image's maps: H W N M

    def add(self, block: RowBlock) -> None:
        """Take in some rows."""
        scratch = block.scratch
        self.entries += block.maps[0].numel()
        torch.sub(block.noisy, block.maps, out=scratch)
        self.sums.add("change", torch.linalg.vector_norm(scratch, dim=(-2, -1)).square_().sum(dim=1))
        self.sums.add("squares", block.squares.sum(dim=(1, 3), dtype=torch.float64))

    def values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """|A' - A| / |A| per image and head (B, H), and the paper's form for all heads (B, 1)."""
        change, squares = self.sums["change"], self.sums["squares"]
        together = change.sum(dim=1, keepdim=True).sqrt() / self.entries
        return {"perturbation_robustness": (change / squares).sqrt()}, {"perturbation_robustness_paper": together}


def same_points(a: Tensor, b: Tensor) -> bool:
    """Whether places are the same ones, NaN in the same rows."""
    if a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride():  # one tensor, as layers share them
        return True
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
