"""The small post-norm vision transformers that SVDA was first trained in, from scratch."""

from __future__ import annotations

import re
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

SMALL = {"patch_size": 4, "embed_dim": 256, "num_heads": 4, "depth": 4}
THEIRS = {
    r"^embed\.": "patch_embed.",
    r"\.ff\.0\.": ".mlp.fc1.",
    r"\.ff\.2\.": ".mlp.fc2.",
    r"\.mha\.in_proj_": ".qkv.",
    r"\.mha\.out_proj\.": ".proj.",
}
LARGE = {"patch_size": 8, "embed_dim": 96, "num_heads": 2, "depth": 8}


class PostNormBlock(Block):
    """timm's block with the norms behind the sums: x = LN(x + Attn(x)); x = LN(x + MLP(x)).

    (B, N, D) -> (B, N, D).
    """

    def attention_half(self, x: Tensor, **arguments: Any) -> Tensor:
        return self.norm1(x + self.drop_path1(self.ls1(self.attn(x, **arguments))))

    def mlp_half(self, x: Tensor) -> Tensor:
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.mlp_half(self.attention_half(x, attn_mask=attn_mask, is_causal=is_causal))


class ScratchViT(VisionTransformer):
    """A ViT of post-norm blocks without positional embedding.

    It cannot tell in which order its patches lie.

        x = [class; patches];  per block x = LN(x + Attn(x)), x = LN(x + MLP(x));  logits = Linear(LN(x)[class])

    MLP of ratio 4 with GELU, linear layers with bias, no dropout, class token started at zero, inputs in [0, 1].
    Paper: Arampatzakis, Pavlidis, Mitianoudis, Papamarkos, 2026, arXiv 2602.10994, experiments from scratch.
    Differs: the paper leaves the start of the weights open; here every layer starts as PyTorch starts it, so that a
        plain and an SVDA arm can share one start. The paper's SVDA arm has separate linear q, k, v, which start as our
        joint layer does; its plain arm is an `nn.MultiheadAttention`, whose weights for q, k, v start Xavier-uniform
        and whose biases start at zero. Patches by a strided convolution and LayerNorm's eps = 1e-5 are our reading too.
    """

    def init_weights(self, mode: str = "reset", needs_reset: bool = True) -> None:
        """PyTorch's own start for every layer, zeros for the class token."""
        super().init_weights("reset", needs_reset)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)

    @staticmethod
    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of the authors' own code under timm's names; SVDA renames what is its own."""
        changed = {}
        for name, value in tensors.items():
            for theirs, ours in THEIRS.items():
                name = re.sub(theirs, ours, name)
            changed[name] = value
        return changed


def _cfg(size: tuple[int, int, int], classes: int) -> dict[str, Any]:
    return {
        "input_size": size,
        "num_classes": classes,
        "mean": (0.0,) * size[0],
        "std": (1.0,) * size[0],
        "crop_pct": 1.0,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2602.10994",
    }


default_cfgs = generate_default_cfgs(
    {
        "scratch_vit_patch4_28": _cfg((1, 28, 28), 10),
        "scratch_vit_patch4_32": _cfg((3, 32, 32), 10),
        "scratch_vit_patch8_224": _cfg((3, 224, 224), 100),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> ScratchViT:
    fixed = {"pos_embed": "none", "norm_layer": nn.LayerNorm, "block_fn": PostNormBlock}
    return build_model_with_cfg(
        ScratchViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(fixed | kwargs),
    )


@register_model
def scratch_vit_patch4_28(pretrained: bool = False, **kwargs: Any) -> ScratchViT:
    """FashionMNIST: one channel, 28 px, 50 tokens; width 256, 4 heads, 4 blocks."""
    return _create("scratch_vit_patch4_28", pretrained, **(SMALL | kwargs))


@register_model
def scratch_vit_patch4_32(pretrained: bool = False, **kwargs: Any) -> ScratchViT:
    """CIFAR-10 and CIFAR-100: 32 px, 65 tokens; width 256, 4 heads, 4 blocks."""
    return _create("scratch_vit_patch4_32", pretrained, **(SMALL | kwargs))


@register_model
def scratch_vit_patch8_224(pretrained: bool = False, **kwargs: Any) -> ScratchViT:
    """ImageNet-100: 224 px, 785 tokens; width 96, 2 heads, 8 blocks."""
    return _create("scratch_vit_patch8_224", pretrained, **(LARGE | kwargs))
