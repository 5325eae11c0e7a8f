"""Learned tokens beside the host's own: more class tokens, or registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.layers.stream import TokenState, insert
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class ExtraTokens(Mechanism):
    """Learned tokens, by default before the first block: class tokens that are read out, or registers.

    Registers are not read out.

    Paper: the CLS=5 control of Murata, Hotta 2026, arXiv 2602.02765 (kind=class, tokens=4, read through the same mean as
        SPC tokens); registers after Darcet et al. 2024, arXiv 2309.16588.
    Differs: they stand behind the patches instead of before; without position they are a set, so order means nothing.
    At start: changes the output.
    Cost: `tokens` more tokens in every block behind them; tokens * D parameters.
    Settings: kind: class | register. tokens: how many. after: blocks that have run (0: before the first). seed: of their
        start, N(0, 0.02^2).
    Raises: HostError on rotary hosts and, for kind=class, where the head cannot read tokens; SettingError.
    """

    paper: ClassVar[str] = "Murata, Hotta 2026, arXiv 2602.02765; Darcet et al. 2024, arXiv 2309.16588"
    no_decay: ClassVar[tuple[str, ...]] = ("learned",)
    examples: ClassVar[tuple[str, ...]] = ("extra_tokens:kind=register,tokens=2", "extra_tokens:after=2")

    kind: Literal["class", "register"] = "class"
    tokens: int = 4
    after: int = 0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 1:
            raise SettingError(f"Found tokens={self.tokens}. Expected 1 or more. Give such a number.")

    @property
    def requires(self) -> tuple[str, ...]:
        return ("stream", "insert", *(("reads_inserted",) if self.kind == "class" else ()))

    def changes(self, model: nn.Module) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        start = 0.02 * torch.randn(1, self.tokens, slots.width(model), generator=generator)
        place = (slots.block_count(model, self.after) - 1, "after") if self.after else (0, "before")
        return slots.add_step(model, *place, Learned(start, read_out=self.kind == "class"))


class Learned(nn.Module):
    """The token step: append the learned tokens (1, m, D) to every image."""

    def __init__(self, start: Tensor, read_out: bool):
        super().__init__()
        self.learned, self.read_out = nn.Parameter(start), read_out

    def forward(self, x: Tensor, state: TokenState, qkv: None) -> tuple[Tensor, TokenState]:
        return insert(x, state, self.learned.expand(x.shape[0], -1, -1), read_out=self.read_out)
