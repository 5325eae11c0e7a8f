"""STViT: a few semantic tokens, attended to from pooled patches, go on in place of all patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import GraftError, SettingError
from vitreous.hosts.token_counts import Count, patch_count
from vitreous.layers.stream import PLAIN, Assignment, TokenState, check_places, reduce, restore, split, take_back
from vitreous.reducer import Reducer

OVERLAP = 3  # a window's keys are those of a window with this many more places along each axis: 10 x 10 of 7 x 7
RATIO = 4  # hidden features of the MLPs, over the width


@dataclass(frozen=True, kw_only=True)
class STViT(Reducer):
    """Semantic tokens S stand for all patches X from some block on, until X is recovered from them.

        S0 = pool(X) on the grid                                                    `tokens` of each window
        S1 = S0 + g * attention(S0 -> [S0, X]),   S1 <- S1 + g' * MLP(S1)           keys of the window and around it
        S2 = S1 + g * attention(S1 -> [S1, X]),   S2 <- S2 + g' * MLP(S2)           all keys
        recovery, some blocks on:  X <- X + g * attention(X -> S),   X <- X + g' * MLP(X)

    Attention and MLP norm their inputs; g, g' are LayerScales, a set for each of the three.

    Paper: Chang, Wang, Lin, Wang, Zhang, Jin, Shou 2023, arXiv 2303.08685 (STViT; STViT-R where patches are recovered).
    Differs: the authors' code holds STViT-R on Swin alone; of the form for DeiT its abstract is followed, the rest is ours.
        Two generation steps stand before the next block, and take the place of none. Class and register tokens pass them by.
        LayerScales start at 0.1, theirs at 1e-5, from which single precision does not move the norms.
        No drop path, no learned token beside S1, no blocks in windows of semantic tokens.
    At start: changes the output: S is nearly S0, pooled patches, and recovered patches are nearly those of before. It has
        to be trained.
    Cost: with S tokens, D features and N patches, 2 (S + N) D^2 + 10 S D^2 + 2 S (S + N) D for each of two steps, 10 N D^2 +
        2 S D^2 + 2 N S D for recovery; S tokens in place of N between. 12 D^2 + 15 D parameters for each of the two or three.
    Settings: tokens: of each window, a square number; more than patches are copies. after: blocks that run on all patches
        (default a third). recover: blocks that have run where patches come back; none: never. macs: share of the host's
        multiply-adds in the blocks, which then decides after. window: places along a side, none: the picture is one. pool:
        avg | max. shortcut: false leaves S0 out of S1 (the authors' default). scale: of g and g' at the start.
        The authors' STViT-R: tokens=9,window=7,pool=max,shortcut=false,scale=1e-5 on 14 x 14 patches.
    Raises: HostError on rotary hosts and where the grid is not known; SettingError; MaskError where patches have no places.
    """

    stage: ClassVar[str] = "prototype"
    paper: ClassVar[str] = "Chang et al. 2023, arXiv 2303.08685"
    solves: ClassVar[str] = "after"
    examples: ClassVar[tuple[str, ...]] = (
        "stvit:tokens=4,after=2",
        "stvit:tokens=1,after=1,recover=3,window=2,pool=max",
        "stvit:tokens=4,after=3,pool=max,shortcut=false",
    )

    tokens: int = 16
    after: int | None = None
    recover: int | None = None
    window: int | None = None
    pool: Literal["avg", "max"] = "avg"
    shortcut: bool = True
    scale: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 1 or math.isqrt(self.tokens) ** 2 != self.tokens:
            raise SettingError(f"Found tokens={self.tokens}. Expected a square number, 1 or more. Give for example tokens=16.")
        if self.window is not None and self.window < 1:
            raise SettingError(f"Found window={self.window}. Expected places along a side, 1 or more. Give for example 7.")
        if self.scale < 0:
            raise SettingError(f"Found scale={self.scale}. Expected 0 or more. Give for example scale=0.1.")

    @property
    def requires(self) -> tuple[str, ...]:
        return ("stream", "remove", "grid", *(() if self.macs is None else ("attention",)))

    @property
    def exact_at_init(self) -> bool:
        return self.macs == 1

    def changes(self, model: nn.Module) -> dict[str, Any]:
        opened, (start, stop) = slots.open_stream(model, self.name), self.span(model, self.strength(model))
        if start == stop:
            return opened
        width, heads, generator = slots.width(model), slots.heads(model), torch.Generator().manual_seed(0)
        layers = [CrossBlock(width, heads, self.scale, generator) for _ in range(2 if self.recover is None else 3)]
        changes = opened | slots.add_step(model, start - 1, "after", Generate(self, *layers[:2]))
        if self.recover is not None:
            changes |= slots.add_step(model, stop - 1, "after", Recover(layers[2]))
        return changes

    def semantic(self, model: nn.Module) -> int:
        """How many semantic tokens there are for images of the model's own size."""
        grid = model.patch_embed.dynamic_feat_size(model.patch_embed.img_size)
        return self.tokens * math.prod(len(windows(length, self.window)) for length in grid)

    def span(self, model: nn.Module, strength: float) -> tuple[int, int]:
        """(start, stop): semantic tokens are there in the blocks start to stop - 1; none where the two are equal."""
        depth = slots.depth(model)
        start, stop = math.floor(strength), depth if self.recover is None else self.recover
        if not 1 <= start <= stop - (self.macs is None) <= stop <= depth:
            raise SettingError(
                f"Found after={start} and recover={stop} of {depth} blocks. Expected 1 <= after < recover <= {depth}: so many "
                "blocks run on all patches, and on semantic tokens from there to recover. Give such numbers."
            )
        return start, stop

    def strength(self, model: nn.Module) -> float:
        blocks = super().strength(model)
        return max(1, slots.depth(model) // 3) if blocks is None else blocks

    def strengths(self, model: nn.Module) -> tuple[float, float]:
        return slots.depth(model) if self.recover is None else self.recover, 1

    def counts(self, model: nn.Module, strength: float) -> tuple[Count, ...]:
        start, stop = self.span(model, strength)
        few, prefix, patches = self.semantic(model), slots.prefix(model), patch_count(model)
        numbers = [prefix + (few if start <= block < stop else patches) for block in range(slots.depth(model))]
        return tuple(Count(n, n) for n in numbers)


class Generate(nn.Module):
    """The token step: x (B, n, D) -> prefix, semantic tokens window by window, inserted tokens."""

    def __init__(self, settings: STViT, first: CrossBlock, second: CrossBlock):
        super().__init__()
        self.settings, self.first, self.second = settings, first, second

    def forward(self, x: Tensor, state: TokenState, qkv: None) -> tuple[Tensor, TokenState]:
        settings, prefix = self.settings, state.prefix
        check_places(state, x.shape[1], settings.name)
        original, _ = split(x, state)
        patches, places = original[:, prefix:], restore(x, state)[0][:, prefix:]  # (B, n, D), (B, N, D)
        bins, near = (
            torch.tensor(table, device=x.device)
            for table in layout(state.grid, state.groups, settings.window, math.isqrt(settings.tokens))
        )
        pooled = pool(places, bins, settings.pool)  # (B, w, t, D)
        keys = torch.cat([pooled, places[:, near]], dim=2)  # (B, w, t + K, D)
        tokens, attention = self.first(pooled, keys, shortcut=settings.shortcut, state=PLAIN)
        start = pool_weights(bins, places.shape[1], attention.dtype)  # (w, t, N)
        own, others = attention.tensor_split((settings.tokens,), dim=-1)
        of_near = (near[..., None] == torch.arange(places.shape[1], device=x.device)).to(attention)  # (w, K, N)
        weights = own @ start + others @ of_near
        weights = self.first.joined(start, weights) if settings.shortcut else weights
        tokens, weights = tokens.flatten(1, 2), weights.flatten(1, 2)  # (B, S, D), (B, S, N)
        if state.assignment is not None:  # of places as of the tokens that stand for them
            unit = torch.eye(original.shape[1], dtype=weights.dtype, device=weights.device).expand(len(x), -1, -1)
            weights = weights @ state.assignment.restore(unit)[:, prefix:, prefix:]
        sizes = None if state.sizes is None else state.sizes[:, prefix : original.shape[1]]
        tokens, attention = self.second(
            tokens, torch.cat([tokens, patches], dim=1), key_sizes(sizes, tokens.shape[1]), state=PLAIN
        )
        own, others = attention.tensor_split((tokens.shape[1],), dim=-1)
        weights = self.second.joined(weights, own @ weights + others)
        step = Assignment.mixing(weights, prefix)
        tokens = torch.cat([original[:, :prefix], tokens.to(x.dtype)], dim=1)
        return reduce(x, state, step, tokens=tokens, aside=settings.recover is not None)


class Recover(nn.Module):
    """The token step: x with semantic tokens -> prefix, the patches of before with what those found out, inserted tokens."""

    def __init__(self, block: CrossBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, state: TokenState, qkv: None) -> tuple[Tensor, TokenState]:
        if state.aside is None:
            raise GraftError(
                "Found tokens whose patches were not put aside. Expected the blocks of stvit from `after` to `recover` to run "
                "one after the other. Run the model from its first block on."
            )
        prefix, original = state.prefix, split(x, state)[0]
        patches = split(state.aside.x, state.aside.state)[0][:, prefix:]
        sizes = None if state.sizes is None else state.sizes[:, prefix : original.shape[1]]
        patches, _ = self.block(patches, original[:, prefix:], key_sizes(sizes, 0), state=PLAIN)
        return take_back(x, state, torch.cat([original[:, :prefix], patches.to(x.dtype)], dim=1))


class CrossBlock(nn.Module):
    """x (..., m, D) plus attention to y (..., n, D), plus MLP, each normed before and scaled behind."""

    def __init__(self, width: int, heads: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = skip_init(nn.Linear, width, width), skip_init(nn.Linear, width, 2 * width)
        self.out = skip_init(nn.Linear, width, width)
        self.up, self.down = skip_init(nn.Linear, width, RATIO * width), skip_init(nn.Linear, RATIO * width, width)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), scale)) for _ in range(2))
        with torch.no_grad():
            for linear in (self.q, self.kv, self.out, self.up, self.down):
                nn.init.trunc_normal_(linear.weight, std=0.02, generator=generator)
                linear.bias.zero_()

    def forward(
        self, x: Tensor, y: Tensor, sizes: Tensor | None = None, *, shortcut: bool = True, state: TokenState = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """The new x, and its attention (..., m, n), mean over heads.

        sizes: of y, (..., n). state: for hooks, of x and y, which are not the tokens of the stream around them.
        """
        z, attention = cross_attention(*self.project(self.norm1(x), self.norm1(y)), sizes)
        added = self.scale1 * self.out(z)
        x = x + added if shortcut else added
        return x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x)))), attention

    def project(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x and keys and values of y, (..., H, m or n, K)."""
        k, v = self.kv(y).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in (self.q(x), k, v))
        return q, k, v

    def joined(self, before: Tensor, drawn: Tensor) -> Tensor:
        """Where new tokens come from: weights of the old ones, and those that attention draws by, as LayerScale lets in."""
        g = self.scale1.abs().mean().to(before)
        return (before + g * drawn) / (1 + g)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(K) + log sizes) v, heads joined (..., m, D), and its weights (..., m, n), mean over heads."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (..., H, m, n)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sizes is not None:
        scores = scores + sizes.log()[..., None, None, :]
    weights = scores.softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(-3, -2).flatten(-2), weights.mean(-3)


def key_sizes(sizes: Tensor | None, semantic: int) -> Tensor | None:
    """Sizes of keys: of so many semantic tokens, one each, and of patches (B, n)."""
    return None if sizes is None else torch.cat([sizes.new_ones(len(sizes), semantic), sizes], dim=1)


# -- places ------------------------------------------------------------------------------------------------------------


def windows(length: int, window: int | None) -> list[range]:
    """The windows along an axis of so many places: as many as come nearest to the size; None: one."""
    count = 1 if window is None else max(1, round(length / window))
    return [range(i * length // count, (i + 1) * length // count) for i in range(count)]


def around(own: range, length: int, window: int | None) -> range:
    """A window with its surroundings along an axis, inside the picture; 10 of 14 places for windows of 7."""
    widest = max(map(len, windows(length, window)))
    size = length if window is None else min(length, widest + OVERLAP)
    start = min(max(own.start - OVERLAP // 2, 0), length - size)
    return range(start, start + size)


def cut(own: range, side: int) -> list[range]:
    """The bins of adaptive pooling, which may overlap: so many along an axis of a window."""
    n = len(own)
    return [range(own.start + i * n // side, own.start - (-(i + 1) * n // side)) for i in range(side)]


def cells(ranges: Sequence[range], grid: Sequence[int], groups: int) -> list[int]:
    """The places of a box, in raster order, in each group of the tokens."""
    places = [0]
    for along, length in zip(ranges, grid, strict=True):
        places = [place * length + i for place in places for i in along]
    return [place + group * math.prod(grid) for group in range(groups) for place in places]


def layout(grid: Sequence[int], groups: int, window: int | None, side: int) -> tuple[list, list]:
    """Places that are pooled, (windows, side * side, places), -1 behind shorter ones, and each window's keys (windows, K)."""
    boxes = [[]]
    for length in grid:
        boxes = [[*box, own] for box in boxes for own in windows(length, window)]
    bins, near = [], []
    for box in boxes:
        parts = [[]]
        for own in box:
            parts = [[*part, some] for part in parts for some in cut(own, side)]
        bins.append([cells(part, grid, groups) for part in parts])
        near.append(cells([around(own, length, window) for own, length in zip(box, grid, strict=True)], grid, groups))
    most = max(len(places) for row in bins for places in row)
    return [[places + [-1] * (most - len(places)) for places in row] for row in bins], near


def pool(x: Tensor, bins: Tensor, how: str) -> Tensor:
    """x (B, N, D) at bins (w, t, L), -1 for none -> the mean or the maximum of each, (B, w, t, D)."""
    values, absent = x[:, bins.clamp(min=0)], (bins < 0)[..., None]
    if how == "max":
        return values.masked_fill(absent, float("-inf")).amax(3)
    return values.masked_fill(absent, 0).sum(3) / (bins >= 0).sum(2, keepdim=True)


def pool_weights(bins: Tensor, places: int, dtype: torch.dtype) -> Tensor:
    """(w, t, N): the same share for each place of a bin, rows that sum to one."""
    inside = (bins[..., None] == torch.arange(places, device=bins.device)).any(2).to(dtype)
    return inside / inside.sum(2, keepdim=True)
