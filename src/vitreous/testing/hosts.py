"""Small hosts of every kind that a graft may meet, and their images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cache, partial
from typing import Any

import timm
import torch
from timm.layers import DiffAttention
from timm.models.cait import Cait
from timm.models.crossvit import CrossVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.twins import Twins
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.grafting import graft
from vitreous.hosts.host import host_of
from vitreous.hosts.stream_ends import collect_terms
from vitreous.layers.adoption import REGISTRIES
from vitreous.mechanism import Mechanism

SIZE, CLASSES = 32, 5  # pixels, classes; patches of 8 x 8 pixels, so a grid of 4 x 4
SMALL: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "num_classes": CLASSES, "embed_dim": 32, "depth": 4, "num_heads": 2}
EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True}
DINOV3 = {"attn_type": "rope", "rope_type": "dinov3", "use_rot_pos_emb": True, "use_abs_pos_emb": False}


def vit(cls: type[nn.Module] = VisionTransformer, **options) -> Callable[[], nn.Module]:
    return partial(cls, **{**SMALL, **options})


def named(name: str) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, img_size=SIZE, patch_size=8, num_classes=CLASSES)


HOSTS: dict[str, Callable[[], nn.Module]] = {
    # the first takes the laws of one host: class token, registers, LayerScale, any image size
    "dinov2": vit(reg_tokens=4, no_embed_class=True, init_values=1e-5, dynamic_img_size=True),
    "plain": vit(),
    "test_vit": named("test_vit"),
    "test_vit2": named("test_vit2"),  # register, average pool, LayerScale
    "test_vit3": named("test_vit3"),  # register, attention pool over the prefix too
    "test_vit4": named("test_vit4"),  # RMSNorm
    "distilled": vit(VisionTransformerDistilled),
    "clip": vit(pre_norm=True),
    "qk_norm": vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "res_post": vit(block_fn=ResPostBlock),
    "class_avg": vit(global_pool="avg"),
    "class_map": vit(global_pool="map"),
    "class_map_all": vit(global_pool="map", pool_include_prefix=True),
    "prr": vit(global_pool="prr"),
    "fc_norm": vit(fc_norm=True),
    "max": vit(global_pool="max"),
    "parallel_scaling": vit(block_fn=ParallelScalingBlock),
    "parallel_things": vit(block_fn=ParallelThingsBlock),
    "diff_attention": vit(attn_layer=DiffAttention),
    "eva": vit(Eva),
    "eva02": vit(Eva, **EVA02),
    "dinov3": vit(Eva, **DINOV3, num_reg_tokens=2, init_values=1e-5, rope_rotate_half=True, dynamic_img_size=True),
    "rope_mixed": vit(Eva, attn_type="rope", rope_type="mixed", use_rot_pos_emb=True),
    "grouped": vit(Eva, **DINOV3, qkv_fused=False, num_kv_heads=1, qk_norm=True),
}

# In these only mechanisms of linear layers stand: windows, reduced keys, talking heads, class
# attention, two branches.
STAGES: dict[str, Any] = {"depths": (2, 2), "embed_dims": (16, 16), "num_heads": (1, 2), "sr_ratios": (2, 1)}
LINEAR_HOSTS: dict[str, Callable[[], nn.Module]] = {
    "swin": partial(
        SwinTransformer, SIZE, num_classes=CLASSES, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2), mlp_ratio=2.0
    ),
    "pvt": partial(PyramidVisionTransformerV2, num_classes=CLASSES, mlp_ratios=(2, 2), **STAGES),
    "twins": partial(Twins, SIZE, num_classes=CLASSES, mlp_ratios=(2, 2), wss=(4, 2), **STAGES),
    "cait": vit(Cait, depth=2, depth_token_only=1, init_values=1.0),
    "crossvit": partial(
        CrossVit, SIZE, patch_size=(8, 16), num_classes=CLASSES, embed_dim=(16, 32), depth=((1, 1, 0),), num_heads=(2, 2)
    ),
}


def small_hosts() -> dict[str, Callable[[], nn.Module]]:
    """{name: function that builds it} of the hosts that the contract is checked in.

    One per kind of timm ViT. Each has 4 blocks or more, a grid of 4 x 4 patches at 32 x 32 pixels
    and 5 classes; it is in eval mode, with the same weights at every call, which are large enough
    that no mistake hides behind a small start.
    """
    return {name: partial(build, name) for name in HOSTS}


def build(host: str) -> nn.Module:
    """The host in eval mode, the same at every call; the global random state stays as it is."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return strengthened((HOSTS | LINEAR_HOSTS)[host]())


@torch.no_grad()
def strengthened(model: nn.Module) -> nn.Module:
    """The model in eval mode with large random weights; drawn from the global random state.

    With the usual start, blocks do next to nothing.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def grafted(mechanism: Mechanism | str, host: str) -> nn.Module:
    return graft(build(host), mechanism)


def images(count: int = 3, size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def per_place(model: nn.Module) -> Fraction:
    """Tokens for each place of the host: more than 1 for channels apart, or smaller patches."""
    height, width = model.patch_embed.dynamic_feat_size((SIZE, SIZE))
    return Fraction(height * width, (SIZE // 8) ** 2)


def anatomy(model: nn.Module, records: bool = False) -> dict[str, tuple]:
    """{module: its identity, class, mode, names of attributes, and what it owns, in order}.

    records: also whether there is a list of grafts on the model.
    """
    return {
        name: (
            id(module),
            type(module),
            module.training,
            sorted(key for key in module.__dict__ if records or key != "grafts"),
            [(kind, key, id(value)) for kind in REGISTRIES[:3] for key, value in module.__dict__[kind].items()],
        )
        for name, module in model.named_modules()
    }


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Of the logits and of all features, with the penalties of activations; scalar.

    Some of what a graft brings shows in the patches of the last block only.
    """
    with collect_terms(model) as terms:
        features = model.forward_features(x)
    logits = model.forward_head(features)
    lists = features if isinstance(features, list) else [features]  # of branches
    values = sum(part.tanh().sum(-1).mean() for part in lists)
    return F.cross_entropy(logits, torch.arange(len(x)) % CLASSES) + values + sum(terms.values())


def fit(model: nn.Module, parameters: Iterable[nn.Parameter], steps: int = 2, lr: float = 0.05) -> None:
    """A few steps of training on noise that move `parameters` alone; the mode stays."""
    parameters = list(parameters)
    if not parameters:
        return
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, images(4, seed=10 + step)).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)


@cache
def offers(host: str) -> frozenset[str]:
    """What a small host offers, words of `hosts.host.CAPABILITIES`."""
    return host_of(build(host)).offers


def lacks(host: str, mechanism: Mechanism) -> set[str]:
    """The words of what the mechanism requires and this host does not offer."""
    return set(mechanism.requires) - offers(host)
