"""Which token stands for which place: state that travels with the tokens, and the way back to the picture.

Tokens lie in the order `prefix, patches, inserted`. Steps may merge or drop tokens (`reduce`; the
`Assignment` then says what became of the original ones) and may append tokens at the end (`insert`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreous.base.errors import MaskError


@dataclass(frozen=True)
class Assignment:
    """From N original tokens (places) to n present ones: exactly one of `index` and `weights`.

    index: (B, N) int64, the present token that stands for each place, -1 for none (hard reducers).
    weights: (B, n, N), not negative, how much each place gives to each present token (soft ones).
    tokens: n of an index. dropped: whether some places may have no token, known without reading it.
    single: whether no two places have one token, known likewise.
    """

    index: Tensor | None = None
    weights: Tensor | None = None
    tokens: int | None = None
    dropped: bool = False
    single: bool = False

    @classmethod
    def keeping(cls, top: Tensor, patches: int, prefix: int, *, fused: bool = False) -> Assignment:
        """The prefix tokens stay, and of the patches those of index top (B, m), in that order.

        The others have no token, or, fused, one together behind them.
        """
        b, count = top.shape
        rest = prefix + count
        place = torch.arange(rest, device=top.device).expand(b, -1)
        others = torch.full((b, patches), rest if fused else -1, device=top.device)
        index = torch.cat([place[:, :prefix], others.scatter(1, top, place[:, prefix:])], dim=1)  # (B, prefix + patches)
        return cls(index=index, tokens=rest + fused, dropped=not fused, single=not fused)

    @classmethod
    def mixing(cls, weights: Tensor, prefix: int) -> Assignment:
        """The prefix tokens stay, and n patches give to m tokens behind them by weights (B, m, n)."""
        m, n = weights.shape[1:]
        own = F.pad(torch.eye(prefix, dtype=weights.dtype, device=weights.device), (0, n, 0, m))
        return cls(weights=F.pad(weights, (prefix, 0, prefix, 0)) + own)

    @property
    def places(self) -> int:
        """N, the number of original tokens."""
        return self.index.shape[1] if self.weights is None else self.weights.shape[2]

    def as_weights(self, dtype: torch.dtype) -> Tensor:
        """(B, n, N): ones where an index points, or the weights."""
        if self.weights is not None:
            return self.weights.to(dtype)
        n = int(self.index.max()) + 1 if self.tokens is None else self.tokens
        return (self.index[:, None] == torch.arange(n, device=self.index.device)[:, None]).to(dtype)

    def then(self, other: Assignment) -> Assignment:
        """This reduction and a later one of its n tokens, as one: `restore` of both is `restore` of it.

        Soft weights are handed on in shares: what a token got of the places goes where the later step
        sends the token.
        """
        if self.weights is None and other.weights is None:
            index = take(other.index, self.index, absent=-1 if self.dropped else None)
            dropped, single = self.dropped or other.dropped, self.single and other.single
            return replace(other, index=index, dropped=dropped, single=single)
        dtype = (other.weights if self.weights is None else self.weights).dtype
        weights = normalized(other.as_weights(dtype), 1) @ self.as_weights(dtype)
        return Assignment(weights=weights, dropped=self.dropped or other.dropped)

    def restore(self, x: Tensor) -> Tensor:
        """Present tokens (B, n, D) -> (B, N, D): each place has its token, or the mean of its tokens; dropped ones 0."""
        if self.weights is None:
            return take(x, self.index, absent=0 if self.dropped else None)
        return normalized(self.weights, 1).mT.to(x.dtype) @ x

    def share(self, x: Tensor) -> Tensor:
        """Amounts of present tokens (B, n, D) -> (B, N, D): divided among the places of each, so that sums stay."""
        if self.weights is None:
            return self.restore(x / self.counts(x.shape[1])[..., None].clamp(min=1))
        return normalized(self.weights, 2).mT.to(x.dtype) @ x

    def counts(self, tokens: int) -> Tensor:
        """(B, n): how many places each of n tokens stands for."""
        if self.weights is not None:
            return normalized(self.weights, 1).sum(2)
        counts = self.index.new_zeros(len(self.index), 1 + tokens)
        return counts.scatter_add(1, self.index + 1, torch.ones_like(self.index))[:, 1:]

    def own_places(self, tokens: int) -> Tensor:
        """(B, n): the place of each of n tokens, none of which stands for two (`single`)."""
        return self.index.masked_fill(self.index < 0, tokens).argsort(1)[:, :tokens]

    def at(self, places: slice) -> Assignment:
        """The assignment of some of the places."""
        name = "index" if self.weights is None else "weights"
        return replace(self, **{name: getattr(self, name)[..., places]})

    def extended(self, tokens: int, more: int) -> Assignment:
        """With `more` tokens behind the n = `tokens` that are there, each in a place of its own."""
        if self.weights is not None:
            b, n, places = self.weights.shape
            weights = self.weights.new_zeros(b, n + more, places + more)
            weights[:, :n, :places] = self.weights
            weights[:, n:, places:] = torch.eye(more, dtype=weights.dtype, device=weights.device)
            return replace(self, weights=weights)
        own = torch.arange(tokens, tokens + more, device=self.index.device).expand(len(self.index), -1)
        return replace(self, index=torch.cat([self.index, own], dim=1), tokens=tokens + more)

    def gather(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Places (B, N, D) -> (B, n, D): the mean of each token's places, weighed by sizes (B, N) if given."""
        weights = self.as_weights(torch.promote_types(x.dtype, torch.float32))
        weights = weights if sizes is None else weights * sizes[:, None]
        return (normalized(weights, 2) @ x.to(weights.dtype)).to(x.dtype)

    def gather_pairs(self, values: Tensor) -> Tensor:
        """Of pairs of places, (H, N, N) or (B, H, N, N) -> (B, H, n, n): the mean over pairs.

        Those of a place of the one token with a place of the other.
        """
        share = normalized(self.as_weights(values.dtype), 2)[:, None]  # (B, 1, n, N)
        return share @ values @ share.mT


