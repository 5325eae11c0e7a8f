"""PPMA: four stages of attention that decays along polyline paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, LayerScale, apply_rot_embed_cat, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitreous.architectures._timm import config, create
from vitreous.base.checkpoint_names import renamed
from vitreous.base.errors import SettingError
from vitreous.layers.polyline import PathRates, line_sums, polyline
from vitreous.layers.pyramid import DepthwiseConv, Grid, Pool, Pyramid, Stage, check_stages, conv_norm, head_width

EPS = 1e-6  # of every LayerNorm
THEIRS = {  # names in the authors' code
    **{rf"^patch_embed\.proj\.{3 * i + j}\.": f"patch_embed.{i}.{j}." for i in range(4) for j in range(2)},
    **{rf"^layers\.{i}\.downsample\.reduction\.": f"stages.{i + 1}.downsample.0." for i in range(3)},
    **{rf"^layers\.{i}\.downsample\.norm\.": f"stages.{i + 1}.downsample.1." for i in range(3)},
    r"^layers\.": "stages.",
    r"\.retention_layer_norm\.": ".norm1.",
    r"\.final_layer_norm\.": ".norm2.",
    r"\.gamma_([12])$": r".ls\1.gamma",
    r"\.retention\.path_embed\.dt_linear\.": ".attn.rates.",
    r"\.retention\.path_embed\.dt_bias$": ".attn.rates.rate_bias",
    r"\.retention\.path_embed\.A_log$": ".attn.rates.log_factor",
    r"\.retention\.([qkv]|out)_proj\.": r".attn.\1.",
    r"\.attn\.out\.": ".attn.proj.",
    r"\.retention\.": ".attn.",
    r"\.ffn\.": ".mlp.",
    r"^proj\.": "pool.before.0.",
    r"^norm\.": "pool.before.1.",
}


def rotation(grid: Grid, width: int, like: Tensor) -> Tensor:
    """Sine and cosine of the angles by which queries and keys of N places turn, (N, 2 K).

    n / 10000^(i / (K/2 - 1)) for place n in raster order and pair i of K = width numbers. By the
    number of the place, not by row and column: in a wider image every place is turned further.
    """
    speed = 10000.0 ** -torch.linspace(0, 1, width // 2, device=like.device)
    angle = (torch.arange(grid[0] * grid[1], device=like.device)[:, None] * speed).repeat_interleave(2, dim=-1)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class PolylineAttention(nn.Module):
    """Self-attention that decays along rows and columns, and a convolution of the values.

        whole: z = (softmax(S + M) + softmax(S + M^T)) / 2 V      S = R(Q) R(K)^T / sqrt(K)
        chunk: z = (A_col A_row V + A_row A_col V) / 2            A_row = softmax(S + M) in each row
        y = W_o (z + DepthwiseConv5x5(V))

    M: sums of rates along polylines (`layers/polyline`); A_col alike. R: `rotation`. (B, h w, D),
    (h, w) -> (B, h w, D). The chunk form needs h + w numbers per place in place of h w, and is
    another function.
    """

    projections: ClassVar[dict[str, str]] = {"q": "q", "k": "k", "v": "v"}

    def __init__(self, dim: int, num_heads: int, whole: bool, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.head_dim, self.whole = num_heads, head_width(dim, num_heads), whole
        if self.head_dim % 2:
            raise SettingError(
                f"Found {num_heads} heads for a width of {dim}: {self.head_dim} channels per head. Expected an even number, "
                "since rotary positions turn pairs. Give another number of heads."
            )
        self.scale = self.head_dim**-0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.lepe = DepthwiseConv(dim, 5)
        self.rates = PathRates(dim, num_heads)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        values = self.v(x)
        q, k, v = (rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for rows in (self.q(x), self.k(x), values))
        turn = rotation(grid, self.head_dim, x)
        q, k = (apply_rot_embed_cat(rows, turn).type_as(v) for rows in (q, k))  # (B, H, N, K)
        rows, columns = self.rates(x).unflatten(-1, grid)  # (B, H, h, w)
        if self.whole:
            paths = polyline(rows[:, :, None], columns[:, :, None]).to(v.dtype)
            z = self.weigh(q, k, v, paths) + self.weigh(q, k, v, paths.mT)
        else:
            q, k, v = (tensor.unflatten(2, grid) for tensor in (q, k, v))
            turned = [tensor.transpose(2, 3) for tensor in (q, k, v)]  # columns as rows
            in_rows, in_columns = line_sums(rows).to(v.dtype), line_sums(columns.mT).to(v.dtype)
            rows_first = self.within_rows(*turned[:2], self.within_rows(q, k, v, in_rows).transpose(2, 3), in_columns)
            columns_first = self.within_rows(*turned, in_columns).transpose(2, 3)
            z = (rows_first.transpose(2, 3) + self.within_rows(q, k, columns_first, in_rows)).flatten(2, 3)
        z = (z / 2).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(z + self.lepe(values, grid)))

    def within_rows(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attention within each row of q, k, v (B, H, h, w, K), bias (B, H, h, w, w)."""
        height = q.shape[2]
        # rows go into the batch, which leaves the four axes of attention
        folded = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v, bias))
        return self.weigh(*folded).unflatten(0, (-1, height)).transpose(1, 2)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(K) + bias) v, (..., H, n, K)."""
        # written out: torch has no fused kernel for a bias with gradients, and ONNX none of its strides
        return self.attn_drop(((q * self.scale) @ k.mT + bias).softmax(-1)) @ v


class ConvMlp(nn.Module):
    """h = GELU(W_1 x); W_2 (h + DepthwiseConv3x3(h)), (B, h w, D) -> (B, h w, D)."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1, self.dwconv, self.fc2 = nn.Linear(dim, hidden), DepthwiseConv(hidden), nn.Linear(hidden, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.act(self.fc1(x))
        return self.drop(self.fc2(x + self.dwconv(x, grid)))


