"""`CoordinateField`: where in the image every element of a tensor comes from; `TensorOp`.

A place is a point of the input image. A `CoordinateField` holds the places of every element of one
tensor as four parts that have the tensor's own shape: y, x, their second moment y^2 + x^2 (from
which follows how far a mean is spread) and the mass (how many tokens were merged into one). Along
axes on which places do not differ the parts have stride 0, so a field of (1, N, D) costs N numbers,
and a view of the tensor is the same view of each part. NaN: no place.

The product of two tensors that both have places (scores) has two sets of parts: where its rows and
where its columns are. A later contraction takes the set that does not vary along the contracted
axis, which for an attention map is the query's, on either side of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]  # y, x, y^2 + x^2, mass
CLOSE = 1e-3  # pixels: places that differ by less are one


@dataclass(frozen=True)
class CoordinateField:
    """The places of one tensor's elements.

    sets: one, or two for a product of rows and columns. is_channel_product: the product summed over
    places (channel attention).
    """

    sets: tuple[Parts, ...]
    is_channel_product: bool = False

    def map_parts(self, change: Callable[[Tensor], Tensor]) -> CoordinateField:
        """The same change to every part."""
        return replace(self, sets=tuple(tuple(change(part) for part in parts) for parts in self.sets))


@dataclass(frozen=True)
class TensorOp:
    """One call of a torch function, as a rule gets it.

    name: the function's plain name. field: gives the `CoordinateField` of an argument, or None. A
    rule is a function (TensorOp) -> CoordinateField of the output, a list of them (one per output),
    or None (no place).
    """

    name: str
    func: Any
    args: tuple
    kwargs: dict[str, Any]
    out: Any
    field: Callable[[Any], CoordinateField | None]

    def arguments(self, *names: str) -> dict[str, Any]:
        """Arguments by name, positional and keyword alike."""
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    @property
    def first(self) -> Any:
        """The tensor (or list of tensors) that the function works on."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    @property
    def source(self) -> CoordinateField | None:
        """The field of the first argument."""
        return self.field(self.first)

    @property
    def out_of_place(self) -> Callable:
        """The function, or its out-of-place form where it works in place."""
        name = getattr(self.func, "__name__", "")
        if name.endswith("_") and not name.startswith("__"):
            # parts may be shared between tensors, so nothing may change them
            return getattr(Tensor, name[:-1], None) or getattr(torch, name[:-1])
        return self.func

    def apply(self, part: Tensor) -> Any:
        """The same call on a part. Index tensors and masks are used as they are."""
        rest = [to_cpu(value) for value in self.args[1:]]
        kwargs = {name: to_cpu(value) for name, value in self.kwargs.items()}
        if self.args:
            return self.out_of_place(part, *rest, **kwargs)
        return self.out_of_place(**kwargs | {next(iter(kwargs)): part})


