"""Modules as functions of the places of the image: what `lens.formulas.mixing` measures.

`record` notes the inputs of modules in a pass of one image; `placed` finds which axes of input and
output are places, and where these are, and gives the module as a function of tokens.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitreous.base.errors import HostError, UnknownName
from vitreous.hosts.mixer import Mixer
from vitreous.layers.stream import TokenState, restore
from vitreous.lens.coordinates.layout import Layout
from vitreous.lens.formulas.mixing import Function
from vitreous.lens.layer_features import first_tensor
from vitreous.lens.tap import Layouts


@dataclass(frozen=True)
class Places:
    """Where N tokens are: points (N, 2) in pixels, or NaN; cells (N,) of the grid, or -1."""

    grid: tuple[int, int]
    points: Tensor
    cells: Tensor

    @classmethod
    def on_grid(cls, grid: Sequence[int], size: Sequence[int], prefix: int = 0, groups: int = 1) -> Places:
        """A full grid over an image of `size` (height, width), for each group, behind a prefix."""
        y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) * side / n for n, side in zip(grid, size, strict=True))
        points = torch.cartesian_prod(y, x).repeat(groups, 1)
        cells = torch.arange(math.prod(grid)).repeat(groups)
        points = torch.cat([points.new_full((prefix, 2), torch.nan), points])
        return cls(tuple(grid), points, torch.cat([cells.new_full((prefix,), -1), cells]))

    @classmethod
    def of(cls, layout: Layout | None) -> Places | None:
        """Those of a layout's queries; None without a grid of two dimensions, or with windows."""
        if layout is None or layout.grid is None or len(layout.grid) != 2 or layout.windows > 1 or layout.images:
            return None
        return cls(tuple(layout.grid), layout.queries[0], layout.cells[0])

    def followed_by(self, count: int) -> Places:
        """The same with so many tokens without a place behind them."""
        nowhere = self.points.new_full((count, 2), torch.nan), self.cells.new_full((count,), -1)
        return replace(self, points=torch.cat([self.points, nowhere[0]]), cells=torch.cat([self.cells, nowhere[1]]))

    @property
    def patches(self) -> Tensor:
        """(N,) bool: which tokens have a place."""
        return self.cells >= 0

    def picture(self, values: Tensor) -> Tensor:
        """Values (..., N), summed by place, on the grid: (..., rows, columns)."""
        patches = self.patches
        flat = values.new_zeros(*values.shape[:-1], math.prod(self.grid))
        return flat.index_add(-1, self.cells[patches], values[..., patches]).unflatten(-1, self.grid)


@dataclass(frozen=True)
class Call:
    """One call of a module with one image, in full. args, kwargs: copies from before it."""

    name: str
    number: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class PlacedCall:
    """A call as a function: f of tokens x (1, N, D). outputs, inputs: where they are."""

    call: Call
    f: Function
    x: Tensor
    outputs: Places
    inputs: Places


def named_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Dotted names that fit any of the patterns, in the order of the model.

    * stands for a part without dots, ** for any. Raises UnknownName for one that fits nothing.
    """
    names, chosen = [name for name, _ in model.named_modules() if name], set()
    for pattern in patterns:
        expression = ".*".join(re.escape(part).replace(r"\*", "[^.]*") for part in pattern.split("**"))
        fitting = [name for name in names if re.fullmatch(expression, name)]
        if not fitting:
            raise UnknownName(pattern, "module", names, "Patterns are such as blocks.*.attn; ** goes through dots.")
        chosen.update(fitting)
    return [name for name in names if name in chosen]


def record(model: nn.Module, image: Tensor, names: Sequence[str]) -> list[Call]:
    """The calls of these modules in a pass of one image (1, C, h, w), in their order."""
    modules, calls, started, counts = dict(model.named_modules()), [], {}, dict.fromkeys(names, 0)
    handles = []
    for name in names:

        def before(module, args, kwargs, name=name):
            # in-place operations of the module, or behind it, would change what is kept
            started[name] = copied(args), copied(kwargs)

        def after(module, args, kwargs, output, name=name):
            own_args, own_kwargs = started.pop(name)
            calls.append(Call(name, counts[name], module, own_args, own_kwargs, copied(output)))
            counts[name] += 1

        handles.append(modules[name].register_forward_pre_hook(before, with_kwargs=True))
        handles.append(modules[name].register_forward_hook(after, with_kwargs=True))
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def copied(value: Any) -> Any:
    """The same with copies of tensors, also in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(copied(item) for item in value)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value


