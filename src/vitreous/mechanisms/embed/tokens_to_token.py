"""Tokens-to-token: patches out of overlapping windows, with attention between the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import DataError, SettingError
from vitreous.layers.spectral import product_svd
from vitreous.mechanism import Mechanism

EPS = 1e-8  # added to the performer's denominator, as released
Kind = Literal["performer", "softmax"]


@dataclass(frozen=True, kw_only=True)
class TokensToToken(Mechanism):
    """Overlapping windows in steps, with attention between them, instead of one projection.

        T_1 = split(image, s_1);  T_(i+1) = split(block_i(T_i) as a picture, s_(i+1));  patches = T_last W + b
        split(x, s): windows of 2 s - 1 pixels, one every s, flattened        s = 4, 2, 2: 7 x 7, 3 x 3, 3 x 3
        block(x): y = v + W_o attend(q, k, v), with q, k, v of LN(x);  y + MLP(LN(y))        one head
        performer: phi(q) (phi(k)^T v) / (phi(q) sum phi(k) + 1e-8),  phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)
        softmax: softmax(q k^T / sqrt(width of x)) v

    Paper: Yuan, Chen, Wang, Yu, Shi, Jiang, Tay, Feng, Yan 2021, arXiv 2101.11986 (T2T module; performer of 2009.14794).
    Differs: the paper's network takes 16 x 16 patches; for others the first stride is a quarter of the patch. The
        performer runs in float32 under autocast, since its exponents are large. w is a buffer: it never trains.
    At start: changes the output. The host's patch projection is replaced (keeps_weights is False).
    Cost: windows of the first step are 16 times as many tokens as patches; the performer is linear in them, softmax
        quadratic. 0.3 M parameters beside a projection of 9 width D.
    Settings: kind: attention of the steps. strides: their product is the patch size; default P / 4, 2, 2. width: of the
        tokens between steps. features: m, random directions, at most width (performer). dropout: behind attention and
        MLP of the steps, in training. seed: of all weights (N(0, 0.02^2) cut at 2) and of w.
    Raises: HostError where patches are not timm's; GraftError where another graft makes them; SettingError; DataError.
    """

    paper: ClassVar[str] = "Yuan, Chen, Wang, Yu, Shi, Jiang, Tay, Feng, Yan 2021, arXiv 2101.11986"
    requires: ClassVar[tuple[str, ...]] = ("grid",)
    keeps_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("tokens_to_token:kind=softmax,width=8,dropout=0.0",)

    kind: Kind = "performer"
    strides: tuple[int, ...] | None = None
    width: int = 64
    features: int = 32
    dropout: float = 0.1
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_settings(self.strides, self.kind, self.width, self.features, self.dropout)

    def changes(self, model: nn.Module) -> dict[str, Any]:
        inputs = slots.plain_projection(model, self.name).in_channels
        strides = self.strides or default_strides(model.patch_embed.patch_size)
        check_strides(strides, model.patch_embed.patch_size)
        new = skip_init(
            TokenProjection, inputs, slots.width(model), strides, self.kind, self.width, self.features, self.dropout
        )
        new.initialise(torch.Generator().manual_seed(self.seed))
        return {"patch_embed.proj": new}


class TokenProjection(nn.Module):
    """Images (B, C, H, W) -> patches as a picture, (B, D, H / P, W / P).

    P is the product of the strides. Raises DataError for images whose sides are no multiples of P.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        strides: tuple[int, ...] = (4, 2, 2),
        kind: Kind = "performer",
        width: int = 64,
        features: int = 32,
        dropout: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.strides = strides
        windows = [inputs * window(s) ** 2 for inputs, s in zip((in_chans, *[width] * len(strides)), strides, strict=False)]
        self.steps = nn.ModuleList(TokenBlock(size, kind, width, features, dropout, **dd) for size in windows[:-1])
        self.project = nn.Linear(windows[-1], embed_dim, **dd)
        self.initialise()

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights; without a generator from the global random state."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, TokenBlock) and module.directions is not None:
                module.directions.copy_(orthogonal_directions(module.directions, generator))

    def forward(self, images: Tensor) -> Tensor:
        x, patch = images, math.prod(self.strides)
        height, width = images.shape[-2:]
        if height % patch or width % patch:
            raise DataError(
                f"Found images of {width} x {height} pixels. Expected sides that are multiples of {patch}, the size of a "
                "patch. Give such images, or a model with other strides."
            )
        for stride, step in zip(self.strides, (*self.steps, self.project), strict=True):
            height, width = height // stride, width // stride
            x = step(split(x, stride)).transpose(1, 2).unflatten(2, (height, width))
        return x