def tensors(value: Any) -> list[Tensor]:
    """Tensors in an argument or a result, also inside lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    result = []
    for item in value:
        if isinstance(item, Tensor):
            result.append(item)
        elif isinstance(item, (list, tuple, dict)):
            result += tensors(item)
    return result


def to_cpu(value: Any) -> Any:
    """Index tensors on the CPU, where parts are kept, also inside a tuple or list."""
    if isinstance(value, Tensor):
        return value.cpu()
    return type(value)(map(to_cpu, value)) if type(value) in (tuple, list) else value


# --- parts ----------------------------------------------------------------------------------------


def thin(part: Tensor, axes: Iterable[int] | None = None) -> Tensor:
    """A part with axes of stride 0 cut to length 1; axes: these alone."""
    for axis in range(part.ndim) if axes is None else axes:
        if part.stride(axis) == 0 and part.shape[axis] > 1:
            part = part.narrow(axis, 0, 1)
    return part


def is_constant_along(parts: Parts, axis: int) -> bool:
    """True if places do not differ along an axis (NaN is no difference)."""
    for part in parts[:2]:
        if part.shape[axis] > 1 and part.stride(axis) != 0:
            # axes of stride 0 need no reading
            values = thin(part)
            # NaN neither lowers the minimum nor raises the maximum
            low = values.nan_to_num(nan=torch.inf).amin(axis)
            high = values.nan_to_num(nan=-torch.inf).amax(axis)
            if bool((high - low > CLOSE).any()):
                return False
    return True


def is_constant(parts: Parts) -> bool:
    """True if all elements have one and the same place, or none."""
    for part in parts[:2]:
        values = thin(part)
        finite = values[~values.isnan()]
        if finite.numel() and bool(finite.max() - finite.min() > CLOSE):
            return False
    return True


def shape_of(out: Any) -> tuple[int, ...]:
    """Shape of an output, or of the first of several."""
    return tuple((out if isinstance(out, Tensor) else out[0]).shape)


def no_place(shape: Sequence[int]) -> Parts:
    """Parts of a tensor without a place."""
    # one number, expanded
    return (torch.full((), torch.nan, dtype=torch.float64, device="cpu").expand(tuple(shape)),) * 4


def parts_of_set(field: CoordinateField | None, which: int, shape: Sequence[int]) -> Parts:
    """Set number `which` of a field; parts without a place if it has none."""
    return field.sets[which] if field and which < len(field.sets) else no_place(shape)


def average(parts: Parts, total: Callable[[Tensor], Tensor]) -> Parts:
    """Parts under a linear operator with non-negative weights, over the sum of its weights.

    total: the operator. Elements without a place have weight 0.
    """
    # without missing places all parts share one weight
    if not parts[0].isnan().any():
        weight = total(torch.ones((), dtype=torch.float64, device="cpu").expand(parts[0].shape))
        return tuple(total(part) / weight for part in parts)
    weight = total((~parts[0].isnan()).double())
    return tuple(total(part.nan_to_num(nan=0.0)) / weight for part in parts)


def mean_over(parts: Parts, axes: int | Sequence[int]) -> Parts:
    """Mean of parts over axes, which stay with length 1."""
    axes = [axes] if isinstance(axes, int) else list(axes)
    parts = tuple(thin(part) for part in parts)
    shape = torch.broadcast_shapes(*(part.shape for part in parts))
    if all(shape[axis] == 1 for axis in axes):
        return parts
    return average(tuple(part.expand(shape) for part in parts), lambda part: part.sum(axes, keepdim=True))


def parts_of_sum(a: Parts, b: Parts) -> Parts:
    """Where the sum of two tensors is, from sets of one shape: the mean of what has a place.

    Where one of them stands for smaller parts of the image (a stream beside its filtered copy, a
    fine map to which a coarse one is added, tokens that attended with the queries of whole
    regions), it alone.
    """
    # residual branches mostly have the very places of their stream
    if a is b or all(equal_parts(thin(p), thin(q)) for p, q in zip(a, b, strict=True)):
        return a
    a, b = (tuple(torch.broadcast_tensors(*map(thin, parts))) for parts in (a, b))
    # medians: one pooled token does not decide for all
    first, second = (float(variance(parts).nanmedian()) for parts in (a, b))
    # 5 % and CLOSE: differences by rounding count as none
    if first > 1.05 * second + CLOSE:
        a, b, first, second = b, a, second, first
    alone = second > 1.05 * first + CLOSE
    only_a, only_b = b[0].isnan() | alone, a[0].isnan()
    return tuple(torch.where(only_b, q, torch.where(only_a, p, (p + q) / 2)) for p, q in zip(a, b, strict=True))


def variance(parts: Parts) -> Tensor:
    """Variance of the pixels that an element stands for, in square pixels.

    The sum over both axes: E[y^2 + x^2] - E[y]^2 - E[x]^2.
    """
    y, x, moment, _ = parts
    return (moment - y.square() - x.square()).clamp(min=0)


def equal_parts(p: Tensor, q: Tensor) -> bool:
    """True if two parts are equal, NaN included."""
    return p.shape == q.shape and torch.equal(p.nan_to_num(nan=-1.0), q.nan_to_num(nan=-1.0))


def broadcast(parts: Parts, shape: Sequence[int]) -> Parts:
    """Parts broadcast to a shape without copying."""
    return tuple(thin(part).expand(tuple(shape)) for part in parts)
