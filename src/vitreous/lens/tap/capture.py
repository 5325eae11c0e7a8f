"""`Capture`: brings every attention to one form, checks it, and calls the callback."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from vitreous.lens.tap.attention_call import (
    Arrangement,
    AttentionCall,
    Buffers,
    ComputedMap,
    StoredMap,
    is_stochastic,
    output_error,
)
from vitreous.lens.tap.attention_op import AttentionOp, Factors, Receiver, guess_factors
from vitreous.lens.tap.module_stack import ModuleStack
from vitreous.lens.tap.tracer import Layouts, Traced

TOLERANCE = 1e-4  # of the largest |V|, or |score|; half precision: four roundings
FLOAT32 = {"highest": 0.0, "high": 2**-10, "medium": 2**-7}  # what PyTorch is allowed to round operands to


class Capture(Receiver):
    """Gives every attention of a pass over a batch to `on_attention`, checked."""

    strict = True

    def __init__(self, on_attention: Callable[[AttentionCall], None], layouts: Layouts, batch: int):
        super().__init__()
        self.on_attention, self.layouts, self.batch, self.buffers = on_attention, layouts, batch, Buffers()

    def attention(self, stack: ModuleStack, op: AttentionOp) -> None:
        """Arrange one attention, check its map, and give it to the callback, or refuse it."""
        name, call_index = self.key(stack)
        traced = self.layouts.calls.get((name, call_index))
        arrangement = batch_arrangement(op, traced, self.batch)
        if arrangement is None:
            shape, batch = tuple(op.output.shape), self.batch
            self.refuse(name, f"no axis of its output {shape} is the batch of {batch}: it is one for all images, or mixes them")
            return
        call = self.call(name, call_index, stack, op, traced, arrangement)
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

    def call(
        self, name: str, call_index: int, stack: ModuleStack, op: AttentionOp, traced: Traced | None, arrangement: Arrangement
    ) -> AttentionCall:
        """The `AttentionCall` of an intercepted attention, with the error of its check."""
        v, output = arrangement.merge(op.v), arrangement.merge(op.output)
        q, k = (None if side is None else arrangement.merge(side[1](side[0])) for side in (op.q, op.k))
        weighted_sum, state = op.weighted_sum, stack.state
        if weighted_sum is None:
            maps = ComputedMap(q, k, op.mask, op.causal, op.scale, arrangement, self.buffers)
        else:
            maps = StoredMap(weighted_sum.probabilities, weighted_sum.effective, arrangement, self.buffers)
        # a reducer of tokens leaves other tokens in every image: no common layout
        layout = traced.layout if traced is not None and state.assignment is None else None
        if layout is not None and (layout.queries.shape[1], layout.keys.shape[1]) != (output.shape[3], v.shape[3]):
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
            note="" if weighted_sum is None else weighted_sum.note,
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


def precision(op: AttentionOp) -> float:
    """The coarsest relative step of the formats that a call computed with."""
    product = None if op.weighted_sum is None else op.weighted_sum.product
    values = [op.output] if product is None else [op.output, product.values]
    # scores may have been computed in a coarser format than the output
    steps = [torch.finfo(x.dtype).eps for x in values]
    return max(*steps, FLOAT32[torch.get_float32_matmul_precision()])


def batch_arrangement(op: AttentionOp, traced: Traced | None, batch: int) -> Arrangement | None:
    """How leading axes of a call divide in a pass of `batch` images; None: none is the batch.

    The axis that grew against the traced pass of one image holds the batch as its outermost factor.
    """
    lead = op.lead
    if traced is None or len(traced.lead) != len(lead):
        if not lead or lead[0] % batch:
            return cached_arrangement(guess_factors(lead, op.heads)) if batch == 1 else None
        # a call that the traced pass did not make: by convention the batch is outermost
        inner = guess_factors((lead[0] // batch, *lead[1:]), op.heads)
        return cached_arrangement((((batch, "B"), *inner[0]), *inner[1:]))
    grown = [i for i, (n, m) in enumerate(zip(lead, traced.lead, strict=True)) if n != m]
    # nothing can grow with one image; the traced factors hold if the sizes do
    if batch == 1:
        return cached_arrangement(guess_factors(lead, op.heads) if grown else traced.factors)
    if len(grown) != 1 or lead[grown[0]] != batch * traced.lead[grown[0]]:
        return None
    factors = list(traced.factors)
    factors[grown[0]] = ((batch, "B"), *factors[grown[0]])
    return cached_arrangement(tuple(factors))


@lru_cache(maxsize=64)
def cached_arrangement(factors: Factors) -> Arrangement:
    """The arrangement of these factors; most calls of a pass have the same."""
    return Arrangement(factors)
