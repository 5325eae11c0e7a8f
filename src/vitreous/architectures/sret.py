"""SReT: blocks applied several times in a row, with attention inside slices of the tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.architectures._timm import config, create
from vitreous.base.checkpoint_names import renamed
from vitreous.base.errors import SettingError
from vitreous.layers.pyramid import Grid, Pool, Pyramid, Stage, check_stages, conv_norm, head_width

EPS = 1e-6  # of every LayerNorm
LARGER = {"embed_dims": (126, 252, 504), "num_heads": (3, 6, 12), "mlp_ratio": 3.0, "projection_ratio": 2.0}


def eval_order(n: int) -> list[int]:
    """The permutation of n tokens in eval mode: the same at every call and on every machine."""
    order = list(range(n))
    random.Random(0).shuffle(order)
    return order


class SlicedAttention(nn.Module):
    """Self-attention inside slices: of N tokens in G slices, each attends to N / G.

    (B, N, D) -> (B, N, D). slices: G in the first application, and in the later ones, where the
    tokens are first permuted if G > 1: at random in training, by `eval_order` otherwise.
    """

    projections: ClassVar[dict[str, str]] = {"qkv": "qkv"}

    def __init__(self, dim: int, num_heads: int, slices: tuple[int, int], attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.head_dim, self.slices = num_heads, head_width(dim, num_heads), slices
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        if not again or self.slices[1] == 1:
            return self.proj_drop(self.proj(self.mixed(x, self.slices[again])))
        n = x.shape[1]
        order = torch.randperm(n, device=x.device) if self.training else torch.tensor(eval_order(n), device=x.device)
        z = self.mixed(x[:, order], self.slices[1])[:, order.argsort()]
        return self.proj_drop(self.proj(z))

    def mixed(self, x: Tensor, slices: int) -> Tensor:
        """Attention inside each of so many runs of tokens, (B, N, D) -> (B, N, D)."""
        x = x.unflatten(1, (slices, -1)).flatten(0, 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attn_drop.p if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        return z.transpose(1, 2).flatten(2).unflatten(0, (-1, slices)).flatten(1, 2)


class Projection(nn.Module):
    """x = c1 x + c2 MLP(LN(x)), (B, N, D) -> (B, N, D); c1 and c2 learn."""

    def __init__(self, dim: int, ratio: float, drop: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(ratio * dim), drop=drop)
        self.c1, self.c2 = (nn.Parameter(torch.ones(1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.c1 * x + self.c2 * self.mlp(self.norm1(x))


class RecursiveBlock(nn.Module):
    """A block applied several times in a row; behind each time stands a projection of its own.

        x = c1 x + c2 Attn(LN(x));  x = c3 x + c4 MLP(LN(x));  x = Projection_r(x),    r = 0, 1, ...

    (B, N, D) -> (B, N, D).
    """

    def __init__(self, dim: int, attn: SlicedAttention, mlp: nn.Module, projections: Sequence[Projection], drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn, self.mlp, self.drop_path = attn, mlp, DropPath(drop_path)
        self.c1, self.c2, self.c3, self.c4 = (nn.Parameter(torch.ones(1)) for _ in range(4))
        self.projections = nn.ModuleList(projections)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        for r, projection in enumerate(self.projections):
            x = self.c1 * x + self.c2 * self.drop_path(self.attn(self.norm1(x), r > 0))
            x = self.c3 * x + self.c4 * self.drop_path(self.mlp(self.norm2(x)))
            x = projection(x)
        return x


class SReT(Pyramid):
    """Sliced recursive transformer: three stages of blocks whose weights serve twice.

        x = three Conv 3x3 / 2 with BN and ReLU, plus a map of positions
        stage: each block twice, tokens in slices; between stages a grouped Conv 3x3 / 2
        logits = Linear(LN(mean of the places))

    Paper: Shen, Liu, Xing 2021, arXiv 2111.05297.
    Differs: the released network permutes tokens at random in eval mode as well, so that two calls differ; here eval mode
        has one permutation for each number of tokens. The release supports exactly two applications; here further ones
        are as the second.

    embed_dims, depths, num_heads, slices, later_slices: one number for each stage. depths: of
    distinct blocks. loops: applications of each. img_size: pixels that the map of positions is for;
    for others it is resampled. Raises SettingError for settings, and for images whose places the
    slices do not share out evenly.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 5, 3),
        loops: int = 2,
        num_heads: Sequence[int] = (2, 4, 8),
        slices: Sequence[int] = (8, 4, 1),
        later_slices: Sequence[int] = (2, 1, 1),
        mlp_ratio: float = 3.6,
        projection_ratio: float = 1.0,
        global_pool: str = "avg",
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        check_stages(embed_dims=embed_dims, depths=depths, num_heads=num_heads, slices=slices, later_slices=later_slices)
        for before, dim in pairwise(embed_dims):
            if dim % before:
                raise SettingError(f"Found embed_dims={embed_dims}. Expected multiples of the stage before. Give such widths.")
        stages, step = [], drop_path_rate / (loops * sum(depths))
        for i, dim in enumerate(embed_dims):
            blocks = []
            for j in range(depths[i]):
                attention = SlicedAttention(dim, num_heads[i], (slices[i], later_slices[i]), attn_drop_rate, proj_drop_rate)
                projections = [Projection(dim, projection_ratio, proj_drop_rate) for _ in range(loops)]
                mlp = Mlp(dim, int(mlp_ratio * dim), drop=proj_drop_rate)
                rate = step * (loops * sum(depths[:i]) + j)
                blocks.append(RecursiveBlock(dim, attention, mlp, projections, rate))
            before = embed_dims[i - 1]
            stages.append(Stage(nn.Conv2d(before, dim, 3, 2, 1, groups=before) if i else nn.Identity(), blocks))
        widths = (in_chans, embed_dims[0] // 2, embed_dims[0], embed_dims[0])
        stem = nn.Sequential(*(conv_norm(a, b, stride=2, act=nn.ReLU) for a, b in pairwise(widths)))
        pool = Pool(global_pool, after=nn.LayerNorm(embed_dims[-1], eps=EPS))
        super().__init__(
            stem, stages, embed_dims, pool, reduction=8, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate
        )
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.pos_embed = nn.Parameter(torch.empty(1, embed_dims[0], -(-height // 8), -(-width // 8)))
        trunc_normal_(self.pos_embed, std=0.02)

    def init_weights(self) -> None:
        """Linear layers start as in PyTorch, as the authors have it."""

    def embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        grid = (x.shape[-2], x.shape[-1])
        self.check_slices((images.shape[-2], images.shape[-1]), grid)
        return x + resized(self.pos_embed, grid)

    def check_slices(self, size: Grid, grid: Grid) -> None:
        """Raise SettingError unless the places of every stage make equal slices.

        size: of the images, in pixels.
        """
        for i, stage in enumerate(self.stages):
            places = grid[0] * grid[1]
            for slices in stage.blocks[0].attn.slices:
                if places % slices:
                    raise SettingError(
                        f"Found images of {size[0]} x {size[1]} pixels (height x width), which have {places} places in stage "
                        f"{i}, for {slices} slices. Expected a multiple. Choose another image size, or other slices."
                    )
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)


def resized(positions: Tensor, grid: Grid) -> Tensor:
    """A map (1, D, h, w) for another grid, bicubic; the same where the grid is."""
    if tuple(positions.shape[-2:]) == tuple(grid):
        return positions
    return F.interpolate(positions.float(), grid, mode="bicubic", antialias=True).to(positions.dtype)  # no bfloat16 on CPUs


# -- checkpoints and sizes ------------------------------------------------------------------------


def block_name(match: re.Match) -> str:
    """Our name of a block or projection: the authors list block, projection, block, ..."""
    stage, i = match[1], int(match[2])
    return f"stages.{stage}.blocks.{i // 4}." + (f"projections.{i // 2 % 2}." if i % 2 else "")


THEIRS = {  # names in the authors' code
    r"^patch_embed\.conv(\d)\.": lambda match: f"patch_embed.{int(match[1]) - 1}.0.",
    r"^patch_embed\.bn(\d)\.": lambda match: f"patch_embed.{int(match[1]) - 1}.1.",
    r"^pools\.(\d)\.conv\.": lambda match: f"stages.{int(match[1]) + 1}.downsample.",
    r"^transformers\.(\d)\.blocks\.(\d+)\.": block_name,
    r"\.coefficient(\d)\.bias$": r".c\1",
    r"^norm\.": "pool.after.",
}


def checkpoint_filter_fn(tensors: dict[str, Tensor], model: SReT) -> dict[str, Tensor]:
    """A checkpoint of the authors' code under our names, positions for the model's images.

    A shared block stands there twice, with equal values.
    """
    names = renamed(tensors, THEIRS)
    if "pos_embed" in names:
        names["pos_embed"] = resized(names["pos_embed"], tuple(model.pos_embed.shape[-2:]))
    return names


CONFIG = config(
    "arXiv:2111.05297",
    "patch_embed.0.0",
    paper_name="Sliced Recursive Transformer",
    origin_url="https://github.com/szq0214/SReT",
)
default_cfgs = generate_default_cfgs(dict.fromkeys(("sret_t", "sret_lt", "sret_s"), CONFIG))


def _create(name: str, pretrained: bool, **kwargs: Any) -> SReT:
    return create(SReT, name, pretrained, checkpoint_filter_fn, None, **kwargs)


@register_model
def sret_t(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-T: widths 64, 128, 256, blocks 2, 5, 3, each applied twice."""
    return _create("sret_t", pretrained, **kwargs)


@register_model
def sret_lt(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-LT: SReT-T with a wider MLP, of ratio 4."""
    return _create("sret_lt", pretrained, **({"mlp_ratio": 4.0} | kwargs))


@register_model
def sret_s(pretrained: bool = False, **kwargs: Any) -> SReT:
    """SReT-S: widths 126, 252, 504, MLPs of ratio 3, projections of ratio 2."""
    return _create("sret_s", pretrained, **(LARGER | kwargs))
