"""A plain ViT and its forward pass written out in float64: what a lens should find, from nothing but the formulas."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

SIZE, GRID, PATCH = (16, 24), (4, 6), 4


def vit(seed: int = 0, **changes):
    """A ViT of three layers on images of 16 x 24, heads that differ, in eval mode; with timm's pretrained_cfg."""
    given = {"patch_size": PATCH, "depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": SIZE, "num_classes": 5}
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**given, **changes}).eval()
    with torch.no_grad():
        for block in model.blocks:  # fresh weights attend evenly, which would hide mistakes
            block.attn.qkv.weight.mul_(12)
            block.attn.qkv.bias.normal_(std=0.3)
    return model


def pixels(count: int, seed: int = 0, channels: int = 3) -> Tensor:
    """Images as the model takes them: pixels of [0, 1] normalised by 0.5 and 0.5, smooth, each with a bright square."""
    generator = torch.Generator().manual_seed(seed)
    images = F.interpolate(torch.rand(count, channels, 4, 6, generator=generator), SIZE, mode="bilinear") * 0.7
    for image in images:
        y, x = (int(torch.randint(n - 6, (), generator=generator)) for n in SIZE)
        image[:, y : y + 6, x : x + 6] += 0.3
    return images.clamp(0, 1) * 2 - 1


@dataclass
class Layer:
    """attention (B, H, N, N), keys (B, N, D) heads side by side, output (B, N, D) of the attention, tokens (B, N, D) after."""

    attention: Tensor
    keys: Tensor
    output: Tensor
    tokens: Tensor


@torch.no_grad()
def explicit(model, images: Tensor) -> list[Layer]:
    """Every layer of a plain timm ViT, written out."""
    model, images = copy.deepcopy(model).double(), images.double()
    x = model.patch_embed.proj(images).flatten(2).mT
    prefix = [token.expand(len(x), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    x = torch.cat([*prefix, x], dim=1) + model.pos_embed
    found = []
    for block in model.blocks:
        attn, heads = block.attn, block.attn.num_heads
        y = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps)
        q, k, v = (y @ attn.qkv.weight.mT + attn.qkv.bias).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        output = (weights @ v).transpose(1, 2).flatten(2) @ attn.proj.weight.mT + attn.proj.bias
        x = x + output
        y = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
        y = F.gelu(y @ block.mlp.fc1.weight.mT + block.mlp.fc1.bias)
        x = x + y @ block.mlp.fc2.weight.mT + block.mlp.fc2.bias
        found.append(Layer(weights, k.transpose(1, 2).flatten(2), output, x))
    return found
