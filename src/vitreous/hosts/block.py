"""A host block with stations for token steps.

Every path by which timm reaches its blocks (the sequence, one by one with a mask, checkpointed, sliced, for
intermediates) calls the block itself, so this is where steps can live without a path that misses them.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from vitreous.base.errors import HostError, MaskError
from vitreous.hosts.attention import Attention
from vitreous.layers.adoption import adopt
from vitreous.layers.stream import PLAIN, Stream, TokenState, opened

STATIONS = ("before", "between", "after")


class Block(nn.Module):
    """The host's block: its own forward on its own children, with steps before, between attention and MLP, and after.

    A step is a module `(x (B, n, D), state, qkv) -> (x, state)`. At `between`, qkv = (q, k, v), (B, H, n, K) each, with q
    scaled such that the scores are q k^T; elsewhere it is None.
    Subclasses may override `attention_half` or `mlp_half`. As long as none is overridden and nothing
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
        """Append a step at a station ("before", "between", "after")."""
        if station not in self._modules:
            self.add_module(station, nn.ModuleList())
        self._modules[station].append(step)

    def steps(self, station: str) -> Any:
        return self._modules.get(station) or ()

    @property
    def splits_halves(self) -> bool:
        """True if the two halves have to be run apart."""
        own = type(self)
        return (
            bool(self.steps("between")) or own.attention_half is not Block.attention_half or own.mlp_half is not Block.mlp_half
        )

    def needs_state(self, state: TokenState) -> bool:
        """True if the attention has to be told which token speaks for which place; raises HostError if it cannot be."""
        attention = getattr(self, "attn", None)
        wanted = not state.plain and isinstance(attention, Attention) and not attention.softmax_of_product
        if wanted:
            check_halves(self, "The block around this attention")
        return wanted

    def forward(self, x: Tensor | Stream, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor | Stream:
        x, state = opened(x)
        for step in self.steps("before"):
            x, state = step(x, state, None)
        mask = token_mask(state, attn_mask, is_causal, x)
        if self.splits_halves or self.needs_state(state):
            x, qkv = self.attention_half(x, mask, is_causal, state)
            for step in self.steps("between"):
                q, k, v = qkv
                x, state = step(x, state, (q * self.attn.scale, k, v))
            token_mask(state, attn_mask, is_causal, x)  # raises: a step that changed the tokens knew of no mask
            x = self.mlp_half(x)
        else:
            x = self.host.forward(self, x, attn_mask=mask, is_causal=is_causal)
        for step in self.steps("after"):
            x, state = step(x, state, None)
        return x if state.plain else Stream(x, state)

    def attention_half(
        self, x: Tensor, mask: Tensor | None, is_causal: bool, state: TokenState = PLAIN
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """The first half: x (B, n, D) -> x plus attention, and the (q, k, v) it was made of, if a step wants them.

        Only then `attn` has to be one of ours: a mechanism that overrides `mlp_half` alone takes any attention.
        """
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        arguments = {"attn_mask": mask, "is_causal": is_causal} | ({"seen": seen} if self.steps("between") else {})
        arguments |= {"state": state} if self.needs_state(state) else {}
        if self.host is TimmBlock:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **arguments)))
        else:  # ResPostBlock
            x = x + self.drop_path1(self.norm1(self.attn(x, **arguments)))
        return x, seen[0] if seen else None

    def mlp_half(self, x: Tensor) -> Tensor:
        """The second half: x (B, n, D) -> x plus MLP."""
        if self.host is TimmBlock:
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


HALVES = (TimmBlock, ResPostBlock)


def check_halves(block: nn.Module, path: str) -> None:
    """Raise HostError if the two halves of this block are not known to us."""
    host = block.host if isinstance(block, Block) else type(block)
    if host not in HALVES:
        known = ", ".join(cls.__name__ for cls in HALVES)
        raise HostError(
            f"{path} is a {host.__name__}, whose attention and MLP halves cannot be run apart. Expected one of: {known}. "
            "Use a mechanism that stands before or after the block, or another host."
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
            + ("" if state.source is None else " and some were merged or dropped")
            + ". A mask is made for the original tokens and says nothing about these. "
            "Call the model without a mask, or take the token graft out first (vitreous.ungraft)."
        )
    return None if state.sizes is None else state.sizes.log().to(x.dtype)[:, None, None, :]
