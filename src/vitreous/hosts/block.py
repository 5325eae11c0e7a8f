"""A host block with stations for token steps.

Every path by which timm reaches its blocks (the sequence, one by one with a mask, checkpointed, sliced, for
intermediates) calls the block itself, so this is where steps can live without a path that misses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from vitreous.base.errors import GraftError, HostError, MaskError
from vitreous.layers.adoption import adopt
from vitreous.layers.stream import Stream, TokenState, opened

STATIONS = ("before", "between", "after")


class Block(nn.Module):
    """The host's block: its own forward on its own children, with steps before, between attention and MLP, and after.

    A step is a module `(x (B, n, D), state, qkv) -> (x, state)`. At `between`, qkv = (q, k, v), (B, H, n, K) each, with q
    scaled such that the scores are q k^T; elsewhere it is None.
    Subclasses may override `attention_half`, `attention_step` or `mlp_half`. As long as none is overridden and nothing
    stands at `between`, the host's forward runs as it is written, whatever the block family.
    """

    host: type[nn.Module]

    @classmethod
    def of(cls, block: nn.Module) -> Block:
        """A block of this class with the children and, if it is one of ours already, the stations of `block`."""
        new = adopt(cls, block)
        if not isinstance(block, Block):
            new.host = type(block)
        for name in STATIONS:
            # A list of its own for the new block: the displaced one must not see what is added later.
            if name in new._modules:
                new._modules[name] = nn.ModuleList(new._modules[name])
        return new

    def add_step(self, station: str, step: nn.Module) -> None:
        """Append a step at a station ("before", "between", "after").

        Raises GraftError where one at "between" ends the patches (`ends_patches`) and another stands
        behind the block, which would read none.
        """
        ending = [step, *self.steps("between")] if station != "before" else []
        if any(getattr(one, "ends_patches", False) for one in ending) and (station == "after" or self.steps("after")):
            raise GraftError(
                "Found a step behind a block in which the patches end (class_query), where it would work on none. Expected it "
                "in an earlier block. Choose such a block, or take the other graft out first (vitreous.ungraft)."
            )
        if station not in self._modules:
            self.add_module(station, nn.ModuleList())
        self._modules[station].append(step)

    def steps(self, station: str) -> Any:
        return self._modules.get(station) or ()

    @property
    def splits_halves(self) -> bool:
        """True if the two halves have to be run apart."""
        own = type(self)
        overrides = own.attention_half is not Block.attention_half or own.mlp_half is not Block.mlp_half
        return bool(self.steps("between")) or overrides or own.merges_within()

    @classmethod
    def merges_within(cls) -> bool:
        """True if the first half may merge tokens: queries and keys are not those of the tokens behind it."""
        return cls.attention_step is not Block.attention_step

    def needs_state(self, state: TokenState) -> bool:
        """True if the attention depends on the places of tokens; raises HostError if it cannot be handed the state."""
        wanted = not state.empty and getattr(getattr(self, "attn", None), "wants_state", False)
        if wanted:
            check_halves(self, "The block around this attention")
        return wanted

    def forward(
        self, x: Tensor | Stream, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor | Stream:
        x, state = opened(x)
        for step in self.steps("before"):
            x, state = step(x, state, None)
        mask = token_mask(state, attn_mask, is_causal, x)
        arguments = {"attn_mask": mask, "is_causal": is_causal} | ({} if rope is None else {"rope": rope})
        needs_state = self.needs_state(state)
        penalized = needs_state and torch.is_grad_enabled() and getattr(self.attn, "has_terms", False)
        if self.splits_halves or needs_state:
            # Queries and keys go into a list, since attention's own output is what hooks on it should see.
            seen: list[tuple[Tensor, Tensor, Tensor] | Tensor] = []
            arguments |= {"seen": seen} if self.steps("between") or penalized else {}
            arguments |= {"state": state} if needs_state else {}
            x, state = self.attention_step(x, state, arguments)
            if penalized:
                state = replace(state, terms=(*state.terms, *self.attn.terms(*seen[0], state)))
            for step in self.steps("between"):
                x, state = step(x, state, for_steps(self.attn, seen[0]))
            token_mask(state, attn_mask, is_causal, x)  # raises: a step that changed the tokens knew of no mask
            x = self.mlp_half(x)
        else:
            x = self.host.forward(self, x, **arguments)
        for step in self.steps("after"):
            x, state = step(x, state, None)
        return x if state.empty else Stream(x, state)

    def attention_step(self, x: Tensor, state: TokenState, arguments: dict[str, Any]) -> tuple[Tensor, TokenState]:
        """The first half and the state behind it; a subclass may merge tokens within it.

        x: (B, n, D). arguments: of `attn`, the mask among them.
        """
        return self.attention_half(x, **arguments), state

    def attention_half(self, x: Tensor, **arguments: Any) -> Tensor:
        """The first half: x (B, n, D) -> x plus attention; arguments: of `attn`.

        `attn` has to be one of ours only where arguments ask for it (`state`, `seen`).
        """
        return halves_of(self).attention(self, x, **arguments)

    def mlp_half(self, x: Tensor) -> Tensor:
        """The second half: x (B, n, D) -> x plus MLP."""
        return halves_of(self).mlp(self, x)


def for_steps(attn: nn.Module, seen: Any) -> Any:
    """What a step at "between" gets: q (scaled), k, v of an attention, or the output (B, n, D) of a mixer."""
    return seen if isinstance(seen, Tensor) else (seen[0] * attn.scale, *seen[1:])


@dataclass(frozen=True)
class Halves:
    """How the two halves of a block are run on its children; the one after the other is the block, bit for bit.

    attention: (block, x (B, n, D), **what `attn` takes) -> x plus attention. mlp: (block, x) -> x plus MLP.
    attention_input: (block, x) -> what `attn` gets of x; None: not known.
    """

    attention: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    attention_input: Callable[..., Tensor] | None = None


def normed_before(block: nn.Module, x: Tensor) -> Tensor:
    """What the attention of a pre-norm block gets of x."""
    return block.norm1(x)


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


POST_NORM = Halves(
    lambda block, x, **arguments: x + block.drop_path1(block.norm1(block.attn(x, **arguments))),
    lambda block, x: x + block.drop_path2(block.norm2(block.mlp(x))),
    lambda block, x: x,
)
HALVES: dict[type[nn.Module], Halves] = {
    TimmBlock: Halves(
        lambda block, x, **arguments: x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **arguments))),
        lambda block, x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))),
        normed_before,
    ),
    EvaBlock: Halves(
        lambda block, x, **arguments: x + block.drop_path1(scaled(block.attn(block.norm1(x), **arguments), block.gamma_1)),
        lambda block, x: x + block.drop_path2(scaled(block.mlp(block.norm2(x)), block.gamma_2)),
        normed_before,
    ),
    ResPostBlock: POST_NORM,
    EvaBlockPostNorm: POST_NORM,
}


def halves_of(block: nn.Module) -> Halves | None:
    """The halves of a block, adopted or not: the methods `attention_half` and `mlp_half` of its class, else `HALVES`."""
    host = block.host if isinstance(block, Block) else type(block)
    if hasattr(host, "attention_half") and hasattr(host, "mlp_half"):
        return Halves(host.attention_half, host.mlp_half)
    return HALVES.get(host)


def check_halves(block: nn.Module, path: str) -> None:
    """Raise HostError if the two halves of this block are not known to us."""
    if halves_of(block) is None:
        host = block.host if isinstance(block, Block) else type(block)
        known = ", ".join(cls.__name__ for cls in HALVES)
        raise HostError(
            f"{path} is a {host.__name__}, whose attention and MLP halves cannot be run apart. Expected one of {known}, or a "
            "block with the methods attention_half and mlp_half. Use a mechanism that stands before or after the block, or "
            "another host."
        )


def check_between(block: nn.Module, path: str) -> None:
    """Raise GraftError if a step between the halves would not get queries and keys of the tokens that it sees."""
    if not isinstance(block, Block):
        return
    if present := block.steps("between"):
        raise GraftError(
            f"{path} already holds {type(present[0]).__name__} between attention and MLP, which may change the tokens; "
            "a second step there would get queries and keys of tokens that are gone. Expected one step there. Choose other "
            "layers, or take the other graft out first (vitreous.ungraft)."
        )
    if block.merges_within():
        raise GraftError(
            f"{path} is already of class {type(block).__name__}, which merges tokens within its first half; a step behind that "
            "would get queries and keys of tokens that are gone. Expected a block that leaves its tokens. Choose other layers, "
            "or take the other graft out first (vitreous.ungraft)."
        )


def check_within(block: nn.Module, cls: type[Block], path: str) -> None:
    """Raise if this block cannot become a `cls` that merges tokens within its first half.

    HostError where it is not known what attention gets of the block's input, GraftError where a step
    between the halves reads queries and keys.
    """
    if not cls.merges_within():
        return
    if halves_of(block).attention_input is None:
        host = block.host if isinstance(block, Block) else type(block)
        known = ", ".join(cls.__name__ for cls, halves in HALVES.items() if halves.attention_input)
        raise HostError(
            f"{path} is a {host.__name__}, of which it is not known what its attention gets of the block's input. Expected one "
            f"of {known}. Use a mechanism that merges tokens behind attention, such as token_merging, or another host."
        )
    if isinstance(block, Block) and (present := block.steps("between")):
        raise GraftError(
            f"{path} already holds {type(present[0]).__name__} between attention and MLP, which reads queries and keys of "
            f"tokens that {cls.__name__} would merge before. Expected no step there. Choose other layers, or take the other "
            "graft out first (vitreous.ungraft)."
        )


def token_mask(state: TokenState, attn_mask: Tensor | None, is_causal: bool, x: Tensor) -> Tensor | None:
    """The mask that attention gets: the caller's on plain tokens; log sizes (B, 1, 1, n) where tokens were merged.

    A token that stands for s places counts s times in the softmax: exp(score + log s) = s exp(score).
    Raises MaskError for a caller's mask, or causal attention, on tokens that were inserted or merged.
    """
    if state.plain:
        return attn_mask
    if attn_mask is not None or is_causal:
        what = "is_causal=True" if is_causal else f"attn_mask of shape {tuple(attn_mask.shape)}"
        raise MaskError(
            f"Found {what}, but the {x.shape[1]} tokens here hold {state.inserted} inserted ones"
            + ("" if state.assignment is None else " and some were merged or dropped")
            + ". A mask is made for the original tokens and says nothing about these. "
            "Call the model without a mask, or take the token graft out first (vitreous.ungraft)."
        )
    return None if state.sizes is None else state.sizes.log().to(x.dtype)[:, None, None, :]
