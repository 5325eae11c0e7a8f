"""CI2P: patches out of a frozen encoder of image compression, a quarter as many as before."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import HostError, SettingError
from vitreous.hosts.patch_grid import regridded
from vitreous.mechanism import Mechanism

PEDESTAL = 2.0**-36  # of the stored roots of beta and gamma
LEAST = 1e-6  # of beta


@dataclass(frozen=True, kw_only=True)
class CI2P(Mechanism):
    """Patches come from the frozen encoder of a compressor and two inverted residual units.

        latent = conv_k(GDN(conv_(k-1)( ... GDN(conv_1(image)))))        5 x 5, stride 2 each; frozen; k = 4 for stride 32
        GDN: y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)             channel i at one place
        patches = unit_2(unit_1(latent)),  unit: 1 x 1, 3 x 3 per channel, 1 x 1, each with batch norm, ReLU6 between
        unit_1 keeps width and side, unit_2 halves the side and gives D channels

    Paper: Zhao, Sun 2025, arXiv 2502.10120 (CI2P-ViT); encoder: Balle et al. 2018, arXiv 1802.01436 (factorized prior).
    Differs: the host's class token, pooling and head stay. Its form with two scales is not here. How many units there are is
        our reading: two meet the published counts of parameters and operations. Pixels go back to 0 to 1 before the encoder.
    At start: changes the output; the host's projection is replaced (keeps_weights is False). The encoder is drawn at random
        until `vitreous.load_weights` reads a compressor's file.
    Cost: at 256 pixels 64 patches in place of 256, so the blocks of ViT-B/16 need 0.24 of their multiply-adds; the encoder has
        2.8 G of its own, 1.5 M frozen numbers, and the units 1.6 M parameters.
    Settings: stride: side of a patch in pixels, a power of 2 from 4; default twice the host's. channels, latent: of the
        encoder, as in its qualities 1 to 5. expansion: of the units. seed: of all weights.
    Raises: HostError on rotary hosts, where patches are not timm's, and for other images than with 3 channels; GraftError where
        other grafts are in the model; SettingError.
    """

    paper: ClassVar[str] = "Zhao, Sun 2025, arXiv 2502.10120"
    requires: ClassVar[tuple[str, ...]] = ("grid", "insert")
    keeps_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("ci2p:stride=8,channels=6,latent=8,expansion=2",)

    stride: int | None = None
    channels: int = 128
    latent: int = 192
    expansion: int = 6
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.stride is not None and (self.stride < 4 or self.stride & (self.stride - 1)):
            raise SettingError(f"Found stride={self.stride}. Expected a power of 2, 4 or more. Give such a number, as 32.")
        for name in ("channels", "latent", "expansion"):
            if getattr(self, name) < 1:
                raise SettingError(f"Found {name}={getattr(self, name)}. Expected 1 or more. Give such a number.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        inputs, patch = slots.plain_projection(model, self.name).in_channels, model.patch_embed.patch_size
        if inputs != 3:
            raise HostError(
                f"The model takes images of {inputs} channels. Expected 3, for which the encoder of {self.name} is. Create the "
                "model with in_chans=3."
            )
        stride = 2 * patch[0] if self.stride is None else self.stride
        if self.stride is None and (patch[0] != patch[1] or stride < 4 or stride & (stride - 1)):
            raise SettingError(
                f"Found patches of {patch[0]} x {patch[1]} pixels and no stride. Expected one, since twice that is no power of "
                "2. Give for example stride=32."
            )
        config = getattr(model, "pretrained_cfg", {})
        new = skip_init(CompressedPatches, slots.width(model), stride, self.channels, self.latent, self.expansion)
        new.initialise(torch.Generator().manual_seed(self.seed), config.get("mean", (0.5,) * 3), config.get("std", (0.5,) * 3))
        return {"patch_embed.proj": new} | regridded(model, (stride, stride), self.name)

    def renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A factorized-prior compressor's encoder under our names; its decoder and entropy model are left out."""
        other = re.compile(r"^(g_s\.|entropy_bottleneck\.|g_a\.\d+\.(beta|gamma)_reparam\.)")
        kept = {name: value for name, value in tensors.items() if not other.match(name)}
        return {re.sub(r"^g_a\.", "patch_embed.proj.encoder.", name): value for name, value in kept.items()}


