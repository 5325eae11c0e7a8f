"""`Tracer`: shapes, coordinates and kinds of every call, from a pass with one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from vitreous.hosts.stream_ends import Opening
from vitreous.layers.stream import Stream
from vitreous.lens.coordinates.coordinate_tracer import CoordinateTracer
from vitreous.lens.coordinates.field import thin
from vitreous.lens.coordinates.layout import Layout, channel, layout
from vitreous.lens.tap.attention_call import Arrangement, output_sample
from vitreous.lens.tap.attention_op import AttentionOp, Factors, Key, OperandView, Receiver, guess_factors
from vitreous.lens.tap.module_stack import ModuleStack
from vitreous.lens.tap.tensor_set import TensorSet


@dataclass(frozen=True)
class Traced:
    """One call of a pass with one image.

    lead: sizes of its leading axes. factors: of these (see `Arrangement`). kind, layout: as in
    `AttentionCall`. sample: entries of its output, as of `output_sample`.
    """

    lead: tuple[int, ...]
    factors: Factors
    kind: str = "token"
    layout: Layout | None = None
    sample: Tensor | None = field(default=None, repr=False)


@dataclass
class Layouts:
    """Where the queries and keys of every call are, from a pass with one image.

    calls: by (call name, call index). outputs: layouts of module outputs, by (module name, call
        index).
    image: the traced image (1, C, h, w), until a batch that begins with it was compared with it.
    orders: which of the possible arrangements of each call holds, found by that comparison.
    unsure: notes on calls of which it could not be told.
    earlier_tensors: of passes before; what is not among them later was computed out of sight.
    """

    calls: dict[Key, Traced] = field(default_factory=dict)
    outputs: dict[Key, Layout] = field(default_factory=dict)
    image: Tensor | None = field(default=None, repr=False)
    orders: dict[Key, int] = field(default_factory=dict)
    unsure: dict[Key, str] = field(default_factory=dict)
    earlier_tensors: TensorSet = field(default_factory=TensorSet, repr=False)  # tensors of earlier passes


class Tracer(Receiver):
    """Records shapes and layouts of every attention, and layouts of module outputs."""

    def __init__(self, image: Tensor):
        super().__init__()
        with torch._C.DisableTorchFunction():  # a tap around this one follows no tensors of ours
            self.layouts = Layouts(image=image.clone())
        self.coordinates = CoordinateTracer(image)
        self.layouts_by_places: dict[bytes, Layout | None] = {}  # most modules leave tokens where they are
        self.layouts_by_count: dict[int, Layout] = {}  # the last layout of so many tokens
        self.shared_layouts: dict[tuple, Layout] = {}  # layouts of calls by what they say

    def follow(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Move coordinates through a call."""
        self.coordinates.follow(func, tuple(args), kwargs, out)

    def attention(self, stack: ModuleStack, op: AttentionOp) -> None:
        """Record the leading axes, factors, kind and layout of an attention."""
        self.count += 1
        product = op.weighted_sum is None or op.weighted_sum.product is not None
        kind = "token" if product else "pooling"
        sides = (op.q, op.k)
        # without a product, the output stands for the queries and V for the keys
        if op.q is None:
            sides = (op.weighted_sum.output_view, op.weighted_sum.v_view)
        query, key = (self.places(side, x.shape[-2]) for side, x in zip(sides, (op.output, op.v), strict=True))
        call_layout = layout(query, key, self.coordinates.size, self.coordinates.reason(*(side[0] for side in sides)))
        # without coordinates, or with leading axes that broadcast, factors are guessed
        if call_layout is None or len(call_layout.factors) != len(op.lead):
            call_layout, factors = None, guess_factors(op.lead, op.heads)
        else:
            call_layout = self.share(call_layout)
            factors = call_layout.factors
        if op.q is not None and channel(query, key):
            kind, call_layout = "channel", None  # rows and columns of the map are channels, which are nowhere
        sample = output_sample(Arrangement(factors).merge(op.output))
        self.layouts.calls[self.key(stack)] = Traced(op.lead, factors, kind, call_layout, sample)

    def places(self, side: OperandView, count: int) -> Tensor:
        """Coordinates (..., count, K, 4) of an operand; NaN if it has none.

        As of `CoordinateTracer.of`; axes along which they are constant have size 1 or stride 0.
        """
        places = self.coordinates.of(side[0])
        if places is None:
            return torch.full((count, 1, 4), math.nan)
        places = side[1](thin(places, range(places.ndim - 1)))
        return places.expand(*places.shape[:-3], count, *places.shape[-2:])

    def share(self, call_layout: Layout) -> Layout:
        """The equal layout of an earlier call, else this one.

        Calls that share one object are compared fast later.
        """
        queries, keys = call_layout.queries.numpy().tobytes(), call_layout.keys.numpy().tobytes()
        if queries == keys and call_layout.queries.shape == call_layout.keys.shape:
            call_layout = replace(call_layout, keys=call_layout.queries)
        details = [getattr(call_layout, name.name) for name in fields(call_layout) if name.repr]
        return self.shared_layouts.setdefault((queries, keys, *details), call_layout)

    def on_output(self, name: str, call_index: int, output: Any) -> None:
        """Record the layout of a module's output.

        An Opening, a Stream, or (1, N, D), (1, D, N), (1, h, w, D), (1, D, h, w), alone or first in
        a tuple.
        """
        if isinstance(output, Opening):
            output = output.x
        if isinstance(output, Stream):  # for its original tokens, as in `Stream.tokens`
            state = output.state
            count = output.x.shape[1] - state.inserted if state.assignment is None else state.assignment.places
            output_layout = self.layouts_by_count.get(count)
        else:
            output = output[0] if isinstance(output, tuple) and output else output  # tokens, and what else a block hands on
            output_layout = self.layout_of_output(output) if isinstance(output, Tensor) and output.ndim in (3, 4) else None
            if output_layout is not None:
                self.layouts_by_count[output_layout.queries.shape[1]] = output_layout
        if output_layout is not None:
            self.layouts.outputs[name, call_index] = output_layout

    def layout_of_output(self, output: Tensor) -> Layout | None:
        """The layout of an output with one axis of features, or None."""
        places = self.coordinates.of(output)
        if places is None or len(output) != 1:
            return None
        places = thin(places, range(places.ndim - 1))
        # the axes of places are those along which coordinates differ; the one left holds features
        varying = [axis for axis in range(1, output.ndim) if places.shape[axis] > 1]
        if len(varying) != output.ndim - 2 or varying[-1] - varying[0] != len(varying) - 1:
            return None
        constant = next(axis for axis in range(1, output.ndim) if axis not in varying)
        places = places.movedim(constant, -2).flatten(1, -3)  # (1, N, 1, 4)
        # layouts take long to find, and most modules leave tokens where they are
        key = places.numpy().tobytes()
        if key not in self.layouts_by_places:
            self.layouts_by_places[key] = layout(places, None, self.coordinates.size)
        return self.layouts_by_places[key]
