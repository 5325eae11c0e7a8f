"""`Tracer`: shapes, coordinates and kinds of every call, from a pass with one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitreous.hosts.stream_ends import Opening
from vitreous.layers.stream import Stream
from vitreous.lens.coordinates.coordinate_tracer import CoordinateTracer, plain_name
from vitreous.lens.coordinates.field import thin
from vitreous.lens.coordinates.layout import Layout, channel, is_full, layout, without_places
from vitreous.lens.coordinates.token_names import TokenNames
from vitreous.lens.tap.attention_call import POOLED, Arrangement, output_sample
from vitreous.lens.tap.attention_op import AttentionOp, Factors, Key, OperandView, Receiver, guess_factors
from vitreous.lens.tap.module_stack import ModuleStack
from vitreous.lens.tap.tensor_set import TensorSet


@dataclass(frozen=True)
class Traced:
    """One call of a pass with one image.

    lead: sizes of its leading axes. factors: of these (see `Arrangement`). kind, layout: as in
    `AttentionCall`. sample: entries of its output, as of `output_sample`.
    choice: what chose its tokens by value or chance, so that each image has other places.
    first_token: as in `AttentionCall`.
    """

    lead: tuple[int, ...]
    factors: Factors
    kind: str = "token"
    layout: Layout | None = None
    sample: Tensor | None = field(default=None, repr=False)
    choice: str = ""
    first_token: str = ""


@dataclass
class Layouts:
    """Where the queries and keys of every call are, from a pass with one image.

    calls: by (call name, call index). outputs: layouts of module outputs, by (module name, call
        index); feature_axes: the axis of each of these outputs that holds features.
    image: the traced image (1, C, h, w), until a batch that begins with it was compared with it.
    orders: which of the possible arrangements of each call holds, found by that comparison.
    unsure: notes on calls of which it could not be told.
    moved: calls whose output for the traced image is another one in a batch.
    earlier_tensors: of passes before; what is not among them later was computed out of sight.
    """

    calls: dict[Key, Traced] = field(default_factory=dict)
    outputs: dict[Key, Layout] = field(default_factory=dict)
    feature_axes: dict[Key, int] = field(default_factory=dict)
    image: Tensor | None = field(default=None, repr=False)
    orders: dict[Key, int] = field(default_factory=dict)
    unsure: dict[Key, str] = field(default_factory=dict)
    moved: set[Key] = field(default_factory=set)
    earlier_tensors: TensorSet = field(default_factory=TensorSet, repr=False)  # tensors of earlier passes

    def full(self) -> list[Layout]:
        """Layouts in which every patch of a grid is, each once."""
        every = (*self.outputs.values(), *(traced.layout for traced in self.calls.values() if not traced.choice))
        return list({id(each): each for each in every if each is not None and is_full(each)}.values())


def located_sides(op: AttentionOp) -> tuple[OperandView, OperandView]:
    """The operands that say where queries and keys are.

    Without a product, the output stands for the queries and V for the keys.
    """
    return (op.q, op.k) if op.q is not None else (op.weighted_sum.output_view, op.weighted_sum.v_view)


def places_of_sides(coordinates: CoordinateTracer, op: AttentionOp) -> list[Tensor]:
    """Coordinates (..., N, K, 4) of queries and (..., M, K, 4) of keys; NaN if they have none.

    As of `CoordinateTracer.of`; axes along which they are constant have size 1 or stride 0.
    """
    sides = []
    for (tensor, view), x in zip(located_sides(op), (op.output, op.v), strict=True):
        places, count = coordinates.of(tensor), x.shape[-2]
        if places is None:
            sides.append(torch.full((count, 1, 4), math.nan, dtype=torch.float64))
            continue
        places = view(thin(places, range(places.ndim - 1)))
        sides.append(places.expand(*places.shape[:-3], count, *places.shape[-2:]))
    return sides


class Tracer(Receiver):
    """Records shapes and layouts of every attention, and layouts of module outputs."""

    def __init__(self, image: Tensor, parameters: Mapping[str, nn.Parameter] | None = None):
        """image: (1, C, h, w). parameters: of the model, by name, to name tokens after."""
        super().__init__()
        with torch._C.DisableTorchFunction():  # a tap around this one follows no tensors of ours
            self.layouts = Layouts(image=image.clone())
        self.coordinates, self.names = CoordinateTracer(image), TokenNames(parameters or {})
        self.layouts_by_places: dict[bytes, Layout | None] = {}  # most modules leave tokens where they are
        self.layouts_by_count: dict[int, Layout] = {}  # the last layout of so many tokens
        self.shared_layouts: dict[tuple, Layout] = {}  # layouts of calls by what they say

    def follow(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Move coordinates through a call."""
        self.coordinates.follow(func, tuple(args), kwargs, out)
        self.names.follow(plain_name(func), args, kwargs, out)

    def read(self, name: str, tensor: Tensor) -> None:
        """Note which values came to Python code."""
        self.coordinates.read(name, tensor)

    def attention(self, stack: ModuleStack, op: AttentionOp) -> None:
        """Record the leading axes, factors, kind and layout of an attention."""
        self.count += 1
        product = op.weighted_sum is None or op.weighted_sum.product is not None
        kind = "token" if product else "pooling"
        sides = located_sides(op)
        query, key = places_of_sides(self.coordinates, op)
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
        # our own grafts record what they choose, image by image
        choice = "" if stack.state.assignment is not None else self.coordinates.choice(*(side[0] for side in sides))
        self.layouts.calls[self.key(stack)] = Traced(
            op.lead, factors, kind, call_layout, sample, choice, self.first_token(call_layout, query)
        )

    def first_token(self, call_layout: Layout | None, query: Tensor) -> str:
        """What the first query is, if it has no place: a parameter, or a pooled token."""
        if call_layout is None or not call_layout.prefix:
            return ""
        if bool(query[..., 0, :, 0].isfinite().any()):  # it has a place, which is that of everything
            return POOLED
        return next(iter(self.names.joined.get(call_layout.queries.shape[1], ())), "")

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
            output_layout, features = None, -1
            if isinstance(output, Tensor) and output.ndim in (3, 4):
                output_layout, features = self.layout_of_output(output)
            if output_layout is not None and self.coordinates.choice(output):
                output_layout = without_places(output_layout)  # which token is where differs from image to image
            elif output_layout is not None:
                self.layouts.feature_axes[name, call_index] = features
                self.layouts_by_count[output_layout.queries.shape[1]] = output_layout
        if output_layout is not None:
            self.layouts.outputs[name, call_index] = output_layout

    def layout_of_output(self, output: Tensor) -> tuple[Layout | None, int]:
        """The layout of an output with one axis of features, or None, and that axis."""
        places = self.coordinates.of(output)
        if places is None or len(output) != 1:
            return None, -1
        places = thin(places, range(places.ndim - 1))
        # the axes of places are those along which coordinates differ; the one left holds features
        varying = [axis for axis in range(1, output.ndim) if places.shape[axis] > 1]
        if len(varying) != output.ndim - 2 or varying[-1] - varying[0] != len(varying) - 1:
            return None, -1
        constant = next(axis for axis in range(1, output.ndim) if axis not in varying)
        places = places.movedim(constant, -2).flatten(1, -3)  # (1, N, 1, 4)
        # layouts take long to find, and most modules leave tokens where they are
        key = places.numpy().tobytes()
        if key not in self.layouts_by_places:
            self.layouts_by_places[key] = layout(places, None, self.coordinates.size)
        return self.layouts_by_places[key], constant
