"""`Capture`: brings every attention to one form, checks it, and calls the callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vitreous.layers.stream import PLAIN, TokenState
from vitreous.lens.coordinates.coordinate_tracer import CoordinateTracer
from vitreous.lens.coordinates.layout import Layout, image_layout, without_places
from vitreous.lens.tap.attention_call import (
    Arrangement,
    AttentionCall,
    Buffers,
    ComputedMap,
    StoredMap,
    is_stochastic,
    output_error,
    output_sample,
)
from vitreous.lens.tap.attention_op import NOT_FINITE, AttentionOp, Factors, Key, Receiver, guess_factors
from vitreous.lens.tap.module_stack import ModuleStack
from vitreous.lens.tap.tracer import Layouts, Traced, places_of_sides

SAME = 0.1  # of the largest output: by how much an image alone may differ from the same in a batch
TOLERANCE = 1e-4  # of the largest |V|, or |score|; half precision: four roundings
FLOAT32 = {"highest": 0.0, "high": 2**-10, "medium": 2**-7}  # what PyTorch is allowed to round operands to


class Capture(Receiver):
    """Gives every attention of a pass over a batch to `on_attention`, checked."""

    strict = True

    def __init__(
        self, on_attention: Callable[[AttentionCall], None], layouts: Layouts, images: Tensor, comparable: bool = False
    ):
        """comparable: the first image is the traced one."""
        super().__init__()
        self.on_attention, self.layouts, self.batch, self.buffers = on_attention, layouts, len(images), Buffers()
        self.comparable = comparable
        # where tokens are chosen, their coordinates are followed for every image in the very pass
        self.coordinates = CoordinateTracer(images) if any(traced.choice for traced in layouts.calls.values()) else None

    def follow(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Move coordinates through a call, if tokens are chosen somewhere."""
        if self.coordinates is not None:
            self.coordinates.follow(func, tuple(args), kwargs, out)

    def attention(self, stack: ModuleStack, op: AttentionOp) -> None:
        """Arrange one attention, check its map, and give it to the callback, or refuse it."""
        name, call_index = self.key(stack)
        traced = self.layouts.calls.get((name, call_index))
        arrangement = self.arrangement((name, call_index), op, traced, stack.state)
        if isinstance(arrangement, str):
            self.refuse(name, arrangement)
            return
        call = self.call(name, call_index, stack, op, traced, arrangement)
        if not all(x is None or bool(x.isfinite().all()) for x in (call.q, call.k, call.v)):
            self.refuse(name, NOT_FINITE)
            return
        tolerance = max(TOLERANCE, 4 * precision(op))
        # not `>`: an error of NaN must be refused too
        if not call.error <= tolerance:
            self.refuse(name, f"its map is off by {call.error:.2g}, more than {tolerance:.2g} ({call.verified})")
            return
        self.count += 1
        try:
            self.on_attention(call)
        finally:
            # the tensors behind it are freed here, so that memory does not grow with depth
            call.maps = None

    def arrangement(self, key: Key, op: AttentionOp, traced: Traced | None, state: TokenState) -> Arrangement | str:
        """How the leading axes divide, or why that is not known.

        Where the batch may stand in several places, that place holds in which the first image gives
        what it gave alone, in the traced pass.
        """
        options, shape = arrangements(op, traced, self.batch), tuple(op.output.shape)
        if not options:
            return (
                f"no axis of its output {shape} is the batch of {self.batch}: it is one for all images, or mixes them; where "
                "images are packed into one sequence, look with batch_size=1, noise=0"
            )
        if traced is None or (len(options) == 1 and not self.comparable):
            return options[0]
        if key not in self.layouts.orders:
            errors = departures(op, traced.sample, options)
            best = min(range(len(errors)), key=errors.__getitem__)
            if len(options) == 1:
                # chance that is not PyTorch's, or a batch that matters: places may be others too,
                # if they are not followed or recorded
                if not errors[0] <= SAME and self.coordinates is None and state.assignment is None:
                    self.layouts.moved.add(key)
                return options[0]
            if not errors[best] <= SAME:
                return (
                    f"which axis of its output {shape} is the batch of {self.batch} is not known: in no order of images, "
                    f"windows and heads does the first image give what it gives alone (off by {errors[best]:.2g})"
                )
            alike = [i for i, error in enumerate(errors) if error <= max(4 * errors[best], TOLERANCE)]
            self.layouts.orders[key] = best
            if len(alike) > 1:
                self.layouts.orders[key] = alike[0]
                self.layouts.unsure[key] = "windows of the first image are alike: that images come before windows is assumed"
        return options[self.layouts.orders[key]]

    def read(self, name: str, tensor: Tensor) -> None:
        """Note which values came to Python code, if tokens are chosen somewhere."""
        if self.coordinates is not None:
            self.coordinates.read(name, tensor)

    def image_layout(self, op: AttentionOp, traced: Traced, arrangement: Arrangement) -> Layout:
        """Where the tokens of a call are in each image, some of which were chosen."""
        query, key = places_of_sides(self.coordinates, op)
        layout = image_layout(query, key, arrangement.merge, op.lead, traced.layout, self.layouts.full())
        if layout is traced.layout:
            return layout
        where = "no grid is known that has their places" if layout.grid is None else "in maps each image has its own places"
        absent = int(layout.keys[0, 0, :, 0].isnan().sum()) - layout.prefix if layout.images else 0
        where += f"; {absent} of {layout.keys.shape[-2]} tokens have no place and are in no map" if absent > 0 else ""
        return replace(layout, note=f"{traced.choice}: {where}")

    def call(
        self, name: str, call_index: int, stack: ModuleStack, op: AttentionOp, traced: Traced | None, arrangement: Arrangement
    ) -> AttentionCall:
        """The `AttentionCall` of an intercepted attention, with the error of its check."""
        v, output = arrangement.merge(op.v), arrangement.merge(op.output)
        own_output, form = op.output_view
        q, k = (None if side is None else arrangement.merge(side[1](side[0])) for side in (op.q, op.k))
        # A step that reduces tokens may attend to others than those of the stream around it.
        weighted_sum, state = op.weighted_sum, stack.state if holds_tokens(stack.state, v.shape[3]) else PLAIN
        if weighted_sum is None:
            maps = ComputedMap(q, k, op.mask, op.causal, op.scale, arrangement, self.buffers)
        else:
            maps = StoredMap(weighted_sum.probabilities, weighted_sum.effective, arrangement, self.buffers)
        # a reducer of tokens leaves other tokens in every image: no common layout
        layout = traced.layout if traced is not None and stack.state.assignment is None else None
        if layout is not None and traced.choice and traced.kind != "channel":
            layout = self.image_layout(op, traced, arrangement)
        elif layout is not None and (name, call_index) in self.layouts.moved:
            layout = replace(without_places(layout), note="alone, the first image gives other values than in a batch")
        if layout is not None and (layout.queries.shape[-2], layout.keys.shape[-2]) != (output.shape[3], v.shape[3]):
            layout = None  # another number of tokens than in the traced pass
        call = AttentionCall(
            name=name,
            call_index=call_index,
            route=op.route,
            kind=traced.kind if traced is not None else "token",
            q=q,
            k=k,
            v=v,
            output=output,
            scale=op.scale,
            layout=layout,
            assignment=state.assignment,
            inserted=state.inserted,
            mixed=weighted_sum is not None and weighted_sum.mixed,
            stochastic=True,
            error=0.0,
            verified="",
            note=(weighted_sum.note if weighted_sum is not None else "")
            or self.layouts.unsure.get((name, call_index), "")
            or ("" if layout is None else heads_note(arrangement)),
            first_token="" if traced is None else traced.first_token,
            graph_output=(own_output, lambda x: arrangement.merge(form(x))),
            maps=maps,
        )
        call.error, call.verified = output_error(call)
        if weighted_sum is not None and weighted_sum.product is not None:
            # A V = output holds by construction on this route, so the scores are checked as well
            call.error, call.verified = max(call.error, weighted_sum.product.error()), f"score entries and {call.verified}"
        elif weighted_sum is not None:
            call.verified += ", from the very weights"
        # an unchanged softmax is stochastic by definition; only changed maps need a look
        call.stochastic = not call.mixed or is_stochastic(call)
        return call


