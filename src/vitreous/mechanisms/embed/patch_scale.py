"""Patches of another size, down to single pixels, with the host's kernels and positions resampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from timm.layers import resample_patch_embed
from torch import nn
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.patch_grid import regridded
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class PatchScale(Mechanism):
    """The host with patches of p x p pixels instead of P x P: as many more tokens as patches are smaller.

        x[n] = w' * patch n + b + position'[n]          (H / p) (W / p) tokens
        w' = pinv(R)^T w,  R: (p^2, P^2), the bicubic resize of a patch from P x P to p x p pixels
        position' = the positions as a picture, resized to (H / p, W / p)

    Paper: Wang, Yu, Wei, Shao, Zhou, Yuille, Xie 2025, arXiv 2502.03738 (smaller patches, down to one pixel);
        Beyer et al. 2022, arXiv 2212.08013 (FlexiViT, eq. 3: the pseudo-inverse resize).
    Differs: the paper trains each patch size from scratch, this one starts from the host's weights. Its causal Mamba-2 network
        is not here: a mixer of the catalogue takes the place of attention.
    At start: changes the output; patch = P is the host, bit for bit.
    Cost: N = H W / p^2 tokens. Attention takes 2 N^2 D multiply-adds per block, so its cost grows as 1 / p^4, that of linear
        layers and of mixers with a cost linear in N as 1 / p^2. Parameters: C D (p^2 - P^2) + D H W (1 / p^2 - 1 / P^2) more.
    Settings: patch: p, in pixels; default half of the host's.
    Raises: HostError on rotary hosts and where patches are not timm's; GraftError where other grafts are in the model, since
        some are made for the grid; SettingError where p does not divide the sides of the image.
    """

    paper: ClassVar[str] = "Wang et al. 2025, arXiv 2502.03738; Beyer et al. 2022, arXiv 2212.08013"
    requires: ClassVar[tuple[str, ...]] = ("grid", "insert")
    keeps_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("patch_scale:patch=16",)

    patch: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.patch is not None and self.patch < 1:
            raise SettingError(f"Found patch={self.patch}. Expected 1 pixel or more. Give such a side.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        projection = slots.plain_projection(model, self.name)
        patch = half(model.patch_embed.patch_size) if self.patch is None else (self.patch, self.patch)
        return {"patch_embed.proj": resampled(projection, patch)} | regridded(model, patch, self.name)


def half(patch: tuple[int, int]) -> tuple[int, int]:
    """Half of a patch's sides. Raises SettingError where that is no whole number."""
    if patch[0] % 2 or patch[1] % 2:
        raise SettingError(
            f"Found patches of {patch[0]} x {patch[1]} pixels and no patch. Expected one, since half of that is no whole "
            "number. Give for example patch=7."
        )
    return patch[0] // 2, patch[1] // 2


def resampled(projection: nn.Conv2d, patch: tuple[int, int]) -> nn.Conv2d:
    """The projection with kernels for `patch` pixels: w' = pinv(R)^T w, so that w' R x = w R^+ R x is nearest to w x.

    The same where patches become larger. Where they become smaller, patches lose what that size cannot hold: for 16 to 8
    pixels 9 % of a constant one (at its edges), 90 % of white noise.
    """
    weight, bias = projection.weight, projection.bias
    new = skip_init(
        nn.Conv2d, projection.in_channels, projection.out_channels, kernel_size=patch, stride=patch, bias=bias is not None
    )
    kernels = resample_patch_embed(weight.detach(), list(patch)).clone()
    new.weight = nn.Parameter(kernels, requires_grad=weight.requires_grad)
    new.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return new
