"""`AttentionCall`: one attention of a forward pass, in one form whatever the model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vitreous.base.errors import HostError
from vitreous.layers.stream import Assignment
from vitreous.lens.coordinates.layout import Layout
from vitreous.lens.tap.axes import unravel

# Entries of a buffer (64 MiB): the most that a block of rows takes at any batch and sequence.
MAX_ENTRIES = 1 << 24
# Up to this many rows the check covers all of them; beyond, strips spread over the rows.
FULL_CHECK_ROWS = 256
STRIP_COUNT, STRIP_ROWS = 8, 8
SAMPLES = 1024  # entries of an output by which an image alone is compared with the same in a batch
POOLED = "pooled"  # the name of a token that is the mean of all others


class Buffers:
    """Two float32 buffers, as large as the largest block so far, reused for all blocks.

    Fresh tensors per block would be simpler, but some allocators keep freed blocks of this size,
    with peaks of gigabytes.
    """

    def __init__(self):
        self.flat: list[Tensor | None] = [None, None]

    def take(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """Buffer 0 or 1 as a contiguous float32 tensor of a shape; its old content is lost."""
        size, flat = math.prod(shape), self.flat[index]
        if flat is None or flat.numel() < size or flat.device != device:
            self.flat[index] = flat = None  # the old one goes before the larger one comes
            self.flat[index] = flat = torch.empty(size, device=device, dtype=torch.float32)
        # a part of a larger buffer is contiguous, so a view costs nothing
        return flat[:size].view(shape)


@dataclass(frozen=True)
class Arrangement:
    """How the leading axes of a call divide into batch (B), windows (W) and heads (H).

    factors: for each leading axis its factors (size, "B" | "W" | "H"), outermost first.
    """

    factors: tuple[tuple[tuple[int, str], ...], ...]

    @cached_property
    def flat(self) -> list[tuple[int, str]]:
        """All factors, in the order of the axes."""
        return [factor for axis in self.factors for factor in axis]

    @cached_property
    def order(self) -> list[int]:
        """Positions in `flat` of the factors of B, then of W, then of H."""
        return sorted(range(len(self.flat)), key=lambda i: "BWH".index(self.flat[i][1]))

    @cached_property
    def sizes(self) -> list[int]:
        """Sizes of all factors, in the order of `spread`."""
        return [self.flat[i][0] for i in self.order]

    @cached_property
    def groups(self) -> tuple[int, int, int]:
        """(B, W, H)."""
        return tuple(math.prod(size for size, kind in self.flat if kind == wanted) for wanted in "BWH")

    def spread(self, x: Tensor) -> Tensor:
        """x (leading axes, X, Y) -> a view (factors of B, of W, of H, X, Y)."""
        rest = x.ndim - len(self.factors)
        x = x.reshape(*(size for size, _ in self.flat), *x.shape[x.ndim - rest :])
        return x.permute(*self.order, *range(len(self.flat), x.ndim))

    def merge(self, x: Tensor) -> Tensor:
        """x (leading axes, X, Y) -> (B, W, H, X, Y), copied only where no view can be."""
        rest = x.shape[len(self.factors) :]
        # factors are nearly always in this order already
        if self.order == list(range(len(self.flat))):
            return x.reshape(*self.groups, *rest)
        return self.spread(x).reshape(*self.groups, *rest)


class Map(ABC):
    """A map whose rows are computed into a buffer: groups (B, W, H), size (N, M)."""

    groups: tuple[int, int, int]
    size: tuple[int, int]

    def slices(self, size: int) -> Iterator[slice]:
        """All rows in order, at most `size` at a time, and no more than a buffer may hold."""
        queries, keys = self.size
        # at least one row, even where a single one exceeds the bound
        step = max(1, min(size, MAX_ENTRIES // max(1, math.prod(self.groups) * keys)))
        for start in range(0, queries, step):
            yield slice(start, min(start + step, queries))

    @abstractmethod
    def block(self, rows: slice, effective: bool = False, fresh: bool = False) -> Tensor:
        """Rows (B, W, H, n, M), float32.

        fresh: the buffer stays unchanged until the next block, which may return it again if it asks
        for the same rows.
        """

    def lasting(self) -> Map:
        """The same map, to be read behind the pass, which other maps share the buffers with.

        For passes with gradients: autograd refuses a model that overwrites what it is made of.
        """
        return self


class ComputedMap(Map):
    """The map of a fused call, computed again from queries, keys, mask and scale."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        arrangement: Arrangement,
        buffers: Buffers,
    ):
        """q (B, W, H, N, K), k (B, W, H, M, K).

        mask: broadcastable to the call's own (leading axes, N, M); added to the scores, or boolean
        with True where a key takes part.
        """
        self.groups, self.size = q.shape[:3], (q.shape[3], k.shape[3])
        self.q, self.k = (x.flatten(0, 2).float() for x in (q, k))
        self.causal, self.scale, self.arrangement, self.buffers = causal, scale, arrangement, buffers
        self.fresh: tuple[slice, Tensor] | None = None
        self.bias = self.blocked = None
        if mask is not None:
            lead = [math.prod(size for size, _ in axis) for axis in arrangement.factors]
            # converted before it is expanded, while it is small
            values = ~mask if mask.dtype == torch.bool else mask.float()
            values = arrangement.spread(values.expand(*lead, *self.size))
            self.blocked, self.bias = (values, None) if mask.dtype == torch.bool else (None, values)

    def lasting(self) -> Map:
        self.fresh = None
        return self

    def block(self, rows: slice, effective: bool = False, fresh: bool = False) -> Tensor:
        """Rows of the map; rows whose keys are all masked are 0, as in fused kernels."""
        ready, self.fresh = self.fresh, None
        if ready is not None and ready[0] == rows:
            return ready[1]
        n, keys = rows.stop - rows.start, self.size[1]
        shape = (self.q.shape[0], n, keys)
        # baddbmm with beta=0 writes scale * q k^T into the buffer without a temporary
        scores = self.buffers.take(0, shape, self.q.device)
        torch.baddbmm(scores, self.q[:, rows], self.k.mT, beta=0, alpha=self.scale, out=scores)
        spread = scores.view(*self.arrangement.sizes, n, keys)
        if self.blocked is not None:
            spread.masked_fill_(self.blocked[..., rows, :], -math.inf)
        if self.bias is not None:
            spread.add_(self.bias[..., rows, :])
        if self.causal:  # aligned top left, also where N differs from M
            query = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
            scores.masked_fill_(torch.arange(keys, device=scores.device) > query, -math.inf)
        maps = torch.softmax(scores, dim=-1, out=self.buffers.take(1, shape, self.q.device))
        if self.blocked is not None or self.bias is not None:
            # softmax of a row of -inf is NaN; fused kernels give 0 there
            maps.masked_fill_((scores.amax(-1, keepdim=True) == -math.inf), 0)
        maps = maps.view(*self.groups, n, keys)
        self.fresh = (rows, maps) if fresh else None
        return maps


