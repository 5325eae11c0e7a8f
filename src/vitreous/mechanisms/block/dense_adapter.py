"""Dense adapters (VLSM-Adapter): a bottleneck in each branch, before its sum with the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.layers.adoption import adopt
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class DenseAdapter(Mechanism):
    """Adapters behind attention and MLP of each block, for fine-tuning with everything else frozen.

        x = x + A(Attn(LN(x))),  x = x + A'(MLP(LN(x)))        A(z) = z + ReLU(W_2 ReLU(W_1 z + b_1) + b_2)

    Paper: Dhakal, Adhikari, Thapaliya, Khanal 2024, arXiv 2405.06196 (VLSM-Adapter, its dense form).
    Differs: this is the dense form in the blocks of one encoder. The paper's adapter of the text's vector and its shallow
        form, at layers that a decoder reads, need a model of images and texts; `Adapter` can be put there.
    At start: changes the output by what a linear layer's usual start gives, as in the authors' code; start=zero equals the
        host exactly.
    Cost: two thin linears twice per block: 2 (2 width + 1) D + 2 width parameters, 4 width D multiply-adds per token.
    Settings: layers (0-based; default all). width: of the bottleneck. start: usual, or zero = W_2 and b_2 are 0. seed.
    Raises: HostError where a block has no place before its sums; GraftError where another graft stands there; SettingError.
    """

    paper: ClassVar[str] = "Dhakal et al. 2024, arXiv 2405.06196"
    requires: ClassVar[tuple[str, ...]] = ("halves",)
    examples: ClassVar[tuple[str, ...]] = ("dense_adapter:layers=0+2,width=5,start=zero",)

    layers: tuple[int, ...] | None = None
    width: int = 64
    start: Literal["usual", "zero"] = "usual"
    seed: int = 0

    @property
    def exact_at_init(self) -> bool:
        return self.start == "zero"

    def __post_init__(self):
        super().__post_init__()
        if self.width < 1:
            raise SettingError(f"Found width={self.width}. Expected 1 or more. Give such a width.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        generator, changes = torch.Generator().manual_seed(self.seed), {}
        for i in slots.layer_indices(model, self.layers):
            for path, displaced in slots.before_the_sums(model, i, self.name):
                adapter = Adapter(slots.width(model), self.width, self.start, generator)
                changes[path] = AdaptedBranch.of(displaced, adapter)
        return changes


class AdaptedBranch(nn.Module):
    """An adapter, then what stood at the end of the branch (drop path, or nothing)."""

    host: type[nn.Module]

    @classmethod
    def of(cls, displaced: nn.Module, adapter: nn.Module) -> AdaptedBranch:
        new = adopt(cls, displaced)
        new.host, new.adapter = type(displaced), adapter
        return new

    def forward(self, x: Tensor) -> Tensor:
        return self.host.forward(self, self.adapter(x))


class Adapter(nn.Module):
    """x + ReLU(W_2 ReLU(W_1 x + b_1) + b_2): (..., D) -> (..., D), never below x.

    W_1 (width, D), W_2 (D, width): 2 D width + width + D parameters.
    """

    def __init__(self, features: int, width: int, start: Literal["usual", "zero"], generator: torch.Generator):
        super().__init__()
        self.down, self.up = skip_init(nn.Linear, features, width), skip_init(nn.Linear, width, features)
        with torch.no_grad():
            for linear in (self.down, self.up):
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
                linear.bias.uniform_(-(linear.in_features**-0.5), linear.in_features**-0.5, generator=generator)
            if start == "zero":
                self.up.weight.zero_()
                self.up.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + rectified(self.up(self.down(x).relu()))


def rectified(x: Tensor) -> Tensor:
    """max(x, 0) with a slope of 1 at 0.

    torch's own has none there, so that start=zero would stay zero for ever.
    """
    return x.masked_fill(x < 0, 0.0)
