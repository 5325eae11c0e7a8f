"""Leverage: patches that span the leading singular directions stay, others merge into them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.token_counts import Count, patch_count
from vitreous.layers.foreground import along_direction, place_bump, towards_centre
from vitreous.layers.spectral import leading_subspace, unit_rows
from vitreous.layers.stream import Assignment, TokenState, reduce, split, take
from vitreous.reducer import Reducer, counts_between, staying

FACTORS = ("leverage", "attention", "foreground", "random")


@dataclass(frozen=True, kw_only=True)
class Leverage(Reducer):
    """Between attention and MLP the patches of largest score stay, and each other merges into its nearest of them.

        the ceil(keep * n) patches of largest score stay; each other i joins the j among them of largest cosine of keys,
        mean over heads:  x_j <- (s_j x_j + sum_i s_i x_i) / s,   s = s_j + sum_i s_i, which attention behind it counts by
        the score is the product of what `by` names, with Z = the patches' values (n, H K), rows of unit length, centred:
            leverage    l_i = sum_{j <= rank} u_ij^2, Z = U S V^T: how much of the leading directions hangs on patch i
            attention   a_i = mean over heads of softmax_i(q_class k_i^T / sqrt(K)), EViT's score
            foreground  1 / (1 + exp(-z_i)), z = Zw standardised over the patches, w = mean over images of Z^T c, c a bump
            random      a number that does not depend on the image: the control

    Paper: our own. Leverage scores: Drineas, Mahoney, Muthukrishnan 2008, arXiv 0708.3696; class attention as a score: Liang
        et al. 2022, arXiv 2202.07800; merging by size: Bolya et al. 2022, arXiv 2210.09461; foreground: `lens.direction`.
    At start: changes the output; keep=1 leaves it bit for bit. The factor foreground is 1/2 for every patch until
        `vitreous.calibrate(model, images)` has set w.
    Cost: with leverage a thin randomised SVD of n x H K; a product of all keys with the staying ones, and one to merge, in
        the chosen blocks; fewer tokens behind each. No parameters; foreground: a buffer of H K per chosen block.
    Settings: keep: fraction of the patches that stay, in (0, 1]. macs: share of the host's multiply-adds in the blocks,
        which then decides keep. layers (0-based; default: at a quarter, half and three quarters of the depth). rank: number
        of leading directions, at most half that of the patches. by: factors of the score. merge: false drops the others,
        whose places in feature maps are 0.
    Raises: HostError on rotary hosts, where halves of a block or its attention are not known, for attention without a class
        token, for foreground where the patch embedding is not timm's, and for merge=false where the head pools over
        patches; SettingError; MaskError where foreground is calibrated on tokens that have no places.
    """

    paper: ClassVar[str] = "Vitreous; leverage scores: Drineas et al. 2008, arXiv 0708.3696"
    stage: ClassVar[Literal["stable", "prototype"]] = "prototype"
    solves: ClassVar[str] = "keep"
    examples: ClassVar[tuple[str, ...]] = (
        "leverage:keep=1",
        "leverage:macs=0.7,layers=0+2,by=leverage+attention,rank=4",
        "leverage:by=leverage+foreground,merge=false",
    )

    keep: float = 0.7
    layers: tuple[int, ...] | None = None
    rank: int = 16
    by: tuple[str, ...] = ("leverage",)
    merge: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise SettingError(f"Found keep={self.keep}. Expected a fraction above 0, up to 1. Give for example keep=0.7.")
        if self.rank < 1:
            raise SettingError(
                f"Found rank={self.rank}. Expected how many leading directions count, 1 or more. Give such a number."
            )
        if set(self.by) - set(FACTORS) or len(set(self.by)) < len(self.by):
            raise SettingError(
                f"Found by={'+'.join(self.by)}. Expected one or more of {', '.join(FACTORS)}, each once, joined by +. Give for "
                "example by=leverage+attention."
            )

    @property
    def requires(self) -> tuple[str, ...]:
        further = ("class_token",) * ("attention" in self.by) + ("grid",) * ("foreground" in self.by)
        return ("stream", "remove", "attention", "halves", *further, *(() if self.merge else ("class_head",)))

    @property
    def exact_at_init(self) -> bool:
        return self.keep == 1 if self.macs is None else self.macs == 1

    def changes(self, model: nn.Module) -> dict[str, Any]:
        settings = replace(self, macs=None, keep=self.strength(model))
        width = slots.width(model) if "foreground" in self.by else None
        changes: dict[str, Any] = slots.open_stream(model, self.name) if width else {}
        for i in self.chosen(model):
            changes |= slots.add_step(model, i, "between", Keep(settings, slots.prefix(model), width))
        return changes

    def chosen(self, model: nn.Module) -> list[int]:
        """The blocks with a step, in order."""
        n = slots.depth(model)
        return sorted(set(slots.layer_indices(model, self.layers or (n // 4, n // 2, 3 * n // 4))))

    def strengths(self, model: nn.Module) -> tuple[float, float]:
        return 1.0, 1 / patch_count(model)

    def counts(self, model: nn.Module, strength: float) -> tuple[Count, ...]:
        chosen = self.chosen(model)
        return counts_between(model, lambda block, n: staying(n, strength) if block in chosen else n)

    @torch.no_grad()
    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """Set the direction of foreground in each chosen block, in one pass over images with centred subjects."""

        def note(step: Keep, inputs: tuple[Tensor, TokenState, tuple[Tensor, Tensor, Tensor]]) -> None:
            x, state, (_, _, v) = inputs
            rows = step.rows(v, split(x, state)[0].shape[1])
            step.direction.copy_(towards_centre(rows, place_bump(state, rows, self.text())))

        steps = [module for module in model.modules() if isinstance(module, Keep) and module.direction is not None]
        handles = [step.register_forward_pre_hook(note) for step in steps]
        try:
            model(images) if steps else None
        finally:
            for handle in handles:
                handle.remove()


class Keep(nn.Module):
    """The token step: x (B, n, D) -> prefix, the patches that stay, in their order, inserted tokens.

    width: H K, of the direction that the factor foreground needs; None: there is none.
    """

    def __init__(self, settings: Leverage, prefix: int, width: int | None):
        super().__init__()
        self.settings, self.prefix = settings, prefix
        self.register_buffer("direction", None if width is None else torch.zeros(width))

    def forward(self, x: Tensor, state: TokenState, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, TokenState]:
        prefix, end = self.prefix, split(x, state)[0].shape[1]
        n = end - prefix
        count = staying(n, self.settings.keep)
        if count >= n:
            return x, state
        with torch.autocast(x.device.type, enabled=False):
            scores = self.scores(qkv, end, state)
        top = scores.topk(count).indices.sort(1).values  # (B, count)
        if not self.settings.merge:
            sizes = (
                None if state.sizes is None else torch.cat([state.sizes[:, :prefix], take(state.sizes[:, prefix:end], top)], 1)
            )
            return reduce(x, state, Assignment.keeping(top, n, prefix), sizes)
        keys = F.normalize(wide(qkv[1][:, :, prefix:end]).mean(1), dim=-1)  # (B, n, K)
        places = torch.arange(prefix + count, device=x.device).expand(x.shape[0], -1)
        nearest = prefix + (keys @ take(keys, top).mT).argmax(-1)  # (B, n)
        index = torch.cat([places[:, :prefix], nearest.scatter(1, top, places[:, prefix:])], dim=1)
        step = Assignment(index=index, tokens=prefix + count)
        before = wide(torch.ones_like(x[:, :end, 0])) if state.sizes is None else state.sizes[:, :end]
        sizes = torch.zeros_like(before[:, : prefix + count]).scatter_add(1, index, before)
        return reduce(x, state, step, sizes)

    def rows(self, values: Tensor, end: int) -> Tensor:
        """Z (B, n, H K) of values (B, H, tokens, K): the patches' rows of unit length, centred."""
        return unit_rows(values.transpose(1, 2).flatten(2)[:, self.prefix : end].detach())

    def scores(self, qkv: tuple[Tensor, Tensor, Tensor], end: int, state: TokenState) -> Tensor:
        """A score per patch (B, n), of queries (already scaled), keys and values (B, H, tokens, K)."""
        q, k, v = qkv
        rows, by, factors = self.rows(v, end), self.settings.by, []
        if "leverage" in by:
            half = max(1, rows.shape[1] // 2)  # with all directions of centred rows every patch counts the same
            factors.append(leverage(rows, min(self.settings.rank, half)))
        if "attention" in by:
            logits = wide((q[:, :, :1] @ k.mT).squeeze(2))  # (B, H, tokens)
            logits = logits if state.sizes is None else logits + state.sizes.log()[:, None]
            factors.append(logits.softmax(-1).mean(1)[:, self.prefix : end])
        if "foreground" in by:
            factors.append(along_direction(rows, self.direction.to(rows)).sigmoid())
        if "random" in by:
            noise = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(rows.shape[1]))
            factors.append(noise.to(rows).expand(rows.shape[0], -1))
        return math.prod(factors)


def leverage(rows: Tensor, rank: int) -> Tensor:
    """l (B, n): squared lengths of the rows of U (B, n, rank), the leading left singular vectors of rows (B, n, D)."""
    n, width = rows.shape[1:]
    rank = min(rank, n, width)
    # Centred rows have a rank below n. A sketch of n columns would hold a direction of rounding, which onnxruntime was
    # seen to mistake for a leading one.
    oversample = max(0, min(8, n - 1 - rank)) if torch.compiler.is_exporting() else 8
    return leading_subspace(rows, rank, oversample=oversample).U.square().sum(-1)


def wide(x: Tensor) -> Tensor:
    """In at least float32, where sizes are whole numbers and similarities can be told apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
