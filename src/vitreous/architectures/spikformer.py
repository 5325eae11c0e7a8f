"""Spikformer (first version): a vision transformer of spikes over a few time steps."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.architectures._timm import config, create
from vitreous.base.checkpoint_names import renamed
from vitreous.base.errors import SettingError
from vitreous.layers.spikes import LIF

SCALE = 0.125  # of attention, whatever the width of a head
THEIRS = {  # names in the authors' code
    r"^block\.": "blocks.",
    r"^patch_embed\.proj_(conv|bn)(\d?)\.": lambda m: f"stem.{m[2] or 0}.{m[1]}.",
    r"^patch_embed\.rpe_": "position.",
    r"\.(q|k|v|proj|fc1|fc2)_(?=conv|bn)": r".\1.",
    r"\.bn\.": ".norm.",
}
UNUSED = re.compile(r"^block\.\d+\.norm[12]\.")  # layer norms that the authors' code builds and never calls


class SpikingConv(nn.Module):
    """Convolution, batch norm, neurons: x (T, B, C, *) -> spikes (T, B, C', *)."""

    def __init__(self, conv: nn.Module, norm: nn.Module):
        super().__init__()
        self.conv, self.norm, self.spikes = conv, norm, LIF()

    def forward(self, x: Tensor, steps: int | None = None) -> Tensor:
        """steps: of the output where x (1, B, C, *) is the same in all; one current serves them."""
        current = self.norm(self.conv(x.flatten(0, 1))).unflatten(0, (x.shape[0], -1))
        return self.spikes(current if steps is None else current.expand(steps, *current.shape[1:]))


def spiking_conv2d(inputs: int, outputs: int, kernel: int = 3, bias: bool = False) -> SpikingConv:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
    return SpikingConv(conv, nn.BatchNorm2d(outputs))


class SpikingAttention(nn.Module):
    """LIF_0.5(q (k^T v) / 8) with spikes q, k, v, then a spiking layer.

    x (T, B, D, H, W) -> the same shape.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v = (SpikingConv(nn.Conv1d(width, width, 1, bias=False), nn.BatchNorm1d(width)) for _ in range(3))
        self.spikes = LIF(threshold=0.5)
        self.proj = SpikingConv(nn.Conv1d(width, width, 1), nn.BatchNorm1d(width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(3)
        q, k, v = (layer(flat).unflatten(2, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        return self.proj(self.spikes(attend(q, k, v).flatten(2, 3))).unflatten(3, x.shape[3:])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (k^T v) / 8 without a softmax, in linear time.

    q, k, v (..., K, N), a column for each token, -> (..., K, N).
    """
    return (v @ k.mT) @ q * SCALE


class SpikingBlock(nn.Module):
    """x + attention(x), then x + MLP(x): sums of spikes, (T, B, D, H, W) -> the same shape."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attn = SpikingAttention(width, heads)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", spiking_conv2d(width, hidden, 1, bias=True))
        self.mlp.add_module("fc2", spiking_conv2d(hidden, width, 1, bias=True))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for half in (self.attn, self.mlp):
            x = x + self.drop_path(half(x).transpose(0, 1)).transpose(0, 1)  # an image is dropped in all its steps
        return x


class Spikformer(nn.Module):
    """A convolutional stem, spiking attention and MLPs, a linear head on the mean over steps.

        x[t] = image for t = 1..T;  stem: four times [3x3 conv, BN, LIF, 3x3 max pool of stride 2];  x = x + LIF(BN(conv(x)))
        block: x = x + LIF(BN(W LIF_0.5(q (k^T v) / 8)));  x = x + MLP(x)         q, k, v = LIF(BN(W x)), all 0 or 1

    Paper: Zhou, Zhu, He, Wang, Yan, Tian, Yuan 2023, arXiv 2209.15425 (Spikformer). The stem and the masked pre-training of
        the second version (arXiv 2401.02020) are not here: no code of it is public.
    Differs: neurons start at 0 in each forward; the released ones keep their potential between calls unless reset.
        drop_path_rate works, per image (the released code builds it and never calls it).
    Settings: steps: T. pools: which of the four layers of the stem pool; (0, 0, 1, 1) is the authors' for 32 px. The others
        are timm's. Raises: SettingError.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 8,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        steps: int = 4,
        pools: tuple[int, int, int, int] = (1, 1, 1, 1),
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        check_settings(embed_dim, num_heads, steps, pools, global_pool)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.steps, self.pools, self.grad_checkpointing = steps, tuple(map(bool, pools)), False
        widths = [in_chans, *(embed_dim // part for part in (8, 4, 2, 1))]
        self.stem = nn.ModuleList(spiking_conv2d(a, b) for a, b in pairwise(widths))
        self.position = spiking_conv2d(embed_dim, embed_dim)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*[SpikingBlock(embed_dim, num_heads, mlp_ratio, rate) for rate in rates])
        reduction = 2 ** sum(self.pools)
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = classifier(embed_dim, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> sums of spikes (T, B, D, H / 16, W / 16), sides rounded up."""
        x, steps = images[None], self.steps
        for layer, pool in zip(self.stem, self.pools, strict=True):
            x = layer(x, steps)
            steps = None
            if pool:
                x = F.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, (self.steps, -1))
        return x + self.position(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> the mean over steps of the last block, (B, D, H / 16, W / 16)."""
        x = self.embed(images)
        for block in self.blocks:
            x = self.run(block, x)
        return x.mean(0)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x) if self.grad_checkpointing else block(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x.mean((2, 3)) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The mean over steps behind blocks, (B, D, H / 16, W / 16) each, and the last.

        As in timm. There is no final norm. Raises SettingError for an output_fmt that is not NCHW.
        """
        if output_fmt != "NCHW":
            raise SettingError(f"Found output_fmt={output_fmt}. Expected NCHW, since this network has pictures. Leave it out.")
        chosen, last = feature_take_indices(len(self.blocks), indices)
        maps, x = [], self.embed(x)
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self.run(block, x)
            if i in chosen:
                maps.append(x.mean(0))
        return maps if intermediates_only else (x.mean(0), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leave out the blocks behind the last index, and the head; returns the indices."""
        chosen, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for so many classes, none for 0.

        Raises SettingError for a pool that is not avg.
        """
        check_pool(global_pool if global_pool is not None else self.global_pool)
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = classifier(self.embed_dim, num_classes).to(self.stem[0].conv.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem|^position", "blocks": r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None)]}


def classifier(width: int, classes: int) -> nn.Module:
    """A linear layer drawn as the authors do; for 0 classes what passes features on."""
    if not classes:
        return nn.Identity()
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def firing_rates(model: nn.Module, images: Tensor) -> dict[str, float]:
    """{layer: share of its neurons' steps with a spike}.

    In the order of the pass, and with names such as blocks.0.attn.q. A spike costs additions where
    another network multiplies, so rates times the operations of the next layer estimate energy.
    """
    rates: dict[str, float] = {}

    def note(path: str) -> Any:
        return lambda module, args, spikes: rates.__setitem__(path, spikes.float().mean().item())

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LIF)}
    handles = [module.register_forward_hook(note(name.removesuffix(".spikes"))) for name, module in layers.items()]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return rates


def check_pool(global_pool: str) -> None:
    if global_pool not in ("", "avg"):
        raise SettingError(f"Found global_pool={global_pool}. Expected avg: there is no class token. Leave it out.")


def check_settings(width: int, heads: int, steps: int, pools: tuple[int, ...], global_pool: str) -> None:
    """Raise SettingError for numbers that make no network."""
    check_pool(global_pool)
    if width % 8 or width % heads:
        raise SettingError(
            f"Found embed_dim={width} and num_heads={heads}. Expected a multiple of 8, since the stem begins with an eighth of "
            "it, and of the heads. Give such numbers."
        )
    if steps < 1 or len(pools) != 4:
        raise SettingError(
            f"Found steps={steps}, pools={pools}. Expected 1 step or more, and four switches, one for each layer of the stem. "
            "Give such numbers."
        )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of the authors' own code under our names.

    Without the layer norms that are never called.
    """
    return renamed({name: value for name, value in state_dict.items() if not UNUSED.match(name)}, THEIRS)


CONFIG = config("arXiv:2209.15425", "stem.0.conv", pool_size=(14, 14))
default_cfgs = generate_default_cfgs(dict.fromkeys(("spikformer_8_384", "spikformer_8_512", "spikformer_8_768"), CONFIG))


def _create(name: str, pretrained: bool, **kwargs: Any) -> Spikformer:
    return create(Spikformer, name, pretrained, checkpoint_filter_fn, 3, **kwargs)


@register_model
def spikformer_8_384(pretrained: bool = False, **kwargs: Any) -> Spikformer:
    """Spikformer with 8 blocks, width 384, 6 heads, 4 time steps."""
    return _create("spikformer_8_384", pretrained, **({"embed_dim": 384, "num_heads": 6} | kwargs))


@register_model
def spikformer_8_512(pretrained: bool = False, **kwargs: Any) -> Spikformer:
    """Spikformer with 8 blocks, width 512, 8 heads, 4 time steps."""
    return _create("spikformer_8_512", pretrained, **({"embed_dim": 512, "num_heads": 8} | kwargs))


@register_model
def spikformer_8_768(pretrained: bool = False, **kwargs: Any) -> Spikformer:
    """Spikformer with 8 blocks, width 768, 12 heads, 4 time steps."""
    return _create("spikformer_8_768", pretrained, **({"embed_dim": 768, "num_heads": 12} | kwargs))
