"""`DataFlow`: finds attention written out in a model: product, softmax, product with V.

Roles travel with tensors from call to call: `Scores` (a product of two activations and what
followed) and `Weights` (a softmax and what followed). A contraction of weights along the softmax's
axis is an attention, with V and the output at hand. Shapes decide nothing.
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

from vitreous.lens.coordinates.contraction import MATMULS, Contraction, Label, contraction
from vitreous.lens.coordinates.field import tensors
from vitreous.lens.tap.axes import Axes, arrange, on_meta
from vitreous.lens.tap.dataflow import Scores, Softmax, SoftmaxRecord, WeightedSum, Weights, make_product, recover_probabilities
from vitreous.lens.tap.module_stack import ModuleStack

SOFTMAXES = {
    "softmax", "_softmax", "special_softmax", "_safe_softmax", "softmin", "gumbel_softmax", "log_softmax", "_log_softmax",
    "special_log_softmax",
}  # fmt: skip
STARTS = (
    SOFTMAXES | MATMULS | {"__matmul__", "__rmatmul__", "einsum"}
)  # calls that may give a role to a tensor without one among its inputs
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
# Entries are taken or put elsewhere, maybe among others: scores stay scores, but without axes.
MOVES = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "pad", "index_select", "gather", "take_along_dim", "scatter",
    "scatter_", "topk", "sort", "roll", "flip", "repeat", "repeat_interleave", "tile", "as_strided", "unfold", "index_put",
    "index_put_", "masked_select", "constant_pad_nd", "__getitem__",
}  # fmt: skip


class DataFlow:
    """Roles of the tensors of one pass.

    Tables are weak: no tensor lives longer than in the model.
    """

    def __init__(self):
        self.roles = WeakIdKeyDictionary()
        self.softmaxes: list[SoftmaxRecord] = []

    def clear(self) -> None:
        """Drop all roles."""
        self.roles = WeakIdKeyDictionary()

    def follow(
        self,
        name: str,
        stack: ModuleStack,
        func: Callable,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        inputs: Sequence[Tensor],
        out: Any,
    ) -> Any:
        """Update roles after a call. inputs: the tensors among its arguments.

        Returns a `WeightedSum`, or a text that says why weights contracted with V are no map, or
        None.
        """
        if name in SOFTMAXES:
            return self.softmax(name, stack.path, args, kwargs, out)
        contracted = contraction(name, args, kwargs)
        if contracted is not None:
            return self.follow_contraction(contracted, name, args, kwargs, out)
        sources = [(x, self.roles[x]) for x in {id(x): x for x in inputs}.values() if x in self.roles]
        if sources:
            self.propagate(sources, name, func, args, kwargs, out)
        return None

    def softmax(self, name: str, path: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """The output of a softmax becomes `Weights` of the scores that it was taken of."""
        if not isinstance(out, Tensor):
            return
        # gumbel_softmax(logits, tau, hard, eps, dim), all others (input, dim)
        x, place = tensors((*args, *kwargs.values()))[0], 4 if name == "gumbel_softmax" else 1
        dim = kwargs.get("dim", args[place] if len(args) > place else None)
        if dim is None:
            # the deprecated default axis of F.softmax depends on the number of axes
            dim = -1 if name == "gumbel_softmax" else F._get_softmax_dim(name, x.ndim, 5)
        role = self.roles.get(x)
        scores = role if isinstance(role, Scores) else role.softmax.scores if isinstance(role, Weights) else None
        record = SoftmaxRecord(path)
        self.softmaxes.append(record)
        softmax = Softmax(record, tuple(out.shape), dim % max(1, out.ndim), scores)
        self.roles[out] = Weights(softmax, Axes.of(out.shape), log="log" in name)

    def follow_contraction(self, c: Contraction, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Any:
        """A contraction: of weights with V, of weights with a mixing matrix, or a new product."""
        # weights may be either operand of the contraction
        for x, own, other, theirs in ((c.a, c.labels_a, c.b, c.labels_b), (c.b, c.labels_b, c.a, c.labels_a)):
            role = self.roles.get(x)
            key = role.key_axis() if isinstance(role, Weights) else None
            if key is None:
                continue
            label = own[key[0]]
            if label in theirs and label not in c.labels_out:
                # the softmax axis is summed with one of V
                return self.attention(c, (x, own), (other, theirs), out, role, key)
            # heads are mixed; a sum with another activation is of features, as in slot attention,
            # whose softmax runs over the slots
            if label in c.labels_out and label not in theirs and isinstance(other, nn.Parameter):
                self.roles[out] = self.change_weights(role, x, contracted_axes(role.axes, own, c.labels_out, out.shape))
                return None
        for x, own in ((c.a, c.labels_a), (c.b, c.labels_b)):
            role = self.roles.get(x)
            if not isinstance(role, Scores):
                continue
            # weights that nobody normalised by a softmax cannot be checked, so they are refused
            if role.has_division:
                return "weights are made of exp and a division, not of a softmax; use torch.softmax, or a fused attention"
            other = c.b if x is c.a else c.a
            # talking heads and learned filters on scores: still scores, with new axes
            if isinstance(other, nn.Parameter):
                axes = None if role.axes is None else contracted_axes(role.axes, own, c.labels_out, out.shape)
                self.roles[out] = role.after_call(name, axes)
                return None
        # a product with a parameter is a linear layer; only activations make scores
        if not any(isinstance(x, nn.Parameter) for x in (c.a, c.b)) and out.is_floating_point():
            self.roles[out] = Scores(make_product(c, name, args, kwargs, out), Axes.of(out.shape))
        return None

    def attention(self, c: Contraction, of_a: tuple, of_v: tuple, out: Tensor, weights: Weights, key: tuple[int, bool]) -> Any:
        """The `WeightedSum` of weights (a, own) with V (v, theirs), or why it is no map, or None.

        key: as of `Weights.key_axis`. of_a, of_v: each a tensor and its labels in the contraction.
        """
        (a, own), (v, theirs) = of_a, of_v
        if weights.softmax.scores is None and weights.mixed:
            return None  # a gate on something else, not weights over places
        weights.softmax.record.used = True
        if weights.log:
            return "logarithms of a softmax were contracted, not the softmax"
        if sum(label not in c.labels_out for label in own) != 1 or sum(label not in c.labels_out for label in theirs) != 1:
            return "the softmax was contracted along more than its own axis"
        label = own[key[0]]
        # labels of one operand alone are queries, or features of V; shared ones are leading axes
        rows = [x for x in own if x not in theirs and x not in c.batch]
        columns = [x for x in theirs if x not in own and x not in c.batch]
        row, columns = rows[-1] if rows else "row", columns or ["column"]
        lead = [x for x in c.labels_out if x != row and x not in columns]
        sizes = dict(zip(c.labels_out, out.shape, strict=True)) | {label: a.shape[key[0]]}
        # an attention of one query, or of scalars, lacks the axis
        sizes = {"row": 1, "column": 1} | sizes
        wanted = [*lead, row, label]
        axes = arranged_axes(weights.axes, own, wanted, sizes)

        def form(labels: Sequence[Label], axis: Label) -> Callable[[Tensor], Tensor]:
            """What brings a tensor with these labels to (leading axes, axis, features of V)."""
            ends = len(lead) + 1, len(lead) + len(columns)  # several axes of V alone, as windows that move as one
            return lambda x: arrange(x, labels, [*lead, axis, *columns], sizes).flatten(*ends)

        form_v, form_output = form(theirs, label), form(c.labels_out, row)
        return WeightedSum(
            weights=weights,
            axes=axes,
            effective=arrange(a, own, wanted, sizes),
            probabilities=recover_probabilities(weights, a, axes, key[1]),
            v=form_v(v),
            output=form_output(out),
            all_keys=key[1],
            v_view=(v, form_v),
            output_view=(out, form_output),
        )

    def change_weights(self, role: Weights, x: Tensor, axes: Axes | None, into: Tensor | None = None, **fields: Any) -> Weights:
        """The role of a tensor that came from the weights x by a change of values.

        into: the tensor itself, if it may be x (in-place calls).
        """
        overwritten = role.overwritten or (into is x and role.original is None)
        return replace(move_role(role, x, axes, into), overwritten=overwritten, mixed=True, **fields)

    def propagate(
        self, sources: list, name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Give the outputs of any other call the role of their inputs, if it goes on."""
        # `x[i] = y` returns nothing, and changes its first argument
        outs = tensors(out) or ([args[0]] if name == "__setitem__" else [])
        outs = [x for x in outs if x.is_floating_point()]
        if not outs:
            return
        x, role = leading_source(sources, outs[0].shape)
        if isinstance(role, Weights):
            for _, other in sources:
                if isinstance(other, Weights):
                    # two softmaxes were combined: the other one is accounted for by this one
                    other.softmax.record.used |= other.softmax is not role.softmax and outs[0].shape == x.shape
        # an index tensor makes a copy of chosen entries, not a view
        indexed = name == "__getitem__" and len(tensors((*args, *kwargs.values()))) > 1
        if name in VIEWS and not indexed:
            for y, axes in zip(outs, view_axes(role.axes, x, func, args, kwargs), strict=False):
                self.roles[y] = move_role(role, x, axes, y)
        elif name in COPIES or (name in DROPOUTS and not is_dropping(args, kwargs)):
            for y in outs:
                if y is not x and y.shape == x.shape:
                    self.roles[y] = move_role(role, x, role.axes, y)
        elif isinstance(role, Scores):
            self.update_scores(role, x, name, outs)
        else:
            self.update_weights(role, x, name, outs[0])

    def update_scores(self, role: Scores, x: Tensor, name: str, outs: list[Tensor]) -> None:
        """Roles after a call on scores: elementwise with what broadcasts, or rearranged."""
        for y in outs:
            # broadcasting aligns axes from the right
            tail = y.shape[y.ndim - x.ndim :] if y.ndim >= x.ndim else None
            if tail is not None and all(n == m or m == 1 for n, m in zip(tail, x.shape, strict=True)):
                axes = None if role.axes is None or name in MOVES else role.axes.broadcast(y.shape)
            elif name in MOVES:
                axes = None
            else:
                self.roles.pop(y, None)
                continue
            self.roles[y] = role.after_call(name, axes)

    def update_weights(self, role: Weights, x: Tensor, name: str, y: Tensor) -> None:
        """The role of the output of a call that changed weights; none if their axis is gone."""
        key = role.key_axis()
        # exp of log_softmax is the softmax again
        if role.log and name in ("exp", "exp_", "special_exp") and not role.mixed:
            self.roles[y] = replace(role, log=False, original=None)
            return
        axes, mixing = role.axes, {"linear": x.ndim - 1, "conv1d": 1, "conv2d": 1, "conv3d": 1}.get(name)
        # a linear layer or a filter along the keys ends the map
        if key is None or key[0] == mixing or len(y.shape) != len(x.shape) or name in MOVES:
            self.roles.pop(y, None)
            return
        differ = [i for i, (n, m) in enumerate(zip(y.shape, x.shape, strict=True)) if n != m]
        if differ and differ != [mixing]:
            self.roles.pop(y, None)
            return
        if differ:
            axes = axes.with_new_axis(mixing, y.shape[mixing])
        self.roles[y] = self.change_weights(role, x, axes, y, lossy=role.lossy or name in DROPOUTS)