class TokenBlock(nn.Module):
    """Attention of one head that changes the width, and an MLP: x (B, N, C) -> (B, N, width).

    The skip is v, since widths differ.
    """

    num_heads = 1

    def __init__(self, inputs: int, kind: Kind, width: int, features: int, dropout: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.scale = inputs**-0.5
        self.norm1 = nn.LayerNorm(inputs, **dd)
        self.kqv = nn.Linear(inputs, 3 * width, bias=kind == "performer", **dd)
        self.proj = nn.Linear(width, width, **dd)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width, **dd)
        self.mlp = Mlp(width, width, drop=(0.0, dropout), **dd)
        self.register_buffer("directions", torch.empty(features, width, **dd) if kind == "performer" else None)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        if self.directions is None:
            y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=self.scale)[:, 0]
        else:
            y = performer(q, k, v, self.directions)
        x = v + self.drop(self.proj(y))
        return x + self.mlp(self.norm2(x))


def window(stride: int) -> int:
    """Side of the windows that lie `stride` apart: neighbours share stride - 1 pixels."""
    return 2 * stride - 1


def split(x: Tensor, stride: int) -> Tensor:
    """Overlapping windows of a picture as tokens, padded with zeros.

    x (B, C, H, W) -> (B, H W / stride^2, C (2 stride - 1)^2).
    """
    return F.unfold(x, window(stride), stride=stride, padding=stride // 2).transpose(1, 2)


def random_features(x: Tensor, directions: Tensor) -> Tensor:
    """exp(w x - |x|^2 / 2) / sqrt(m): x (..., N, K), directions w (m, K) -> (..., N, m).

    For w ~ N(0, I) the mean of phi(q) phi(k) is exp(q k).
    """
    exponents = x @ directions.mT - x.square().sum(-1, keepdim=True) / 2
    return exponents.exp() / math.sqrt(len(directions))


def performer(q: Tensor, k: Tensor, v: Tensor, directions: Tensor) -> Tensor:
    """phi(q) (phi(k)^T v) / (phi(q) sum phi(k) + 1e-8), in linear time.

    q, k, v (B, N, K), directions (m, K) -> (B, N, K).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (random_features(x.to(wide), directions.to(wide)) for x in (q, k))
        sums = keys.mT @ v.to(wide)  # (B, m, K)
        total = queries @ keys.sum(1)[..., None]  # (B, N, 1)
        return (queries @ sums / (total + EPS)).to(v.dtype)


def orthogonal_directions(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Orthogonal rows of length sqrt(m), uniformly distributed: (m, K), m <= K, as `like`."""
    normal = torch.randn(like.shape, generator=generator, device=like.device)
    rows = product_svd(normal, normal)[0].mT  # right singular vectors of a Gaussian matrix, whose signs LAPACK chooses
    signs = torch.randn((len(like), 1), generator=generator, device=like.device).sign()
    return math.sqrt(len(like)) * signs * rows


def default_strides(patch: tuple[int, int]) -> tuple[int, ...]:
    """(P / 4, 2, 2) for P x P pixels. Raises SettingError where 4 does not divide P."""
    if patch[0] % 4:
        raise SettingError(
            f"Found patches of {patch[0]} x {patch[1]} pixels and no strides. Expected them, since a quarter of the patch is "
            f"no whole number. Give strides whose product is {patch[0]}."
        )
    return patch[0] // 4, 2, 2


def check_strides(strides: tuple[int, ...], patch: tuple[int, int]) -> None:
    """Raise SettingError unless the strides multiply to the side of a square patch."""
    if tuple(patch) != (math.prod(strides),) * 2:
        raise SettingError(
            f"Found strides={'+'.join(map(str, strides))} for patches of {patch[0]} x {patch[1]} pixels. Expected strides "
            "whose product is the side of a square patch. Give such strides, or another patch_size."
        )


def check_settings(strides: tuple[int, ...] | None, kind: Kind, width: int, features: int, dropout: float) -> None:
    """Raise SettingError for settings that describe no such steps."""
    if strides is not None and (not strides or min(strides) < 1):
        raise SettingError(f"Found strides={strides}. Expected one or more, each 1 or more. Give such as 4+2+2.")
    if width < 1:
        raise SettingError(f"Found width={width}. Expected 1 or more. Give such a width.")
    if kind == "performer" and not 1 <= features <= width:
        raise SettingError(
            f"Found features={features}, width={width}. Expected 1 <= features <= width, since the random directions are "
            "orthogonal. Give such numbers."
        )
    if not 0 <= dropout < 1:
        raise SettingError(f"Found dropout={dropout}. Expected 0 to below 1. Give such a share.")