def holds_tokens(state: TokenState, count: int) -> bool:
    """Whether so many keys may be the tokens that a state is of."""
    if state.assignment is None:
        return True
    weights = state.assignment.weights
    tokens = state.assignment.tokens if weights is None else weights.shape[1]
    return tokens is None or tokens + state.inserted == count


def heads_note(arrangement: Arrangement) -> str:
    """A note where frames, views or channels, with equal places, are counted as heads.

    They are in an axis of their own, or in that of the batch, beside which heads have another.
    """
    heads = [[size for size, kind in axis if kind == "H" and size > 1] for axis in arrangement.factors]
    mixed = [own for own, axis in zip(heads, arrangement.factors, strict=True) if own and any(kind == "B" for _, kind in axis)]
    sizes = [size for own in heads for size in own]
    if len(sizes) < 2 and not (mixed and len(heads) > 1):
        return ""
    shared = " x ".join(map(str, sizes))
    return f"{shared} maps have the same places: what is counted as heads is also frames, views or channels"


def precision(op: AttentionOp) -> float:
    """The coarsest relative step of the formats that a call computed with."""
    product = None if op.weighted_sum is None else op.weighted_sum.product
    values = [op.output] if product is None else [op.output, product.values]
    # scores may have been computed in a coarser format than the output
    steps = [torch.finfo(x.dtype).eps for x in values]
    return max(*steps, FLOAT32[torch.get_float32_matmul_precision()])


