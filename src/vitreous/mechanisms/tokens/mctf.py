"""Multi-criteria token fusion: patches merge before a block attends, by similarity, attention and size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.attention import Attention, masked
from vitreous.hosts.block import Block, halves_of, token_mask
from vitreous.hosts.token_counts import Count, patch_count
from vitreous.layers.stream import PLAIN, Assignment, TokenState, reduce, split, take
from vitreous.reducer import Reducer, between_schedules

LEAST = 10  # tokens that stay, prefix included, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class MCTF(Reducer):
    """Before a block attends, patches fuse that are alike, receive little attention and are small.

        W_ij = ((cos(x_i, x_j) + 1) / 2)^(1/tau_1) (I_i I_j)^(1/tau_2) (S_i S_j)^(1/tau_3)
            i in A, j in B, alternate patches;  I = 1 / a, a_j = mean over heads and queries of A_ij;  S = 1 / s, s the size
        the tokens/2 of A of greatest W join their best of B, then as many of B their best of what is left of A (same W)
        x_g <- sum_j a_j s_j x_j / sum_j a_j s_j,   s_g <- sum_j s_j              over the tokens j of group g
        A = softmax(q k^T / sqrt(K) + log s) of the tokens before, in the block that fuses them (one-step-ahead attention)
        z_g = sum_{i in g} r_i sum_j A_ij v_g(j),   r = a s / sum a s             with v of the tokens after

    Paper: Lee, Choi, Kim 2024, arXiv 2403.10030 (equations 3 to 9).
    Differs: the attention between groups, columns summed and rows averaged, is not written out: A weighs the values of
        each token's group and rows are averaged behind it, the same by associativity. Registers and inserted tokens are
        protected like the class token. The loss of training that compares class tokens is left to the run.
    At start: changes the output; tokens=0 leaves it bit for bit.
    Cost: a product of n/2 x n/2 x D and an attention that is written out per chosen block, fewer tokens from its values
        on. No parameters.
    Settings: tokens: how many patches fuse away per block; at most half of them, and 10 tokens stay. ratio: if given, that
        share of the patches in place of `tokens`. macs: share of the host's multiply-adds in the blocks, which then
        decides tokens; the first blocks may fuse one more than the others. tau: temperatures of similarity, attention
        received and size; 0 leaves a criterion out. both_ways: false merges A into B alone. pooling: "attention", or
        "size", which weighs by size alone. precise: compute attention anew on the fused tokens. layers (0-based;
        default all but the first).
    Raises: HostError on rotary hosts and where halves of a block or its attention are not known; GraftError where another
        mechanism changed attention or a half of the block; SettingError.
    """

    paper: ClassVar[str] = "Lee et al. 2024, arXiv 2403.10030"
    requires: ClassVar[tuple[str, ...]] = ("stream", "remove", "attention", "halves")
    solves: ClassVar[str] = "tokens"
    examples: ClassVar[tuple[str, ...]] = (
        "mctf:tokens=0",
        "mctf:tokens=5,layers=0+2,precise=true",
        "mctf:macs=0.9",
        "mctf:tokens=3,both_ways=false,tau=1.0+0.0+0.0,pooling=size",
    )

    tokens: int = 16
    ratio: float | None = None
    tau: tuple[float, float, float] = (1.0, 20.0, 40.0)
    both_ways: bool = True
    pooling: Literal["attention", "size"] = "attention"
    precise: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 0:
            raise SettingError(
                f"Found tokens={self.tokens}. Expected how many patches fuse away per block, 0 or more. Give such a number."
            )
        if self.ratio is not None and not 0 < self.ratio <= 0.5:
            raise SettingError(
                f"Found ratio={self.ratio}. Expected a share above 0, up to 0.5: at most half of the patches can fuse away. "
                "Give such a share, or tokens."
            )
        if self.ratio is not None and self.macs is not None:
            raise SettingError(
                f"Found macs={self.macs} and ratio={self.ratio}. Expected one of the two, since macs decides how many patches "
                "fuse. Leave ratio or macs out."
            )
        if len(self.tau) != 3 or min(self.tau) < 0:
            raise SettingError(
                f"Found tau={'+'.join(map(str, self.tau))}. Expected three temperatures, of similarity, attention and size, "
                "each 0 (off) or more. Give for example tau=1.0+20.0+40.0."
            )

    @property
    def exact_at_init(self) -> bool:
        return self.macs == 1 if self.macs is not None else self.tokens == 0 and self.ratio is None

    def changes(self, model: nn.Module) -> dict[str, Any]:
        slots.check_checkpointing()
        fusing, depth = self.fusing(model, self.strength(model)), slots.depth(model)
        # The blocks behind the first one that fuses hand on what it leaves.
        behind = range(min(fusing, default=depth), depth)
        changes: dict[str, Any] = {
            f"blocks.{i}": Block.of(model.blocks[i]) for i in behind if not isinstance(model.blocks[i], Block)
        }
        for i, settings in fusing.items():
            changes[f"blocks.{i}"] = block = slots.block_of(model, i, FusingBlock)
            block.settings, block.prefix = settings, slots.prefix(model)
            changes[f"blocks.{i}.attn"] = AheadAttention.of(slots.plain_attention(model, i, self.name))
        return changes | slots.stream_end(model)

    def fusing(self, model: nn.Module, tokens: float) -> dict[int, MCTF]:
        """{block: settings with its own number of tokens}."""
        depth = slots.depth(model)
        chosen = range(min(1, depth - 1), depth) if self.layers is None else self.layers
        layers = sorted(set(slots.layer_indices(model, chosen)))
        numbers = between_schedules(lambda whole: [whole] * len(layers), tokens)
        return {i: replace(self, macs=None, tokens=number) for i, number in zip(layers, numbers, strict=True)}

    def strengths(self, model: nn.Module) -> tuple[float, float]:
        return 0, patch_count(model)

    def counts(self, model: nn.Module, strength: float) -> tuple[Count, ...]:
        fusing, prefix, n, counts = self.fusing(model, strength), slots.prefix(model), patch_count(model), []
        for i in range(slots.depth(model)):
            n -= fusing[i].count(n, prefix) if i in fusing else 0
            counts.append(Count(prefix + n, prefix + n))
        return tuple(counts)

    def count(self, patches: int, prefix: int) -> int:
        """How many of so many patches fuse away."""
        wanted = self.tokens if self.ratio is None else int(patches * self.ratio)
        return max(0, min(wanted, patches // 2, prefix + patches - LEAST))


class FusingBlock(Block):
    """The host's block, which fuses tokens before it attends; with `settings` and `prefix`."""

    settings: MCTF
    prefix: int

    def attention_step(self, x: Tensor, state: TokenState, arguments: dict[str, Any]) -> tuple[Tensor, TokenState]:
        patches = slice(self.prefix, split(x, state)[0].shape[1])
        count = self.settings.count(patches.stop - patches.start, patches.start)
        if count == 0:
            return super().attention_step(x, state, arguments)
        weights = self.attn.weights(halves_of(self).attention_input(self, x), arguments["attn_mask"], state)
        groups, sizes = chosen(x, state, weights, patches, count, self.settings)
        fused, after = fuse(x, state, groups, sizes)
        if self.settings.precise:
            own = {"attn_mask": token_mask(after, None, False, fused), "is_causal": False, "state": after}
            return self.attention_half(fused, **arguments | own), after
        return self.attention_half(fused, state=state, weights=weights, groups=groups), after


