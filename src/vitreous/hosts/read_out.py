"""Which tokens a host's head reads, and how inserted ones reach it."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def read_tokens(model: nn.Module) -> tuple[tuple[int, int | None], bool]:
    """((start, stop), pooled): which tokens the host's head reads, and whether it pools over them."""
    if isinstance(model, VisionTransformer) and type(model).forward_head is not VisionTransformer.forward_head:
        return (0, model.num_prefix_tokens), False  # distilled DeiT: a head each for the class and the distillation token
    pooled_from = 0 if getattr(model, "pool_include_prefix", False) else model.num_prefix_tokens
    if model.attn_pool is not None or model.global_pool in ("avg", "avgmax", "max"):
        return (pooled_from, None), True
    if model.cls_token is not None:
        return (0, 1), False
    return (pooled_from, None), True


def read_out(tokens: Tensor, inserted: Tensor, heads: slice, *, pooled: bool) -> Tensor:
    """Let the head see the inserted tokens, through the tokens that it reads anyway: tokens (B, N, D), inserted (B, m, D).

    pooled=False (class and distillation tokens): each becomes the mean of itself and the inserted ones.
    pooled=True (the head pools over `heads`): the pooled tokens move by one common vector, such that their mean becomes
    the mean over pooled and inserted tokens together. In an attention pool a common vector leaves the weights as they are
    (softmax ignores what all keys share), so there too the inserted tokens get their even share m / (n + m).
    Feature maps keep their shape.
    """
    m = inserted.shape[1]
    target = tokens[:, heads]  # (B, n, D)
    if pooled:
        share = m / (target.shape[1] + m)
        target = target + share * (inserted.mean(1, keepdim=True) - target.mean(1, keepdim=True))
    else:
        target = (target + inserted.sum(1, keepdim=True)) / (1 + m)
    start, stop, _ = heads.indices(tokens.shape[1])
    return torch.cat([tokens[:, :start], target, tokens[:, stop:]], dim=1)
