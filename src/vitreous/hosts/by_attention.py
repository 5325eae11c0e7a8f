"""Models of which the linear layers of their attention are known and nothing else.

timm's Swin, PVTv2, Twins, CaiT, VOLO, CrossViT, and any network with an attention class that has `projections`.
"""

from __future__ import annotations

from typing import ClassVar

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitreous.base.errors import HostError
from vitreous.hosts.directions import UNSUITABLE, attentions_in, projections_of, unsuitable
from vitreous.hosts.vit import ViT

WRAPPED = ("_orig_mod", "module", "model")  # where a wrapper keeps the model inside


class ByAttention(ViT):
    """They offer their linear layers. A block is what has an attention for a child, counted in running order."""

    base: ClassVar[type[nn.Module]] = nn.Module
    tokens_change: ClassVar[bool] = False

    def has(self, model: nn.Module) -> bool:
        """Not a subclass of a family that walks over blocks in its own way, nor a wrapper: both are refused by name."""
        if isinstance(model, VisionTransformer | Eva) or any(isinstance(getattr(model, w, None), nn.Module) for w in WRAPPED):
            return False
        found = (model.get_submodule(path) for _, path in attentions_in(model))
        return any(projections_of(attention) is not None or type(attention) in UNSUITABLE for attention in found)

    def blocks(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(block for block, _ in attentions_in(model))

    def attention(self, model: nn.Module, block: int) -> str:
        return tuple(attentions_in(model))[block][1]

    def width(self, model: nn.Module, block: int) -> int:
        attention = model.get_submodule(self.attention(model, block))
        return next(module.in_features for module in attention.modules() if isinstance(module, nn.Linear))

    def offers(self, model: nn.Module) -> set[str]:
        attentions = [model.get_submodule(path) for _, path in attentions_in(model)]
        return {"linear"} | {"projections" for attention in attentions if unsuitable(attention) is None}

    def sentence(self, model: nn.Module, word: str) -> str:
        kind = type(model).__name__
        if word == "projections":
            path = self.attention(model, 0)
            attention = model.get_submodule(path)
            return (
                f"The model is a {kind}, whose {path} is a {type(attention).__module__}.{type(attention).__name__}, "
                f"{unsuitable(attention)}. Expected attention whose linear layers give queries and keys for a softmax of their "
                "products. Use another host for {mechanism}."
            )
        return (
            f"The model is a {kind}, which hands its blocks a picture, or several lists of tokens: an inserted, merged or "
            "dropped token has no place there, and nothing but linear layers can be exchanged. Expected timm's "
            "VisionTransformer or Eva for {mechanism}. Use a mechanism of linear layers here, such as svda."
        )

    def prefix(self, model: nn.Module) -> int:
        raise HostError(self.sentence(model, "stream").format(mechanism="a mechanism that reads the tokens"))
