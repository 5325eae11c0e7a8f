"""EViT: the patches that the class token attends to stay, the others become one token."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.token_counts import Count, patch_count
from vitreous.layers.matching import class_attention
from vitreous.layers.stream import Assignment, TokenState, reduce, split, take
from vitreous.reducer import Reducer, counts_between, staying


@dataclass(frozen=True, kw_only=True)
class EViT(Reducer):
    """Between attention and MLP the patches that the class token attends to most stay, and the others fuse into one.

        a_j = mean over heads of softmax_j(q_class k_j^T / sqrt(K))                  one score per patch
        [class, x_1 ... x_n]  ->  [class, the ceil(keep * n) patches of largest a, sum over the others of a_j x_j]

    Paper: Liang, Ge, Tong, Song, Wang, Xie 2022, arXiv 2202.07800 (token reorganisation; the fused token is not
        normalised, and counts as a patch in the next such block).
    Differs: scores are taken before attention dropout; the schedule of `keep` goes by fractions of a run, not by epochs.
    At start: changes the output; keep=1 leaves it bit for bit.
    Cost: one row of attention more in the chosen blocks, fewer tokens behind it. No parameters.
    Settings: keep: fraction of the patches that stay, in (0, 1]. macs: share of the host's multiply-adds in the blocks,
        which then decides keep. layers (0-based; default: at a quarter, half and three
        quarters of the depth, 3+6+9 of 12). fuse: false drops the others, and their places in feature maps are 0.
        warmup, until: in training, keep is 1 up to the fraction `warmup` of the run, then falls as a cosine to its value
        at `until`; outside training it is always its value.
    Raises: HostError on rotary hosts, without a class token, where halves of a block or its attention are not known, and
        for fuse=false where the head pools over patches; SettingError.
    """

    paper: ClassVar[str] = "Liang et al. 2022, arXiv 2202.07800"
    solves: ClassVar[str] = "keep"
    examples: ClassVar[tuple[str, ...]] = ("evit:keep=1", "evit:keep=0.5,layers=0+3", "evit:macs=0.7,fuse=false")

    keep: float = 0.7
    layers: tuple[int, ...] | None = None
    fuse: bool = True
    warmup: float = 0.05
    until: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise SettingError(f"Found keep={self.keep}. Expected a fraction above 0, up to 1. Give for example keep=0.7.")
        if not 0 <= self.warmup <= self.until <= 1:
            raise SettingError(
                f"Found warmup={self.warmup}, until={self.until}. Expected 0 <= warmup <= until <= 1, fractions of a run. "
                "Give for example warmup=0.05,until=0.5."
            )

    @property
    def requires(self) -> tuple[str, ...]:
        return ("stream", "insert", "remove", "class_token", "attention", "halves", *(() if self.fuse else ("class_head",)))

    @property
    def exact_at_init(self) -> bool:
        return self.keep == 1 if self.macs is None else self.macs == 1

    def changes(self, model: nn.Module) -> dict[str, Any]:
        settings = replace(self, macs=None, keep=self.strength(model))
        changes: dict[str, Any] = {}
        for i in self.chosen(model):  # a later block's entry holds its own step, and none of the earlier ones
            changes |= slots.add_step(model, i, "between", Reorganize(settings, slots.prefix(model)))
        return changes

    def chosen(self, model: nn.Module) -> list[int]:
        """The blocks with a step, in order."""
        n = slots.depth(model)
        return sorted(set(slots.layer_indices(model, self.layers or (n // 4, n // 2, 3 * n // 4))))

    def strengths(self, model: nn.Module) -> tuple[float, float]:
        return 1.0, 1 / patch_count(model)

    def counts(self, model: nn.Module, strength: float) -> tuple[Count, ...]:
        chosen = self.chosen(model)
        return counts_between(model, lambda block, n: min(n, staying(n, strength) + self.fuse) if block in chosen else n)

    def keep_at(self, progress: float) -> float:
        """The fraction that stays at some progress of a training run, 0 to 1: first 1, then a cosine down to `keep`."""
        if progress >= self.until:
            return self.keep
        if progress <= self.warmup:
            return 1.0
        fallen = (progress - self.warmup) / (self.until - self.warmup)
        return self.keep + (1 - self.keep) * (1 + math.cos(math.pi * fallen)) / 2


class Reorganize(nn.Module):
    """The token step of EViT: x (B, n, D) -> prefix, kept patches by falling score, fused patch, inserted tokens."""

    def __init__(self, settings: EViT, prefix: int):
        super().__init__()
        self.settings, self.prefix = settings, prefix
        self.training_keep = settings.keep

    def schedule(self, progress: float) -> None:
        """Set what stays in training, by the progress of the run, 0 to 1."""
        self.training_keep = self.settings.keep_at(progress)

    def forward(self, x: Tensor, state: TokenState, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, TokenState]:
        original, _ = split(x, state)
        prefix, patches = original[:, : self.prefix], original[:, self.prefix :]
        n = patches.shape[1]
        count = staying(n, self.training_keep if self.training else self.settings.keep)
        if count >= n:
            return x, state
        scores = class_attention(qkv[0], qkv[1], state.sizes)[:, self.prefix : self.prefix + n]  # (B, n)
        top = scores.topk(count).indices  # (B, count)
        parts = [prefix, take(patches, top)]
        if self.settings.fuse:
            others = scores.scatter(1, top, 0.0).to(x.dtype)
            parts.append((others[:, None] @ patches).to(x.dtype))
        step = Assignment.keeping(top, n, self.prefix, fused=self.settings.fuse)
        return reduce(x, state, step, self.sizes(state.sizes, top), tokens=torch.cat(parts, dim=1))

    def sizes(self, before: Tensor | None, top: Tensor) -> Tensor | None:
        """Sizes after patches `top` stayed, where tokens have sizes; the fused token counts as one."""
        if before is None:
            return None
        parts = [before[:, : self.prefix], before[:, self.prefix :].gather(1, top)]
        return torch.cat([*parts, torch.ones_like(before[:, : int(self.settings.fuse)])], dim=1)