def placed(call: Call, layouts: Layouts, size: Sequence[int]) -> PlacedCall:
    """The call as a function of places. size: (height, width) of the image.

    A `Mixer` of an opened stream has its places from the stream, and where tokens were merged
    before it, it is the function of the tokens of all places. Others have them from the traced
    pass, or from the shape of a picture. Raises HostError where there are none.
    """
    if isinstance(call.module, Mixer):
        arguments = inspect.signature(call.module.forward).bind(*call.args, **call.kwargs).arguments
        state = arguments.get("state")
        if isinstance(state, TokenState) and state.grid is not None and len(state.grid) == 2:
            x, inserted = restore(arguments["x"], state)
            places = Places.on_grid(state.grid, size, state.prefix, state.groups)
            if call.module.mixes_inserted:
                x, places = torch.cat([x, inserted], dim=1), places.followed_by(inserted.shape[1])
            plain = replace(state, assignment=None, sizes=None)
            return PlacedCall(call, lambda tokens: call.module.mix_tokens(tokens, plain), x, places, places)
    at, x = first_argument(call)
    y = first_tensor(call.output) if call.output is not None else None
    if x is None or not isinstance(y, Tensor) or not (x.is_floating_point() and y.is_floating_point()):
        raise refusal(call, "takes or gives no tensor of features", "one of each")
    outputs, split_output = located(y, call, layouts, size, "output")
    inputs, split_input = located(x, call, layouts, size, "input")

    def f(tokens: Tensor) -> Tensor:
        own = split_input.joined(tokens)
        args, kwargs = list(call.args), dict(call.kwargs)
        if isinstance(at, int):
            args[at] = own
        else:
            kwargs[at] = own
        return split_output.tokens(first_tensor(call.module(*args, **kwargs)))

    return PlacedCall(call, f, split_input.tokens(x), outputs, inputs)


def first_argument(call: Call) -> tuple[int | str, Tensor | None]:
    """Where the first tensor among the arguments is, and the tensor."""
    for at, value in [*enumerate(call.args), *call.kwargs.items()]:
        if isinstance(value, Tensor):
            return at, value
    return 0, None


@dataclass(frozen=True)
class Axes:
    """Which axes of a tensor are images, places and features. shape: with one image."""

    shape: tuple[int, ...]
    batch: int
    spatial: tuple[int, ...]

    @property
    def order(self) -> list[int]:
        """Images, places, features."""
        rest = [axis for axis in range(len(self.shape)) if axis != self.batch and axis not in self.spatial]
        return [self.batch, *self.spatial, *rest]

    def tokens(self, x: Tensor) -> Tensor:
        """x -> (B, N, D)."""
        x = x.permute(self.order)
        return x.flatten(1, len(self.spatial)).flatten(2)

    def joined(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> x, in memory as the module has it."""
        sizes = [self.shape[axis] for axis in self.order[1:]]
        back = [self.order.index(axis) for axis in range(len(self.shape))]
        return tokens.reshape(-1, *sizes).permute(back).contiguous()


def located(x: Tensor, call: Call, layouts: Layouts, size: Sequence[int], side: str) -> tuple[Places, Axes]:
    """Places and axes of an input or output with one image.

    Raises HostError where they are not known.
    """
    shape = tuple(x.shape)
    batch = next((axis for axis in (0, 1) if len(shape) > axis and shape[axis] == 1), None)
    if batch is None or x.ndim < 3:
        what = "has no axis of places" if x.ndim < 3 else "has several rows for one image, such as windows"
        raise refusal(call, f"has an {side} {shape} that {what}", "tokens (B, N, D) or a picture (B, C, h, w) or (B, h, w, C)")
    key = call.name, call.number
    own = Places.of(layouts.outputs.get(key))
    features = layouts.feature_axes.get(key)
    others = (Places.of(layout) for layout in layouts.outputs.values())
    for places in filter(None, (own, *others)):
        candidates = axes_of(shape, batch, places)
        if len(candidates) > 1 and features is not None and x.ndim == len(first_tensor(call.output).shape):
            candidates = [axes for axes in candidates if features not in axes.spatial] or candidates
        if candidates:
            return places, candidates[0]
    if x.ndim >= 4:  # a picture on a grid of its own: channels first, unless only the other way has two equal sides
        last = x.ndim - 1
        channels_last = shape[last - 2] == shape[last - 1] != shape[last]
        spatial = (last - 2, last - 1) if channels_last else (last - 1, last)
        return Places.on_grid([shape[axis] for axis in spatial], size), Axes(shape, batch, spatial)
    raise refusal(call, f"has an {side} {shape} whose places in the image are not known", "a grid, or as many tokens as one")


def axes_of(shape: tuple[int, ...], batch: int, places: Places) -> list[Axes]:
    """The ways in which a tensor can hold these places: a picture first, else tokens."""
    rest = [axis for axis in range(len(shape)) if axis != batch]
    whole = len(places.cells) == math.prod(places.grid)
    pairs = [(a, b) for a, b in itertools.pairwise(rest) if b == a + 1 and (shape[a], shape[b]) == places.grid]
    if whole and pairs and len(shape) > 3:
        # cells of a picture are in raster order; channels first is the more frequent of two
        return [Axes(shape, batch, pair) for pair in reversed(pairs)]
    return [Axes(shape, batch, (axis,)) for axis in rest if shape[axis] == len(places.cells)]


def refusal(call: Call, found: str, expected: str) -> HostError:
    """An error of three parts about a module."""
    return HostError(
        f"Found that {call.name} ({type(call.module).__name__}) {found}. Expected {expected}. Name another module, such as the "
        "one around it."
    )
