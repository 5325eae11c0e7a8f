"""Contractions in labels: matmul, einsum and their kin in one form, with a label per axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Label = int | str
Labels = tuple[Label, ...]


@dataclass(frozen=True)
class Contraction:
    """out = sum over the labels that only a and b have; one label per axis.

    Axes with equal labels are one axis (or one of them has size 1). batch: labels that count as
    leading axes even where one operand lacks them (broadcasting of matmul).
    """

    a: Tensor
    b: Tensor
    labels_a: Labels
    labels_b: Labels
    labels_out: Labels
    batch: frozenset[Label] = frozenset()


MATMULS = {"matmul", "rmatmul", "bmm", "mm", "mv", "baddbmm", "addmm", "addmv"}  # without underscores
# operands by keyword, in order
OPERAND_NAMES = ("input", "batch1", "mat1", "mat", "other", "tensor2", "batch2", "mat2", "vec")


def contraction(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    """The call as a contraction of two tensors of two or more axes, or None.

    einsum may contract tensors of one axis as well.
    """
    operands, out = labelled(name, args, kwargs)
    if len(operands) != 2 or (name != "einsum" and min(x.ndim for x, _ in operands) < 2):
        return None
    (a, labels_a), (b, labels_b) = operands
    return Contraction(a, b, labels_a, labels_b, out, frozenset(label for label in out if isinstance(label, int)))


def labelled(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[tuple[Tensor, Labels]], Labels]:
    """Operands with their labels, and the labels of the output.

    name: of the function, with or without underscores around it. No operands for any other call, or
    one of another form. Leading axes that broadcast have numbers, counted from their right end.
    """
    name = name.strip("_")
    if name == "einsum":
        return einsum_labels(args)
    if name not in MATMULS:
        return [], ()
    operands = [*args, *(kwargs[key] for key in OPERAND_NAMES if key in kwargs)]
    operands = [x for x in operands if isinstance(x, Tensor)]
    # the first argument is added to the product and is no operand
    if name in ("baddbmm", "addmm", "addmv"):
        operands = operands[1:]
    if len(operands) != 2:
        return [], ()
    # `a.__rmatmul__(b)` is b @ a
    a, b = reversed(operands) if name == "rmatmul" else operands
    lead = tuple(range(max(a.ndim, b.ndim, 2) - 2))
    # leading axes are numbered from the right end, as broadcasting aligns them; vectors have none
    own = [lead[len(lead) - (x.ndim - 2) :] for x in (a, b)]
    out = (*lead, *("n",)[: a.ndim - 1], *("m",)[: b.ndim - 1])
    return [(a, (*own[0], *("n", "c")[-a.ndim :])), (b, (*own[1], *("c", "m")[: b.ndim]))], out


def einsum_labels(args: Sequence[Any]) -> tuple[list[tuple[Tensor, Labels]], Labels]:
    """`labelled` of an einsum, which must be written as text and without diagonals."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if not isinstance(args[0], str):
        return [], ()
    left, _, right = args[0].replace(" ", "").partition("->")
    labels = [expand_ellipsis(term, x.ndim) for term, x in zip(left.split(","), operands, strict=True)]
    if "->" in args[0]:
        longest = max(sum(isinstance(label, int) for label in own) for own in labels)
        out = expand_ellipsis(right, len(right.replace("...", "")) + (longest if "..." in right else 0))
    else:
        every = [label for own in labels for label in own]
        # without "->" the output has the ellipsis first, then letters that occur once, in order
        out = tuple(sorted({label for label in every if isinstance(label, int)}, reverse=True))
        out += tuple(sorted(label for label in every if isinstance(label, str) and every.count(label) == 1))
    if any(len(set(own)) < len(own) for own in (*labels, out)):
        return [], ()  # a diagonal
    return list(zip(operands, labels, strict=True)), out


def expand_ellipsis(term: str, ndim: int) -> Labels:
    """Letters of one operand, with "..." as numbers that count from its right."""
    before, dots, after = term.partition("...")
    count = ndim - len(before) - len(after)
    return (*before, *(range(count - 1, -1, -1) if dots else ()), *after)