class AheadAttention(Attention):
    """Plain attention whose map can be taken before the tokens that it will weigh are there."""

    def weights(self, x: Tensor, attn_mask: Tensor | None, state: TokenState) -> Tensor:
        """The map (B, H, n, n) of x (B, n, D), before dropout."""
        q, k = self.parts(x, 0, 2)
        return self.normalize(masked(self.scores(q, k, state), attn_mask, False), state)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        state: TokenState = PLAIN,
        seen: list[tuple[Tensor, Tensor, Tensor]] | None = None,
        weights: Tensor | None = None,
        groups: Groups | None = None,
    ) -> Tensor:
        """x (B, n, D) -> (B, n, D); with weights (B, H, n, n), x (B, m, D) of groups of n tokens -> (B, m, D)."""
        if weights is None:
            return super().forward(x, rope, attn_mask, is_causal, state, seen)
        (v,) = self.parts(x, 2, 3)
        heads = (v.shape[1], v.shape[3])
        # Every key has the value of its group: the product with columns summed over groups, and one that `look` verifies.
        values = take(v.transpose(1, 2).flatten(2), groups.index).unflatten(2, heads).transpose(1, 2)  # (B, H, n, K)
        z = groups.mean((self.attn_drop(weights) @ values).transpose(1, 2).flatten(2))  # (B, m, D)
        return self.merge(z.unflatten(2, heads).transpose(1, 2), x, state)


@dataclass(frozen=True)
class Groups:
    """Which of n tokens become one, and what each weighs in it.

    staying: (B, m) the tokens that stand for a group, in their new order. leaving: (B, r) those that
    join one. target: (B, r) which. weight: (B, n).
    """

    staying: Tensor
    leaving: Tensor
    target: Tensor
    weight: Tensor

    @property
    def index(self) -> Tensor:
        """(B, n): the group of each token."""
        position = torch.arange(self.staying.shape[1], device=self.target.device).expand_as(self.staying)
        index = torch.zeros_like(self.weight, dtype=torch.long).scatter(1, self.staying, position)
        return index.scatter(1, self.leaving, self.target)

    def joining(self, amounts: Tensor) -> Tensor:
        """amounts (B, n) of those that join: (B, m, r), 0 where they join another group."""
        position = torch.arange(self.staying.shape[1], device=self.target.device)
        return (self.target[:, None] == position[:, None]) * take(amounts, self.leaving)[:, None]

    def sum(self, amounts: Tensor) -> Tensor:
        """amounts (B, n) of tokens -> (B, m) of groups."""
        return take(amounts, self.staying) + self.joining(amounts).sum(2)

    def mean(self, y: Tensor) -> Tensor:
        """Tokens y (B, n, D) -> (B, m, D): weighted means; a token that nothing joins stays as it is."""
        with torch.autocast(y.device.type, enabled=False):
            total = self.sum(self.weight)[..., None]
            own = take(self.weight, self.staying)[..., None] / total
            joining = self.joining(self.weight) / total
            return (own * take(y, self.staying) + joining @ take(y, self.leaving).to(joining.dtype)).to(y.dtype)


