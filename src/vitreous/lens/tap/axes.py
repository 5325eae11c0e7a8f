"""`Axes`: where each entry of a tensor stood in an earlier one, after any chain of views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitreous.lens.coordinates.contraction import Label

Digit = tuple[int, int | None]  # size, stride in the flat index of the first tensor; 0: repeated; None: new, not from there


def arrange(x: Tensor, labels: Sequence[Label], wanted: Sequence[Label], sizes: dict[Label, int]) -> Tensor:
    """x as a view with one axis per wanted label (and more behind), in that order.

    Axes of size 1, and absent ones, are expanded to `sizes`.
    """
    more = range(len(labels), x.ndim)
    x = x.permute(*(labels.index(label) for label in wanted if label in labels), *more)
    for i, label in enumerate(wanted):
        if label not in labels:
            x = x.unsqueeze(i)
    return x.expand(*(sizes[label] for label in wanted), *x.shape[x.ndim - len(more) :])


@dataclass(frozen=True)
class Axes:
    """Where each entry of a tensor stood in an earlier tensor, from which views led to it.

    shape: of the earlier tensor. digits: for each axis its parts (`Digit`), outermost first, so
    that a flattened or split axis keeps its origin. offset: flat index there of the entry at 0, 0,
    ...
    """

    shape: tuple[int, ...]
    digits: tuple[tuple[Digit, ...], ...]
    offset: int = 0

    @classmethod
    def of(cls, shape: Sequence[int]) -> Axes:
        """The axes of a contiguous tensor in itself."""
        strides = torch.empty(tuple(shape), device="meta").stride()
        return cls(tuple(shape), tuple(((n, s),) for n, s in zip(shape, strides, strict=True)))

    def after_view(self, view: Tensor, shape: Sequence[int]) -> Axes | None:
        """Axes after a view of a contiguous tensor of `shape`, that of these axes, or None.

        view: the result of the view on a stand-in, whose strides tell which parts of which axes it
        took. None if that cannot be said of an axis.
        """
        parts, stride = [], 1  # (size, stride in the first tensor, stride in the viewed one), innermost first
        for digits, n in zip(reversed(self.digits), reversed(shape), strict=True):
            inner = stride
            for size, base in reversed(digits):
                parts.append((size, base, inner))
                inner *= size
            stride *= n
        # the offset of the view is that of its first entry, in digits of the viewed tensor
        start = view.storage_offset()
        view_digits = [axis_digits(parts, n, s, start) for n, s in zip(view.shape, view.stride(), strict=True)]
        if any(digits is None for digits in view_digits):
            return None
        offset = self.offset + sum(start // inner % size * (base or 0) for size, base, inner in parts)
        return Axes(self.shape, tuple(view_digits), offset)

    def broadcast(self, shape: Sequence[int]) -> Axes:
        """Axes after a broadcast to a shape."""
        padded = (((1, 0),),) * (len(shape) - len(self.digits)) + self.digits
        spread = (
            digits if math.prod(size for size, _ in digits) == n else ((n, 0),) for digits, n in zip(padded, shape, strict=True)
        )
        return Axes(self.shape, tuple(spread), self.offset)

    def with_new_axis(self, axis: int, size: int) -> Axes:
        """Axes after the entries along one axis were mixed, which ends what is known of it."""
        return Axes(self.shape, (*self.digits[:axis], ((size, None),), *self.digits[axis + 1 :]), self.offset)

    @property
    def traceable(self) -> bool:
        """False if an axis is new, so that entries along it come from nowhere in particular."""
        return all(base is not None for digits in self.digits for _, base in digits)

    def index(self, axes: Sequence[int]) -> Tensor:
        """Flat index in the earlier tensor of each entry at coordinate 0 of the other axes.

        int64, one axis per entry of `axes`.
        """
        total = torch.tensor(self.offset)
        for axis in axes:
            total = total[..., None] + flat_steps(self.digits[axis])
        return total


def axis_digits(parts: Sequence[tuple[int, int | None, int]], n: int, stride: int, start: int) -> tuple[Digit, ...] | None:
    """The parts, outermost first, over which an axis of n entries at a stride runs.

    parts: (size, stride in the earlier tensor, stride in the viewed one), innermost first. None if
    the axis ends within a part.
    """
    # an empty view, as a split at 0 gives, shows nothing
    if not n or not all(size for size, *_ in parts):
        return None
    if n == 1 or stride == 0:
        # a repeated entry, or a single one, has no stride of its own
        return ((n, 0),)
    digits: list[Digit] = []
    for size, base, inner in parts:
        first, step = start // inner % size, stride // inner
        # the axis takes every `step`-th entry of one part, as x[::2] does
        if inner <= stride < inner * size and stride % inner == 0 and first + (n - 1) * step < size:
            return ((n, None if base is None else base * step),)
        # the range of strides that this part contributes to the axis
        low, high = max(inner, stride), min(inner * size, stride * n)
        if low < high:
            # the cut goes through an entry of the part, or starts in its middle
            if low % inner or high % low or first:
                return None
            digits.append((high // low, None if base is None else base * (low // inner)))
    digits.reverse()
    return tuple(digits) if math.prod(size for size, _ in digits) == n else None


def flat_steps(digits: Sequence[Digit]) -> Tensor:
    """Flat steps of each entry of an axis: int64 (n,)."""
    steps = torch.zeros(1, dtype=torch.int64)
    for size, stride in digits:
        steps = (steps[:, None] + torch.arange(size) * stride).flatten()
    return steps


def unravel(flat: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Flat index in a contiguous tensor of this shape -> one index per axis."""
    # innermost axis first, then reversed
    coordinates = []
    for n in reversed(shape):
        coordinates.append(flat % n)
        flat = flat // n
    return coordinates[::-1]


def on_meta(func: Callable, args: Sequence[Any], kwargs: dict[str, Any], source: Tensor, stand_in: Tensor) -> Any:
    """The call on tensors without data, with `stand_in` for `source`.

    Strides of its result show what a view did, at no cost and without touching the data.
    """

    def without_data(x: Any) -> Any:
        """The argument with tensors replaced by ones on the "meta" device."""
        if isinstance(x, Tensor):
            return stand_in if x is source else torch.empty(x.shape, device="meta")
        return type(x)(map(without_data, x)) if type(x) in (list, tuple) else x

    return func(*map(without_data, args), **{key: without_data(value) for key, value in kwargs.items()})