class CompressedPatches(nn.Module):
    """Images (B, 3, H, W), normed -> patches as a picture, (B, D, H / stride, W / stride)."""

    def __init__(self, width: int, stride: int, channels: int, latent: int, expansion: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        sides = [3, *[channels] * (int(math.log2(stride)) - 2), latent]
        layers = [[FrozenConv(a, b, **dd), GDN(b, **dd)] for a, b in pairwise(sides)]
        self.encoder = nn.Sequential(*[layer for pair in layers for layer in pair][:-1])
        self.units = nn.Sequential(Unit(latent, latent, 1, expansion, **dd), Unit(latent, width, 2, expansion, **dd))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(3, 1, 1, **dd))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Draw all weights; mean, std: of the pixels of images, as the host gets them."""
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))
        for module in self.modules():
            if isinstance(module, GDN):
                module.beta.fill_(1 + PEDESTAL).sqrt_()
                module.gamma.copy_((0.1 * torch.eye(len(module.gamma)) + PEDESTAL).sqrt())
            elif isinstance(module, Norm):
                for one, zero in ((module.weight, module.bias), (module.running_var, module.running_mean)):
                    one.fill_(1)
                    zero.zero_()
            elif isinstance(module, (FrozenConv, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                module.weight.normal_(std=math.sqrt(2 / fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.units(self.encoder(images * self.std + self.mean))


class FrozenConv(nn.Module):
    """A 5 x 5 convolution of stride 2 whose weights are buffers: it never trains."""

    def __init__(self, inputs: int, outputs: int, device=None, dtype=None):
        super().__init__()
        self.register_buffer("weight", torch.empty(outputs, inputs, 5, 5, device=device, dtype=dtype))
        self.register_buffer("bias", torch.empty(outputs, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=2, padding=2)


class GDN(nn.Module):
    """Generalized divisive normalization; beta (C,) and gamma (C, C) are stored as roots, and never train."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        self.register_buffer("beta", torch.empty(channels, device=device, dtype=dtype))
        self.register_buffer("gamma", torch.empty(channels, channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # squares need the range of float32
            beta, gamma = squared(self.beta.to(wide), LEAST), squared(self.gamma.to(wide), 0.0)
            return divided(x.to(wide), beta, gamma).to(x.dtype)


class Unit(nn.Module):
    """An inverted residual: x (B, C, H, W) -> (B, outputs, H / stride, W / stride), plus x where that has its shape."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, device=None, dtype=None):
        super().__init__()
        dd, hidden = {"device": device, "dtype": dtype}, inputs * expansion
        self.residual = inputs == outputs and stride == 1
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False, **dd)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False, **dd)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False, **dd)
        self.norm1, self.norm2, self.norm3 = (Norm(channels, **dd) for channels in (hidden, hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm1(self.expand(x)))
        y = self.norm3(self.project(F.relu6(self.norm2(self.depthwise(y)))))
        return x + y if self.residual else y


class Norm(nn.Module):
    """A batch norm (B, C, H, W) -> (B, C, H, W) that counts no batches, which a moving mean does not need."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) for _ in range(2))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


def squared(stored: Tensor, least: float) -> Tensor:
    """The number behind a stored root: max(stored, sqrt(least + e))^2 - e with e = 2^-36, at least `least`."""
    return stored.clamp(min=math.sqrt(least + PEDESTAL)).square() - PEDESTAL


def divided(x: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2): x (B, C, H, W), beta (C,), gamma (C, C) -> (B, C, H, W)."""
    return x * F.conv2d(x.square(), gamma[:, :, None, None], beta).rsqrt()