def leading_source(sources: list[tuple[Tensor, Scores | Weights]], shape: Sequence[int]) -> tuple[Tensor, Scores | Weights]:
    """The input whose role the result of a call inherits.

    Weights come before scores, then those of the result's shape. Of several products it is the one
    that has a value of its own for every entry (q k^T beside relative positions, which repeat);
    with two such, queries and keys are ambiguous, and the axes are dropped.
    """

    def rank(source: tuple[Tensor, Scores | Weights]) -> tuple[bool, ...]:
        x, role = source
        if isinstance(role, Weights):
            return False, role.softmax.scores is None, x.shape != shape
        return True, repeats(x, role, shape), x.shape != shape

    x, role = min(sources, key=rank)
    if isinstance(role, Scores) and not repeats(x, role, shape):
        rivals = [(y, other) for y, other in sources if isinstance(other, Scores) and other.product is not role.product]
        if any(not repeats(y, other, shape) for y, other in rivals):
            role = replace(role, axes=None)
    return x, role


def repeats(x: Tensor, role: Scores, shape: Sequence[int]) -> bool:
    """True if scores broadcast to a shape repeat entries of their product, or lost their axes."""
    if role.axes is None or len(shape) < x.ndim:
        return True
    return any(size > 1 and not stride for digits in role.axes.broadcast(shape).digits for size, stride in digits)


