"""Weighted merging: similar patches become one, and those that the class token attends to do so last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.token_counts import Count, patch_count
from vitreous.layers.matching import best_pairs, class_attention, merged, wide
from vitreous.layers.stream import TokenState, split
from vitreous.reducer import Reducer, between_schedules, counts_between


@dataclass(frozen=True, kw_only=True)
class WeightedMerging(Reducer):
    """Between attention and MLP the pairs of patches merge whose merging costs the class token least.

        A = every second patch, B = the others;  for each i in A the j in B of least cost
        cost_ij = (1 - cos(k_i, k_j)) (a_i + a_j)^power,   k_i the keys of all heads as one vector,
        a_i = mean over heads of softmax_i(q_class k_i^T / sqrt(K) + log s_i)
        the `tokens` pairs of least cost merge:  x_j <- (s_j x_j + sum_i s_i x_i) / s,   s = s_j + sum_i s_i
        attention behind it: softmax(q k^T / sqrt(K) + log s)

    Paper: ours. Matching and merging are those of Bolya et al. 2022, arXiv 2210.09461 (`token_merging`); that attention
        decides which patches matter is Liang et al. 2022, arXiv 2202.07800 (`evit`).
    Differs: from `token_merging` by the weight (a_i + a_j)^power, by keys of all heads in the place of their mean, and by
        the blocks: not in the first one, and not in the last, behind whose attention `class_query` needs no patches.
    At start: changes the output; tokens=0 leaves it bit for bit.
    Cost: a product of n/2 x n/2 x H K and one row of attention per chosen block, `tokens` fewer tokens behind each. No
        parameters.
    Settings: tokens: how many patches merge away per block, 0 or more, at most half of those present. macs: share of the
        host's multiply-adds in the blocks; it then decides tokens, and the first blocks may merge one more than the
        others. power: of the attention, 0 (none) or more. layers (0-based; default all but the first and the last).
    Raises: HostError on rotary hosts, without a class token, and where halves of a block or its attention are not known;
        SettingError.
    """

    paper: ClassVar[str] = "ours; after arXiv 2210.09461 and arXiv 2202.07800"
    requires: ClassVar[tuple[str, ...]] = ("stream", "remove", "class_token", "attention", "halves")
    solves: ClassVar[str] = "tokens"
    examples: ClassVar[tuple[str, ...]] = ("weighted_merging:tokens=0", "weighted_merging:macs=0.7,power=1.0,layers=0+2")

    tokens: int = 16
    power: float = 0.5
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 0:
            raise SettingError(
                f"Found tokens={self.tokens}. Expected how many patches merge away per block, 0 or more. Give such a number."
            )
        if self.power < 0:
            raise SettingError(f"Found power={self.power}. Expected 0 (attention has no weight) or more. Give such a number.")

    @property
    def exact_at_init(self) -> bool:
        return self.tokens == 0 if self.macs is None else self.macs == 1

    def changes(self, model: nn.Module) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for i, tokens in self.merging(model, self.strength(model)).items():
            changes |= slots.add_step(model, i, "between", WeightedMerge(tokens, slots.prefix(model), self.power))
        return changes

    def merging(self, model: nn.Module, tokens: float) -> dict[int, int]:
        """{block: patches that merge away there, if there are twice as many}."""
        inner = range(1, slots.depth(model) - 1) or range(slots.depth(model))
        layers = sorted(set(slots.layer_indices(model, inner if self.layers is None else self.layers)))
        numbers = between_schedules(lambda whole: [whole] * len(layers), tokens)
        return dict(zip(layers, numbers, strict=True))

    def strengths(self, model: nn.Module) -> tuple[float, float]:
        return 0, patch_count(model)

    def counts(self, model: nn.Module, strength: float) -> tuple[Count, ...]:
        merging = self.merging(model, strength)
        return counts_between(model, lambda block, n: n - min(merging.get(block, 0), n // 2))


class WeightedMerge(nn.Module):
    """The token step: x (B, n, D) -> prefix, what is left of A, B with what merged into it, inserted tokens."""

    def __init__(self, tokens: int, prefix: int, power: float):
        super().__init__()
        self.tokens, self.prefix, self.power = tokens, prefix, power

    def forward(self, x: Tensor, state: TokenState, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, TokenState]:
        prefix, end = self.prefix, split(x, state)[0].shape[1]
        merging = min(self.tokens, (end - prefix) // 2)
        if merging == 0:
            return x, state
        with torch.autocast(x.device.type, enabled=False):  # half precision cannot tell similar keys apart
            q, k, _ = qkv
            attention = class_attention(q, k, state.sizes)[:, prefix:end]
            pairs = best_pairs(-costs(k[:, :, prefix:end], attention, self.power), merging)
        return merged(x, state, pairs, prefix, proportional=True)


def costs(keys: Tensor, attention: Tensor, power: float) -> Tensor:
    """What merging costs, (B, |A|, |B|), of patches with keys (B, H, n, K) and the class token's attention (B, n)."""
    keys = F.normalize(keys.to(wide(keys)).transpose(1, 2).flatten(2), dim=-1)  # (B, n, H K)
    apart = 1 - keys[:, 1::2] @ keys[:, ::2].mT
    return apart * (attention[:, 1::2, None] + attention[:, None, ::2]) ** power
