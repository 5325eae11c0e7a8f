"""`AttentionOp`: an intercepted attention; the fused route; `Receiver`, which gets it."""

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
NOT_FINITE = "its queries, keys or values are not finite"


@dataclass(frozen=True)
class Refusal:
    """A part of a pass that gave no map: the name of its module, and the reason."""

    name: str
    reason: str


@dataclass
class AttentionOp:
    """An intercepted attention; leading axes are the call's own.

    route: "fused" or "softmax". q, k: `OperandView`s that give (..., N, K) and (..., M, K); None if
        there is no product of queries and keys, or its axes were lost.
    v, output: (..., M, Kv), (..., N, Kv).
    output_view: the output as an `OperandView`.
    mask, causal, scale: as `scaled_dot_product_attention` got them.
    weighted_sum: of the softmax route. heads: their number, where the module passed it.
    """

    route: str
    q: OperandView | None
    k: OperandView | None
    v: Tensor
    output: Tensor
    output_view: OperandView
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    weighted_sum: WeightedSum | None = None
    heads: int | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return tuple(self.output.shape[:-2])


def fused_attention(args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> AttentionOp | str:
    """The `AttentionOp` of a `scaled_dot_product_attention` call, or why it has no map."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    arguments = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None} | dict(zip(names, args, strict=False))
    arguments |= kwargs
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    # each refusal is a text that ends up in the report, so it says what to do
    if q.is_nested:
        return "nested tensors have no map of one shape; give images of one size"
    if arguments["dropout_p"]:
        return f"dropout {arguments['dropout_p']} is on even in eval mode, so the map is random"
    lead = out.shape[:-2]

    def spread(x: Tensor, axes: int) -> Tensor:
        """x with `axes` own axes (and more behind) -> the leading axes of the call."""
        # grouped-query attention: one key head serves several query heads in a row
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
        output_view=(out, lambda x: x),
        mask=arguments["attn_mask"],
        causal=arguments["is_causal"],
        scale=float(scale),
    )


def guess_factors(lead: Sequence[int], heads: int | None) -> Factors:
    """Factors of leading axes of one image without coordinates: heads last, windows before.

    heads: their number, if the module passed it; in one axis with windows they are the inner
    factor.
    """
    if not lead:
        return ()
    last = ((lead[-1], "H"),)
    if heads and len(lead) == 1 and lead[0] % heads == 0:
        last = ((lead[0] // heads, "W"), (heads, "H"))
    return (*(((n, "W"),) for n in lead[:-1]), last)


class Receiver(ABC):
    """Gets the attentions of one pass. count: how many; refused: what gave no map.

    strict: tensors that no intercepted call made are an error. The first pass only records them:
    what is there again in the second pass is a constant that the model's code keeps, and what is
    new in it was computed out of sight.
    """

    strict = False

    def __init__(self):
        self.count, self.refused = 0, []
        self.counts: Counter[str] = Counter()

    def key(self, stack: ModuleStack) -> Key:
        """(path of the running module, index of this attention under that path)."""
        name = stack.path
        self.counts[name] += 1
        return name, self.counts[name] - 1

    def refuse(self, name: str, reason: str) -> None:
        """Record why something gave no map, once."""
        # a module that runs many times is refused once
        refusal = Refusal(name, reason)
        if refusal not in self.refused:
            self.refused.append(refusal)

    def follow(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:  # noqa: B027 (only the tracer follows)
        """Called after every call of the pass."""

    def read(self, name: str, tensor: Tensor) -> None:  # noqa: B027
        """Called when Python code reads the values of a tensor."""

    @abstractmethod
    def attention(self, stack: ModuleStack, op: AttentionOp) -> None:
        """Called at every attention of the pass."""