def view_axes(
    axes: Axes | None, x: Tensor, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[Axes | None]:
    """Axes of the outputs of a view of x, one per output.

    None where it is no view after all, as in x[:, [0, 2]].
    """
    stand_in = torch.empty(x.shape, device="meta")
    try:
        result = on_meta(func, args, kwargs, x, stand_in)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        result = ()
    for view in tensors(result):
        same = view.untyped_storage()._cdata == stand_in.untyped_storage()._cdata
        yield axes.after_view(view, x.shape) if same and axes is not None else None
    yield from repeat(None)


def move_role(role: Scores | Weights, x: Tensor, axes: Axes | None, y: Tensor | None) -> Scores | Weights:
    """The role of y, which has the values of x in other places; y: None if it is not x."""
    if isinstance(role, Scores):
        return replace(role, axes=axes)
    return replace(role, axes=axes, original=role.original if role.original is not None or role.overwritten or y is x else x)


def is_dropping(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """True if a dropout is on.

    By the arguments of F.dropout(input, p, training) or torch.dropout(input, p, train).
    """
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return bool(p) and kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))


def contracted_axes(axes: Axes, own: Sequence[Label], out: Sequence[Label], shape: Sequence[int]) -> Axes:
    """Axes after a contraction with another tensor: those that are left, and new ones.

    If one axis was mixed into one of equal size, as heads are, the new one takes its place.
    """
    removed, new = [x for x in own if x not in out], [x for x in out if x not in own]
    digits_of = dict(zip(own, axes.digits, strict=True))
    if len(removed) == len(new) == 1 and math.prod(n for n, _ in digits_of[removed[0]]) == shape[out.index(new[0])]:
        digits_of[new[0]] = digits_of[removed[0]]
    digits = tuple(digits_of.get(label, ((n, None),)) for label, n in zip(out, shape, strict=True))
    return Axes(axes.shape, digits, axes.offset).broadcast(shape)


def arranged_axes(axes: Axes, own: Sequence[Label], wanted: Sequence[Label], sizes: dict[Label, int]) -> Axes:
    """Axes of the result of `arrange`."""
    digits = tuple(axes.digits[own.index(label)] if label in own else ((1, 0),) for label in wanted)
    return Axes(axes.shape, digits, axes.offset).broadcast([sizes[label] for label in wanted])
