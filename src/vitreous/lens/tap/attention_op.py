"""An attention as a tap finds it, and who receives it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from vitreous.lens.tap.dataflow import WeightedSum
from vitreous.lens.tap.module_stack import ModuleStack

Key = tuple[str, int]  # name of a call or module, call index
OperandView = tuple[Tensor, Callable[[Tensor], Tensor]]  # a tensor of the model, and the function that gives the operand
Factors = tuple[tuple[tuple[int, str], ...], ...]  # of leading axes, see `Arrangement`


@dataclass(frozen=True)
class Refusal:
    """Something in a pass that gave no map: where it was, and why."""

    name: str
    reason: str


@dataclass
class AttentionOp:
    """An attention as it was found: leading axes are the call's own.

    q, k: each an operand of the product and what brings a tensor with its axes to (..., N, K), (..., M, K); None: unknown.
    v, output: (..., M, Kv), (..., N, Kv).
    """

    route: str
    q: OperandView | None
    k: OperandView | None
    v: Tensor
    output: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    weighted_sum: WeightedSum | None = None
    heads: int | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.output.shape[:-2])


def fused_attention(args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> AttentionOp | str:
    """A call of `scaled_dot_product_attention` as it was given, or why it has no map."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    arguments = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None} | dict(zip(names, args, strict=False))
    arguments |= kwargs
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    if q.is_nested:
        return "nested tensors have no map of one shape; give images of one size"
    if arguments["dropout_p"]:
        return f"dropout {arguments['dropout_p']} is on even in eval mode, so the map is random"
    lead = out.shape[:-2]

    def spread(x: Tensor, axes: int) -> Tensor:
        """x with `axes` axes (and more behind) -> the call's leading axes; fewer key heads serve several query heads."""
        if axes > 2 and lead and x.shape[axes - 3] not in (1, lead[-1]):
            x = x.repeat_interleave(lead[-1] // x.shape[axes - 3], dim=axes - 3)
        return x.expand(*lead, *x.shape[axes - 2 :])

    scale = 1 / math.sqrt(max(1, q.shape[-1])) if arguments["scale"] is None else arguments["scale"]
    return AttentionOp(
        route="fused",
        q=(q, partial(spread, axes=q.ndim)),
        k=(k, partial(spread, axes=k.ndim)),
        v=spread(v, v.ndim),
        output=out,
        mask=arguments["attn_mask"],
        causal=arguments["is_causal"],
        scale=float(scale),
    )


def guess_factors(lead: Sequence[int], heads: int | None) -> Factors:
    """Factors of leading axes of one image where places do not tell: the last axis is heads, others are windows.

    heads: how many there are, if the module said so; they are inside of windows in one axis with them.
    """
    if not lead:
        return ()
    last = ((lead[-1], "H"),)
    if heads and len(lead) == 1 and lead[0] % heads == 0:
        last = ((lead[0] // heads, "W"), (heads, "H"))
    return (*(((n, "W"),) for n in lead[:-1]), last)


class Receiver(ABC):
    """What becomes of the attentions of one pass. count: how many were taken; refused: what gave no map.

    strict: tensors that no visible call made are an error. In a first pass they are only remembered: what is there again
    in the second is a constant that the model's code keeps, and what is not was computed out of sight.
    """

    strict = False

    def __init__(self):
        self.count, self.refused = 0, []
        self.counts: Counter[str] = Counter()

    def key(self, stack: ModuleStack) -> Key:
        name = stack.path
        self.counts[name] += 1
        return name, self.counts[name] - 1

    def refuse(self, name: str, reason: str) -> None:
        refusal = Refusal(name, reason)
        if refusal not in self.refused:
            self.refused.append(refusal)

    def follow(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:  # noqa: B027 (only the tracer follows)
        """Every call of the pass, after it was made."""

    @abstractmethod
    def attention(self, stack: ModuleStack, op: AttentionOp) -> None:
        """An attention that the pass made."""