def arrangements(op: AttentionOp, traced: Traced | None, batch: int) -> list[Arrangement]:
    """How leading axes of a call may divide in a pass of `batch` images.

    None, if no axis holds the batch. The axis that grew against the traced pass of one image holds
    it, as the outermost of its factors, as the innermost, or between them: `torch.cat` of tiles has
    it inside.
    """
    lead = op.lead
    if traced is None or len(traced.lead) != len(lead):
        if batch == 1:
            return [cached_arrangement(guess_factors(lead, op.heads))]
        # the traced pass made no such call: only an axis of nothing else is the batch for sure
        if not lead or lead[0] not in (batch, batch * (op.heads or 1)):
            return []
        inner = guess_factors((lead[0] // batch, *lead[1:]), op.heads)
        return [cached_arrangement((((batch, "B"), *inner[0]), *inner[1:]))]
    grown = [i for i, (n, m) in enumerate(zip(lead, traced.lead, strict=True)) if n != m]
    # nothing can grow with one image; the traced factors hold if the sizes do
    if batch == 1:
        return [cached_arrangement(guess_factors(lead, op.heads) if grown else traced.factors)]
    if len(grown) != 1 or lead[grown[0]] != batch * traced.lead[grown[0]]:
        return []
    before, factors, after = traced.factors[: grown[0]], traced.factors[grown[0]], traced.factors[grown[0] + 1 :]
    factors = tuple(factor for factor in factors if factor[0] > 1)  # before or behind a single window is the same
    places = range(len(factors) + 1)
    return [cached_arrangement((*before, (*factors[:i], (batch, "B"), *factors[i:]), *after)) for i in places]


def departures(op: AttentionOp, sample: Tensor, options: Sequence[Arrangement]) -> list[float]:
    """How far the first image's output is from that of it alone, for each arrangement.

    The largest difference, over the largest value. sample: as of `output_sample`.
    """
    largest = sample.abs().nan_to_num().max().clamp(min=torch.finfo(torch.float32).tiny)
    samples = [output_sample(arrangement.merge(op.output)) for arrangement in options]
    differ = [(own - sample).nan_to_num().abs().max() / largest if own.shape == sample.shape else torch.inf for own in samples]
    return [float(value) for value in differ]


@lru_cache(maxsize=64)
def cached_arrangement(factors: Factors) -> Arrangement:
    """The arrangement of these factors; most calls of a pass have the same."""
    return Arrangement(factors)
