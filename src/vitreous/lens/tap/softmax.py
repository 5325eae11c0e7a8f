"""Attention that a model writes out itself, found by data flow: product, softmax, contraction with V.

Three facts travel with tensors from call to call: *scores* (a product of two activations and what followed), *weights*
(what a softmax gave and what followed), and at a contraction of weights along the softmax's axis an attention is found,
with V and the output in hand. Shapes decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from vitreous.lens.tap.axes import MATMULS, Axes, Contraction, Label, arranged, contraction, on_meta
from vitreous.lens.tap.dataflow import Scores, Softmax, SoftmaxRecord, WeightedSum, Weights, probabilities, product
from vitreous.lens.tap.module_stack import ModuleStack

SOFTMAXES = {
    "softmax", "_softmax", "special_softmax", "_safe_softmax", "softmin", "gumbel_softmax", "log_softmax", "_log_softmax",
    "special_log_softmax",
}  # fmt: skip
STARTS = SOFTMAXES | MATMULS | {"einsum"}  # calls at which a fact may come up that hangs on no other
VIEWS = {
    "view", "reshape", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "flatten", "unflatten", "squeeze",
    "unsqueeze", "t", "T", "mT", "H", "mH", "expand", "expand_as", "view_as", "reshape_as", "select", "narrow", "__getitem__",
    "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "ravel", "_unsafe_view", "unsafe_chunk", "unsafe_split",
    "hsplit", "vsplit", "dsplit", "broadcast_to", "atleast_2d", "atleast_3d", "adjoint",
}  # fmt: skip
COPIES = {
    "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as", "detach", "data", "alias", "cpu",
    "cuda", "_to_copy", "requires_grad_", "positive", "__pos__",
}  # fmt: skip
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
# Entries are taken or put elsewhere, maybe among others: what came of scores are scores still, but nobody knows where.
MOVES = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "pad", "index_select", "gather", "take_along_dim", "scatter",
    "scatter_", "topk", "sort", "roll", "flip", "repeat", "repeat_interleave", "tile", "as_strided", "unfold", "index_put",
    "index_put_", "masked_select", "constant_pad_nd", "__getitem__",
}  # fmt: skip


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument, or in what a call gave; also inside lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    found = []
    for item in value:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, dict)):
            found += tensors(item)
    return found


class Flow:
    """What is known of tensors, from the calls of one pass. Holds no tensor longer than the model does."""

    def __init__(self):
        self.facts = WeakIdKeyDictionary()
        self.softmaxes: list[SoftmaxRecord] = []

    def clear(self) -> None:
        self.facts = WeakIdKeyDictionary()

    def follow(
        self,
        name: str,
        stack: ModuleStack,
        func: Callable,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        given: Sequence[Tensor],
        out: Any,
    ) -> Any:
        """Take note of a call that was made; given: the tensors among its arguments.

        Gives a `WeightedSum`, or words that say why weights that met V are no map, or None.
        """
        if name in SOFTMAXES:
            return self.softmax(name, stack.path, args, kwargs, out)
        found = contraction(name, args, kwargs)
        if found is not None:
            return self.contracted(found, name, args, kwargs, out)
        sources = [(x, self.facts[x]) for x in {id(x): x for x in given}.values() if x in self.facts]
        if sources:
            self.passed(sources, name, func, args, kwargs, out)
        return None

    def softmax(self, name: str, path: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        if not isinstance(out, Tensor):
            return
        x, place = tensors((*args, *kwargs.values()))[0], 4 if name == "gumbel_softmax" else 1
        dim = kwargs.get("dim", args[place] if len(args) > place else None)
        if dim is None:
            dim = -1 if name == "gumbel_softmax" else F._get_softmax_dim(name, x.ndim, 5)
        fact = self.facts.get(x)
        scores = fact if isinstance(fact, Scores) else fact.softmax.scores if isinstance(fact, Weights) else None
        record = SoftmaxRecord(path)
        self.softmaxes.append(record)
        softmax = Softmax(record, tuple(out.shape), dim % max(1, out.ndim), scores)
        self.facts[out] = Weights(softmax, Axes.of(out.shape), log="log" in name)

    def contracted(self, c: Contraction, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Any:
        for x, own, other, theirs in ((c.a, c.labels_a, c.b, c.labels_b), (c.b, c.labels_b, c.a, c.labels_a)):
            fact = self.facts.get(x)
            key = fact.key_axis() if isinstance(fact, Weights) else None
            if key is None:
                continue
            label = own[key[0]]
            if label in theirs and label not in c.labels_out:
                return self.used(c, (x, own), (other, theirs), out, fact, key)
            if label in c.labels_out and label not in theirs:  # heads are mixed
                self.facts[out] = self.changed(fact, x, carried(fact.axes, own, c.labels_out, out.shape))
                return None
        for x, own in ((c.a, c.labels_a), (c.b, c.labels_b)):
            fact = self.facts.get(x)
            if not isinstance(fact, Scores):
                continue
            if fact.divided:
                return "weights are made of exp and a division, not of a softmax; use torch.softmax, or a fused attention"
            other = c.b if x is c.a else c.a
            if isinstance(other, nn.Parameter):
                axes = None if fact.axes is None else carried(fact.axes, own, c.labels_out, out.shape)
                self.facts[out] = fact.after(name, axes)
                return None
        if not any(isinstance(x, nn.Parameter) for x in (c.a, c.b)) and out.is_floating_point():
            self.facts[out] = Scores(product(c, name, args, kwargs, out), Axes.of(out.shape))
        return None

    def used(self, c: Contraction, of_a: tuple, of_v: tuple, out: Tensor, weights: Weights, key: tuple[int, bool]) -> Any:
        (a, own), (v, theirs) = of_a, of_v
        if weights.softmax.scores is None and weights.mixed:
            return None  # a gate on something else, not weights over places
        weights.softmax.record.used = True
        if weights.log:
            return "logarithms of a softmax were contracted, not the softmax"
        if sum(label not in c.labels_out for label in own) != 1 or sum(label not in c.labels_out for label in theirs) != 1:
            return "the softmax was contracted along more than its own axis"
        label = own[key[0]]
        rows = [x for x in own if x not in theirs and x not in c.batch]
        columns = [x for x in theirs if x not in own and x not in c.batch]
        row, column = rows[-1] if rows else "row", columns[-1] if columns else "column"
        lead = [x for x in c.labels_out if x not in (row, column)]
        sizes = dict(zip(c.labels_out, out.shape, strict=True)) | {label: a.shape[key[0]]}
        sizes = {"row": 1, "column": 1} | sizes
        wanted = [*lead, row, label]
        axes = rearranged(weights.axes, own, wanted, sizes)

        def form(labels: Sequence[Label], last: Sequence[Label]) -> Callable[[Tensor], Tensor]:
            return lambda x: arranged(x, labels, [*lead, *last], sizes)

        form_v, form_output = form(theirs, [label, column]), form(c.labels_out, [row, column])
        return WeightedSum(
            weights=weights,
            axes=axes,
            effective=arranged(a, own, wanted, sizes),
            probabilities=probabilities(weights, a, axes, key[1]),
            v=form_v(v),
            output=form_output(out),
            whole=key[1],
            place_v=(v, form_v),
            place_output=(out, form_output),
        )

    def changed(self, fact: Weights, x: Tensor, axes: Axes | None, into: Tensor | None = None, **fields: Any) -> Weights:
        """The fact of a tensor that came from x by a change of values; into: the tensor itself, if it may be x."""
        overwritten = into is x and fact.kept is None
        kept = fact.kept if fact.kept is not None or fact.gone or overwritten else x
        return replace(fact, axes=axes, kept=kept, gone=fact.gone or overwritten, mixed=True, **fields)

    def passed(self, sources: list, name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        outs = tensors(out) or ([args[0]] if name == "__setitem__" else [])
        outs = [x for x in outs if x.is_floating_point()]
        if not outs:
            return
        x, fact = principal(sources, outs[0].shape)
        if isinstance(fact, Weights):
            for _, other in sources:
                if isinstance(other, Weights):
                    other.softmax.record.used |= other.softmax is not fact.softmax and outs[0].shape == x.shape
        indexed = name == "__getitem__" and len(tensors((*args, *kwargs.values()))) > 1
        if name in VIEWS and not indexed:
            for y, axes in zip(outs, views(fact.axes, x, func, args, kwargs), strict=False):
                self.facts[y] = moved(fact, x, axes, y)
        elif name in COPIES or (name in DROPOUTS and not drops(args, kwargs)):
            for y in outs:
                if y is not x and y.shape == x.shape:
                    self.facts[y] = moved(fact, x, fact.axes, y)
        elif isinstance(fact, Scores):
            self.facts_of_scores(fact, x, name, outs)
        else:
            self.facts_of_weights(fact, x, name, outs[0])

    def facts_of_scores(self, fact: Scores, x: Tensor, name: str, outs: list[Tensor]) -> None:
        for y in outs:
            tail = y.shape[y.ndim - x.ndim :] if y.ndim >= x.ndim else None
            if tail is not None and all(n == m or m == 1 for n, m in zip(tail, x.shape, strict=True)):
                axes = None if fact.axes is None or name in MOVES else fact.axes.broadcast(y.shape)
            elif name in MOVES:
                axes = None
            else:
                self.facts.pop(y, None)
                continue
            self.facts[y] = fact.after(name, axes)

    def facts_of_weights(self, fact: Weights, x: Tensor, name: str, y: Tensor) -> None:
        key = fact.key_axis()
        if fact.log and name in ("exp", "exp_", "special_exp") and not fact.mixed:
            self.facts[y] = replace(fact, log=False, kept=None)
            return
        axes, mixing = fact.axes, {"linear": x.ndim - 1, "conv1d": 1, "conv2d": 1, "conv3d": 1}.get(name)
        if key is None or key[0] == mixing or len(y.shape) != len(x.shape) or name in MOVES:
            self.facts.pop(y, None)
            return
        differ = [i for i, (n, m) in enumerate(zip(y.shape, x.shape, strict=True)) if n != m]
        if differ and differ != [mixing]:
            self.facts.pop(y, None)
            return
        if differ:
            axes = axes.renewed(mixing, y.shape[mixing])
        self.facts[y] = self.changed(fact, x, axes, y, lossy=fact.lossy or name in DROPOUTS)


def principal(sources: list[tuple[Tensor, Scores | Weights]], shape: Sequence[int]) -> tuple[Tensor, Scores | Weights]:
    """The tensor whose fact the result of a call inherits: weights before scores, then those of the result's shape.

    Of several products the one that has a value of its own for every entry (q k^T beside relative positions, which repeat);
    if there are two such, nobody can say what queries and keys are.
    """

    def rank(source: tuple[Tensor, Scores | Weights]) -> tuple[bool, ...]:
        x, fact = source
        if isinstance(fact, Weights):
            return False, fact.softmax.scores is None, x.shape != shape
        return True, repeats(x, fact, shape), x.shape != shape

    x, fact = min(sources, key=rank)
    if isinstance(fact, Scores) and not repeats(x, fact, shape):
        rivals = [(y, other) for y, other in sources if isinstance(other, Scores) and other.product is not fact.product]
        if any(not repeats(y, other, shape) for y, other in rivals):
            fact = replace(fact, axes=None)
    return x, fact


def repeats(x: Tensor, fact: Scores, shape: Sequence[int]) -> bool:
    """Whether these scores, broadcast to a shape, have entries that come from one of the product, or from nobody knows."""
    if fact.axes is None or len(shape) < x.ndim:
        return True
    return any(size > 1 and not stride for digits in fact.axes.broadcast(shape).digits for size, stride in digits)


def views(axes: Axes | None, x: Tensor, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Axes | None]:
    """Axes of what a view gives of x, one per output; None where that is no view after all (x[:, [0, 2]])."""
    stand_in = torch.empty(x.shape, device="meta")
    try:
        given = on_meta(func, args, kwargs, x, stand_in)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        given = ()
    for view in tensors(given):
        same = view.untyped_storage()._cdata == stand_in.untyped_storage()._cdata
        yield axes.viewed(view, x.shape) if same and axes is not None else None
    yield from repeat(None)


def moved(fact: Scores | Weights, x: Tensor, axes: Axes | None, y: Tensor) -> Scores | Weights:
    """The fact of y, which has the values of x in other places."""
    if isinstance(fact, Scores):
        return replace(fact, axes=axes)
    return replace(fact, axes=axes, kept=fact.kept if fact.kept is not None or fact.gone or y is x else x)


def drops(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a dropout is switched on: F.dropout(input, p, training), torch.dropout(input, p, train)."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return bool(p) and kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))


def carried(axes: Axes, own: Sequence[Label], out: Sequence[Label], shape: Sequence[int]) -> Axes:
    """Axes after a contraction with something else: those that are left, and new ones.

    If one axis was mixed into one of equal size, as heads are, that stands in its place.
    """
    gone, new = [x for x in own if x not in out], [x for x in out if x not in own]
    known = dict(zip(own, axes.digits, strict=True))
    if len(gone) == len(new) == 1 and math.prod(n for n, _ in known[gone[0]]) == shape[out.index(new[0])]:
        known[new[0]] = known[gone[0]]
    digits = tuple(known.get(label, ((n, None),)) for label, n in zip(out, shape, strict=True))
    return Axes(axes.shape, digits, axes.offset).broadcast(shape)


def rearranged(axes: Axes, own: Sequence[Label], wanted: Sequence[Label], sizes: dict[Label, int]) -> Axes:
    """Axes of what `arranged` gives."""
    digits = tuple(axes.digits[own.index(label)] if label in own else ((1, 0),) for label in wanted)
    return Axes(axes.shape, digits, axes.offset).broadcast([sizes[label] for label in wanted])
