"""Which token speaks for which place: state that travels with the tokens, and the way back to the picture.

Tokens lie in the order `prefix, patches, inserted`. Steps may merge or drop tokens (then `sizes` and `source` say what
became of the original ones) and may append tokens at the end (then `read_out` has one entry for each).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenState:
    """What a forward pass knows about its tokens beside their values. A step returns a new one.

    sizes:  (B, n) how many original tokens each present one stands for; None: one each. Inserted tokens count 1.
    source: (B, N) for each of the N original tokens, the index of the present one that speaks for it; -1: it was dropped,
        and none does; None: itself.
    read_out: one entry per inserted token, in order: True if the read-out at `norm` takes it in.
    dropped: True if some places may have no token (-1 in source).
    grid: places of one image, (H, W), or (T, H, W) and (D, H, W); None: this stream was not opened by the patch embedding.
    prefix: class, distillation and register tokens at the front, of an opened stream.
    groups: tokens per place, such as one for each channel; all places of the first group, then those of the second.
    groups_present: (G,) bool, which of G groups are there, where this pass leaves some out; `groups` of them are.
    rope: rotary positions of the patches, as the host's blocks take them; only where a stream is run in pieces.
    context: (B, M, D') tokens of another modality, for steps that ask for them.
    terms: (name, value per image (B,)) of penalties that depend on activations (see `hosts.stream_ends.collect_terms`).
    """

    sizes: Tensor | None = None
    source: Tensor | None = None
    read_out: tuple[bool, ...] = ()
    dropped: bool = False
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    groups: int = 1
    groups_present: Tensor | None = None
    rope: Tensor | None = None
    context: Tensor | None = None
    terms: tuple[tuple[str, Tensor], ...] = ()

    @property
    def inserted(self) -> int:
        """The number of inserted tokens; they stand at the end."""
        return len(self.read_out)

    @property
    def plain(self) -> bool:
        """True if every token is an original one in its own place."""
        return self.sizes is None and self.source is None and not self.read_out

    @property
    def empty(self) -> bool:
        """True if there is nothing to hand on: a plain tensor of tokens says the same."""
        return self.plain and self.grid is None and self.context is None and not self.terms


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
        """(B, N, D): for every original token the one that speaks for it; inserted ones left out.

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


def follow(state: TokenState, to: Tensor, sizes: Tensor | None, *, dropped: bool = False) -> TokenState:
    """The state after a step that merged or dropped present original tokens; inserted ones stay as they are.

    to: (B, n) for each of the n, the index of the one that speaks for it from now on; if `dropped`, also -1 for none.
    sizes: (B, n' + inserted) of the tokens that are left; None: one each.
    """
    if state.source is not None:
        to = take(to, state.source, absent=-1 if state.dropped else None)  # (B, N)
    return replace(state, source=to, sizes=sizes, dropped=state.dropped or dropped)


def take(values: Tensor, index: Tensor, *, absent: int | None = None) -> Tensor:
    """values (B, n) or (B, n, D) at index (B, m); absent: what stands where the index is -1, None if it never is."""
    if values.ndim == 3:
        index = index[..., None].expand(-1, -1, values.shape[-1])
    if absent is None:
        return values.gather(1, index)
    return values.gather(1, index.clamp(min=0)).masked_fill(index < 0, absent)


def split(x: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:
    """x (B, n, D) as (present original tokens, inserted tokens)."""
    keep = x.shape[1] - state.inserted
    return x[:, :keep], x[:, keep:]


def restore(x: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:
    """x (B, n, D) as (one token per original place (B, N, D), inserted tokens (B, m, D)); dropped places are 0."""
    original, inserted = split(x, state)
    if state.source is not None:
        original = take(original, state.source, absent=0 if state.dropped else None)
    return original, inserted


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
torch.export.register_dataclass(TokenState)
torch.export.register_dataclass(Stream)