def chosen(
    x: Tensor, state: TokenState, attention: Tensor, patches: slice, count: int, settings: MCTF
) -> tuple[Groups, Tensor]:
    """Groups of all tokens of x (B, n, D) after `count` of the patches joined others, and sizes (B, n) before.

    attention: (B, H, n, n). Prefix and inserted tokens are groups of their own.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    received = attention.detach().mean((1, 2), dtype=dtype)
    received = received.clamp(min=torch.finfo(dtype).tiny)  # a key that no query attends to
    sizes = torch.ones_like(received) if state.sizes is None else state.sizes
    with torch.autocast(x.device.type, enabled=False):  # half precision cannot tell similar tokens apart
        pairs = scores(x[:, patches].detach().to(dtype), received[:, patches], sizes[:, patches], settings)
    staying, leaving, target = match(pairs, count, settings.both_ways)
    every = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    first, last = every[:, : patches.start], every[:, patches.stop :]
    staying = torch.cat([first, patches.start + staying, last], dim=1)
    weight = received * sizes if settings.pooling == "attention" else sizes
    return Groups(staying, patches.start + leaving, patches.start + target, weight), sizes


def fuse(x: Tensor, state: TokenState, groups: Groups, sizes: Tensor) -> tuple[Tensor, TokenState]:
    """Tokens x (B, n, D) with sizes (B, n) as their groups, and the state of these."""
    original = slice(0, x.shape[1] - state.inserted)
    fused, sizes = groups.mean(x), groups.sum(sizes)
    stop = fused.shape[1] - state.inserted
    step = Assignment(index=groups.index[:, original], tokens=stop)
    return reduce(x, state, step, sizes[:, :stop], tokens=fused[:, :stop])


def scores(x: Tensor, received: Tensor, sizes: Tensor, settings: MCTF) -> Tensor:
    """log W (B, |A|, |B|) of patches x (B, n, D), A the second, fourth, ... and B the others.

    received: (B, n) attention of a patch, above 0. sizes: (B, n). The order is that of W, whose
    powers could vanish.
    """
    by_similarity, by_attention, by_size = settings.tau
    alone = torch.zeros_like(received)
    if by_attention > 0:
        alone = alone - received.log() / by_attention
    if by_size > 0:
        alone = alone - sizes.log() / by_size
    pairs = alone[:, 1::2, None] + alone[:, None, ::2]
    if by_similarity > 0:
        unit = F.normalize(x, dim=-1)
        half = (unit[:, 1::2] @ unit[:, ::2].mT + 1) / 2
        pairs = pairs + half.clamp(min=torch.finfo(half.dtype).tiny).log() / by_similarity
    return pairs


def match(pairs: Tensor, count: int, both_ways: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Who joins whom by scores (B, |A|, |B|), A being patches 1, 3, ... and B patches 0, 2, ...

    Returns (staying (B, n - count), leaving (B, count), target (B, count)): patches that stay, what is
    left of A first, in their new order; patches that leave; where in `staying` each of these goes.
    """
    to_b = count // 2 if both_ways else count
    to_a = count - to_b
    best, nearest = pairs.max(2)
    order = best.argsort(dim=1, descending=True)
    from_a, rest_a = order[:, :to_b], order[:, to_b:].sort(1).values
    place = torch.arange(pairs.shape[2], device=pairs.device).expand(pairs.shape[0], -1)  # of each of B
    from_b, rest_b, joined = place[:, :0], place, place[:, :0]
    if to_a > 0:
        left = pairs.gather(1, rest_a[..., None].expand(-1, -1, pairs.shape[2]))
        best, nearest_a = left.max(1)
        order = best.argsort(dim=1, descending=True)
        from_b, rest_b = order[:, :to_a], order[:, to_a:]
        joined = take(nearest_a, from_b)
        place = place.scatter(1, rest_b, place[:, : rest_b.shape[1]])
    # Where each of B is found: behind what is left of A, or in the one of A that it joins, with all that joined it before.
    place = (rest_a.shape[1] + place).scatter(1, from_b, joined)
    staying = torch.cat([2 * rest_a + 1, 2 * rest_b], dim=1)
    leaving = torch.cat([2 * from_a + 1, 2 * from_b], dim=1)
    return staying, leaving, torch.cat([take(place, take(nearest, from_a)), joined], dim=1)
