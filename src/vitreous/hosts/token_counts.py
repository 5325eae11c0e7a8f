"""Multiply-adds of a host's blocks by their numbers of tokens, and how many tokens a pass gives each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitreous.base.errors import HostError
from vitreous.hosts.attention import HOSTS as ATTENTIONS
from vitreous.hosts.attention import Attention
from vitreous.hosts.host import class_names, host_of
from vitreous.hosts.mixer import Mixer


class Count(NamedTuple):
    """Tokens of one block, prefix included: in its attention, and in its MLP."""

    attention: int
    mlp: int


class BlockCost(NamedTuple):
    """Multiply-adds of one block for n tokens in attention and m in the MLP: attention n + pairs n^2 + mlp m.

    attention: qkv and proj, per token. pairs: scores and weighted values, 2 H K. Those of a mixer
        are what it says (`Mixer.products`), beside layers of these names.
    mlp: fc1 and fc2, per token. Norms, softmax, sums and biases are not counted, nor is what grafts
        add, so that a budget does not depend on the order of grafts.
    """

    attention: int
    pairs: int
    mlp: int

    def of(self, count: Count) -> int:
        return self.attention * count.attention + self.pairs * count.attention**2 + self.mlp * count.mlp


def block_costs(model: nn.Module) -> tuple[BlockCost, ...]:
    """The cost of every block, each by its own widths. Raises HostError for attention that is not known."""
    host = host_of(model)
    return tuple(block_cost(model, i, host.attention(i)) for i in range(len(host.blocks)))


def block_cost(model: nn.Module, block: int, attention_path: str) -> BlockCost:
    attention = model.get_submodule(attention_path)
    if isinstance(attention, (Attention, *ATTENTIONS)):
        products = 0, 2 * attention.proj.in_features
    else:
        products = attention.products() if isinstance(attention, Mixer) else None
    if products is None:
        raise HostError(
            f"{attention_path} is a {type(attention).__name__}, whose multiply-adds have no formula here. Expected one of "
            f"{class_names(ATTENTIONS)}. Give the strength of the reducer itself instead of macs."
        )

    def size(*names: str) -> int:
        paths = {inner for name in names for inner in host_of(model).linears_called(name, block)}
        linears = [model.get_submodule(inner) for inner in paths]
        return sum(linear.in_features * linear.out_features for linear in linears)

    return BlockCost(products[0] + size("qkv", "proj"), products[1], size("fc1", "fc2"))


def multiply_adds(costs: Sequence[BlockCost], counts: Sequence[Count]) -> int:
    """Multiply-adds of all blocks for one image; patch embedding and head are left out."""
    return sum(cost.of(count) for cost, count in zip(costs, counts, strict=True))


def patch_count(model: nn.Module) -> int:
    """Patches of an image of the model's own size, also where a graft makes several tokens of each."""
    embed = model.patch_embed
    kind = PatchEmbed if isinstance(embed, PatchEmbed) else type(embed)
    return math.prod(kind.dynamic_feat_size(embed, embed.img_size))


def whole(model: nn.Module) -> tuple[Count, ...]:
    """The counts of the host: every token in every block."""
    tokens = host_of(model).prefix + patch_count(model)
    return (Count(tokens, tokens),) * len(host_of(model).blocks)


@torch.no_grad()
def measured_counts(model: nn.Module, images: Tensor) -> tuple[Count, ...]:
    """The counts of one pass over images (B, C, H, W), with everything that is grafted."""
    host, found = host_of(model), {}

    def note(key: tuple[int, str]):
        def hook(module: nn.Module, inputs: tuple) -> None:
            found[key] = inputs[0].shape[1]

        return hook

    places = {(i, "attention"): host.attention(i) for i in range(len(host.blocks))}
    places |= {(i, "mlp"): f"{path}.mlp" for i, path in enumerate(host.blocks)}
    handles = [model.get_submodule(path).register_forward_pre_hook(note(key)) for key, path in places.items()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(Count(found[i, "attention"], found[i, "mlp"]) for i in range(len(host.blocks)))
