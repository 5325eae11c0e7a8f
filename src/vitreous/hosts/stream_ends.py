"""Where the stream of tokens begins and ends: the host's patch embedding and its norm, both adopted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitreous.base.errors import GraftError
from vitreous.hosts.read_out import read_out
from vitreous.layers.adoption import adopt
from vitreous.layers.stream import Stream, TokenState, opened, restore

E = TypeVar("E", bound="Embed")


@dataclass(frozen=True)
class Opening:
    """Patches between the patch embedding and the first block, with the state that the stream begins with.

    What the host does there (adding positions, joining prefix tokens, dropout, a norm) passes through
    `__torch_function__`. So it is neither a tensor, which would lose the state, nor kept on a module,
    where two passes at a time would overwrite each other's grid.
    """

    x: Tensor
    state: TokenState

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        states = []

        def unwrapped(value: Any) -> Any:
            if isinstance(value, Opening):
                states.append(value.state)
                return value.x
            return type(value)(map(unwrapped, value)) if type(value) in (list, tuple) else value

        out = func(*unwrapped(args), **{key: unwrapped(value) for key, value in (kwargs or {}).items()})
        return cls(out, states[0])

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def device(self) -> torch.device:
        return self.x.device

    def view(self, *shape: int) -> Opening:
        return Opening(self.x.view(*shape), self.state)

    def __add__(self, other: Tensor) -> Opening:
        return Opening(self.x + other, self.state)

    # Patch dropout selects patches at random, after which the grid is not that of the tokens: the state ends here.
    def __getitem__(self, index: Any) -> Tensor:
        return self.x[index]

    def gather(self, dim: int, index: Tensor) -> Tensor:
        return self.x.gather(dim, index)


class Embed(PatchEmbed):
    """timm's patch embedding, the same bit for bit, which opens the stream: its patches know the grid that they form.

    A block sees tokens only, and with images of any size their number does not tell height from width.
    """

    prefix: int

    @classmethod
    def of(cls: type[E], embed: PatchEmbed, prefix: int) -> E:
        """Adopt timm's patch embedding, or one of ours; prefix: the number of tokens that the host joins in front."""
        new = adopt(cls, embed)
        new.prefix = prefix
        return new

    def forward(self, images: Tensor) -> Opening:
        return Opening(*self.patches(images))

    def patches(self, images: Tensor) -> tuple[Tensor, TokenState]:
        """images (B, C, H, W) -> patches (B, N, D), or (B, H, W, D) where the host takes any size, and their state."""
        grid = PatchEmbed.dynamic_feat_size(self, images.shape[-2:])
        return super().forward(images), TokenState(grid=tuple(grid), prefix=self.prefix)


class StreamEnd(nn.Module):
    """The host's `norm`, where the stream of tokens ends: restore every place, norm, read inserted tokens, let them leave.

    heads (start, stop): the tokens that the host's head reads; pooled: whether it pools over them (see `read_out`). Raises
    GraftError if it would pool over places whose tokens were dropped.
    """

    host: type[nn.Module]

    @classmethod
    def of(cls, norm: nn.Module, heads: tuple[int, int | None], pooled: bool) -> StreamEnd:
        new = adopt(cls, norm)
        new.host, new.heads, new.pooled = type(norm), heads, pooled
        return new

    def forward(self, x: Tensor | Stream | Opening) -> Tensor:
        x, state = opened(x)
        if state.dropped and self.pooled:
            raise GraftError(
                "The head pools over all patches, but some were dropped and nothing stands for them. Expected a head that "
                "reads class tokens. Merge or fuse tokens where they are dropped now, or use another pooling."
            )
        tokens, inserted = restore(x, state)
        tokens = self.host.forward(self, tokens)
        wanted = [i for i, read in enumerate(state.read_out) if read]
        if not wanted:
            return tokens
        if len(wanted) < inserted.shape[1]:
            inserted = torch.stack([inserted[:, i] for i in wanted], dim=1)
        return read_out(tokens, self.host.forward(self, inserted), slice(*self.heads), pooled=self.pooled)


@contextmanager
def collect_terms(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it, the penalties of activations (`TokenState.terms`): {name: mean over images}, summed over passes.

    Of passes of this thread that have gradients. They are read where the stream ends, by a temporary hook, so a checkpointed
    block that runs twice counts once. A compiled model has none: what is compiled would keep the first hook.
    """
    means: dict[str, Tensor] = {}
    thread = threading.get_ident()

    def collect(module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled() and threading.get_ident() == thread:
            for name, value in opened(args[0])[1].terms:
                means[name] = means.get(name, 0) + value.float().mean()

    ends = [] if hasattr(model, "_orig_mod") else [module for module in model.modules() if isinstance(module, StreamEnd)]
    handles = [module.register_forward_pre_hook(collect) for module in ends]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


torch.export.register_dataclass(Opening)
