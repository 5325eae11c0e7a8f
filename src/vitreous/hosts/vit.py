"""timm's `VisionTransformer` in all its options: ViT, DeiT, DINOv2, SigLIP, CLIP and their like."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitreous.hosts.attention import HOSTS as ATTENTIONS
from vitreous.hosts.attention import Attention
from vitreous.hosts.block import halves_of
from vitreous.hosts.mixer import Mixer
from vitreous.hosts.read_out import read_tokens
from vitreous.hosts.stream_ends import Embed

WALKS = ("forward_features", "forward_intermediates")


class ViT:
    """What is particular to this family of models. It holds nothing; a model is handed to each method."""

    base: ClassVar[type[nn.Module]] = VisionTransformer
    tokens_change: ClassVar[bool] = True  # tokens may be appended, merged or dropped between blocks

    def has(self, model: nn.Module) -> bool:
        """True for models of this family; a subclass counts as long as it leaves the walk over the blocks alone."""
        return isinstance(model, self.base) and all(getattr(type(model), w) is getattr(self.base, w) for w in WALKS)

    def offers(self, model: nn.Module) -> set[str]:
        """The words of `host.CAPABILITIES` that hold for this model."""
        attentions = [getattr(block, "attn", None) for block in model.blocks]
        known = any(isinstance(attn, (Attention, Mixer, *ATTENTIONS)) for attn in attentions)  # a mixer is refused by name
        return {"stream", "walk"} | {
            word
            for word, offered in {
                "insert": self.tokens_change,
                "remove": self.tokens_change,
                "attention": known,
                "projections": known,
                "decaying_mixer": any(getattr(attn, "decays", False) for attn in attentions),
                "halves": any(map(halves_of, model.blocks)),
                "linear": any(isinstance(module, nn.Linear) for module in model.blocks.modules()),
                "grid": isinstance(model.patch_embed, Embed) or type(model.patch_embed) is PatchEmbed,
                "rotary_free": getattr(model, "rope", None) is None,
                "class_token": model.cls_token is not None,
                "class_head": not read_tokens(model)[1],
                "classifier": type(getattr(model, "head_drop", None)) is nn.Dropout and not hasattr(model, "head_dist"),
                "poolable": self.own_pool(model) is None,
                "reads_inserted": model.attn_pool is not None or model.global_pool not in ("max", "avgmax"),
            }.items()
            if offered
        }

    def blocks(self, model: nn.Module) -> tuple[str, ...]:
        """Dotted paths of the blocks, in running order."""
        return tuple(f"blocks.{i}" for i in range(len(model.blocks)))

    def attention(self, model: nn.Module, block: int) -> str:
        """Dotted path of a block's attention."""
        return f"blocks.{block}.attn"

    def width(self, model: nn.Module, block: int) -> int:
        """Features of a token at a block."""
        return model.embed_dim

    def sentence(self, model: nn.Module, word: str) -> str | None:
        """What is said where a word of `host.CAPABILITIES` is missing, if it is not the sentence there."""
        return None

    def prefix(self, model: nn.Module) -> int:
        """The number of class, distillation and register tokens that stand before the patches."""
        return model.num_prefix_tokens

    def own_pool(self, model: nn.Module) -> str | None:
        """What keeps another pool from taking the place of the head's own, as the beginning of a sentence, or None."""
        for method in ("pool", "forward_head"):
            if getattr(type(model), method) is not getattr(self.base, method):
                return f"The model is a {type(model).__name__} with a {method} of its own, which never calls attn_pool"
        kind = type(model.attn_pool)
        held = kind.__module__.startswith("timm.")
        return f"attn_pool holds {kind.__name__}, a pool with weights of its own" if held else None

    def prefix_at_pool(self, model: nn.Module) -> int:
        """How many of them reach `attn_pool`, where that stands for the head's pool over patches."""
        return 0

    def begin(self, model: nn.Module, images: Tensor) -> tuple[Any, Tensor | None]:
        """What the first block gets: tokens (an `Opening` where the stream is opened), and rotary positions or None."""
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))), None

    def rope(self, model: nn.Module, rope: Tensor | None, block: int) -> dict[str, Tensor]:
        """What a block takes beside tokens and masks."""
        return {}

    def keep_rope(self, model: nn.Module, x: Tensor, rope: Tensor | None, keep: Tensor) -> Tensor | None:
        """Rotary positions of the patches keep (B, n) alone."""
        return None

    def after_positions(self, model: nn.Module) -> str:
        """Name of the child through which all tokens, (B, N, D) -> (B, N, D), pass once they have their positions."""
        return "patch_drop"
