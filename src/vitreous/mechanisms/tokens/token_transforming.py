"""Token transforming: the patches that stay are weighted means of all patches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.token_counts import Count, patch_count
from vitreous.layers.stream import Assignment, TokenState, normalized, reduce, split, take
from vitreous.layers.unit_norm import unit
from vitreous.reducer import Reducer, counts_between, staying

COLDEST = 0.025  # exp(-2 / 0.025) over some hundreds of patches is still a normal number in float32


@dataclass(frozen=True, kw_only=True)
class TokenTransforming(Reducer):
    """Each of a few patches becomes a weighted mean of all patches, between attention and MLP.

        anchors i: the ceil(keep * n) patches of largest score a;   c_ij = cosine of anchor i and patch j
        normalize=sources:  P_ij = exp(c_ij / T) / sum_j exp(c_ij / T)               an anchor draws from all patches
        normalize=anchors:  P_ij = exp(c_ij / T) / sum_i exp(c_ij / T)               a patch is shared out among anchors
        Y = W X,   W_ij = s_j P_ij / sum_j s_j P_ij,   sizes s'_i = sum_j s_j P_ij / sum_i P_ij

    A one-hot W is pruning, disjoint means are merging; as T falls, normalize=sources becomes pruning to the anchors and
    normalize=anchors a merge of each patch into its most similar anchor.

    Paper: Zeng, Yu, Kong, Tang 2025, arXiv 2506.05709 (reduction as Y = W X with a dense W, without training). How W is made
        is not confirmed: score, cosine, T, normalisation and layers are ours.
    Differs: where the paper's formula is not known (above); register and inserted tokens are kept like the class token.
    At start: changes the output; keep=1 leaves it bit for bit.
    Cost: products of m x n x K and m x n x D in each chosen block, for score=received one of n x n x D more; fewer tokens
        behind it. No parameters.
    Settings: keep: fraction of the patches that stay, in (0, 1]. macs: share of the host's multiply-adds in the blocks,
        which then decides keep. layers (0-based; default: at a quarter, half and three quarters of the depth). score:
        attention from the class token, or the mean attention that a patch receives. similarity: of keys (mean over heads)
        or of tokens. normalize: sources | anchors. temperature: T, above 0, for sources 0.025 or more. proportional: tokens
        count by their size in attention; means are weighted by size either way.
    Raises: HostError on rotary hosts, where halves of a block or its attention are not known and, for score=class, without a
        class token; SettingError.
    """

    stage: ClassVar[str] = "prototype"
    paper: ClassVar[str] = "Zeng et al. 2025, arXiv 2506.05709"
    solves: ClassVar[str] = "keep"
    examples: ClassVar[tuple[str, ...]] = (
        "token_transforming:keep=1",
        "token_transforming:keep=0.5,layers=0+2,score=class,similarity=keys,normalize=anchors",
        "token_transforming:proportional=false",
    )

    keep: float = 0.7
    layers: tuple[int, ...] | None = None
    score: Literal["class", "received"] = "received"
    similarity: Literal["keys", "tokens"] = "tokens"
    normalize: Literal["sources", "anchors"] = "sources"
    temperature: float = 0.03
    proportional: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise SettingError(f"Found keep={self.keep}. Expected a fraction above 0, up to 1. Give for example keep=0.7.")
        if self.temperature <= 0 or (self.normalize == "sources" and self.temperature < COLDEST):
            raise SettingError(
                f"Found temperature={self.temperature}. Expected more than 0 and, for normalize=sources, {COLDEST} or more, "
                "below which a patch could give nothing in single precision. Give for example temperature=0.03."
            )

    @property
    def requires(self) -> tuple[str, ...]:
        return ("stream", "remove", "attention", "halves", *(("class_token",) if self.score == "class" else ()))

    @property
    def exact_at_init(self) -> bool:
        return self.keep == 1 if self.macs is None else self.macs == 1

    def changes(self, model: nn.Module) -> dict[str, Any]:
        settings = replace(self, macs=None, keep=self.strength(model))
        changes: dict[str, Any] = {}
        for i in self.chosen(model):
            changes |= slots.add_step(model, i, "between", Transform(settings, slots.prefix(model)))
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


class Transform(nn.Module):
    """The token step: x (B, n, D) -> prefix, anchors by falling score as means of patches, inserted tokens."""

    def __init__(self, settings: TokenTransforming, prefix: int):
        super().__init__()
        self.settings, self.prefix = settings, prefix

    def forward(self, x: Tensor, state: TokenState, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, TokenState]:
        settings, prefix, end = self.settings, self.prefix, split(x, state)[0].shape[1]
        count = staying(end - prefix, settings.keep)
        if count >= end - prefix:
            return x, state
        q, k, _ = qkv
        with torch.autocast(x.device.type, enabled=False):  # half precision cannot tell similar patches apart
            top = patch_scores(q, k, state.sizes, settings.score)[:, prefix:end].topk(count).indices  # (B, m)
            features = k.mean(1) if settings.similarity == "keys" else x
            weights = similarity_weights(features[:, prefix:end], top, settings.temperature, settings.normalize)
            return transform(x, state, weights, prefix, proportional=settings.proportional)


def patch_scores(q: Tensor, k: Tensor, sizes: Tensor | None, score: str) -> Tensor:
    """Attention to each token (B, n), mean over heads: of the class token, or the mean over all tokens.

    q (already scaled), k: (B, H, n, K). sizes: (B, n) or None.
    """
    logits = (q[:, :, :1] if score == "class" else q) @ k.mT  # (B, H, 1 or n, n)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sizes is not None:
        logits = logits + sizes.log()[:, None, None]
    return logits.softmax(-1).mean((1, 2))


def similarity_weights(features: Tensor, top: Tensor, temperature: float, normalize: str) -> Tensor:
    """P (B, m, n): how much each patch gives to each anchor, by cosine of features (B, n, C); top (B, m): the anchors.

    normalize: "sources": rows sum to one; "anchors": columns do.
    """
    rows = unit(features)  # (B, n, C)
    cosines = take(rows, top) @ rows.mT
    return (cosines / temperature).softmax(2 if normalize == "sources" else 1)


def transform(
    x: Tensor, state: TokenState, weights: Tensor, prefix: int, *, proportional: bool = True
) -> tuple[Tensor, TokenState]:
    """Reduce the n patches behind the prefix to the m rows of weights (B, m, n): Y = W X, W the weights times sizes, rows to 1.

    proportional: hand on sizes, which attention counts by.
    """
    original, _ = split(x, state)
    sizes = state.sizes
    proportional = proportional or sizes is not None  # an earlier graft counts by sizes
    if sizes is not None:
        sizes = sizes[:, : original.shape[1]]
    elif state.assignment is not None:
        sizes = state.assignment.counts(original.shape[1]).to(weights.dtype)
    else:
        sizes = torch.ones_like(original[..., 0], dtype=weights.dtype)
    before, own = sizes.tensor_split((prefix,), dim=1)
    tokens = Assignment(weights=weights).gather(original[:, prefix:], own)
    # Without gradient: the fused kernel takes no mask that has one.
    after = torch.cat([before, (normalized(weights.detach(), 1) @ own[..., None])[..., 0]], dim=1)
    step = Assignment.mixing(weights, prefix)
    return reduce(x, state, step, after if proportional else None, tokens=torch.cat([original[:, :prefix], tokens], dim=1))
