"""SpectFormer, plain and as a pyramid: spectral gates first, then attention."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import checkpoint_filter_fn as pyramid_names
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as resized_positions
from torch import Tensor, nn

from vitreous import slots
from vitreous.architectures._timm import config, create
from vitreous.architectures.svt import BASE, LARGE, PYRAMID, SMALL, GridCall, MixerPyramid
from vitreous.base.checkpoint_names import renamed
from vitreous.base.errors import SettingError
from vitreous.hosts.mixer import mixers_in
from vitreous.layers.fourier import resized
from vitreous.mechanisms.mixer.spectral_gate import Gate


class SpectralBlock(Block):
    """One residual around filter and MLP: x = x + MLP(LN(gate(LN(x)))).

    (B, N, D) -> (B, N, D). The second half has nothing left to do.
    """

    def attention_half(self, x: Tensor, **arguments: Any) -> Tensor:
        return x + self.drop_path2(self.mlp(self.norm2(self.attn(self.norm1(x), **arguments))))

    def mlp_half(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.attention_half(x, attn_mask=attn_mask, is_causal=is_causal)


class SpectFormer(VisionTransformer):
    """A ViT without class token whose first blocks filter the picture by frequency.

        first `spectral` blocks x = x + MLP(LN(irfft2(W * rfft2(LN(x)))));  then ViT blocks
        logits = Linear(mean(LN(x)))

    Paper: Patro, Namboodiri, Agneeswaran 2023, arXiv 2304.06446.
    Settings: spectral: how many of the blocks; all others are of timm's `VisionTransformer`.
    """

    def __init__(self, spectral: int = 4, **arguments: Any):
        fixed = {"class_token": False, "global_pool": "avg", "fc_norm": False}
        super().__init__(**(fixed | arguments))
        # a gate gives class tokens nothing, so that with gates alone every image would get the same logits
        most = len(self.blocks) - (self.num_prefix_tokens > 0 and self.global_pool == "token")
        if not 0 <= spectral <= most:
            raise SettingError(
                f"Found spectral={spectral} of {len(self.blocks)} blocks and global_pool={self.global_pool!r}. Expected "
                f"0 to {most}: a head that reads class tokens needs a block with attention. Give such a number."
            )
        for block in self.blocks[:spectral]:
            gate = Gate.instead_of(block.attn)
            gate.initialise(self.patch_embed.grid_size, self.embed_dim)
            block.attn = gate.to(self.patch_embed.proj.weight)
            block.__class__ = SpectralBlock
            del block.drop_path1  # one sum, one stochastic depth
        for path, module in slots.open_stream(self, "spectformer").items():
            self.set_submodule(path, module)


class PyramidGate(GridCall, Gate):
    """`Gate` in a stage of a pyramid."""


class SpectFormerH(MixerPyramid):
    """SpectFormer as a pyramid: the first two stages filter by frequency, two residuals.

    Paper: Patro, Namboodiri, Agneeswaran 2023, arXiv 2304.06446.
    """

    mixer = PyramidGate
    mixer_stages = 2


def refitted(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Spectral weights of another, square grid on the model's: the kernel in patches stays."""
    for path, mixer in mixers_in(model).items():
        name = f"{path}.complex_weight"
        if name in tensors and tensors[name].shape != mixer.complex_weight.shape:
            rows = tensors[name].shape[0]
            weight = resized(torch.view_as_complex(tensors[name].float().contiguous()), (rows, rows), mixer.grid)
            tensors = tensors | {name: torch.view_as_real(weight)}
    return tensors


def filtered(tensors: dict[str, Tensor], model: SpectFormer) -> dict[str, Tensor]:
    """A checkpoint of the authors' code under our names, on the model's grid."""
    return refitted(resized_positions(renamed(tensors, {r"^(blocks\.\d+)\.filter\.": r"\1.attn."}), model), model)


def filtered_pyramid(tensors: dict[str, Tensor], model: SpectFormerH) -> dict[str, Tensor]:
    """A checkpoint of the authors' code under our names, on the model's grids."""
    return refitted(renamed(pyramid_names(tensors, model), {r"^stages\.3\.norm\.": "norm."}), model)


PLAIN = ("spectformer_tiny", "spectformer_xsmall", "spectformer_small", "spectformer_base")
PYRAMIDS = ("spectformer_h_s", "spectformer_h_b", "spectformer_h_l")
PAPER = "arXiv:2304.06446"
default_cfgs = generate_default_cfgs(
    dict.fromkeys(PLAIN, config(PAPER, "patch_embed.proj", fixed_input_size=True))
    | dict.fromkeys(PYRAMIDS, config(PAPER, **PYRAMID))
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> SpectFormer:
    return create(SpectFormer, name, pretrained, filtered, 3, **kwargs)


@register_model
def spectformer_tiny(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-T: 224 px; width 256, 4 heads, 12 blocks, the first 4 spectral."""
    return _create("spectformer_tiny", pretrained, **({"embed_dim": 256, "num_heads": 4, "depth": 12} | kwargs))


@register_model
def spectformer_xsmall(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-XS: 224 px; width 384, 6 heads, 12 blocks, the first 4 spectral."""
    return _create("spectformer_xsmall", pretrained, **({"embed_dim": 384, "num_heads": 6, "depth": 12} | kwargs))


@register_model
def spectformer_small(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-S: 224 px; width 384, 6 heads, 19 blocks, the first 4 spectral."""
    return _create("spectformer_small", pretrained, **({"embed_dim": 384, "num_heads": 6, "depth": 19} | kwargs))


@register_model
def spectformer_base(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-B: 224 px; width 512, 8 heads, 19 blocks, the first 4 spectral."""
    return _create("spectformer_base", pretrained, **({"embed_dim": 512, "num_heads": 8, "depth": 19} | kwargs))


@register_model
def spectformer_h_s(pretrained: bool = False, **kwargs: Any) -> SpectFormerH:
    """SpectFormer-H-S: 224 px; widths 64, 128, 320, 448, 16 blocks, the first 7 spectral."""
    return create(SpectFormerH, "spectformer_h_s", pretrained, filtered_pyramid, None, **(SMALL | kwargs))


@register_model
def spectformer_h_b(pretrained: bool = False, **kwargs: Any) -> SpectFormerH:
    """SpectFormer-H-B: 224 px; widths 64, 128, 320, 512, 22 blocks, the first 7 spectral."""
    return create(SpectFormerH, "spectformer_h_b", pretrained, filtered_pyramid, None, **(BASE | kwargs))


@register_model
def spectformer_h_l(pretrained: bool = False, **kwargs: Any) -> SpectFormerH:
    """SpectFormer-H-L: 224 px; widths 96, 192, 384, 512, 30 blocks, the first 9 spectral."""
    return create(SpectFormerH, "spectformer_h_l", pretrained, filtered_pyramid, None, **(LARGE | kwargs))
