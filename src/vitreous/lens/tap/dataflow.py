"""Roles of tensors between queries and keys and V: `Scores`, `Weights`, and `WeightedSum`.

`Scores` is a product of two activations and what followed from it, `Weights` a softmax and what
followed, `WeightedSum` the contraction of weights with V that ends the chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitreous.lens.coordinates.contraction import Contraction, Label
from vitreous.lens.tap.axes import Axes, flat_steps, unravel

POWERS = {"exp", "exp2", "special_exp2"}
DIVISIONS = {"div", "true_divide", "truediv", "rtruediv", "rdiv", "itruediv", "mul", "rmul", "imul"}
SAMPLES = 256  # entries of a product that are kept, to be computed again from the operands


@dataclass(frozen=True)
class Product:
    """A contraction of two activations, with some of its entries: values at flat positions."""

    contraction: Contraction
    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor

    def error(self) -> float:
        """Largest error of the sampled entries, over the largest entry.

        They are compared with the products of the recorded operands, in float64.
        """
        c, coordinates = self.contraction, unravel(self.positions, self.shape)
        sides = ((c.a, c.labels_a), (c.b, c.labels_b))
        rows = [operand_rows(x, labels, c.labels_out, coordinates).cpu().double() for x, labels in sides]  # (S, K) each
        # in float64, so that what is measured is the error of the model's own arithmetic
        values = self.values.cpu().double()
        finite = values.isfinite()
        # scores that are masked throughout (-inf) leave nothing to compare
        if rows[0].shape != rows[1].shape or not finite.any():
            return 0.0
        own, again = values[finite], (rows[0] * rows[1]).sum(-1)[finite]
        return float((own - again).abs().max() / own.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


@dataclass(frozen=True)
class Scores:
    """A product of two activations, or what followed from it.

    axes: this tensor's axes in the product; None: lost on the way. has_exp, has_division: exp was
    taken of it, then it was divided or multiplied: a softmax written by hand.
    """

    product: Product
    axes: Axes | None
    has_exp: bool = False
    has_division: bool = False

    def after_call(self, name: str, axes: Axes | None) -> Scores:
        """The role after a call that changed values."""
        name = name.strip("_")
        has_division = self.has_division or (self.has_exp and name in DIVISIONS)
        return Scores(self.product, axes, self.has_exp or name in POWERS, has_division)


@dataclass
class SoftmaxRecord:
    """One softmax of a pass, and whether it was contracted with a V.

    Kept to the end of the pass, so it holds no tensor.
    """

    path: str
    used: bool = False


@dataclass(frozen=True)
class Softmax:
    """One softmax of the pass.

    shape, axis: of its output. scores: what it was taken of; None if no product leads here.
    """

    record: SoftmaxRecord
    shape: tuple[int, ...]
    axis: int
    scores: Scores | None


@dataclass(frozen=True)
class Weights:
    """A softmax's output, or what followed from it.

    axes: this tensor's axes in that output; None: lost. original: the output itself, unless this
    tensor is it. overwritten: its values were overwritten. mixed: values changed since. log: still
    logarithms.
    lossy: dropout that was not switched off.
    """

    softmax: Softmax
    axes: Axes | None
    original: Tensor | None = None
    overwritten: bool = False
    mixed: bool = False
    log: bool = False
    lossy: bool = False

    def key_axis(self) -> tuple[int, bool] | None:
        """(this tensor's axis that is the softmax's, whether all its entries are left), or None."""
        if self.axes is None:
            return None
        # the axis is identified by its stride in the softmax output, whatever views did to its
        # position
        size, stride = self.softmax.shape[self.softmax.axis], math.prod(self.softmax.shape[self.softmax.axis + 1 :])
        for i, digits in enumerate(self.axes.digits):
            if len(digits) == 1 and digits[0][1] and digits[0][1] % stride == 0 and digits[0][1] < stride * size:
                return i, digits[0] == (size, stride)
        return None


@dataclass(frozen=True)
class WeightedSum:
    """Weights contracted with V. Leading axes are the call's own.

    effective: (..., N, M), what multiplied V. v: (..., M, Kv). output: (..., N, Kv).
    probabilities: the softmax's own output in the same form as `effective`; None: it is
        `effective`, or cannot be recovered.
    all_keys: no key of the softmax is left out.
    v_view, output_view: V and the output as `OperandView`s.
    """

    weights: Weights
    axes: Axes
    effective: Tensor
    probabilities: Tensor | None
    v: Tensor
    output: Tensor
    all_keys: bool
    v_view: tuple[Tensor, Callable[[Tensor], Tensor]]
    output_view: tuple[Tensor, Callable[[Tensor], Tensor]]

    @property
    def note(self) -> str:
        """What a user should know of this map, in words; "" if nothing."""
        if self.weights.lossy:
            return "dropout is on between softmax and V, even in eval mode"
        if self.mixed and self.probabilities is None:
            return "the softmax's own output is gone or of another shape; probabilities are the effective map"
        return "" if self.all_keys else "some keys of the softmax are left out at V"

    @property
    def mixed(self) -> bool:
        """Values were changed, or keys left out, between softmax and V."""
        return self.weights.mixed or not self.all_keys

    @property
    def product(self) -> Product | None:
        """The product that the softmax was taken of, or None."""
        return None if self.weights.softmax.scores is None else self.weights.softmax.scores.product

    def operands(self) -> tuple[tuple[Tensor, Callable], tuple[Tensor, Callable]] | None:
        """`OperandView`s of queries and keys: (q, view), (k, view).

        The views bring a tensor with an operand's axes to (..., N or M, K). None if there is no
        product, or its axes were lost between it and V.
        """
        softmax = self.weights.softmax
        scores = softmax.scores
        if scores is None or scores.axes is None or not scores.axes.traceable or not self.axes.traceable:
            return None
        c, place = scores.product.contraction, scores.axes.digits[softmax.axis]
        strides = Axes.of(scores.product.shape).digits
        # the label of the product whose strides contain the softmax axis is that of the keys
        key_labels = [
            label
            for label, ((n, stride),) in zip(c.labels_out, strides, strict=True)
            if len(place) == 1 and stride <= place[0][1] < n * stride
        ]
        if len(key_labels) != 1 or (key_labels[0] in c.labels_a) == (key_labels[0] in c.labels_b):
            return None
        # queries may be either operand: k q^T transposed is as common as q k^T
        sides = [(c.b, c.labels_b), (c.a, c.labels_a)]
        (k, of_k), (q, of_q) = sides if key_labels[0] in c.labels_b else sides[::-1]
        # a sum over two labels has no single feature axis K
        if any(sum(label not in c.labels_out for label in labels) != 1 for labels in (of_k, of_q)):
            return None
        lead = range(len(self.axes.digits) - 2)
        at_q, at_k = (self.coordinates((*lead, axis), scores) for axis in (len(lead), len(lead) + 1))
        of_out = c.labels_out
        return (q, lambda x: operand_rows(x, of_q, of_out, at_q)), (k, lambda x: operand_rows(x, of_k, of_out, at_k))

    def coordinates(self, axes: Sequence[int], scores: Scores) -> list[Tensor]:
        """Where every entry along these axes of the map was in the product.

        Returns one index per axis of the product.
        """
        # map entry -> entry of the softmax output -> entry of the product
        inside = unravel(self.axes.index(axes), self.axes.shape)
        steps = (flat_steps(digits)[at] for digits, at in zip(scores.axes.digits, inside, strict=True))
        return unravel(sum(steps) + scores.axes.offset, scores.axes.shape)


def operand_rows(x: Tensor, labels: Sequence[Label], indexed_labels: Sequence[Label], coordinates: Sequence[Tensor]) -> Tensor:
    """Rows of an operand at coordinates of the indexed labels: (..., the other axes).

    x: one axis per label, and more behind.
    """
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in indexed_labels)
    at = [coordinates[indexed_labels.index(labels[i])] for i in order if labels[i] in indexed_labels]
    x = x.permute(*order, *range(len(labels), x.ndim))
    # an axis of size 1 was broadcast: its only entry serves every index
    return x[tuple(index if x.shape[i] > 1 else index * 0 for i, index in enumerate(at))]


def make_product(c: Contraction, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Product:
    """The `Product` of a call, with entries spread over it. Of `baddbmm` without what it adds."""
    positions = torch.linspace(0, max(0, out.numel() - 1), min(SAMPLES, out.numel()), dtype=torch.float64).long()
    coordinates = tuple(unravel(positions, out.shape))
    values = out[coordinates]
    if name in ("baddbmm", "addmm"):
        added = args[0] if args else kwargs["input"]
        # baddbmm and addmm give beta * input + alpha * product
        added = kwargs.get("beta", 1) * added.expand(out.shape)[coordinates]
        # beside a mask of -1e4 or the lowest number nothing is left of the product
        values = ((values - added) / kwargs.get("alpha", 1)).masked_fill(added.abs() >= 1e4, math.nan)
    return Product(c, tuple(out.shape), positions, values)


def recover_probabilities(weights: Weights, a: Tensor, axes: Axes, all_keys: bool) -> Tensor | None:
    """The softmax's own output with the axes of the map at V, or None.

    None if it is that map, or can no longer be had.
    """
    original = weights.original
    if not (weights.mixed or not all_keys) or original is None or not axes.traceable:
        return None
    original, parts = original.contiguous(), [part for digits in axes.digits for part in digits]
    # the digits of `axes` are strides in the softmax output, so they are the view itself
    offset = original.storage_offset() + axes.offset
    original = original.as_strided([n for n, _ in parts], [stride for _, stride in parts], offset)
    return original.reshape([math.prod(n for n, _ in digits) for digits in axes.digits])
