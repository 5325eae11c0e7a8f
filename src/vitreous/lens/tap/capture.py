"""Every attention of a pass brought to one form, checked, and shown."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from vitreous.lens.tap.attention_call import (
    Arrangement,
    Buffers,
    Call,
    ComputedMap,
    StoredMap,
    is_stochastic,
    output_error,
)
from vitreous.lens.tap.attention_op import Factors, Raw, Receiver, guessed
from vitreous.lens.tap.module_stack import Running
from vitreous.lens.tap.tracer import Layouts, Traced

TOLERANCE = 1e-4  # of the largest |V|, or |score|; half precision: four roundings
FLOAT32 = {"highest": 0.0, "high": 2**-10, "medium": 2**-7}  # what PyTorch is allowed to round operands to


class Capture(Receiver):
    """Brings every attention to one form, checks it, and shows it."""

    strict = True

    def __init__(self, see: Callable[[Call], None], layouts: Layouts, batch: int):
        super().__init__()
        self.see, self.layouts, self.batch, self.buffers = see, layouts, batch, Buffers()

    def attention(self, running: Running, raw: Raw) -> None:
        name, number = self.key(running)
        traced = self.layouts.calls.get((name, number))
        arranged = arranged_batch(raw, traced, self.batch)
        if arranged is None:
            shape, batch = tuple(raw.output.shape), self.batch
            self.refuse(name, f"no axis of its output {shape} is the batch of {batch}: it is one for all images, or mixes them")
            return
        call = self.call(name, number, running, raw, traced, arranged)
        tolerance = max(TOLERANCE, 4 * precision(raw))
        if not call.error <= tolerance:
            self.refuse(name, f"its map is off by {call.error:.2g}, more than {tolerance:.2g} ({call.verified})")
            return
        self.count += 1
        try:
            self.see(call)
        finally:
            call.maps = None

    def call(self, name: str, number: int, running: Running, raw: Raw, traced: Traced | None, arranged: Arrangement) -> Call:
        v, output = arranged.merge(raw.v), arranged.merge(raw.output)
        q, k = (None if side is None else arranged.merge(side[1](side[0])) for side in (raw.q, raw.k))
        use, state = raw.use, running.state
        if use is None:
            maps = ComputedMap(q, k, raw.mask, raw.causal, raw.scale, arranged, self.buffers)
        else:
            maps = StoredMap(use.probabilities, use.effective, arranged, self.buffers)
        layout = traced.layout if traced is not None and state.source is None else None
        if layout is not None and (layout.queries.shape[1], layout.keys.shape[1]) != (output.shape[3], v.shape[3]):
            layout = None  # another number of tokens than in the traced pass
        call = Call(
            name=name,
            number=number,
            route=raw.route,
            kind=traced.kind if traced is not None else "token",
            q=q,
            k=k,
            v=v,
            output=output,
            scale=raw.scale,
            layout=layout,
            source=state.source,
            inserted=state.inserted,
            mixed=use is not None and use.mixed,
            stochastic=True,
            error=0.0,
            verified="",
            note="" if use is None else use.note,
            maps=maps,
        )
        call.error, call.verified = output_error(call)
        if use is not None and use.product is not None:
            call.error, call.verified = max(call.error, use.product.error()), f"score entries and {call.verified}"
        elif use is not None:
            call.verified += ", from the very weights"
        call.stochastic = not call.mixed or is_stochastic(call)
        return call


def precision(raw: Raw) -> float:
    """The coarsest step, relative, of what a call computed with."""
    values = [raw.output] if raw.use is None or raw.use.product is None else [raw.output, raw.use.product.values]
    steps = [torch.finfo(x.dtype).eps for x in values]
    return max(*steps, FLOAT32[torch.get_float32_matmul_precision()])


def arranged_batch(raw: Raw, traced: Traced | None, batch: int) -> Arrangement | None:
    """The arrangement of a call in a pass with `batch` images: the axis that grew holds the batch, outermost."""
    lead = raw.lead
    if traced is None or len(traced.lead) != len(lead):
        if not lead or lead[0] % batch:
            return arrangement(guessed(lead, raw.heads)) if batch == 1 else None
        inner = guessed((lead[0] // batch, *lead[1:]), raw.heads)
        return arrangement((((batch, "B"), *inner[0]), *inner[1:]))
    grown = [i for i, (n, m) in enumerate(zip(lead, traced.lead, strict=True)) if n != m]
    if batch == 1:
        return arrangement(guessed(lead, raw.heads) if grown else traced.factors)
    if len(grown) != 1 or lead[grown[0]] != batch * traced.lead[grown[0]]:
        return None
    factors = list(traced.factors)
    factors[grown[0]] = ((batch, "B"), *factors[grown[0]])
    return arrangement(tuple(factors))


@lru_cache(maxsize=64)
def arrangement(factors: Factors) -> Arrangement:
    """The arrangement of these factors; most calls of a pass have the same."""
    return Arrangement(factors)