def normalized(weights: Tensor, dim: int) -> Tensor:
    """Weights divided by their sums along an axis; rows of zeros stay zeros."""
    total = weights.sum(dim, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


@dataclass(frozen=True)
class TokenState:
    """What a forward pass knows about its tokens beside their values. A step returns a new one.

    grid: places of one image, (H, W), or (T, H, W) and (D, H, W); None: this stream was not opened by
        the patch embedding.
    prefix: class, distillation and register tokens at the front, of an opened stream.
    groups: tokens per place, such as one for each channel; all places of the first group, then those
        of the second.
    groups_present: (G,) bool, which of G groups are there, where this pass leaves some out; `groups`
        of them are.
    assignment: from original to present tokens; None: each is itself.
    sizes: (B, n) how many original tokens each present one counts for in attention; None: one each.
        Inserted tokens count 1.
    read_out: one entry per inserted token, in order: True if the read-out at `norm` takes it in.
    rope: rotary positions of the patches, as the host's blocks take them; only where a stream is run
        in pieces.
    context: (B, M, D') tokens of another modality, for steps that ask for them.
    graph: (B, n, n) weights of edges between the n present original tokens, for steps that move tokens
        along them; row i holds what token i receives from each. A merged token has the mean over pairs.
    terms: (name, value per image (B,)) of penalties that depend on activations
        (see `hosts.stream_ends.collect_terms`).
    aside: the tokens before a reduction that a later step takes back (`reduce`, `take_back`).
    """

    grid: tuple[int, ...] | None = None
    prefix: int = 0
    groups: int = 1
    groups_present: Tensor | None = None
    assignment: Assignment | None = None
    sizes: Tensor | None = None
    read_out: tuple[bool, ...] = ()
    rope: Tensor | None = None
    context: Tensor | None = None
    graph: Tensor | None = None
    terms: tuple[tuple[str, Tensor], ...] = ()
    aside: Stream | None = None

    @property
    def inserted(self) -> int:
        """The number of inserted tokens; they stand at the end."""
        return len(self.read_out)

    @property
    def dropped(self) -> bool:
        """True if some places may have no token."""
        return self.assignment is not None and self.assignment.dropped

    @property
    def plain(self) -> bool:
        """True if every token is an original one in its own place."""
        return self.sizes is None and self.assignment is None and not self.read_out

    @property
    def empty(self) -> bool:
        """True if there is nothing to hand on: a plain tensor of tokens says the same."""
        bare = self.grid is None and self.context is None and self.graph is None and self.aside is None
        return self.plain and bare and len(self.terms) == 0


PLAIN = TokenState()


@dataclass(frozen=True)
class Stream:
    """Tokens with their state, as one block hands them to the next: x (B, n, D).

    To code that expects a tensor of tokens (timm's `forward_intermediates` slices and reshapes block outputs) it answers
    with `tokens()`: one token per original place, so feature maps keep their shape.
    """

    x: Tensor
    state: TokenState

    def tokens(self) -> Tensor:
        """(B, N, D): for every original token the one that stands for it; inserted ones left out.

        Places of groups that this pass leaves out are 0, so that the shape does not depend on chance.
        """
        tokens, present, prefix = restore(self.x, self.state)[0], self.state.groups_present, self.state.prefix
        if present is None:
            return tokens
        patches = tokens[:, prefix:].unflatten(1, (self.state.groups, -1))  # (B, groups, N / groups, D)
        every = patches.new_zeros(patches.shape[0], len(present), *patches.shape[2:]).index_copy(
            1, present.nonzero().squeeze(1), patches
        )
        return torch.cat([tokens[:, :prefix], every.flatten(1, 2)], dim=1)

    def __getitem__(self, index) -> Tensor:
        return self.tokens()[index]

    def reshape(self, *shape) -> Tensor:
        return self.tokens().reshape(*shape)

    @property
    def shape(self) -> torch.Size:
        return self.tokens().shape


def opened(x: Any) -> tuple[Tensor, TokenState]:
    """Tokens and state of whatever holds both (`Stream`, `hosts.stream_ends.Opening`); a tensor opens a fresh state."""
    return (x, PLAIN) if isinstance(x, Tensor) else (x.x, x.state)


def insert(x: Tensor, state: TokenState, tokens: Tensor, *, read_out: bool) -> tuple[Tensor, TokenState]:
    """Append tokens (B, m, D) at the end of x (B, n, D); `read_out`: the read-out at `norm` takes them in."""
    m = tokens.shape[1]
    sizes = state.sizes
    if sizes is not None:
        sizes = torch.cat([sizes, sizes.new_ones(sizes.shape[0], m)], dim=1)
    x = torch.cat([x, tokens.to(x.dtype)], dim=1)  # (B, n + m, D)
    return x, replace(state, sizes=sizes, read_out=state.read_out + (read_out,) * m)


def reduce(
    x: Tensor,
    state: TokenState,
    step: Assignment,
    sizes: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    aside: bool = False,
) -> tuple[Tensor, TokenState]:
    """Merge or drop present original tokens of x (B, n + m, D); the m inserted ones stay as they are.

    step: from the n to n' tokens. sizes: (B, n') of these from now on; None: one each.
    tokens: (B, n', D), where an idea has a formula of its own; None: `step.gather` of them, by size.
    aside: keep the n tokens for a later `take_back`.
    """
    before = Stream(x, state) if aside else state.aside
    original, inserted = split(x, state)
    n = original.shape[1]
    if tokens is None:
        tokens = step.gather(original, None if state.sizes is None else state.sizes[:, :n])
    if sizes is not None:
        later = sizes.new_ones(*inserted.shape[:2]) if state.sizes is None else state.sizes[:, n:]
        sizes = torch.cat([sizes, later], dim=1)
    assignment = step if state.assignment is None else state.assignment.then(step)
    joined = torch.cat([tokens, inserted], dim=1) if state.inserted else tokens
    graph = None if state.graph is None else step.gather_pairs(state.graph[:, None])[:, 0]
    return joined, replace(state, assignment=assignment, sizes=sizes, graph=graph, aside=before)


def take_back(x: Tensor, state: TokenState, tokens: Tensor) -> tuple[Tensor, TokenState]:
    """Undo the latest reduction that put its tokens aside, and all later ones; what was inserted since then stays.

    tokens: (B, n, D), the values that these n tokens have from now on. `state.aside` is not None.
    """
    inserted, before = split(x, state)[1], state.aside.state
    sizes = before.sizes
    if sizes is not None:
        own = sizes[:, : tokens.shape[1]]
        sizes = torch.cat([own, own.new_ones(len(own), inserted.shape[1])], dim=1)
    later = replace(state, assignment=before.assignment, sizes=sizes, graph=before.graph, aside=before.aside)
    return torch.cat([tokens, inserted], dim=1), later


def take(values: Tensor, index: Tensor, *, absent: int | None = None) -> Tensor:
    """values (B, n) or (B, n, D) at index (B, m); absent: what stands where the index is -1, None if it never is."""
    place = index if absent is None else index.clamp(min=0)
    if values.ndim == 2:
        out = values.gather(1, place)
    else:  # whole rows of one table: on a CPU some 15 times as fast as `gather`, which takes number after number
        b, n, _ = values.shape
        rows = place + n * torch.arange(b, device=index.device)[:, None]
        out = values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
        index = index[..., None]
    return out if absent is None else out.masked_fill(index < 0, absent)


def split(x: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:
    """x (B, n, D) as (present original tokens, inserted tokens)."""
    keep = x.shape[1] - state.inserted
    return x[:, :keep], x[:, keep:]


def restore(x: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:
    """x (B, n, D) as (one token per original place (B, N, D), inserted tokens (B, m, D)); dropped places are 0."""
    original, inserted = split(x, state)
    return original if state.assignment is None else state.assignment.restore(original), inserted


def check_places(state: TokenState, tokens: int, mechanism: str) -> None:
    """Raise MaskError if the places of so many present tokens are not known."""
    if state.grid is None:
        present = tokens - state.inserted
        original = present if state.assignment is None else state.assignment.places
        raise MaskError(
            f"Found {original} tokens whose places in the images are not known. Expected a token for each place. Switch "
            f"off what drops patches before the blocks (patch_drop_rate), or take {mechanism} out (vitreous.ungraft)."
        )


def present_pairs(pairs: Tensor, state: TokenState, other: float) -> Tensor:
    """Values of pairs of patches, (H, N, N) or (B, H, N, N), for the n present tokens.

    (H, n, n) or (B, H, n, n). other: the value where one of the two is a prefix or an inserted
    token. A merged token has the mean over its places.
    """
    pairs = F.pad(pairs, (state.prefix, 0, state.prefix, 0), value=other)
    if state.assignment is not None:
        pairs = state.assignment.gather_pairs(pairs)
    return F.pad(pairs, (0, state.inserted, 0, state.inserted), value=other)


def to_grid(value: Tensor, state: TokenState, grid: tuple[int, int], prefix: int) -> Tensor:
    """A value per present token, (B, n) or (B, n, C), as a picture (B, H, W) or (B, H, W, C).

    grid: (H, W) in patches, from the caller (`patch_embed.dynamic_feat_size`); prefix: class and register tokens.
    Raises ValueError if the restored patches do not fill the grid.
    """
    flat = value if value.ndim == 3 else value[..., None]
    patches = restore(flat, state)[0][:, prefix:]
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{patches.shape[1]} patches do not fill a grid of {grid[0]} x {grid[1]}. Expected H * W patches after "
            f"{prefix} prefix tokens. Take the grid from model.patch_embed.dynamic_feat_size(image size)."
        )
    picture = patches.unflatten(1, grid)
    return picture if value.ndim == 3 else picture[..., 0]


# A lone block that hands on a Stream can be exported, too.
torch.export.register_dataclass(Assignment)
torch.export.register_dataclass(TokenState)
torch.export.register_dataclass(Stream)
