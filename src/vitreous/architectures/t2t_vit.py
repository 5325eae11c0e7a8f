"""T2T-ViT: deep, narrow vision transformers whose patches grow out of overlapping windows."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitreous.architectures._timm import config, create
from vitreous.base.checkpoint_names import renamed
from vitreous.base.errors import SettingError
from vitreous.mechanisms.embed.tokens_to_token import (
    Kind,
    TokenProjection,
    check_settings,
    check_strides,
    default_strides,
)

THEIRS = {  # names in the authors' code
    r"^tokens_to_token\.attention(\d)\.(?:attn\.)?": lambda m: f"patch_embed.proj.steps.{int(m[1]) - 1}.",
    r"^tokens_to_token\.project\.": "patch_embed.proj.project.",
    r"^(patch_embed\..*)\.w$": r"\1.directions",
    r"^(patch_embed\..*\.mlp)\.0\.": r"\1.fc1.",
    r"^(patch_embed\..*\.mlp)\.2\.": r"\1.fc2.",
}


class T2TViT(VisionTransformer):
    """timm's ViT on patches of a tokens-to-token module, with fixed positions.

        x = [class; tokens_to_token(image)] + sinusoid;  pre-norm blocks;  logits = Linear(LN(x)[class])
        sinusoid[n, 2 i] = sin(n / 10000^(2 i / D)),  sinusoid[n, 2 i + 1] = cos(n / 10000^(2 i / D))        n: class 0

    Paper: Yuan, Chen, Wang, Yu, Shi, Jiang, Tay, Feng, Yan 2021, arXiv 2101.11986.
    Queries, keys and values have no bias.
    Differs: positions and random directions are buffers, so that no choice of what trains lets them move. Positions of
        other image sizes (`set_input_size`, dynamic_img_size) are resampled over the grid, as timm does.
    Settings beside timm's: those of `tokens_to_token`, its width and dropout as token_width and token_dropout.
    Raises: SettingError where strides and patch_size, or image and patches, do not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        kind: Kind = "performer",
        strides: tuple[int, ...] | None = None,
        token_width: int = 64,
        features: int = 32,
        token_dropout: float = 0.1,
        **arguments: Any,
    ):
        size, patch = ((x, x) if isinstance(x, int) else tuple(x) for x in (img_size, patch_size))
        strides = tuple(strides or default_strides(patch))
        check_settings(strides, kind, token_width, features, token_dropout)
        check_strides(strides, patch)
        check_size(size, patch)
        make = partial(TokenProjection, strides=strides, kind=kind, width=token_width, features=features, dropout=token_dropout)
        super().__init__(size, patch, embed_layer=partial(embedding, make), **arguments)
        if self.pos_embed is not None:
            self.fix_positions(self.pos_embed)

    def fix_positions(self, values: Tensor) -> None:
        """Let `pos_embed` be a buffer, which no optimizer moves."""
        del self.pos_embed
        self.register_buffer("pos_embed", values.detach())

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)  # draws positions, too
        if self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed.copy_(sinusoid(*self.pos_embed.shape[1:])[None])

    def set_input_size(self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None) -> None:
        """Resample the positions for another image size. Raises SettingError for other patches."""
        if patch_size not in (None, self.patch_embed.patch_size):
            raise SettingError(
                f"Found patch_size={patch_size}. Expected {self.patch_embed.patch_size}, which the strides make. "
                "Create the network with another patch_size."
            )
        if img_size is not None:
            check_size(img_size, self.patch_embed.patch_size)
        super().set_input_size(img_size=img_size)
        if self.pos_embed is not None:
            self.fix_positions(self.pos_embed)


def embedding(make: partial[TokenProjection], embed_dim: int, in_chans: int, **arguments: Any) -> PatchEmbed:
    """timm's patch embedding with a tokens-to-token module as its projection."""
    dd = {name: arguments.get(name) for name in ("device", "dtype")}
    embed = PatchEmbed(in_chans=in_chans, embed_dim=embed_dim, **arguments)
    embed.proj = make(in_chans, embed_dim, **dd)
    return embed


def sinusoid(places: int, width: int) -> Tensor:
    """Sines and cosines in turn: (places, width) float32.

    Computed in float64: powers in float32 are 7e-6 off.
    """
    place = torch.arange(places, dtype=torch.float64)[:, None]
    pair = torch.arange(width, dtype=torch.float64) // 2
    angle = place / 10000 ** (2 * pair / width)
    even = torch.arange(width) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()


def check_size(size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise SettingError unless the sides of the images are multiples of those of the patches."""
    if any(side % part for side, part in zip(size, patch, strict=True)):
        raise SettingError(
            f"Found img_size={size} for patches of {patch[1]} x {patch[0]} pixels. Expected multiples. Give another size, or "
            "another patch_size."
        )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of the authors' own code under our names; others stay as they are.

    The released weights were trained with scores q k / sqrt(width); here queries take the factor
    between that and the usual 1 / sqrt(width of a head).
    """
    if not any(name.startswith("tokens_to_token.") for name in state_dict):
        return state_dict
    changed = our_tensors(state_dict)
    width = model.embed_dim
    factor = math.sqrt(model.blocks[0].attn.head_dim / width)
    for name in [name for name in changed if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)]:
        q, rest = changed[name].split((width, 2 * width))
        changed[name] = torch.cat([q * factor, rest])
    return changed


def our_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names as ours; the joint projection of softmax steps becomes k, q, v."""
    changed = {}
    for name, value in renamed(tensors, THEIRS).items():
        if name.startswith("patch_embed.") and name.endswith(".qkv.weight"):
            q, k, v = value.chunk(3)
            name, value = name.replace(".qkv.", ".kqv."), torch.cat([k, q, v])
        changed[name] = value
    return changed


NETWORKS = ("t2t_vit_7", "t2t_vit_10", "t2t_vit_12", "t2t_vit_14", "t2t_vit_t_14")
default_cfgs = generate_default_cfgs(dict.fromkeys(NETWORKS, config("arXiv:2101.11986", fixed_input_size=True)))
NARROW = {"embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0}
WIDE = {"embed_dim": 384, "num_heads": 6, "mlp_ratio": 3.0}


def _create(name: str, pretrained: bool, **kwargs: Any) -> T2TViT:
    fixed = {"qkv_bias": False, "norm_layer": nn.LayerNorm}
    return create(T2TViT, name, pretrained, checkpoint_filter_fn, 3, **(fixed | kwargs))


@register_model
def t2t_vit_7(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-7: width 256, 4 heads, 7 blocks, MLP ratio 2, performer between the windows."""
    return _create("t2t_vit_7", pretrained, **(NARROW | {"depth": 7} | kwargs))


@register_model
def t2t_vit_10(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-10: width 256, 4 heads, 10 blocks, MLP ratio 2."""
    return _create("t2t_vit_10", pretrained, **(NARROW | {"depth": 10} | kwargs))


@register_model
def t2t_vit_12(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-12: width 256, 4 heads, 12 blocks, MLP ratio 2."""
    return _create("t2t_vit_12", pretrained, **(NARROW | {"depth": 12} | kwargs))


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14: width 384, 6 heads, 14 blocks, MLP ratio 3."""
    return _create("t2t_vit_14", pretrained, **(WIDE | {"depth": 14} | kwargs))


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-14: the same with softmax attention between the windows, in quadratic time."""
    return _create("t2t_vit_t_14", pretrained, **(WIDE | {"depth": 14, "kind": "softmax", "token_dropout": 0.0} | kwargs))
