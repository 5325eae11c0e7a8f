"""The residual stream of a host as a sum: what its blocks add, and the norms behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from vitreous.base.errors import HostError
from vitreous.hosts.block import HALVES, Block
from vitreous.hosts.host import finish
from vitreous.layers.stream import PLAIN, Stream, opened

ATTENTION, MLP, BOTH = "attention", "MLP", "attention and MLP"


def branches_of(block: nn.Module) -> dict[str, str]:
    """{path inside a block: half} of the modules through which goes what the block adds.

    timm lets each branch pass a stochastic depth at its end, an identity where that is off. A block with one branch for
    both halves has `drop_path` alone.
    """
    names = [name for name, _ in block.named_modules() if name.rpartition(".")[2].startswith("drop_path")]
    return {name: half_of(name) for name in names}


def half_of(branch: str) -> str:
    """Which half of a block a branch is, of two in a row or several side by side."""
    parent, _, name = branch.rpartition(".")
    if name == "drop_path1" or parent.startswith("attn"):
        return ATTENTION
    return MLP if name == "drop_path2" or parent.startswith("ffn") else BOTH


def adds_to_its_tokens(block: nn.Module) -> bool:
    """True if a block gives its tokens plus something, whatever a graft of ours adds."""
    return isinstance(block, Block) and block.host in HALVES


def final_norms(model: nn.Module) -> list[nn.Module]:
    """The norms between the last block and the classifier, in order; no identities."""
    norms = (getattr(model, name, None) for name in ("norm", "fc_norm"))
    return [norm for norm in norms if norm is not None and not issubclass(kind_of(norm), nn.Identity)]


def kind_of(norm: nn.Module) -> type[nn.Module]:
    """The class of a norm, or of the one that a stream's end of ours has adopted."""
    return getattr(norm, "host", type(norm))


@contextmanager
def frozen_norms(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """In the body each norm divides by what it divides by at `tokens`.

    So `finish` is affine in its tokens, if the head is. tokens: (1, N, D), the whole sum behind the last block. A
    LayerNorm still takes the mean over channels from whatever it gets, which is linear. Raises HostError for a norm that
    divides by something else.
    """
    scales: dict[nn.Module, Tensor] = {}

    def measure(norm: nn.Module, args: tuple) -> None:
        scales[norm] = inverse_scale(norm, opened(args[0])[0])

    def frozen(norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = opened(args[0])[0]
        x = (x - x.mean(-1, keepdim=True) if issubclass(kind_of(norm), nn.LayerNorm) else x) * scales[norm]
        x = x if norm.weight is None else x * norm.weight
        bias = getattr(norm, "bias", None)
        return x if bias is None else x + bias

    norms = final_norms(model)
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        finish(model, Stream(tokens, PLAIN))
        for handle in handles:
            handle.remove()
        handles = [norm.register_forward_hook(frozen) for norm in norms]
        yield
    finally:
        for handle in handles:
            handle.remove()


def inverse_scale(norm: nn.Module, x: Tensor) -> Tensor:
    """One over what a norm divides x (..., D) by, (..., 1). Raises HostError."""
    kind = kind_of(norm)
    if issubclass(kind, nn.LayerNorm):
        square = x.var(-1, keepdim=True, correction=0)
    elif issubclass(kind, nn.RMSNorm | RmsNorm):
        square = x.square().mean(-1, keepdim=True)
    else:
        raise HostError(
            f"Found a {kind.__name__} between the last block and the classifier. Expected a LayerNorm or an RMSNorm, which "
            "divide by one number per token. Use a host with one of them."
        )
    return (square + (torch.finfo(x.dtype).eps if norm.eps is None else norm.eps)).rsqrt()
