"""Smaller networks inside a ViT: run under prefix masks, and cut out as networks."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from timm.layers import LayerNorm, Mlp
from timm.models import checkpoint
from timm.models._input import get_model_args
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.base.errors import HostError


@dataclass(frozen=True)
class Subnetwork:
    """A prefix of each: heads with their features, hidden features of an MLP, blocks.

    heads: times the width of a head it is the width of a token. hidden, depth: how many.
    """

    heads: int
    hidden: int
    depth: int


def check_plain(model: nn.Module) -> None:
    """Raise HostError unless prefixes of all widths can be cut out of the model."""
    norms = (nn.LayerNorm, LayerNorm, nn.Identity)
    wrong = [
        path or type(model).__name__
        for path, module in model.named_modules()
        if (not path and type(module) is not VisionTransformer)
        or (path.startswith("blocks.") and path.count(".") == 1 and type(module) is not Block)
        or (path.endswith(".attn") and (type(module) is not Attention or type(module.norm) is not nn.Identity or module.gate))
        or (path.endswith(".mlp") and (type(module) is not Mlp or type(module.norm) is not nn.Identity))
        or (path in ("norm", "norm_pre", "fc_norm") and type(module) not in norms)
        or (path.rpartition(".")[2] in ("norm1", "norm2") and type(module) not in norms)
        or (path == "patch_embed.proj" and type(module) is not nn.Conv2d)
        or (path == "patch_embed.norm" and type(module) is not nn.Identity)
        or path == "attn_pool"
    ]
    if wrong:
        raise HostError(
            f"Found {wrong[0]} of another kind. Expected timm's VisionTransformer with its plain blocks, LayerNorm, and a head "
            "that pools without a module, all without grafts. Use such a network."
        )


def whole(model: nn.Module) -> Subnetwork:
    """All of the model."""
    block = model.blocks[0]
    return Subnetwork(block.attn.num_heads, block.mlp.fc1.out_features, len(model.blocks))


def masked_norm(norm: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """LayerNorm over the features with mask 1; the others stay 0.

    x (B, N, D), mask (B, 1, D) of 0 and 1 -> (B, N, D).
    """
    if isinstance(norm, nn.Identity):
        return x
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = mask.sum(-1, keepdim=True)
        mean = (wide * mask).sum(-1, keepdim=True) / count
        centred = (wide - mean) * mask
        variance = centred.square().sum(-1, keepdim=True) / count
        return ((centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias) * mask).to(x.dtype)


def masked_logits(model: nn.Module, images: Tensor, heads: Tensor, hidden: Tensor, depth: Tensor) -> Tensor:
    """Each image through a sub-network of its own, by masks.

    images (B, C, H, W), heads, hidden, depth (B,) as in `Subnetwork` -> logits (B, classes).
    """
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    of_heads = prefix_mask(heads, attention.num_heads)  # (B, heads)
    features = of_heads.repeat_interleave(attention.head_dim, dim=1)[:, None]  # (B, 1, D)
    inner = prefix_mask(hidden, mlp.fc1.out_features)[:, None]
    x = model.patch_drop(model._pos_embed(model.patch_embed(images))) * features
    x = masked_norm(model.norm_pre, x, features)
    for i, block in enumerate(model.blocks):
        there = (depth > i).to(features.dtype)[:, None, None] * features
        arguments = block, x, there, features, of_heads, inner
        x = checkpoint(masked_block, *arguments) if model.grad_checkpointing else masked_block(*arguments)
    pooled = model.pool(masked_norm(model.norm, x, features))
    pooled = masked_norm(model.fc_norm, pooled[:, None], features)[:, 0]
    return model.head(model.head_drop(pooled))


def masked_block(block: nn.Module, x: Tensor, there: Tensor, features: Tensor, heads: Tensor, hidden: Tensor) -> Tensor:
    """timm's block under masks of 0 and 1: x (B, N, D) -> (B, N, D).

    there: (B, 1, D), features where the image has this block, else 0. hidden: (B, 1, of the MLP).
    """
    y = masked_attention(block.attn, masked_norm(block.norm1, x, features), heads)
    x = x + there * block.drop_path1(block.ls1(y))
    mlp = block.mlp
    y = mlp.drop1(mlp.act(mlp.fc1(masked_norm(block.norm2, x, features)))) * hidden
    return x + there * block.drop_path2(block.ls2(mlp.drop2(mlp.fc2(y))))


def masked_attention(attention: nn.Module, x: Tensor, heads: Tensor) -> Tensor:
    """timm's attention with the outputs of some heads at 0.

    x (B, N, D), heads (B, H) of 0 and 1 -> (B, N, D).
    """
    q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    dropout = attention.attn_drop.p if attention.training else 0.0
    z = F.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v, dropout_p=dropout)
    z = z * heads[:, :, None, None]
    return attention.proj_drop(attention.proj(z.transpose(1, 2).flatten(2)))


def prefix_mask(counts: Tensor, size: int) -> Tensor:
    """(B,) -> (B, size): 1 for the first `counts` of each row, else 0."""
    return (torch.arange(size, device=counts.device) < counts[:, None]).float()


def cut_out(model: nn.Module, part: Subnetwork) -> nn.Module:
    """A network of timm's with the part's weights, in eval mode: it computes what masks do.

    Raises HostError for a model that timm did not create.
    """
    attention = model.blocks[0].attn
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is None:
        raise HostError("Found a model without a name of timm's. Expected one from timm.create_model. Create it so.")
    width = part.heads * attention.head_dim
    size = {"embed_dim": width, "num_heads": part.heads, "depth": part.depth, "mlp_ratio": (part.hidden + 0.5) / width}
    new = timm.create_model(architecture, **(get_model_args(model) | size)).to(next(model.parameters()))
    new.pretrained_cfg = dict(model.pretrained_cfg)
    tensors, shapes = model.state_dict(), {name: value.shape for name, value in new.state_dict().items()}
    new.load_state_dict({name: cut(name, tensors[name], shape, part, attention) for name, shape in shapes.items()})
    return new.eval()


def cut(name: str, tensor: Tensor, shape: torch.Size, part: Subnetwork, attention: nn.Module) -> Tensor:
    """The first entries of a tensor along each axis; of a joint projection of q, k, v each."""
    if ".qkv." in name:
        tensor = tensor.unflatten(0, (3, attention.num_heads, attention.head_dim))[:, : part.heads].flatten(0, 2)
    return tensor[tuple(slice(n) for n in shape)]
