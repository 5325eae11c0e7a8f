"""LoRA: an update of low rank beside the weight of a linear layer, the only part that learns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import HostError, SettingError
from vitreous.base.text_form import written
from vitreous.hosts.directions import parts_held
from vitreous.hosts.host import host_of
from vitreous.layers.linear import Linear
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class LoRA(Mechanism):
    """Linear layers get a product of two thin matrices beside their weight, for fine-tuning with the rest frozen.

        y = W x + b + (alpha / rank) B A dropout(x)        A (rank, in), B (out, rank)

    Paper: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen 2021, arXiv 2106.09685, section 4.1.
    Differs: nothing in the formula. What trains is the run's decision (`--train new+head`). A is drawn from U(-1, 1) /
        sqrt(in), as in the authors' code; start=gaussian, as the paper says, with a standard deviation of 1 / rank, which
        is peft's, since the paper gives none.
    At start: equals the host exactly, since B is 0.
    Cost: rank (in + out) multiply-adds per token and pair of matrices, where q and v of one qkv have a pair each rank (2 in +
        2 out) with out = 3 D; no cost once folded (`vitreous.fold`). 2 rank D parameters per pair.
    Settings: layers (0-based; default all). linears: names such as qkv+fc1; default qkv, or the separate layers of queries,
        keys and values, and where a block has none of these all its linear layers. parts: which of queries, keys and values
        get a pair, each its own, of layers that hold such; none: one pair for all of a layer. Other layers get one pair.
        rank. alpha: of the factor alpha / rank. dropout: of what the update sees, 0 to below 1. start: of A, uniform or
        gaussian. seed: of A.
    Raises: HostError for names that a block lacks, or parts that no named layer holds; GraftError where another graft holds
        the layer; SettingError.
    """

    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    requires: ClassVar[tuple[str, ...]] = ("linear",)
    exact_at_init: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = (
        "lora:layers=1-2,parts=none,rank=3,alpha=6.0,start=gaussian",
        "lora:parts=q+k+v,rank=2,dropout=0.1",
    )

    layers: tuple[int, ...] | None = None
    linears: tuple[str, ...] | None = None
    parts: tuple[Literal["q", "k", "v"], ...] | None = ("q", "v")
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    start: Literal["uniform", "gaussian"] = "uniform"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise SettingError(f"Found rank={self.rank}. Expected 1 or more. Give such a rank.")
        if self.alpha <= 0:
            raise SettingError(f"Found alpha={self.alpha}. Expected more than 0. Give such a number.")
        if not 0 <= self.dropout < 1:
            raise SettingError(f"Found dropout={self.dropout}. Expected 0 to below 1. Give such a share.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        generator, changes = torch.Generator().manual_seed(self.seed), {}
        for i in slots.layer_indices(model, self.layers):
            chosen = {child: places for child, places in self.places(model, i) if any(places)}
            if not chosen:
                raise HostError(
                    f"No layer of blocks.{i} that is meant by {self} holds any of parts={written(self.parts)}. Expected one. "
                    "Give other linears or parts, or parts=none."
                )
            for child, places in chosen.items():
                make = partial(adapted, places=places, settings=self, generator=generator)
                changes |= slots.adapt_linears(model, i, (child,), make, self.name)
        return changes

    def places(self, model: nn.Module, layer: int) -> Iterator[tuple[str, tuple[bool, ...]]]:
        """(name, which of the equal parts of its output get a pair) of every linear layer that is meant."""
        host, paths = host_of(model), []
        if self.linears is None:
            paths += host.projections(layer) or host.linears(layer).values()
        for name in self.linears or ():
            paths += host.linears_called(name, layer) or (name,)  # an unknown one is refused with the list of all
        for path in paths:
            owner, _, child = path.rpartition(".")
            held = parts_held(model.get_submodule(owner), child) if owner and self.parts else ""
            yield child, tuple(part in self.parts for part in held) or (True,)

    def renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of peft, which names a module for each matrix; the authors' names are ours."""
        plain = {name.replace(".base_layer.", "."): value for name, value in tensors.items()}
        return {re.sub(r"\.lora_([AB])(\.\w+)?\.weight$", r".lora_\1", name): value for name, value in plain.items()}


def adapted(linear: nn.Linear, places: tuple[bool, ...], settings: LoRA, generator: torch.Generator) -> LoRALinear:
    """The layer with a pair for each chosen place among the equal parts of its output. Raises HostError."""
    if linear.out_features % len(places):
        raise HostError(
            f"Found a layer of {linear.out_features} numbers for {len(places)} parts. Expected parts of one size. Give "
            "parts=none."
        )
    new = LoRALinear.of(linear)
    new.initialise(places, settings, generator)
    return new


class LoRALinear(Linear):
    """A linear layer with updates of low rank for some of the equal parts of its output.

    places: for which. lora_A (P rank, in) and lora_B (P out / parts, rank) hold those of P places, one under the other.
    """

    def initialise(self, places: tuple[bool, ...], settings: LoRA, generator: torch.Generator) -> None:
        self.places, self.scaling, self.dropout = places, settings.alpha / settings.rank, settings.dropout
        a = torch.empty(sum(places) * settings.rank, self.in_features)
        if settings.start == "uniform":
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        else:
            a.normal_(std=1 / settings.rank, generator=generator)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(sum(places) * (self.out_features // len(places)), settings.rank))

    def effective_weight(self) -> Tensor:
        return self.weight + self.scaling * spread(self.lora_B, self.places) @ self.lora_A

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(low, spread(self.lora_B, self.places))


def spread(b: Tensor, places: tuple[bool, ...]) -> Tensor:
    """B (P o, r) of P places -> (parts o, P r): each block in its own columns, in the rows of its part; 0 elsewhere."""
    blocks = iter(b.chunk(sum(places)))
    empty = b.new_zeros(len(b) // sum(places), 0)  # rows without columns
    return torch.block_diag(*(next(blocks) if place else empty for place in places))