class Block(nn.Module):
    """x = x + DepthwiseConv3x3(x); x = x + Attn(LN(x)); x = x + MLP(LN(x)).

    (B, h w, D), (h, w) -> (B, h w, D). init_values: start of a scale per channel of the last two, 0 for none.
    """

    def __init__(self, attn: nn.Module, mlp: nn.Module, dim: int, init_values: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.pos = DepthwiseConv(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn, self.mlp = attn, mlp
        self.ls1, self.ls2 = (LayerScale(dim, init_values) if init_values else nn.Identity() for _ in range(2))
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.pos(x, grid)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), grid)))


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of each channel of tokens, (B, N, D) -> (B, N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class PPMA(Pyramid):
    """Polyline path masked attention: stages of blocks whose attention decays along paths.

        stem: four Conv3x3, BN, strides 2, 1, 2, 1, GELU between;  stage: Conv3x3 / 2, BN, blocks
        logits = Linear(mean over places of SiLU(BN(W x)))

    Paper: Zhao, Xiao, Lin, Xie, Zhang, Meng 2025, arXiv 2506.15940.
    Differs: nothing in the formula. `drop_path_rate` is 0 unless given; the authors train with
        0.1, 0.15 and 0.4.

    embed_dims, depths, num_heads, mlp_ratios: one number for each stage, at least one stage. whole:
    which stages have the whole form of the attention; the others have the chunk form. init_values:
    start of LayerScale, 0 for none. projection: width of what is pooled. global_pool: "avg", and
    others of `Pool`. Raises SettingError where heads do not divide the width into even parts.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        whole: Sequence[bool] = (False, False, True, True),
        init_values: Sequence[float] = (0, 0, 0, 0),
        projection: int = 1024,
        global_pool: str = "avg",
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        settings = zip(embed_dims, depths, num_heads, mlp_ratios, whole, init_values, strict=False)
        check_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            whole=whole,
            init_values=init_values,
        )
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (dim, depth, heads, ratio, form, scale) in enumerate(settings):
            blocks = [
                Block(
                    PolylineAttention(dim, heads, form, attn_drop_rate, proj_drop_rate),
                    ConvMlp(dim, int(ratio * dim), proj_drop_rate),
                    dim,
                    scale,
                    next(rates),
                )
                for _ in range(depth)
            ]
            stages.append(Stage(conv_norm(embed_dims[i - 1], dim, stride=2) if i else nn.Identity(), blocks))
        first, half = embed_dims[0], embed_dims[0] // 2
        before = nn.Sequential(nn.Linear(embed_dims[-1], projection), TokenBatchNorm(projection), nn.SiLU())
        super().__init__(
            nn.Sequential(
                conv_norm(in_chans, half, stride=2, act=nn.GELU),
                conv_norm(half, half, act=nn.GELU),
                conv_norm(half, first, stride=2, act=nn.GELU),
                conv_norm(first, first),
            ),
            stages,
            embed_dims,
            Pool(global_pool, before=before),
            num_features=projection,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
        )

    def no_weight_decay(self) -> set[str]:
        names = (name for name, _ in self.named_parameters())
        return super().no_weight_decay() | {name for name in names if name.endswith(("rate_bias", "log_factor"))}


def checkpoint_filter_fn(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of the authors' code under our names, without the constant of the rotation."""
    ours = renamed({name: value for name, value in tensors.items() if not name.endswith(".Relpos.angle")}, THEIRS)
    return {name: value.flatten() if name.endswith(".gamma") else value for name, value in ours.items()}


CONFIG = config(
    "arXiv:2506.15940",
    "patch_embed.0.0",
    paper_name="Polyline Path Masked Attention for Vision Transformer",
    origin_url="https://github.com/zhongchenzhao/PPMA",
)
default_cfgs = generate_default_cfgs(dict.fromkeys(("ppma_t", "ppma_s", "ppma_b"), CONFIG))
SMALL = {"depths": (3, 4, 18, 4), "mlp_ratios": (4, 4, 3, 3), "whole": (False, False, False, True)}
BASE = SMALL | {
    "embed_dims": (80, 160, 320, 512),
    "depths": (4, 8, 25, 8),
    "num_heads": (5, 5, 10, 16),
    "init_values": (0, 0, 1e-6, 1e-6),
}


def _create(name: str, pretrained: bool, **kwargs: Any) -> PPMA:
    return create(PPMA, name, pretrained, checkpoint_filter_fn, None, **kwargs)


@register_model
def ppma_t(pretrained: bool = False, **kwargs: Any) -> PPMA:
    """PPMA-T: widths 64 to 512, depths 2, 2, 8, 2; the whole form in the last two stages."""
    return _create("ppma_t", pretrained, **kwargs)


@register_model
def ppma_s(pretrained: bool = False, **kwargs: Any) -> PPMA:
    """PPMA-S: widths 64 to 512, depths 3, 4, 18, 4; the whole form in the last stage."""
    return _create("ppma_s", pretrained, **(SMALL | kwargs))


@register_model
def ppma_b(pretrained: bool = False, **kwargs: Any) -> PPMA:
    """PPMA-B: widths 80 to 512, depths 4, 8, 25, 8; LayerScale in the last two stages."""
    return _create("ppma_b", pretrained, **(BASE | kwargs))
