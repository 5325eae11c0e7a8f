"""One sweep over the rows of an attention map, block by block, that adds up everything the measures need."""

from __future__ import annotations

import torch
from torch import Tensor

from vitreous.lens.formulas import indicators
from vitreous.lens.tap.attention_call import Buffers


class Distances:
    """Distances between places, in buffers; kept until others are asked for, since the layers of a model ask for the same."""

    def __init__(self):
        self._buffers = Buffers()
        self._places: tuple[Tensor, Tensor] | None = None
        self._found: tuple[Tensor, Tensor] | None = None

    def between(self, queries: Tensor, keys: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which queries have a place, (..., n) bool, and what to sum keys with, (..., n, 3, M): 1, distance, its square.

        queries (..., n, 2), keys (..., M, 2): (y, x), NaN for none; keys without a place are summed with 0.
        """
        same = self._places is not None and all(map(same_places, self._places, (queries, keys)))
        if not same or self._found[0].device != device:
            self._places = queries, keys
            seen, there = (places.isfinite().all(dim=-1).to(device) for places in (queries, keys))
            queries, keys = (places.nan_to_num().to(device, torch.float32) for places in (queries, keys))
            shape = (*queries.shape[:-1], 3, keys.shape[-2])
            factors, x = self._buffers.take(0, shape, device), self._buffers.take(1, (*shape[:-2], shape[-1]), device)
            one, distance, square = factors.unbind(-2)
            torch.sub(queries[..., 0, None], keys[..., None, :, 0], out=square).square_()
            torch.sub(queries[..., 1, None], keys[..., None, :, 1], out=x).square_()
            one.copy_(there[..., None, :])
            torch.sqrt(square.add_(x).mul_(one), out=distance)
            self._found = seen, factors
        return self._found


class Sweep:
    """Sums over the rows of one map (B, W, H, N, M).

    count: the first `count` of B images are measured; with `noisy` as many noisy versions follow.
    stochastic: rows are distributions; otherwise only what needs none is measured.
    places: (y, x) of queries (B or 1, W, N, 2) and keys (B or 1, W, M, 2), NaN for none; None: unknown.
    """

    def __init__(
        self,
        count: int,
        noisy: bool,
        stochastic: bool,
        places: tuple[Tensor, Tensor] | None,
        buffers: Buffers,
        distances: Distances,
    ):
        self.count, self.noisy, self.stochastic, self.places = count, noisy, stochastic, places
        self.buffers, self.distances = buffers, distances
        self.sums: dict[str, Tensor] = {}
        self.entries = 0  # of one image's maps: H W N M

    def add(self, rows: slice, block: Tensor) -> None:
        """Take in the query rows `rows`: block (B, W, H, n, M)."""
        clean = block[: self.count]
        scratch = self.buffers.take(0, clean.shape, clean.device)
        self.entries += clean[0].numel()
        squares = torch.linalg.vector_norm(clean, dim=-1).square_()  # (B, W, H, n)
        rows_of = {"squares": squares}
        flat = clean.flatten(0, 1).flatten(2)  # (B W, H, n M)
        self._put("gram", (flat @ flat.mT).unflatten(0, clean.shape[:2]).sum(dim=1))
        if self.noisy:
            torch.sub(block[self.count :], clean, out=scratch)
            self._put("change", torch.linalg.vector_norm(scratch, dim=(-2, -1)).square_().sum(dim=1))
        if self.stochastic:
            live = squares > 0  # not masked out
            rows_of |= {"live": live.float(), "tokens": torch.where(live, squares.reciprocal(), 0.0)}
            torch.clamp_min(clean, torch.finfo(clean.dtype).tiny, out=scratch)  # 0 log 0 = 0
            rows_of["entropy"] = scratch.log_().mul_(clean).sum(dim=-1).neg_()
            if self.places is not None:
                self._add_distances(rows, clean, scratch)
        sums = torch.stack([*rows_of.values()]).sum(dim=(2, 4), dtype=torch.float64)  # over windows and rows
        for name, value in zip(rows_of, sums, strict=True):
            self._put(name, value)

    def values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Measures per image and head {column: (B, H)}, and of all heads together {column: (B,)}."""
        s = self.sums
        heads, together = {"head_redundancy": indicators.head_redundancy(s["gram"])}, {}
        if self.noisy:
            heads["perturbation_robustness"] = (s["change"] / s["squares"]).sqrt()
            together["perturbation_robustness_paper"] = s["change"].sum(dim=1).sqrt() / self.entries
        if self.stochastic:
            heads["attention_entropy"] = s["entropy"] / s["live"]
            heads["effective_tokens"] = s["tokens"] / s["live"]
            heads["selectivity"] = 1 - s["squares"] / s["live"] / (1 + indicators.PAPER_EPS)
            together["selectivity_paper"] = heads["selectivity"].mean(dim=1)
            if self.places is not None:
                heads["mean_distance"] = s["distance"] / s["placed"]
                heads["attention_width"] = (s["square_distance"] / s["placed"] / 2).sqrt()
        return heads, together

    def _add_distances(self, rows: slice, clean: Tensor, scratch: Tensor) -> None:
        """Mean distance and square distance under each row's weights on keys with a place."""
        seen, factors = self.distances.between(self.places[0][..., rows, :], self.places[1], clean.device)
        shared = len(factors) == 1  # images share the places
        maps = clean.permute(1, 3, 0, 2, 4) if shared else clean.permute(0, 1, 3, 2, 4)  # (W, n, B, H, M), (B, W, n, H, M)
        lead = factors.shape[:-2].numel()  # rows that differ in places
        if clean.shape[1] > 1 or not shared:  # else a view will do
            maps = scratch.view(maps.shape).copy_(maps)
        sums = torch.bmm(factors.flatten(0, -3), maps.reshape(lead, -1, clean.shape[-1]).mT)  # (rows, 3, images and heads)
        mass, far, farther = sums.unbind(1)
        valid = (mass > 0) & seen.reshape(lead, 1)
        each = torch.where(valid, torch.stack([valid.float(), far / mass, farther / mass]), 0)
        each = each.view(3, len(factors), -1, sums.shape[-1]).sum(dim=2, dtype=torch.float64)
        for name, value in zip(("placed", "distance", "square_distance"), each, strict=True):
            self._put(name, value.view(clean.shape[0], clean.shape[2]))

    def _put(self, name: str, value: Tensor) -> None:
        """Add to what the blocks before have come to."""
        value = value.double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def same_places(a: Tensor, b: Tensor) -> bool:
    """Whether places are the same ones, NaN in the same rows."""
    if a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride():  # one tensor, as layers share them
        return True
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
