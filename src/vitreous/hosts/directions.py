"""Queries and keys at the linear slot: what a layer gives as queries and keys comes out changed.

`Projections` is the base; `Directions` is SVDA's operator there.

Nothing of the attention behind the layer is known or copied: windows, relative positions, reduced keys, talking heads
and class attention stay the host's. What has to be known of an attention class is which of its linear layers hold queries
and keys. Of timm's that is the table `PROJECTIONS`, looked up by class object; a class of our own or of a third party says
it itself:

    projections: ClassVar[dict[str, str]] = {"q": "q", "kv": "kv"}     {child: the equal parts of its output, in order}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from timm.layers import Attention as TimmAttention
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn, TalkingHeadAttn
from timm.models.crossvit import CrossAttention
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.volo import Attention as VoloAttention
from timm.models.volo import ClassAttention, OutlookAttention
from timm.models.xcit import XCA
from torch import Tensor, nn

from vitreous.base.errors import HostError
from vitreous.hosts.mixer import Mixer
from vitreous.layers.adoption import adopt
from vitreous.layers.linear import Linear
from vitreous.layers.unit_norm import unit

P = TypeVar("P", bound="Projections")

PROJECTIONS: dict[type[nn.Module], dict[str, str]] = {
    TimmAttention: {"qkv": "qkv"},  # of Twins and CrossViT, too
    WindowAttention: {"qkv": "qkv"},
    PvtAttention: {"q": "q", "kv": "kv"},
    LocallyGroupedAttn: {"qkv": "qkv"},
    GlobalSubSampleAttn: {"q": "q", "kv": "kv"},
    TalkingHeadAttn: {"qkv": "qkv"},
    ClassAttn: {"q": "q", "k": "k"},
    VoloAttention: {"qkv": "qkv"},
    ClassAttention: {"q": "q", "kv": "kv"},
    CrossAttention: {"wq": "q", "wk": "k"},
}

USUAL = {"qkv": "qkv", "kv": "kv"} | {name.format(part): part for part in "qkv" for name in ("{}", "{}_proj", "w{}")}
COSINE = "whose queries and keys have unit length already, under a factor that it learns itself"
UNSUITABLE: dict[type[nn.Module], str] = {
    BeitAttention: "which reads the weight of its qkv and never calls the layer",
    WindowAttentionV2: COSINE,
    WindowMultiHeadAttention: COSINE,
    OutlookAttention: "whose weights come from one linear layer, without queries and keys",
    XCA: "in which channels attend to each other, not tokens",
}


def projections_of(attention: nn.Module) -> dict[str, str] | None:
    """{child linear: the equal parts of its output, of q, k, v} of an attention; None where that is not known."""
    own = getattr(type(attention), "projections", None)
    return own if isinstance(own, dict) else PROJECTIONS.get(type(attention))


def parts_held(attention: nn.Module, child: str) -> str:
    """The equal parts of a child linear's output, of q, k, v, in order: as its attention says, else by its name.

    "" for any other layer.
    """
    return (projections_of(attention) or {}).get(child) or USUAL.get(child, "")


def unsuitable(attention: nn.Module) -> str | None:
    """Why queries and keys of an attention cannot be had by its linear layers, as a relative clause, or None."""
    if isinstance(attention, Mixer):
        return "a mixer in the place of attention, without queries and keys"
    if type(attention) in UNSUITABLE:
        return UNSUITABLE[type(attention)]
    if projections_of(attention) is None:
        return "whose linear layers are not known"
    if any(type(getattr(attention, name, None)) not in (nn.Identity, type(None)) for name in ("q_norm", "k_norm")):
        return "which norms queries and keys behind its linear layers"
    return None


def never_calls(attention: nn.Module, child: str) -> bool:
    """True if an attention that is not ours to adopt reads the weight of this child and never calls the layer."""
    swin_v2 = type(attention) is WindowAttentionV2 and attention.q_bias is not None and not attention.qkv_bias_separate
    return child == "qkv" and (type(attention) is BeitAttention or swin_v2)


def attentions_in(model: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, str]]:
    """(path of the block, path of its attention), in the order in which the model lists them, which is that of running.

    An attention is a child of a known class, or one called `attn`, whatever takes its place; nothing inside one counts.
    """
    seen = set() if seen is None else seen
    for name, child in (model.get_submodule(path) if path else model).named_children():
        inner = f"{path}.{name}".lstrip(".")
        if id(child) in seen:
            continue
        seen.add(id(child))
        if name == "attn" or projections_of(child) is not None or type(child) in UNSUITABLE:
            yield path, inner
        else:
            yield from attentions_in(model, inner, seen)


def host_scale(attention: nn.Module, width: int) -> float:
    """The number by which a host multiplies its scores: its attribute `scale`, width^-0.5 where it has none.

    Raises HostError for one that is learned or computed, which no fixed number can make up for.
    """
    scale = getattr(attention, "scale", width**-0.5)
    if not isinstance(scale, int | float) or scale == 0:
        raise HostError(
            f"Found {type(attention).__name__}.scale of type {type(scale).__name__}. Expected a number other than 0, by which "
            "the scores are multiplied. Give the class such a number, or use another host."
        )
    return float(scale)


class Projections(Linear):
    """A linear layer whose output holds queries, keys or values; made by `holding`.

    A subclass overrides `changed`. `effective_weight` is that of the product before it, since the
    forward of an adapter below may ask for it.

    parts: of the output, in order, "qkv", "q", "kv", ... heads: H. host: the class of the layer
    before, which makes the product, adapters included.
    """

    host: type[nn.Linear]
    parts: str
    heads: int

    @classmethod
    def holding(cls: type[P], linear: nn.Linear, parts: str, attention: nn.Module) -> P:
        """Adopt a layer of an attention, which has `num_heads`. Raises HostError where parts and heads do not divide it."""
        heads = getattr(attention, "num_heads", 0)
        if not heads or linear.out_features % (len(parts) * heads):
            raise HostError(
                f"{type(attention).__name__} has a layer of {linear.out_features} numbers for the parts {parts!r} and "
                f"num_heads={heads}. Expected parts of one size, and each of so many heads. Correct the class's projections, "
                "or give it num_heads."
            )
        new = adopt(cls, linear)
        new.host, new.parts, new.heads = type(linear), parts, heads
        return new

    @property
    def head_dim(self) -> int:
        return self.out_features // (len(self.parts) * self.heads)

    def changed(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Queries, keys, values by their letters, (..., H, K) each -> the same letters in order."""
        return parts

    def effective_weight(self) -> Tensor:
        """W (out, in) of the product, without what `changed` does."""
        return self.host.effective_weight(self) if issubclass(self.host, Linear) else self.weight

    def effective_bias(self) -> Tensor | None:
        return self.host.effective_bias(self) if issubclass(self.host, Linear) else self.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.host.forward(self, x)
        parts = dict(zip(self.parts, out.unflatten(-1, (len(self.parts), self.heads, -1)).unbind(-3), strict=True))
        return torch.stack([part.to(out.dtype) for part in self.changed(parts).values()], dim=-3).flatten(-3)


class Directions(Projections):
    """A layer of queries or keys, which come out as unit vectors.

        q <- w_h * q / |q|,    k <- k / |k|,    v as it is         per token and head, biases included

    with w (H, K) of `query_weight`. The host goes on as before: scores are scale * sum_d w_d q_d k_d, with its own scale.
    """

    @classmethod
    def holding(cls: type[P], linear: nn.Linear, parts: str, attention: nn.Module) -> P:
        """As `Projections.holding`; raises HostError also where the host's scale is no fixed number."""
        new = super().holding(linear, parts, attention)
        new.host_scale = host_scale(attention, new.head_dim)
        return new

    def query_weight(self) -> Tensor:
        """w (H, K), the factors of unit queries; asked only where the output holds queries."""
        raise TypeError(f"{type(self).__name__} does not say how directions count: define query_weight(self).")

    def rows(self, part: str) -> Tensor | None:
        """W_Q or W_K (H K, D), by the letter of the part; None where it is not in this layer."""
        return self.effective_weight().chunk(len(self.parts))[self.parts.index(part)] if part in self.parts else None

    def changed(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if "q" in parts:
            parts["q"] = unit(parts["q"]) * self.query_weight()
        if "k" in parts:
            parts["k"] = unit(parts["k"])
        return parts
