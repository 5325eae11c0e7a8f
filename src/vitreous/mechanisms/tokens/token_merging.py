"""Token merging: in every block the most similar patches become one, and count for as many as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.token_counts import Count, patch_count
from vitreous.layers.matching import Pairs, best_pairs, merged, wide
from vitreous.layers.stream import TokenState, split
from vitreous.reducer import Reducer, between_schedules, counts_between


@dataclass(frozen=True, kw_only=True)
class TokenMerging(Reducer):
    """Between attention and MLP the most similar pairs of patches merge, by bipartite soft matching.

        A = every second patch, B = the others;  for each i in A the most similar j in B by cosine of keys, mean over heads
        the `tokens` pairs of greatest similarity merge:  x_j <- (s_j x_j + sum_i s_i x_i) / s,   s = s_j + sum_i s_i
        attention behind it: softmax(q k^T / sqrt(K) + log s), so that a token of size s counts as s tokens

    Paper: Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman 2022, arXiv 2210.09461 (section 3).
    Differs: register and inserted tokens are protected like the class token; A begins at the second patch, and what is left
        of A stands before B in its old order. A head that pools sees every place, so its mean weighs tokens by size.
    At start: changes the output; tokens=0 leaves it bit for bit.
    Cost: a product of n/2 x n/2 x K per chosen block, `tokens` fewer tokens behind each. No parameters.
    Settings: tokens: how many patches merge away per block, 0 or more, at most half of those present. macs: share of the
        host's multiply-adds in the blocks; it then decides tokens, and the first blocks may merge one more than the
        others. inflection: -1 to 1, how tokens changes from the first chosen block to the last, with the same sum: -1
        falls from 2 * tokens to 0, 0 is constant, 1 rises from 0 to 2 * tokens (the r and inflection of the authors'
        code, rounded down as there). proportional: count tokens by their size in attention; merged tokens are weighted
        means either way. layers (0-based; default all).
    Raises: HostError on rotary hosts and where halves of a block or its attention are not known; SettingError.
    """

    paper: ClassVar[str] = "Bolya et al. 2022, arXiv 2210.09461"
    requires: ClassVar[tuple[str, ...]] = ("stream", "remove", "attention", "halves")
    solves: ClassVar[str] = "tokens"
    examples: ClassVar[tuple[str, ...]] = (
        "token_merging:tokens=0",
        "token_merging:tokens=3,layers=0+2",
        "token_merging:tokens=2,inflection=-1.0,proportional=false",
        "token_merging:macs=0.7",
    )

    tokens: int = 8
    inflection: float = 0.0
    proportional: bool = True
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 0:
            raise SettingError(
                f"Found tokens={self.tokens}. Expected how many patches merge away per block, 0 or more. Give such a number."
            )
        if not -1 <= self.inflection <= 1:
            raise SettingError(
                f"Found inflection={self.inflection}. Expected -1 (falling) to 1 (rising); 0 is constant. Give such a number."
            )

    @property
    def exact_at_init(self) -> bool:
        return self.tokens == 0 if self.macs is None else self.macs == 1

    def changes(self, model: nn.Module) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for i, tokens in self.merging(model, self.strength(model)).items():
            changes |= slots.add_step(model, i, "between", Merge(tokens, slots.prefix(model), self.proportional))
        return changes

    def merging(self, model: nn.Module, tokens: float) -> dict[int, int]:
        """{block: patches that merge away there, if there are twice as many}."""
        layers = sorted(set(slots.layer_indices(model, self.layers)))
        numbers = between_schedules(lambda whole: schedule(whole, self.inflection, len(layers)), tokens)
        return dict(zip(layers, numbers, strict=True))

    def strengths(self, model: nn.Module) -> tuple[float, float]:
        return 0, patch_count(model)

    def counts(self, model: nn.Module, strength: float) -> tuple[Count, ...]:
        merging = self.merging(model, strength)
        return counts_between(model, lambda block, n: n - min(merging.get(block, 0), n // 2))


def schedule(tokens: int, inflection: float, blocks: int) -> list[int]:
    """How many patches merge away in each block: a line from tokens (1 - inflection) to tokens (1 + inflection)."""
    first = int(tokens * (1 - inflection))
    step = (2 * tokens - 2 * first) / max(1, blocks - 1)
    return [int(first + step * i) for i in range(blocks)]


class Merge(nn.Module):
    """The token step: x (B, n, D) -> prefix, what is left of A, B with what merged into it, inserted tokens.

    proportional: hand on sizes, which attention counts by; else they are counted anew from where places went.
    """

    def __init__(self, tokens: int, prefix: int, proportional: bool = True):
        super().__init__()
        self.tokens, self.prefix, self.proportional = tokens, prefix, proportional

    def forward(self, x: Tensor, state: TokenState, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, TokenState]:
        prefix, end = self.prefix, split(x, state)[0].shape[1]
        merging = min(self.tokens, (end - prefix) // 2)
        if merging == 0:
            return x, state
        with torch.autocast(x.device.type, enabled=False):  # half precision cannot tell similar keys apart
            pairs = match(qkv[1][:, :, prefix:end], merging)
        return merged(x, state, pairs, prefix, self.proportional)


def match(keys: Tensor, merging: int) -> Pairs:
    """Bipartite soft matching on keys (B, H, n, K): those whose keys, mean over heads, have the greatest cosine."""
    keys = F.normalize(keys.to(wide(keys)).mean(1), dim=-1)  # (B, n, K)
    return best_pairs(keys[:, 1::2] @ keys[:, ::2].transpose(1, 2), merging)
