"""Rules for calls that move values without mixing them: views, gathers, joins, padding.

A rule takes a `TensorOp` and returns the `CoordinateField` of its output, a list of them (one per
output) or None (no place). Most apply the very call to each part, without the axes along which the
part is constant (stride 0), so that it costs as little as a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreous.lens.coordinates.field import (
    CoordinateField,
    TensorOp,
    broadcast,
    equal_parts,
    mean_over,
    parts_of_set,
    shape_of,
    thin,
    to_cpu,
)

# --- values that stay where they are, and views ---------------------------------------------------


def keep(op: TensorOp) -> CoordinateField | None:
    """Elementwise with one tensor, normalisation, activation, softmax, cast, copy, expand."""
    return op.source and op.source.map_parts(lambda part: thin(part).expand(shape_of(op.out)))


def view(op: TensorOp) -> CoordinateField | list[CoordinateField] | None:
    """The same view of every part; several outputs give several fields."""
    field = op.source
    if field is None:
        return None
    moved = [[op.apply(part) for part in parts] for parts in field.sets]
    if isinstance(op.out, Tensor):
        return replace(field, sets=tuple(map(tuple, moved)))
    count = len(op.out)
    return [replace(field, sets=tuple(tuple(p[i] for p in parts) for parts in moved)) for i in range(count)]


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Axes of two shapes in the smallest groups of equal size.

    Yields (axes of old, axes of new).
    """
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news, a, b = [], [], 1, 1
        if i < len(old):
            a, i = old[i], i + 1
            olds.append(i - 1)
        if j < len(new):
            b, j = new[j], j + 1
            news.append(j - 1)
        # take axes of the side whose product is smaller, until both are equal
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
                olds.append(i - 1)
            else:
                b, j = b * new[j], j + 1
                news.append(j - 1)
        yield olds, news


def refold(part: Tensor, shape: Sequence[int]) -> Tensor:
    """`reshape` that keeps stride 0 along axes on which nothing changes."""
    if not part.numel():
        return part.reshape(tuple(shape))
    small = list(shape)
    for olds, news in blocks(part.shape, shape):
        # a constant group of axes is one element before, and is expanded again after
        if all(part.shape[axis] == 1 or part.stride(axis) == 0 for axis in olds):
            part = thin(part, olds)
            for axis in news:
                small[axis] = 1
    return part.reshape(small).expand(tuple(shape))


def fold(op: TensorOp) -> CoordinateField | None:
    """reshape, view, flatten, unflatten, squeeze, unsqueeze: elements keep their order."""
    field, shape = op.source, shape_of(op.out)
    if field is None or field.sets[0][0].numel() != op.out.numel():
        return None
    return field.map_parts(lambda part: refold(part, shape))


def roll(op: TensorOp) -> CoordinateField | None:
    """roll and flip, without axes of stride 0."""
    # without dims, roll works on the flattened tensor, where no axis can be left out
    if "dims" not in op.arguments("input", "shifts", "dims") and op.name == "roll":
        return view(op)
    return op.source and op.source.map_parts(lambda part: op.apply(thin(part)).expand(shape_of(op.out)))


