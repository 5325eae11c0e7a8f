"""CvT: convolutions in front of queries, keys and values, and between three stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates, get_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.architectures._timm import config, create
from vitreous.base.checkpoint_names import renamed
from vitreous.layers.pyramid import DepthwiseConv, Grid, Pool, Pyramid, Stage, check_stages, head_width

EPS = 1e-5  # of every LayerNorm
THEIRS = {  # names in the authors' code
    r"^stage0\.patch_embed\.": "patch_embed.",
    r"^stage(\d)\.patch_embed\.": r"stages.\1.downsample.",
    r"^stage(\d)\.": r"stages.\1.",
    r"\.attn\.conv_proj_([qkv])\.bn\.": r".attn.conv_\1.norm.",
    r"\.attn\.conv_proj_([qkv])\.": r".attn.conv_\1.",
    r"\.attn\.proj_([qkv])\.": r".attn.\1.",
    r"^norm\.": "pool.before.",
}


class ConvEmbed(nn.Module):
    """Overlapping patches by a strided convolution, each normed over its channels.

    (B, C, H, W) -> (B, D, h, w).
    """

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = LayerNorm2d(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class ConvAttention(nn.Module):
    """Self-attention with a convolution in front of each projection of queries, keys, values.

        q, k, v = W BN(DepthwiseConv3x3(x));  softmax(q k^T / sqrt(D)) v

    (B, P + h w, D), (h, w) -> (B, P + h w, D). Keys and values come from every `kv_stride`-th row
    and column. Prefix tokens are projected without the convolution. The scale is that of the whole
    width D, not of a head.
    """

    projections: ClassVar[dict[str, str]] = {"q": "q", "k": "k", "v": "v"}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kv_stride: int = 2,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, head_width(dim, num_heads), dim**-0.5
        self.conv_q, self.conv_k, self.conv_v = (
            DepthwiseConv(dim, stride=stride, norm=nn.BatchNorm2d, bias=False) for stride in (1, kv_stride, kv_stride)
        )
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        pairs = (self.conv_q, self.q), (self.conv_k, self.k), (self.conv_v, self.v)
        q, k, v = (linear(conv(x, grid)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for conv, linear in pairs)
        drop = self.attn_drop.p if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        return self.proj_drop(self.proj(z.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """x = x + Attn(LN(x)); x = x + MLP(LN(x)), (B, P + h w, D) -> (B, P + h w, D)."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn, self.mlp = attn, mlp
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), grid))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class CvT(Pyramid):
    """Convolutional vision transformer: three stages, no positional embedding.

        stage: Conv (7x7 / 4, then 3x3 / 2), LN;  per block x = x + ConvAttn(LN(x)), x = x + MLP(LN(x))
        logits = Linear(LN(x)[class]);  the class token joins in the last stage

    Paper: Wu, Xiao, Codella, Liu, Dai, Yuan, Zhang 2021, arXiv 2103.15808.
    Differs: nothing in the formula. The MLP's activation is QuickGELU, x sigmoid(1.702 x), as in the authors' code;
        transformers' CvT has the exact GELU, act_layer="gelu" here. `drop_path_rate` rises from 0 over the blocks of the
        last stage alone, as the authors set it.

    embed_dims, depths, num_heads: one number for each stage, at least one stage. kv_stride: every
    how-many rows and columns give a key. global_pool: "token", or "avg" of the patches, and others
    of `Pool`; without class_token there is no "token".
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 192, 384),
        depths: Sequence[int] = (1, 2, 10),
        num_heads: Sequence[int] = (1, 3, 6),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        kv_stride: int = 2,
        class_token: bool = True,
        act_layer: str = "quick_gelu",
        global_pool: str = "token",
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        check_stages(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
        last = len(depths) - 1
        rates = [[0.0] * depth for depth in depths[:last]] + [calculate_drop_path_rates(drop_path_rate, depths[last])]
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            attention = partial(ConvAttention, dim, heads, kv_stride, qkv_bias, attn_drop_rate, proj_drop_rate)
            mlp = partial(Mlp, dim, int(mlp_ratio * dim), act_layer=get_act_layer(act_layer), drop=proj_drop_rate)
            blocks = [Block(dim, attention(), mlp(), rate) for rate in rates[i]]
            cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token and i == last else None
            downsample = ConvEmbed(embed_dims[i - 1], dim, kernel=3, stride=2, padding=1) if i else nn.Identity()
            stages.append(Stage(downsample, blocks, cls_token=cls_token))
        super().__init__(
            ConvEmbed(in_chans, embed_dims[0], kernel=7, stride=4, padding=2),
            stages,
            embed_dims,
            Pool(global_pool, stages[-1].prefix, before=nn.LayerNorm(embed_dims[-1], eps=EPS)),
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
        )


def checkpoint_filter_fn(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of the authors' code under our names."""
    return renamed(tensors, THEIRS)


CONFIG = config(
    "arXiv:2103.15808",
    "patch_embed.proj",
    crop_pct=0.875,
    paper_name="CvT: Introducing Convolutions to Vision Transformers",
    origin_url="https://github.com/leoxiaobin/CvT",
)
default_cfgs = generate_default_cfgs(dict.fromkeys(("cvt_13", "cvt_21"), CONFIG))


def _create(name: str, pretrained: bool, **kwargs: Any) -> CvT:
    return create(CvT, name, pretrained, checkpoint_filter_fn, None, **kwargs)


@register_model
def cvt_13(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-13: widths 64, 192, 384, depths 1, 2, 10."""
    return _create("cvt_13", pretrained, **kwargs)


@register_model
def cvt_21(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-21: widths 64, 192, 384, depths 1, 4, 16."""
    return _create("cvt_21", pretrained, **({"depths": (1, 4, 16)} | kwargs))
