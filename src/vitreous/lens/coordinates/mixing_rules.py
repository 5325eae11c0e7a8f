"""Rules for calls that mix values: sums, filters, products and merges, at a mean place.

Residual sums take the mean of what has a place. A product takes the place of what does not vary
along the contracted axis: a linear layer its row's, attention its query's. A rule takes a
`TensorOp` and returns the `CoordinateField` of its output or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreous.lens.coordinates.contraction import Labels, labelled
from vitreous.lens.coordinates.field import (
    CoordinateField,
    Parts,
    TensorOp,
    average,
    broadcast,
    is_constant,
    is_constant_along,
    mean_over,
    parts_of_set,
    parts_of_sum,
    shape_of,
    thin,
    to_cpu,
    variance,
)
from vitreous.lens.coordinates.view_rules import pair, refold

# --- elementwise ----------------------------------------------------------------------------------


def combine(op: TensorOp) -> CoordinateField | None:
    """Sums, products, `where` of several tensors: the mean of what has a place.

    A single place beside many (a gate from a pooled token) says nothing about them and is left out.
    Something with one set of places beside scores with two (a bias) leaves these as they are.
    """
    shape = shape_of(op.out)
    fields = [field for value in (*op.args, *op.kwargs.values()) if (field := op.field(value))]
    most = max((len(field.sets) for field in fields), default=0)
    # scores have two sets; a bias or mask added to them has one, or none
    fields = [field for field in fields if len(field.sets) == most]
    if len(fields) > 1:
        # if all are constant, one is kept: the sum of pooled tokens is where they are
        fields = [field for field in fields if not all(map(is_constant, field.sets))] or fields[:1]
    if not fields:
        return None
    sets = [broadcast(parts, shape) for parts in fields[0].sets]
    for field in fields[1:]:
        sets = [parts_of_sum(a, broadcast(parts, shape)) for a, parts in zip(sets, field.sets, strict=True)]
    return CoordinateField(tuple(broadcast(parts, shape) for parts in sets), any(field.is_channel_product for field in fields))


def extreme(op: TensorOp) -> CoordinateField | None:
    """max, min: elementwise of two tensors, or over an axis."""
    # torch.max(x, 1) reduces, torch.max(x, y) compares
    two = isinstance(op.arguments("input", "other").get("other"), Tensor)
    return combine(op) if two else reduce(op)


# --- means over axes and footprints ---------------------------------------------------------------


def reduce(op: TensorOp) -> CoordinateField | None:
    """mean, sum, norm, variance, ... over axes: the mean place of what was reduced."""
    second = ("input", "p", "dim") if op.name in ("norm", "vector_norm") else ("input", "dim")
    arguments = op.arguments(*second)
    axes, field = arguments.get("dim", arguments.get("axis")), op.source
    if field is None or not isinstance(op.first, Tensor):
        return None
    size = tuple(op.first.shape)
    axes = list(range(len(size))) if axes is None or isinstance(axes, bool) or axes == () else axes
    axes = [axis % len(size) for axis in ([axes] if isinstance(axes, int) else axes)]
    reduced_shape = [1 if axis in axes else length for axis, length in enumerate(size)]
    shape = shape_of(op.out)
    return CoordinateField(
        tuple(tuple(refold(part, shape) for part in broadcast(mean_over(parts, axes), reduced_shape)) for parts in field.sets)
    )


def _channels(parts: Parts, axis: int, groups: int = 1) -> Parts:
    """Mean over channels, or over each group where channels differ in places."""
    # channels at one place need no groups, as nearly always
    if groups == 1 or all(part.stride(axis) == 0 for part in parts):
        return mean_over(parts, axis)
    split = tuple(part.unflatten(axis, (groups, -1)) for part in parts)
    return tuple(part.squeeze(axis + 1) for part in mean_over(split, axis + 1))


def _spatial(
    op: TensorOp, axes: int, total: Callable[[Tensor], Tensor], groups: int = 1, sides: Sequence[int] = ()
) -> CoordinateField | None:
    """Places (..., C, *space) under a linear operator on (n, 1, *space).

    total: the operator, which gets parts of one channel. sides: (before, after) of each axis, by
    which the image is continued over its border, so that zero padding pulls nothing in.
    """
    field, shape = op.source, shape_of(op.out)
    if field is None:
        return None
    channel = op.first.ndim - axes - 1
    space = tuple(op.first.shape[channel + 1 :])

    def filtered(parts: Parts) -> Parts:
        parts = _channels(parts, channel, groups)
        # only axes along which parts vary are filtered; the result is expanded
        small = torch.broadcast_shapes(*(thin(part).shape[: channel + 1] for part in parts))
        flat = tuple(thin(part).expand(*small, *space).reshape(-1, 1, *space) for part in parts)
        for axis in range(len(sides) // 2):
            # zero padding would count as places at 0, or as missing ones that shift the mean inward
            flat = _extrapolate(flat, axis - axes, *sides[2 * axis : 2 * axis + 2])
        filtered_parts = [part.reshape(*small, *shape[channel + 1 :]) for part in average(flat, total)]
        if small[-1] > 1:
            # one mean per group serves all output channels of the group
            filtered_parts = [part.repeat_interleave(shape[channel] // small[-1], channel) for part in filtered_parts]
        return tuple(part.expand(shape) for part in filtered_parts)

    return CoordinateField(tuple(map(filtered, field.sets)), field.is_channel_product)


def convolve(op: TensorOp) -> CoordinateField | None:
    """Convolution: the mean over the footprint and the channels; padding has no place."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    arguments, axes = op.arguments(*names), int(op.name[-2])
    kernel, groups = tuple(arguments["weight"].shape[2:]), arguments.get("groups", 1)
    stride, dilation = _per_axis(arguments.get("stride", 1), axes), _per_axis(arguments.get("dilation", 1), axes)
    padding = arguments.get("padding", 0)
    if isinstance(padding, str):
        reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        # "same" pads one more on the right where the footprint is even
        left = [n // 2 for n in reach] if padding == "same" else [0] * axes
    else:
        left = _per_axis(padding, axes)
    # a filter of one pixel is a linear layer, which leaves places alone
    if {*kernel, *stride, groups} == {1} and not any(left):
        return linear(op, -1 - axes)
    return _windowed(op, kernel, stride, left, dilation, groups)


def pool(op: TensorOp) -> CoordinateField | list[CoordinateField | None] | None:
    """Average and maximum pooling: the mean over the footprint."""
    axes = int(op.name[-2])
    names = ("input", "kernel_size", "stride", "padding", *(("dilation",) if "max" in op.name else ()))
    arguments = op.arguments(*(names if "lp" not in op.name else ("input", "norm_type", "kernel_size", "stride")))
    kernel = _per_axis(arguments["kernel_size"], axes)
    stride = _per_axis(arguments.get("stride") or kernel, axes)
    left, dilation = _per_axis(arguments.get("padding", 0), axes), _per_axis(arguments.get("dilation", 1), axes)
    field = _windowed(op, kernel, stride, left, dilation, op.first.shape[-axes - 1])
    return field if isinstance(op.out, Tensor) else [field, None]


def adapt(op: TensorOp) -> CoordinateField | list[CoordinateField | None] | None:
    """Adaptive average and maximum pooling."""
    axes = int(op.name[-2])
    out = shape_of(op.out)[-axes:]
    operator = getattr(F, f"adaptive_avg_pool{axes}d")
    field = _each_channel(op, axes, lambda part: operator(part, out))
    return field if isinstance(op.out, Tensor) else [field, None]


def _each_channel(op: TensorOp, axes: int, total: Callable[[Tensor], Tensor]) -> CoordinateField | None:
    """`_spatial` with every channel on its own."""
    return _spatial(op, axes, total, op.first.shape[-axes - 1])


def _per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    """A setting as one number per axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _windowed(
    op: TensorOp, kernel: Sequence[int], stride: Sequence[int], left: Sequence[int], dilation: Sequence[int], groups: int
) -> CoordinateField | None:
    """Means over windows, as many as the call itself gave."""
    axes, sides = len(kernel), []
    for i, (size, out) in enumerate(zip(op.first.shape[-axes:], shape_of(op.out)[-axes:], strict=True)):
        # the length that the windows reach over; ceil_mode and output sizes are in `out` already
        need = (out - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        sides += [left[i], need - left[i] - size]

    def total(part: Tensor) -> Tensor:
        # avg_pool is faster than a convolution with ones, but knows no dilation
        if max(dilation) == 1 and axes > 1:
            return getattr(F, f"avg_pool{axes}d")(part, tuple(kernel), tuple(stride), divisor_override=1)
        ones = torch.ones(1, 1, *kernel, dtype=part.dtype, device="cpu")
        return getattr(F, f"conv{axes}d")(part, ones, stride=tuple(stride), dilation=tuple(dilation))

    return _spatial(op, axes, total, groups, sides)


def _extrapolate(parts: Parts, axis: int, before: int, after: int) -> Parts:
    """Parts longer on both sides of an axis (or cut).

    Places go on as at the border; variance and mass stay.
    """
    y, x, _, mass = parts
    size = mass.shape[axis]
    wanted = torch.arange(-before, size + after)
    inside = wanted.clamp(0, size - 1)
    inner = (2 * inside - wanted).clamp(0, size - 1)  # mirrored at the border
    # how many steps beyond the border, in units of the mirrored step
    far = torch.where(inner == inside, 0.0, (wanted - inside) / (inside - inner)).double()
    far = far.reshape(-1, *(1,) * (-1 - axis))
    width = variance(parts)
    y, x = (p.index_select(axis, inside) + (p.index_select(axis, inside) - p.index_select(axis, inner)) * far for p in (y, x))
    return y, x, width.index_select(axis, inside) + y.square() + x.square(), mass.index_select(axis, inside)


def transpose_convolve(op: TensorOp) -> CoordinateField | None:
    """Transposed convolution: the mean of what reaches a place."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    arguments, axes = op.arguments(*names), int(op.name[-2])
    names = ("stride", "padding", "output_padding", "dilation")
    settings = {name: arguments[name] for name in names if name in arguments}
    ones = torch.ones(1, 1, *arguments["weight"].shape[2:], dtype=torch.float64, device="cpu")
    operator = getattr(F, f"conv_transpose{axes}d")
    return _spatial(op, axes, lambda part: operator(part, ones, **settings))


def resize(op: TensorOp) -> CoordinateField | None:
    """interpolate: bilinear stands in for bicubic."""
    arguments = op.arguments("input", "size", "scale_factor", "mode", "align_corners")
    axes, mode = op.first.ndim - 2, arguments.get("mode", "nearest")
    # bicubic weights are negative in places, and a mean needs non-negative ones
    mode = "bilinear" if mode == "bicubic" else mode
    corners = arguments.get("align_corners") if "linear" in mode else None
    size = shape_of(op.out)[-axes:]
    return _each_channel(op, axes, lambda part: F.interpolate(part, size, mode=mode, align_corners=corners))


def sample(op: TensorOp) -> CoordinateField | None:
    """grid_sample: bilinear means at the very points."""
    arguments = op.arguments("input", "grid", "mode", "padding_mode", "align_corners")
    axes, mode, grid = op.first.ndim - 2, arguments.get("mode", "bilinear"), to_cpu(arguments["grid"]).double()
    mode, corners = "nearest" if mode == "nearest" else "bilinear", arguments.get("align_corners")

    def total(part: Tensor) -> Tensor:
        points = grid.expand(part.shape[0], *grid.shape[1:])
        return F.grid_sample(part, points, mode, arguments.get("padding_mode", "zeros"), corners)

    return _spatial(op, axes, total)


def fold(op: TensorOp) -> CoordinateField | None:
    """`F.fold`: overlapping windows (C k k) are added up where they lie."""
    names = ("input", "output_size", "kernel_size", "dilation", "padding", "stride")
    arguments = op.arguments(*names)
    settings = {name: arguments[name] for name in names[3:] if name in arguments}
    kernel, field, shape = pair(arguments["kernel_size"]), op.source, shape_of(op.out)
    if field is None or op.first.ndim != 3:
        return None
    inner = (op.first.shape[0], shape[1], kernel[0] * kernel[1], op.first.shape[-1])
    parts = mean_over(tuple(refold(part, inner) for part in field.sets[0]), 1)
    flat = tuple(part.squeeze(1) for part in broadcast(parts, (inner[0], 1, *inner[2:])))
    means = average(flat, lambda part: F.fold(part, arguments["output_size"], kernel, **settings))
    return CoordinateField((tuple(part.expand(shape) for part in means),))


# --- products -------------------------------------------------------------------------------------


def contract(op: TensorOp, operands: Sequence[tuple[Tensor, Labels]], out: Labels) -> CoordinateField | None:
    """Places of a product of one or two tensors whose axes have labels, as in einsum.

    Labels that are not in `out` are summed. Sets that do not vary along a summed axis give the
    place: one, or two (rows and columns of scores). A single place beside many says nothing and is
    left out, unless it is no place at all (a class token's query). If all vary: the mean, of what a
    factor without places does not multiply by 0 (a matrix that selects or merges tokens).
    """
    fixed, loose, own, shape = [], [], [], shape_of(op.out)
    for i, (tensor, labels) in enumerate(operands):
        field = op.field(tensor)
        others = {label for j, (_, theirs) in enumerate(operands) if j != i for label in theirs}
        # labels of the output that this operand alone has
        own += [out.index(label) for label in labels if label in out and label not in others]
        for parts in field.sets if field else ():
            steady = all(is_constant_along(parts, axis) for axis, label in enumerate(labels) if label not in out)
            # an operand that is at one place along the sum gives its own place
            (fixed if steady else loose).append(broadcast(_aligned(parts, labels, out), shape))
    if fixed:
        # an operand that is nowhere in particular, as a pooled one, does not place the rows
        informative = [parts for parts in fixed if not is_constant(parts) or parts[0].isnan().all()]
        return CoordinateField(tuple((informative or fixed[:1])[:2]))
    if not loose:
        return None
    by_place = sorted(operands, key=lambda operand: op.field(operand[0]) is None)
    if len(operands) > 1 and op.field(by_place[1][0]) is None and bool((by_place[1][0] == 0).any()):
        # zeros of the other factor select tokens: only what they let through counts
        (tensor, labels), (mask, its_labels) = by_place
        return CoordinateField((_masked_mean(op.field(tensor).sets[0], labels, to_cpu(mask) != 0, its_labels, out),))
    both_have_places = all(op.field(tensor) is not None for tensor, _ in operands)
    return CoordinateField(
        (loose[0],), both_have_places and all(is_constant_along(parts, axis) for parts in loose for axis in own)
    )


def _masked_mean(parts: Parts, labels: Labels, mask: Tensor, its_labels: Labels, out: Labels) -> Parts:
    """Means over summed labels of the elements that a second operand does not multiply by 0."""
    shape, slim = parts[0].shape, tuple(thin(part) for part in parts)
    widths = [max(part.shape[axis] for part in slim) for axis in range(len(shape))]
    small_shape = [width if label in out else n for width, label, n in zip(widths, labels, shape, strict=True)]
    sizes = dict(zip(its_labels, mask.shape, strict=True)) | dict(zip(labels, shape, strict=True))
    # torch.einsum takes numbers in place of letters
    numbers = {label: i for i, label in enumerate(sorted(sizes, key=str))}
    axes = [[numbers[label] for label in of] for of in (labels, its_labels, out)]
    means = average(
        tuple(part.expand(small_shape) for part in slim),
        lambda part: torch.einsum(part, axes[0], mask.to(part.dtype), axes[1], axes[2]),
    )
    return broadcast(means, [sizes[label] for label in out])


def _aligned(parts: Parts, labels: Labels, out: Labels) -> Parts:
    """Parts averaged over labels that are not in `out`, with the axes of `out`.

    Axes have length 1 where the parts have none.
    """
    gone = [axis for axis, label in enumerate(labels) if label not in out]
    order = [labels.index(label) for label in out if label in labels] + gone
    index = (*(slice(None) if label in labels else None for label in out), *(0 for _ in gone))
    return tuple(part.permute(order)[index] for part in mean_over(parts, gone))


def linear(op: TensorOp, axis: int = -1) -> CoordinateField | None:
    """A linear layer, or a filter of one pixel: the mean over the channels."""
    shape = shape_of(op.out)
    return op.source and CoordinateField(tuple(broadcast(mean_over(parts, axis), shape) for parts in op.source.sets))


def multiply(op: TensorOp) -> CoordinateField | None:
    """matmul, bmm, baddbmm and the like; einsum of one or two tensors."""
    operands, out = labelled(op.name, op.args, op.kwargs)
    return contract(op, operands, out) if len(operands) in (1, 2) else None


def attend(op: TensorOp) -> CoordinateField | None:
    """scaled_dot_product_attention: the query's place.

    If channels attend to channels, the value's.
    """
    arguments = op.arguments("query", "key", "value")
    query, value, shape = op.field(arguments["query"]), op.field(arguments["value"]), shape_of(op.out)
    # queries that differ along K are channels
    if query and is_constant_along(query.sets[0], -1):
        return CoordinateField((broadcast(mean_over(query.sets[0], -1), shape),))
    return value and CoordinateField((broadcast(mean_over(value.sets[0], -2), shape),))


# --- merges ---------------------------------------------------------------------------------------


def merge(op: TensorOp) -> CoordinateField | None:
    """scatter_add, scatter_reduce, index_add, index_reduce: the mean place by mass.

    The masses add up.
    """
    arguments = op.arguments("input", "dim", "index", "source", "reduce")
    target, source = op.first, arguments.get("src", arguments.get("source"))
    base, field, dim = op.source, op.field(source), arguments["dim"] % target.ndim
    old, new = parts_of_set(base, 0, target.shape), parts_of_set(field, 0, source.shape)
    index = to_cpu(arguments["index"])
    # index_add takes one index per slice; as scatter does, one per element
    if op.name.startswith("index"):
        index = index.reshape([-1 if axis == dim else 1 for axis in range(target.ndim)]).expand(source.shape)
    new = tuple(part[tuple(map(slice, index.shape))] for part in new)
    for axis in range(target.ndim):
        # constant axes need no scattering
        if axis != dim and all(part.stride(axis) == 0 for part in (*old, *new, index)):
            old, new = (tuple(part.narrow(axis, 0, 1) for part in parts) for parts in (old, new))
            index = index.narrow(axis, 0, 1)
    stay, come = (torch.where(parts[0].isnan(), 0.0, parts[3]).contiguous() for parts in (old, new))
    if arguments.get("include_self", True) is False:
        hit = torch.zeros_like(stay).scatter_add(dim, index, torch.ones_like(come))
        # include_self=False: targets that are hit lose their own value
        stay = stay.masked_fill(hit > 0, 0.0)
    mass = stay.scatter_add(dim, index, come)
    means = []
    for p, q in zip(old[:3], new[:3], strict=True):
        moments = (p.nan_to_num(nan=0.0) * stay).scatter_add(dim, index, q.nan_to_num(nan=0.0) * come)
        means.append(moments / mass)
    return CoordinateField((broadcast((*means, torch.where(mass > 0, mass, torch.nan)), shape_of(op.out)),))
