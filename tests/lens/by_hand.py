"""Attention maps written out by hand, one function per attention class, from the module's weights and what it was given.

Independent of the tap: a function gets a float64 copy of the module and its float64 arguments, and returns for every call
inside it (map (B, W, H, N, M), V (B, W, H, M, K)). Layers without attention (linear, norms, filters) are called as they
are; splitting, rotation, relative positions, windows, pooling of queries and talking heads are done here, with plain loops
where that is clearer. `BATCH` images are in a batch.
"""

from __future__ import annotations

import itertools
import math

import torch
from timm import layers as L
from timm import models as T
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import swin_transformer as torchvision_swin

BATCH = 2
Maps = list[tuple[Tensor, Tensor]]


def probability(scores: Tensor, dim: int = -1) -> Tensor:
    weights = (scores - scores.amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(..., N, K), (..., M, K), (..., M, Kv) -> (map, V)."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return probability(torch.einsum("...nk,...mk->...nm", q, k) * scale + bias), v


def whole(pair: tuple[Tensor, Tensor]) -> Maps:
    """(B, H, N, M) without windows."""
    return [(pair[0].unsqueeze(1), pair[1].unsqueeze(1))]


def in_windows(pair: tuple[Tensor, Tensor]) -> Maps:
    """(B W, H, N, M), windows inside of images; also for one window."""
    return [tuple(x.unflatten(0, (BATCH, -1)) for x in pair)]


def heads(x: Tensor, count: int) -> Tensor:
    """(B, N, H K) -> (B, H, N, K)."""
    return torch.stack(x.chunk(count, dim=-1), dim=1)


def thirds(x: Tensor, count: int) -> list[Tensor]:
    """(B, N, 3 H K) -> q, k, v (B, H, N, K)."""
    return [heads(part, count) for part in x.chunk(3, dim=-1)]


def flat(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C)."""
    return x.flatten(2).mT


def image(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h w, C) -> (B, C, h, w)."""
    return x.mT.unflatten(2, tuple(size))


def pixels(size: tuple[int, int], step: int = 1) -> list[tuple[int, int]]:
    return list(itertools.product(range(0, size[0], step), range(0, size[1], step)))


def swin_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Row (dy + h - 1)(2 w - 1) + dx + w - 1 of a table (R, H) for every pair of places -> (H, N, N)."""
    h, w = window
    places = pixels(window)
    index = [[(y - v + h - 1) * (2 * w - 1) + x - u + w - 1 for v, u in places] for y, x in places]
    return table[torch.tensor(index)].permute(2, 0, 1)


def levit_bias(table: Tensor, size: tuple[int, int], step: int = 1) -> Tensor:
    """Column |dy| w + |dx| of a table (H, R), queries every `step` places -> (H, N, M)."""
    index = [[abs(y - v) * size[1] + abs(x - u) for v, u in pixels(size)] for y, x in pixels(size, step)]
    return table[:, torch.tensor(index)]


def axis_bias(q: Tensor, rel_h: Tensor, rel_w: Tensor, q_size: tuple[int, int], k_size: tuple[int, int]) -> Tensor:
    """q . (rel_h[distance in y] + rel_w[distance in x]) for queries (B, H, h w, K): SAM, MViT v2 -> (B, H, N, M)."""
    bias = q.new_zeros(*q.shape[:3], k_size[0] * k_size[1])
    for n, (y, x) in enumerate(pixels(q_size)):
        for m, (v, u) in enumerate(pixels(k_size)):
            rows = [
                int(a * max(ks / qs, 1) - b * max(qs / ks, 1) + (ks - 1) * max(qs / ks, 1))
                for a, b, qs, ks in zip((y, x), (v, u), q_size, k_size, strict=True)
            ]
            bias[..., n, m] = q[..., n, :] @ (rel_h[rows[0]] + rel_w[rows[1]])
    return bias


def rotated(x: Tensor, rope: Tensor | None, prefix: int, half: bool) -> Tensor:
    """Pairs of channels turned by the angles of `rope` (N, 2 K), sines first; `prefix` tokens stay."""
    if rope is None:
        return x
    sin, cos = rope.chunk(2, dim=-1)
    out, turned = x.clone(), x[..., prefix:, :]
    width = x.shape[-1]
    for i in range(width // 2):
        a, b = (i, i + width // 2) if half else (2 * i, 2 * i + 1)
        out[..., prefix:, a] = turned[..., a] * cos[..., a] - turned[..., b] * sin[..., a]
        out[..., prefix:, b] = turned[..., b] * cos[..., b] + turned[..., a] * sin[..., b]
    return out


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


# --- timm: plain, RoPE, relative positions ----------------------------------------------------------------------------


def plain(m, x, **_) -> Maps:
    q, k, v = thirds(m.qkv(x), m.num_heads)
    return in_windows(attend(m.q_norm(q), m.k_norm(k), v))


def parallel(m, x, **_) -> Maps:
    q, k, v = (heads(part, m.num_heads) for part in m.in_proj(m.in_norm(x)).split(m.in_split, dim=-1)[1:])
    return whole(attend(m.q_norm(q), m.k_norm(k), v))


def differential(m, x, **_) -> Maps:
    """Heads in pairs: A1 - lambda A2, one map where the module writes it out, two calls where it uses the fused kernel."""
    parts = m.qkv(x).chunk(3, dim=-1) if hasattr(m, "qkv") else m.in_proj(m.in_norm(x)).split(m.in_split, dim=-1)[1:]
    q, k, v = heads(parts[0], 2 * m.num_heads), heads(parts[1], 2 * m.num_heads), heads(parts[2], m.num_heads)
    first, second = (attend(m.q_norm(q[:, i::2]), m.k_norm(k[:, i::2]), v)[0] for i in (0, 1))
    if m.fused_attn:
        return whole((first, v)) + whole((second, v))
    weight = (m.lambda_q1 @ m.lambda_k1).exp() - (m.lambda_q2 @ m.lambda_k2).exp() + m.lambda_init
    return whole((first - weight * second, v))


def latent(m, x, **_) -> Maps:
    x = x if m.pos_embed is None else x + m.pos_embed
    k, v = (heads(part, m.num_heads) for part in m.kv(x).chunk(2, dim=-1))
    return whole(attend(m.q_norm(heads(m.q(m.latent).expand(len(x), -1, -1), m.num_heads)), m.k_norm(k), v))


def no_weights(m, x, **_) -> Maps:
    q = heads(m.pre_norm(x), m.num_heads)
    return whole(attend(q, q, q))


def beit(m, x, shared_rel_pos_bias=None, **_) -> Maps:
    q, k, v = thirds(m.qkv(x), m.num_heads)
    q, v = q + heads(m.q_bias[None, None], m.num_heads), v + heads(m.v_bias[None, None], m.num_heads)
    table = m.relative_position_bias_table
    bias = torch.zeros(m.num_heads, x.shape[1], x.shape[1], dtype=x.dtype)
    bias[:, 1:, 1:] = swin_bias(table[:-3], m.window_size)
    bias[:, 0, :], bias[:, :, 0], bias[:, 0, 0] = table[-3][:, None], table[-2][:, None], table[-1]
    return whole(attend(q, k, v, bias))


def eva(m, x, rope=None, **_) -> Maps:
    if m.qkv is not None:
        q, k, v = thirds(m.qkv(x), m.num_heads)
        if getattr(m, "q_bias", None) is not None:
            q, v = q + heads(m.q_bias[None, None], m.num_heads), v + heads(m.v_bias[None, None], m.num_heads)
    else:
        group = getattr(m, "num_kv_groups", 1)  # so many heads of queries share one of keys and values
        serving = [head // group for head in range(m.num_heads)]
        q = heads(m.q_proj(x), m.num_heads)
        k, v = (heads(layer(x), m.num_heads // group)[:, serving] for layer in (m.k_proj, m.v_proj))
    q, k = (rotated(part, rope, m.num_prefix_tokens, m.rotate_half) for part in (m.q_norm(q), m.k_norm(k)))
    return whole(attend(q, k, v))


def relative(m, x, **_) -> Maps:
    q, k, v = thirds(m.qkv(x), m.num_heads)
    bias = swin_bias(m.rel_pos.relative_position_bias_table, m.rel_pos.window_size)
    return whole(attend(m.q_norm(q), m.k_norm(k), v, bias))


def sam(m, x, **_) -> Maps:
    size = tuple(x.shape[1:3])
    q, k, v = thirds(m.qkv(x.flatten(1, 2)), m.num_heads)
    return in_windows(attend(q, k, v, axis_bias(q, m.rel_pos_h, m.rel_pos_w, size, size)))


# --- timm: windows ----------------------------------------------------------------------------------------------------


def masked(mask: Tensor | None, like: Tensor) -> Tensor | float:
    """(W, N, N) for (B W, H, N, N)."""
    return 0.0 if mask is None else mask.repeat(len(like) // len(mask), 1, 1).unsqueeze(1)


def swin(m, x, mask=None, **_) -> Maps:
    q, k, v = thirds(m.qkv(x), m.num_heads)
    return in_windows(attend(q, k, v, swin_bias(m.relative_position_bias_table, m.window_size) + masked(mask, x)))


def swin_v2(m, x, mask=None, **_) -> Maps:
    """Cosine attention; bias 16 sigmoid(mlp(log-spaced distance)), distances from -8 to 8 in units of log2 8."""
    q, k, v = thirds(m.qkv(x), m.num_heads)
    q, v = q + heads(m.q_bias[None, None], m.num_heads), v + heads(m.v_bias[None, None], m.num_heads)
    h, w = m.window_size
    far = [[8 * dy / (h - 1), 8 * dx / (w - 1)] for dy in range(1 - h, h) for dx in range(1 - w, w)]
    far = torch.tensor(far, dtype=x.dtype)
    table = m.cpb_mlp(far.sign() * (far.abs() + 1).log2() / 3)
    bias = 16 * swin_bias(table, (h, w)).sigmoid() + masked(mask, x)
    scale = m.logit_scale.clamp(max=math.log(100)).exp()
    return in_windows(attend(unit(q) * scale, unit(k), v, bias, 1.0))


def swin_v2_cr(m, x, mask=None, **_) -> Maps:
    q, k, v = thirds(m.qkv(x), m.num_heads)
    places = pixels(m.window_size)
    apart = torch.tensor([[[y - v, x - u] for v, u in places] for y, x in places], dtype=x.dtype)
    bias = m.meta_mlp(apart.sign() * (1 + apart.abs()).log()).permute(2, 0, 1)
    scale = m.logit_scale.clamp(max=math.log(100)).exp()[:, None, None]
    return in_windows(attend(unit(q) * scale, unit(k), v, bias + masked(mask, x), 1.0))


def maxvit_last(m, x, **_) -> Maps:
    """Channels last, (B W, h, w, C); each head has its q, k, v side by side if `head_first`."""
    x = x.flatten(1, -2)
    if m.head_first:
        q, k, v = (heads(m.qkv(x), m.num_heads)[..., i * m.dim_head : (i + 1) * m.dim_head] for i in range(3))
    else:
        q, k, v = thirds(m.qkv(x), m.num_heads)
    return in_windows(attend(q, k, v, swin_bias(m.rel_pos.relative_position_bias_table, m.rel_pos.window_size)))


def maxvit_first(m, x, **_) -> Maps:
    """Channels first, (B W, C, h, w)."""
    y = flat(m.qkv(x))
    if m.head_first:
        q, k, v = (heads(y, m.num_heads)[..., i * m.dim_head : (i + 1) * m.dim_head] for i in range(3))
    else:
        q, k, v = thirds(y, m.num_heads)
    rel_pos = getattr(m, "rel_pos", None)
    bias = 0.0 if rel_pos is None else swin_bias(rel_pos.relative_position_bias_table, rel_pos.window_size)
    return in_windows(attend(q, k, v, bias))


def hiera(m, x, **_) -> Maps:
    """Tokens lie unit by unit fastest: token t of unit w is at t W + w; queries are the maximum over the first axis."""
    units = x.shape[1] // (m.q_stride * m.window_size) if m.use_mask_unit_attn else 1
    found = []
    for w in range(units):
        q, k, v = thirds(m.qkv(x[:, w::units]), m.heads)
        if m.q_stride > 1:
            q = torch.stack(q.chunk(m.q_stride, dim=2)).amax(0)
        found.append(attend(q, k, v))
    return [tuple(torch.stack(part, dim=1) for part in zip(*found, strict=True))]


def hiera_sam2(m, x, **_) -> Maps:
    size = tuple(x.shape[1:3])
    q, k, v = m.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
    if m.q_pool is not None:
        q = flat(F.max_pool2d(image(q, size), 2, 2))
    return in_windows(attend(*(heads(part, m.num_heads) for part in (q, k, v))))


def mvit(m, x, feat_size, **_) -> Maps:
    """Depthwise pooling of each head's q, k, v, the class token aside, then a norm; bias by rows and columns."""
    sizes, parts = [], []
    for part, pool, norm in zip(
        thirds(m.qkv(x), m.num_heads), (m.pool_q, m.pool_k, m.pool_v), (m.norm_q, m.norm_k, m.norm_v), strict=True
    ):
        first = int(m.has_cls_token)
        size = tuple(feat_size)
        if pool is not None:
            pooled = pool(image(part[:, :, first:].flatten(0, 1), size))
            size = tuple(pooled.shape[2:])
            part = torch.cat([part[:, :, :first], flat(pooled).unflatten(0, (-1, m.num_heads))], dim=2)
        parts.append(part if norm is None else norm(part))
        sizes.append(size)
    q, k, v = parts
    bias = torch.zeros(*q.shape[:3], k.shape[2], dtype=x.dtype)
    bias[:, :, first:, first:] = axis_bias(q[:, :, first:], m.rel_pos_h, m.rel_pos_w, sizes[0], sizes[1])
    return whole(attend(q, k, v, bias))


def twins_local(m, x, size, **_) -> Maps:
    y, ws, found = image(x, size), m.ws, []
    for row, column in itertools.product(range(size[0] // ws), range(size[1] // ws)):
        window = flat(y[:, :, row * ws : (row + 1) * ws, column * ws : (column + 1) * ws])
        found.append(attend(*thirds(m.qkv(window), m.num_heads)))
    return [tuple(torch.stack(part, dim=1) for part in zip(*found, strict=True))]


def nest(m, x, **_) -> Maps:
    found = [attend(*thirds(m.qkv(x[:, t]), m.num_heads)) for t in range(x.shape[1])]
    return [tuple(torch.stack(part, dim=1) for part in zip(*found, strict=True))]


def tiny_vit(m, x, **_) -> Maps:
    each = heads(m.qkv(m.norm(x)), m.num_heads)
    side = math.isqrt(x.shape[1])
    pair = attend(*each.split([m.key_dim, m.key_dim, m.val_dim], dim=-1), levit_bias(m.attention_biases, (side, side)))
    return in_windows(pair)


def windows_only(m, x, **_) -> Maps:
    return in_windows(attend(*thirds(m.qkv(x), m.num_heads)))


def gcvit(m, x, q_global=None, **_) -> Maps:
    """Local, or with queries that all windows of an image share."""
    if q_global is None or not m.use_global:
        q, k, v = thirds(m.qkv(x), m.num_heads)
    else:
        k, v = (heads(part, m.num_heads) for part in m.qkv(x).chunk(2, dim=-1))
        shared = heads(q_global.flatten(1, -2), m.num_heads)
        q = torch.cat([shared[i : i + 1].expand(len(x) // len(shared), -1, -1, -1) for i in range(len(shared))])
    return in_windows(attend(q, k, v, swin_bias(m.rel_pos.relative_position_bias_table, m.rel_pos.window_size)))


def halo(m, x, **_) -> Maps:
    """Blocks of queries, and around each a wider block of keys; what lies outside of the image is a key of zeros."""
    size, wide, step = m.block_size, m.win_size, m.block_stride
    q = m.q(x)
    kv = F.pad(m.kv(x), [m.halo_size] * 4)
    maps, values = [], []
    for row, column in itertools.product(range(x.shape[2] // size), range(x.shape[3] // size)):
        n = size // step
        mine = flat(q[:, :, row * n : (row + 1) * n, column * n : (column + 1) * n])
        around = flat(kv[:, :, row * size : row * size + wide, column * size : column * size + wide])
        mine, around = heads(mine, m.num_heads), heads(around, m.num_heads)
        keys, v = around.split([m.dim_head_qk, m.dim_head_v], dim=-1)
        bias = block_bias(mine, m.pos_embed, n, wide)
        factor = m.scale if m.scale_pos_embed else 1.0
        pair = attend(mine, keys, v, bias * factor, m.scale)
        maps.append(pair[0])
        values.append(pair[1])
    return [(torch.stack(maps, dim=1), torch.stack(values, dim=1))]


def block_bias(q: Tensor, table, n: int, wide: int) -> Tensor:
    """q . (height_rel[v - y] + width_rel[u - x]) of n x n queries and wide x wide keys, distances counted from wide - 1."""
    bias = q.new_zeros(*q.shape[:3], wide * wide)
    for i, (y, x) in enumerate(pixels((n, n))):
        for j, (v, u) in enumerate(pixels((wide, wide))):
            bias[..., i, j] = q[..., i, :] @ (table.height_rel[v - y + wide - 1] + table.width_rel[u - x + wide - 1])
    return bias


def bottleneck(m, x, **_) -> Maps:
    q, k, v = m.qkv(x).split([m.dim_out_qk, m.dim_out_qk, m.dim_out_v], dim=1)
    q, k, v = (heads(flat(part), m.num_heads) for part in (q, k, v))
    bias = block_bias(q, m.pos_embed, x.shape[2], x.shape[2])
    return whole(attend(q, k, v, bias * (m.scale if m.scale_pos_embed else 1.0), m.scale))


# --- timm: pooled keys, other forms -----------------------------------------------------------------------------------


def pvt(m, x, feat_size=None, **kwargs) -> Maps:
    """Queries everywhere, keys and values where a strided filter puts them."""
    size = kwargs.get("size", feat_size)
    q, around = heads(m.q(x), m.num_heads), x
    if getattr(m, "pool", None) is not None:
        around = m.act(m.norm(flat(m.sr(m.pool(image(x, size))))))
    elif m.sr is not None:
        around = m.norm(flat(m.sr(image(x, size))))
    k, v = (heads(part, m.num_heads) for part in m.kv(around).chunk(2, dim=-1))
    return whole(attend(q, k, v))


def twins_global(m, x, size, **_) -> Maps:
    return pvt(m, x, size)


def next_vit(m, x, **_) -> Maps:
    around = x if m.sr is None else m.norm(m.sr(x.mT)).mT
    return whole(attend(*(heads(part, m.num_heads) for part in (m.q(x), m.k(around), m.v(around)))))


def multi_query(m, x, **_) -> Maps:
    """One head of keys and values for all heads of queries."""
    q = heads(flat(m.query(x)), m.num_heads)
    k, v = (flat(part)[:, None].expand(-1, m.num_heads, -1, -1) for part in (m.key(x), m.value(x)))
    return whole(attend(q, k, v))


def outlook(m, x, **_) -> Maps:
    """Weights of each place for its 3 x 3 neighbours, from a pooled place alone: no product of queries and keys."""
    size, side = tuple(x.shape[1:3]), m.kernel_size
    v = F.unfold(m.v(x).permute(0, 3, 1, 2), side, padding=m.padding, stride=m.stride)  # (B, C k k, W)
    v = v.unflatten(1, (m.num_heads, -1, side * side)).permute(0, 4, 1, 3, 2)
    weights = m.attn(flat(F.avg_pool2d(x.permute(0, 3, 1, 2), m.stride, m.stride, ceil_mode=True)))
    assert v.shape[1] == weights.shape[1] == math.ceil(size[0] / m.stride) * math.ceil(size[1] / m.stride)
    return [(probability(weights.unflatten(-1, (m.num_heads, side * side, side * side)) * m.scale), v)]


def last_axes(m, x, **_) -> Maps:
    """(B, h, w, C)."""
    return whole(attend(*thirds(m.qkv(x.flatten(1, -2)), m.num_heads)))


def first_axes(m, x, **_) -> Maps:
    """(B, C, h, w), a filter or a linear layer for q, k, v."""
    y = flat(m.qkv(x)) if isinstance(m.qkv, nn.Conv2d) else m.qkv(flat(x))
    return whole(attend(*thirds(y, m.num_heads)))


def class_row(m, x, **_) -> Maps:
    """The class token asks, all tokens answer: CaiT, XCiT, VOLO, CrossViT."""
    if hasattr(m, "wq"):
        q, k, v = m.wq(x[:, :1]), m.wk(x), m.wv(x)
    elif hasattr(m, "kv"):
        q, (k, v) = m.q(x[:, :1]), m.kv(x).chunk(2, dim=-1)
    else:
        q, k, v = m.q(x[:, :1]), m.k(x), m.v(x)
    return whole(attend(*(heads(part, m.num_heads) for part in (q, k, v))))


def talking(m, x, **_) -> Maps:
    """CaiT: heads are mixed before and after the softmax."""
    q, k, v = thirds(m.qkv(x), m.num_heads)
    scores = torch.einsum("bhnk,bhmk->bhnm", q, k) / math.sqrt(q.shape[-1])
    scores = torch.einsum("gh,bhnm->bgnm", m.proj_l.weight, scores) + m.proj_l.bias[:, None, None]
    mixed = torch.einsum("gh,bhnm->bgnm", m.proj_w.weight, probability(scores)) + m.proj_w.bias[:, None, None]
    return whole((mixed, v))


def levit(m, x, **_) -> Maps:
    y = flat(m.qkv(x)) if m.use_conv else m.qkv(x)
    parts = heads(y, m.num_heads).split([m.key_dim, m.key_dim, m.val_dim], dim=-1)
    return whole(attend(*parts, levit_bias(m.attention_biases, m.resolution)))


def levit_down(m, x, **_) -> Maps:
    y, q = (flat(m.kv(x)), flat(m.q(x))) if m.use_conv else (m.kv(x), m.q(x))
    k, v = heads(y, m.num_heads).split([m.key_dim, m.val_dim], dim=-1)
    return whole(attend(heads(q, m.num_heads), k, v, levit_bias(m.attention_biases, m.resolution, m.stride)))


def efficientformer(m, x, **_) -> Maps:
    parts = heads(m.qkv(x), m.num_heads).split([m.key_dim, m.key_dim, m.val_dim], dim=-1)
    return whole(attend(*parts, levit_bias(m.attention_biases, (math.isqrt(x.shape[1]),) * 2)))


def efficientformer_v2(m, x, **_) -> Maps:
    """Talking heads by 1 x 1 filters."""
    x = x if m.stride_conv is None else m.stride_conv(x)
    q, k, v = (heads(flat(layer(x)), m.num_heads) for layer in (m.q, m.k, m.v))
    scores = torch.einsum("bhnk,bhmk->bhnm", q, k) * m.scale + levit_bias(m.attention_biases, m.resolution)
    mix = [(layer.weight[:, :, 0, 0], layer.bias[:, None, None]) for layer in (m.talking_head1, m.talking_head2)]
    maps = probability(torch.einsum("gh,bhnm->bgnm", mix[0][0], scores) + mix[0][1])
    return whole((torch.einsum("gh,bhnm->bgnm", mix[1][0], maps) + mix[1][1], v))


def efficientformer_v2_down(m, x, **_) -> Maps:
    q, k, v = (heads(flat(layer(x)), m.num_heads) for layer in (m.q, m.k, m.v))
    return whole(attend(q, k, v, levit_bias(m.attention_biases, m.resolution, 2), m.scale))


def cascade(m, x, **_) -> Maps:
    """EfficientViT: heads one after the other, each adds its output to what the next one is given."""
    found, carried, batch = [], 0.0, len(x)
    bias = levit_bias(m.attention_biases, (m.resolution, m.resolution))
    for head, part in enumerate(x.chunk(m.num_heads, dim=1)):
        q, k, v = m.qkvs[head](part + carried).split([m.key_dim, m.key_dim, m.val_dim], dim=1)
        pair = attend(flat(m.dws[head](q)), flat(k), flat(v), bias[head], m.scale)
        carried = image(pair[0] @ pair[1], tuple(x.shape[2:]))
        found.append(tuple(y.reshape(BATCH, batch // BATCH, 1, *y.shape[1:]) for y in pair))
    return found


def single_head(m, x, **_) -> Maps:
    """SHViT: one head on a part of the channels."""
    q, k, v = m.qkv(m.pre_norm(x[:, : m.pdim])).split([m.qk_dim, m.qk_dim, m.pdim], dim=1)
    return whole(tuple(y[:, None] for y in attend(flat(q), flat(k), flat(v), 0.0, m.scale)))


def gated_positions(m, x, **_) -> Maps:
    """ConViT: a gate between a softmax of products and one of distances."""
    q, k = (heads(part, m.num_heads) for part in m.qk(x).chunk(2, dim=-1))
    places = pixels((math.isqrt(x.shape[1]),) * 2)
    apart = [[[u - x, v - y, (u - x) ** 2 + (v - y) ** 2] for v, u in places] for y, x in places]
    positions = probability(m.pos_proj(torch.tensor(apart, dtype=x.dtype)).permute(2, 0, 1))
    gate = m.gating_param.sigmoid()[:, None, None]
    v = heads(m.v(x), m.num_heads)
    return whole(((1 - gate) * attend(q, k, v)[0] + gate * positions, v))


def two_widths(m, x, **_) -> Maps:
    """TNT: q and k narrower than v."""
    q, k = (heads(part, m.num_heads) for part in m.qk(x).chunk(2, dim=-1))
    return in_windows(attend(q, k, heads(m.v(x), m.num_heads)))


def mean_query(m, x, **_) -> Maps:
    """CLIP ResNet head: the mean token first."""
    x = flat(x)
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + m.pos_embed
    return whole(attend(*(heads(layer(x), m.num_heads) for layer in (m.q, m.k, m.v))))


# --- timm: channels, or weights without a product ---------------------------------------------------------------------


def cross_covariance(m, x, **_) -> Maps:
    """XCiT, EdgeNeXt: channels attend to channels."""
    q, k, v = (part.mT for part in thirds(m.qkv(x), m.num_heads))  # (B, H, K, N)
    return whole(attend(unit(q) * m.temperature, unit(k), v, 0.0, 1.0))


def davit_channels(m, x, **_) -> Maps:
    q, k, v = (part.mT for part in thirds(m.qkv(x), m.num_heads))
    return whole(attend(k, v, q, 0.0, m.scale))


def factorized(m, x, size, **_) -> Maps:
    """CoaT: a softmax of k over the tokens, per channel."""
    _, k, v = thirds(m.qkv(x), m.num_heads)
    return whole((probability(k, dim=2).mT, v))


# --- other libraries --------------------------------------------------------------------------------------------------


def torch_mha(m, query, key=None, value=None, **_) -> Maps:
    """nn.MultiheadAttention, batch first."""
    weight, bias = m.in_proj_weight, m.in_proj_bias
    return whole(attend(*thirds(query @ weight.T + bias, m.num_heads)))


def torchvision_shifted(m, x, **_) -> Maps:
    """All of a shifted window attention: shift, windows, mask between regions that were apart."""
    (h, w), ws, shift = x.shape[1:3], m.window_size, list(m.shift_size)
    shift = [0 if ws[i] >= (h, w)[i] else shift[i] for i in (0, 1)]
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    found = []
    cosine = isinstance(m, torchvision_swin.ShiftedWindowAttentionV2)
    if cosine:
        far = [[8 * y / (ws[0] - 1), 8 * x / (ws[1] - 1)] for y in range(1 - ws[0], ws[0]) for x in range(1 - ws[1], ws[1])]
        far = torch.tensor(far, dtype=x.dtype)
        bias = 16 * swin_bias(m.cpb_mlp(far.sign() * (far.abs() + 1).log2() / 3), ws).sigmoid()
    else:
        bias = swin_bias(m.relative_position_bias_table, ws)
    for row, column in itertools.product(range(0, h, ws[0]), range(0, w, ws[1])):
        window = x[:, row : row + ws[0], column : column + ws[1]].flatten(1, 2)
        far_side = [(row + i >= h - shift[0], column + j >= w - shift[1]) for i, j in pixels(ws)]  # came round the border
        region = torch.tensor([2 * (a and shift[0] > 0) + (b and shift[1] > 0) for a, b in far_side])
        apart = torch.where(region[:, None] == region, 0.0, -100.0).to(x.dtype)
        projected = window @ m.qkv.weight.T
        shift_by = m.qkv.bias.clone()
        if cosine:
            shift_by[len(shift_by) // 3 : 2 * len(shift_by) // 3] = 0
        q, k, v = thirds(projected + shift_by, m.num_heads)
        if cosine:
            q, k = unit(q) * m.logit_scale.clamp(max=math.log(100)).exp(), unit(k)
        found.append(attend(q, k, v, bias + apart, 1.0 if cosine else None))
    return [tuple(torch.stack(part, dim=1) for part in zip(*found, strict=True))]


def hugging_face(m, hidden_states, *_, **__) -> Maps:
    count = m.q_proj.out_features // m.head_dim
    return whole(attend(*(heads(layer(hidden_states), count) for layer in (m.q_proj, m.k_proj, m.v_proj))))


def separate(m, x) -> Maps:
    """q, k and v from layers of their own."""
    return whole(attend(*(heads(layer(x), m.heads) for layer in (m.q, m.k, m.v))))


def hugging_face_swin(m, hidden_states, attention_mask=None, **_) -> Maps:
    count = m.q_proj.out_features // m.head_dim
    side = math.isqrt(hidden_states.shape[1])
    bias = swin_bias(m.relative_position_bias.relative_position_bias_table, (side, side))
    bias = bias + masked(attention_mask, hidden_states)
    return in_windows(attend(*(heads(layer(hidden_states), count) for layer in (m.q_proj, m.k_proj, m.v_proj)), bias))


BY_HAND = {
    L.Attention: plain, L.AttentionRope: eva, L.DiffAttention: differential, L.AttentionPoolLatent: latent,
    L.AttentionPoolPrr: no_weights, T.vision_transformer.ParallelScalingBlock: parallel,
    T.vision_transformer.DiffParallelScalingBlock: differential, T.beit.Attention: beit,
    T.eva.EvaAttention: eva, T.vision_transformer_relpos.RelPosAttention: relative, T.vision_transformer_sam.Attention: sam,
    T.swin_transformer.WindowAttention: swin, T.swin_transformer_v2.WindowAttention: swin_v2,
    T.swin_transformer_v2_cr.WindowMultiHeadAttention: swin_v2_cr, T.maxxvit.AttentionCl: maxvit_last,
    T.maxxvit.Attention2d: maxvit_first, T.hiera.MaskUnitAttention: hiera, T.hieradet_sam2.MultiScaleAttention: hiera_sam2,
    T.mvitv2.MultiScaleAttention: mvit, T.pvt_v2.Attention: pvt, T.twins.LocallyGroupedAttn: twins_local,
    T.twins.GlobalSubSampleAttn: twins_global, T.volo.OutlookAttention: outlook, T.volo.Attention: last_axes,
    T.volo.ClassAttention: class_row, T.cait.ClassAttn: class_row, T.cait.TalkingHeadAttn: talking,
    T.crossvit.CrossAttention: class_row, T.levit.Attention: levit, T.levit.AttentionDownsample: levit_down,
    T.xcit.XCA: cross_covariance, T.edgenext.CrossCovarianceAttn: cross_covariance, T.davit.WindowAttention: windows_only,
    T.davit.ChannelAttention: davit_channels, T.tnt.Attention: two_widths, T.visformer.Attention: first_axes,
    T.convit.GPSA: gated_positions, T.convit.MHSA: last_axes, T.nest.Attention: nest, T.tiny_vit.Attention: tiny_vit,
    T.efficientformer.Attention: efficientformer, T.efficientformer_v2.Attention2d: efficientformer_v2,
    T.efficientformer_v2.Attention2dDownsample: efficientformer_v2_down, T.metaformer.Attention: last_axes,
    T.gcvit.WindowAttentionGlobal: gcvit, T.nextvit.EfficientAttention: next_vit, T.fastvit.Attention: first_axes,
    T.efficientvit_msra.CascadedGroupAttention: cascade, T.shvit.SHSA: single_head,
    T.coat.FactorAttnConvRelPosEnc: factorized,
    L.MultiQueryAttention2d: multi_query, L.Attention2d: maxvit_first, L.halo_attn.HaloAttn: halo,
    L.bottleneck_attn.BottleneckAttn: bottleneck, L.AttentionPool2d: mean_query, nn.MultiheadAttention: torch_mha,
    torchvision_swin.ShiftedWindowAttention: torchvision_shifted,
    torchvision_swin.ShiftedWindowAttentionV2: torchvision_shifted,
}  # fmt: skip
