"""timm's `Eva`: EVA, EVA-02, DINOv3 and other models, most of them with rotary positions."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import apply_keep_indices_nlc
from timm.models.eva import Eva
from torch import Tensor, nn

from vitreous.hosts.vit import ViT


class EvaViT(ViT):
    """As `ViT`, but rotary positions are laid over a fixed list of tokens, and no child sees all tokens before the blocks."""

    base: ClassVar[type[nn.Module]] = Eva
    tokens_change: ClassVar[bool] = False

    def prefix_at_pool(self, model: nn.Module) -> int:
        return model.num_prefix_tokens  # Eva hands all tokens to `attn_pool`

    def begin(self, model: nn.Module, images: Tensor) -> tuple[Any, Tensor | None]:
        x, rope = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(x), rope

    def rope(self, model: nn.Module, rope: Tensor | None, block: int) -> dict[str, Tensor]:
        mixed = getattr(model, "rope_mixed", False)  # positions of their own for each block
        return {} if rope is None else {"rope": rope[block] if mixed else rope}

    def keep_rope(self, model: nn.Module, x: Tensor, rope: Tensor | None, keep: Tensor) -> Tensor | None:
        if rope is None:
            return None
        rope = apply_keep_indices_nlc(x, rope, keep)
        mixed = getattr(model, "rope_mixed", False)
        return rope.transpose(0, 1) if mixed else rope.unsqueeze(1)  # as timm does behind patch dropout