def repeat(op: TensorOp) -> CoordinateField | None:
    """repeat, tile, repeat_interleave."""
    field, shape = op.source, shape_of(op.out)
    if field is None:
        return None

    def change(part: Tensor) -> Tensor:
        # repeat_interleave repeats along one axis, which the call itself names
        if len(shape) == 1 or op.name == "repeat_interleave":
            return op.apply(part)
        lead = part.expand((1,) * (len(shape) - part.ndim) + tuple(part.shape))
        slim = thin(lead)
        # an axis of length 1 is expanded below instead of copied
        times = [1 if have == 1 else want // have for have, want in zip(slim.shape, shape, strict=True)]
        return slim.repeat(times).expand(shape)

    return field.map_parts(change)


def pick(op: TensorOp) -> CoordinateField | None:
    """`tensor[index]` with the very index; axes after those that it names are not read."""
    field, index = op.source, to_cpu(op.args[1])
    if field is None:
        return None
    items = index if isinstance(index, tuple) else (index,)
    used = sum(item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else item is not None for item in items)
    shape = shape_of(op.out)

    def change(part: Tensor) -> Tensor:
        # slices and integers make a view, which keeps stride 0 by itself
        if not any(isinstance(item, Tensor | list) for item in items) or any(item is Ellipsis for item in items):
            return part[index]
        return thin(part, range(used, part.ndim))[index].expand(shape)

    return field.map_parts(change)


def has_list(index: Any) -> bool:
    """True if an index holds a list, which takes elements in an order of its own."""
    return any(isinstance(item, list) for item in (index if isinstance(index, tuple) else (index,)))


def gather(op: TensorOp) -> CoordinateField | None:
    """gather, take_along_dim, without axes on which neither places nor indices change."""
    along = op.name == "take_along_dim"
    arguments = op.arguments("input", *(("indices", "dim") if along else ("dim", "index")))
    field, index, dim = op.source, to_cpu(arguments["indices" if along else "index"]), arguments.get("dim")
    if field is None or dim is None:
        return None
    shape = shape_of(op.out)

    def change(part: Tensor) -> Tensor:
        flat = index
        for axis in range(part.ndim):
            if axis == dim % part.ndim or part.stride(axis) != 0 or part.shape[axis] == 1:
                continue
            if flat.stride(axis) == 0 or flat.shape[axis] == 1:
                part, flat = part.narrow(axis, 0, 1), flat.narrow(axis, 0, 1)
        return (torch.take_along_dim(part, flat, dim) if along else part.gather(dim, flat)).expand(shape)

    return field.map_parts(change)


def select(op: TensorOp) -> CoordinateField | None:
    """index_select, without other axes of stride 0."""
    arguments = op.arguments("input", "dim", "index")
    dim, index, shape = arguments["dim"], to_cpu(arguments["index"]), shape_of(op.out)

    def change(part: Tensor) -> Tensor:
        if part.stride(dim) == 0:
            return part.narrow(dim, 0, 1).expand(shape)
        return thin(part).index_select(dim, index).expand(shape)

    return op.source and op.source.map_parts(change)


def sort(op: TensorOp) -> list[CoordinateField | None] | None:
    """topk, sort: values come from where their indices point; the indices have no field."""
    if op.source is None:
        return None
    index = to_cpu(op.out[1])
    dim = op.arguments("input", *(("k", "dim") if op.name == "topk" else ("dim",))).get("dim", -1)
    # indices are integers and have no place of their own
    return [op.source.map_parts(lambda part: part.gather(dim, index)), None]


# --- several tensors into one ---------------------------------------------------------------------


def join(op: TensorOp) -> CoordinateField | None:
    """cat and stack: pieces without places become NaN.

    Axes on which no piece changes stay of stride 0.
    """
    arguments = op.arguments("tensors", "dim")
    tensors, dim = list(arguments["tensors"]), arguments.get("dim", arguments.get("axis", 0))
    fields = [op.field(tensor) for tensor in tensors]
    if not any(fields):
        return None
    shape, new = shape_of(op.out), op.name == "stack"
    if op.name in ("hstack", "vstack"):
        dim = 0 if op.name == "vstack" or len(shape) == 1 else 1
    sets = []
    for which in range(max(len(field.sets) for field in fields if field)):
        pieces = []
        for tensor, field in zip(tensors, fields, strict=True):
            if tensor.ndim == len(shape) - new and tensor.numel():  # cat takes empty pieces of any shape
                parts = parts_of_set(field, which, tensor.shape)
                pieces.append(tuple(part.unsqueeze(dim) for part in parts) if new else parts)
        sets.append(tuple(_joined([piece[i] for piece in pieces], dim, shape) for i in range(4)))
    return CoordinateField(tuple(sets), any(field.is_channel_product for field in fields if field))


def _joined(pieces: list[Tensor], dim: int, shape: tuple[int, ...]) -> Tensor:
    """One part of all pieces joined along `dim`."""
    for axis in range(len(shape)):
        fixed = all(piece.stride(axis) == 0 or piece.shape[axis] == 1 for piece in pieces)
        if fixed and axis != dim % len(shape):
            pieces = [piece.narrow(axis, 0, 1) for piece in pieces]
        # pieces with the same places, as the halves of a rotation: constant along the joined axis
        # too
        elif fixed and all(equal_parts(thin(pieces[0]), thin(piece)) for piece in pieces[1:]):
            return pieces[0].narrow(axis, 0, 1).expand(shape)
    slim = torch.broadcast_shapes(*(piece.select(dim, 0).shape for piece in pieces))
    axis = dim % len(shape)
    # what is still constant in all pieces was narrowed above and is expanded at the end
    pieces = [piece.expand(*slim[:axis], piece.shape[axis], *slim[axis:]) for piece in pieces]
    return torch.cat(pieces, axis).expand(shape)


def glu(op: TensorOp) -> CoordinateField | None:
    """glu: half of the axis gates the other half; the mean place of both."""
    dim = op.arguments("input", "dim").get("dim", -1)
    shape = shape_of(op.out)
    return op.source and CoordinateField(tuple(broadcast(mean_over(parts, dim), shape) for parts in op.source.sets))


def complex_view(op: TensorOp) -> CoordinateField | None:
    """view_as_complex, view_as_real: both numbers of a pair are at one place."""
    if op.name == "view_as_complex":
        return op.source and op.source.map_parts(lambda part: part[..., 0])
    return op.source and op.source.map_parts(lambda part: part[..., None].expand(shape_of(op.out)))


# --- padding, patches, writing --------------------------------------------------------------------


def pad(op: TensorOp) -> CoordinateField | None:
    """pad: constant padding has no place; reflection and the like repeat places."""
    arguments = op.arguments("input", "pad", "mode", "value")
    sides, field = list(arguments["pad"]), op.source
    if field is None:
        return None
    if op.name == "pad" and arguments.get("mode", "constant") != "constant":
        return field.map_parts(op.apply)
    shape = shape_of(op.out)

    def change(part: Tensor) -> Tensor:
        # pad counts pairs of sides from the last axis
        padded = [axis for axis in range(part.ndim) if any(sides[2 * (part.ndim - 1 - axis) :][:2])]
        # NaN: constant padding has no place
        return F.pad(thin(part, set(range(part.ndim)) - set(padded)), sides, value=torch.nan).expand(shape)

    return field.map_parts(change)


def patches(op: TensorOp) -> CoordinateField | None:
    """`Tensor.unfold` is a view; `F.unfold` lays windows (C k k) along the channels.

    The padding of the latter has no place.
    """
    field = op.source
    if field is None or op.func in (Tensor.unfold, torch.Tensor.unfold):
        return view(op)
    arguments = op.arguments("input", "kernel_size", "dilation", "padding", "stride")
    padding, channels = pair(arguments.get("padding", 0)), op.first.shape[-3]
    settings = {name: arguments.get(name, 1) for name in ("dilation", "stride")}

    def change(part: Tensor) -> Tensor:
        slim = thin(part, (-3,))
        # padded with NaN here, as F.unfold itself pads with 0, which would be a place
        wide = F.pad(slim, (padding[1], padding[1], padding[0], padding[0]), value=torch.nan)
        windows = F.unfold(wide, arguments["kernel_size"], **settings).unflatten(-2, (slim.shape[-3], -1))
        return refold(windows.expand(*windows.shape[:-3], channels, *windows.shape[-2:]), shape_of(op.out))

    return field.map_parts(change)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A setting for both image axes."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def write(op: TensorOp) -> CoordinateField | None:
    """Writing into a tensor: what is written brings its place along.

    `tensor[index] = value`, scatter, index_copy, copies into slices.
    """
    target = op.first
    values = op.args[-1] if len(op.args) > 2 else next(reversed(op.kwargs.values()), None)
    base, field = op.source, op.field(values)
    # a number that is written has no place, and leaves those of the target
    if not isinstance(values, Tensor) or (base is None and field is None):
        return base
    rest = [to_cpu(value) for value in op.args[1:]]

    def written(p: Tensor, q: Tensor) -> Tensor:
        if op.name == "setitem":
            p, q = _slim(p, q, rest[0])
            p = p.clone(memory_format=torch.contiguous_format)
            # the part was cloned: parts are shared between tensors
            p[rest[0]] = q
            return p.expand(target.shape)
        p = p.clone(memory_format=torch.contiguous_format)
        if len(op.args) > 2:
            return op.out_of_place(p, *rest[:-1], q)
        return op.out_of_place(p, *rest, **{n: q if v is values else to_cpu(v) for n, v in op.kwargs.items()})

    sets = []
    for which in range(max(len(f.sets) for f in (base, field) if f)):
        pairs = zip(parts_of_set(base, which, target.shape), parts_of_set(field, which, values.shape), strict=True)
        sets.append(tuple(written(p, q) for p, q in pairs))
    return CoordinateField(tuple(sets), bool(base and base.is_channel_product) or bool(field and field.is_channel_product))


def _slim(p: Tensor, q: Tensor, index: Any) -> tuple[Tensor, Tensor]:
    """Both without axes of stride 0 that the index takes in full."""
    items = index if isinstance(index, tuple) else (index,)
    # only slices keep the axes of both in step
    if p.ndim != q.ndim or not all(isinstance(item, slice) for item in items):
        return p, q
    for axis in range(p.ndim):
        whole = axis >= len(items) or items[axis].indices(p.shape[axis]) == (0, p.shape[axis], 1)
        if whole and p.stride(axis) == 0 and (q.stride(axis) == 0 or q.shape[axis] == 1):
            p, q = p.narrow(axis, 0, 1), q.narrow(axis, 0, 1)
    return p, q


def copy(op: TensorOp) -> CoordinateField | None:
    """copy_: the places of what is copied."""
    field = op.field(op.args[1])
    return field and field.map_parts(lambda part: part.expand(shape_of(op.out)))