class StoredMap(Map):
    """The map of an intercepted softmax: its own output, and what multiplied V."""

    def __init__(self, probabilities: Tensor | None, effective: Tensor, arrangement: Arrangement, buffers: Buffers):
        """Both with the call's own leading axes, (leading axes, N, M)."""
        self.groups, self.size, self.buffers = arrangement.groups, tuple(effective.shape[-2:]), buffers
        self.effective = arrangement.spread(effective)
        self.probabilities = self.effective if probabilities is None else arrangement.spread(probabilities)

    def block(self, rows: slice, effective: bool = False, fresh: bool = False) -> Tensor:
        """Rows of the softmax's own output, or of what multiplied V."""
        part = (self.effective if effective else self.probabilities)[..., rows, :]
        # a copy, since the model may still overwrite its map in place
        buffer = self.buffers.take(0, part.shape, part.device)
        return buffer.copy_(part).view(*self.groups, *part.shape[-2:])


@dataclass
class AttentionCall:
    """One attention of a pass. Tensors are valid only during the callback that gets it.

    name: dotted path of the innermost running module ("blocks.3.attn"; a leaf of class Softmax is
        left out).
    call_index: 0 for the first attention under this name in this pass, 1 for the second, ...
    route: "fused" (`scaled_dot_product_attention`, map recomputed) or "softmax" (map as it was).
    kind: "token" (places attend to places), "channel" (channels to channels), "pooling" (weights
        over places without a product of queries and keys).
    q, k: (B, W, H, N, K), (B, W, H, M, K) as they enter the product; None where there is none, or
        its axes were lost.
    v, output: (B, W, H, M, Kv), (B, W, H, N, Kv), the second as the model computed it.
    scale: what the fused call multiplied q k^T with; None: unknown.
    layout: where queries and keys are in the image (`coordinates.layout.Layout`); None: unknown, or
        different in every image: see assignment.
    assignment, inserted: of our own token grafts, as in `layers.stream.TokenState`: from original
        to present tokens, None where each is itself. Inserted tokens are at the end.
    mixed: values were changed between softmax and V, so that `effective` maps differ from
        probabilities.
    stochastic: rows of the effective map are non-negative and sum to one (rows masked in full count
        as such).
    error, verified: the largest error of the check, relative, and what was checked
        (`output_error`).
    first_token: the parameter that the first query comes from, or `POOLED`, if it has no place in
        the image; "": unknown.
    graph_output: (tensor, function): the output as the model's own tensor, for a pass with
        gradients, and what brings its gradient to the form of `output`.
    note: anything else to know, in words.
    """

    name: str
    call_index: int
    route: str
    kind: str
    q: Tensor | None
    k: Tensor | None
    v: Tensor
    output: Tensor
    scale: float | None
    layout: Layout | None
    assignment: Assignment | None
    inserted: int
    mixed: bool
    stochastic: bool
    error: float
    verified: str
    note: str = ""
    first_token: str = ""
    graph_output: tuple[Tensor, Callable[[Tensor], Tensor]] | None = field(default=None, repr=False)
    maps: Map | None = field(default=None, repr=False)

    def rows(self, size: int = 256, effective: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of at most `size` rows in order: (slice, (B, W, H, n, M) float32).

        All blocks share ONE buffer: use each at once, or clone it. effective: what multiplied V, in
        place of the softmax's own output; they are the same unless `mixed`.
        """
        if self.maps is None:
            raise HostError(
                f"The map of {self.name} was asked for after its call. Expected to be read while the tap shows it: maps are "
                "not kept. Read rows() or map() inside the callback."
            )
        for rows in self.maps.slices(size):
            # a generator, so that a consumer that stops early computes nothing more
            yield rows, self.maps.block(rows, effective)

    def map(self, effective: bool = False) -> Tensor:
        """The whole map (B, W, H, N, M), float32, as a tensor of its own: for small ones."""
        return torch.cat([block.clone() for _, block in self.rows(effective=effective)], dim=3)


def output_sample(output: Tensor) -> Tensor:
    """Entries of the first image's output, spread over windows, heads and rows.

    output: (B, W, H, N, Kv).
    """
    shape = output.shape[1:]
    positions = torch.linspace(0, math.prod(shape) - 1, min(SAMPLES, math.prod(shape)), dtype=torch.float64).long()
    return output[0][tuple(unravel(positions, shape))].float()


def checked_rows(call: AttentionCall) -> list[slice]:
    """The rows that a check covers: all of few, or strips from the first to the last."""
    queries = call.maps.size[0]
    if queries <= FULL_CHECK_ROWS:
        return list(call.maps.slices(FULL_CHECK_ROWS))
    starts = (i * (queries - STRIP_ROWS) // (STRIP_COUNT - 1) for i in range(STRIP_COUNT))
    return [slice(start, start + STRIP_ROWS) for start in starts]


def output_error(call: AttentionCall) -> tuple[float, str]:
    """max |A V - output| / max |V| over `checked_rows`, and a text that says what was done.

    NaN where both are NaN is no error: rows masked in full, of a plain softmax.
    """
    v, worst, slices = call.v.float(), 0.0, checked_rows(call)
    for rows in slices:
        recomputed, output = call.maps.block(rows, effective=True, fresh=True) @ v, call.output[..., rows, :].float()
        error = (recomputed - output).abs_()
        # one transfer per block from the device
        largest = error.max().item()
        if math.isnan(largest):
            largest = error.masked_fill_(recomputed.isnan() & output.isnan(), 0).max().item()
        worst = largest if math.isnan(largest) else max(worst, largest)
    largest, count = v.abs().nan_to_num_(0).max().item(), sum(rows.stop - rows.start for rows in slices)
    text = "output recomputed" if count == call.maps.size[0] else f"output recomputed for {count} of {call.maps.size[0]} rows"
    if not largest:
        text += ", which says nothing: V is zero"
    return worst / max(largest, torch.finfo(torch.float32).tiny), text


def is_stochastic(call: AttentionCall) -> bool:
    """True if rows of the effective map are non-negative and sum to one.

    Rows that are masked in full may sum to zero.
    """
    for _, block in call.rows(effective=True):
        # half precision sums to one within a percent
        total = block.sum(-1)
        if bool(((total - 1).abs() > 1e-2).logical_and(total != 0).any()) or bool((block < -1e-6).any()):
            return False
    return True
