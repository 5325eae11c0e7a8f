"""SVT: a pyramid whose first stage mixes through wavelets, and the skeleton it shares."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm, get_device_dtype, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import PyramidVisionTransformerV2, checkpoint_filter_fn
from timm.models.volo import ClassBlock
from torch import Tensor, nn

from vitreous.architectures._timm import config, create
from vitreous.base.checkpoint_names import renamed
from vitreous.base.errors import SettingError
from vitreous.hosts.mixer import Mixer, mixers_in
from vitreous.layers.pyramid import check_stages, head_width
from vitreous.layers.stream import TokenState
from vitreous.mechanisms.mixer.scattering import Scatter, interpolated

DENSE = 0.5  # share of the auxiliary head's logits
BLOCKS = 4  # on the diagonals of the mixer's layers
THEIRS = {  # names in the authors' code, once timm has made them those of its PVTv2
    r"complex_weight_ll$": "low",
    r"complex_weight_lh_b([12])$": r"b\1",
    r"complex_weight_lh_([12])$": r"w\1",
    r"^stages\.3\.norm\.": "norm.",
}
SMALL = {"stem_width": 32, "embed_dims": (64, 128, 320, 448), "num_heads": (2, 4, 10, 14), "depths": (3, 4, 6, 3)}
BASE = {"stem_width": 64, "embed_dims": (64, 128, 320, 512), "num_heads": (2, 4, 10, 16), "depths": (3, 4, 12, 3)}
LARGE = {"stem_width": 64, "embed_dims": (96, 192, 384, 512), "num_heads": (3, 6, 12, 16), "depths": (3, 6, 18, 3)}
PYRAMID = {
    "first_conv": "patch_embed.conv.0",
    "classifier": ("head", "aux_head"),
    "pool_size": (7, 7),
    "fixed_input_size": True,
}


class Stem(nn.Module):
    """Four convolutions and a norm: (B, C, H, W) -> (B, H / 4, W / 4, D)."""

    def __init__(self, in_chans: int, hidden: int, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for source, kernel, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers += [
                nn.Conv2d(source, hidden, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, width, 3, 2, 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x)).permute(0, 2, 3, 1))


class GridCall(Mixer):
    """A mixer called as the attention of timm's PVTv2 is, with the grid beside the tokens."""

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        return super().forward(x, state=TokenState(grid=tuple(feat_size)))


class PyramidScatter(GridCall, Scatter):
    """`Scatter` in a stage of a pyramid."""


class MixerPyramid(PyramidVisionTransformerV2):
    """timm's PVTv2 with a convolutional stem, mixers in the first stages, and class attention.

        per block x = x + mix(LN(x)), x = x + FFN(LN(x));   mix: `mixer` in the first `mixer_stages`
            stages, full attention in the others;   FFN with a 3 x 3 depthwise convolution
        class = mean of the tokens, one block of class attention, LN
        logits = head(class) + 0.5 max over patches of aux_head(patches)

    Differs: the authors train the two heads apart, by token labelling; here the logits above are
        those of training, too.
    Settings: img_size: the mixers' weights are made for it; other sizes are resampled as the mixer
        does it. stem_width: channels within the stem. embed_dims, num_heads, mlp_ratios, depths: by
        stage. aux_head: the head over patches, trained by token labelling in the papers.
    """

    mixer: ClassVar[type[GridCall]]
    mixer_stages: ClassVar[int]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        stem_width: int = 32,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: tuple[int, ...] = SMALL["embed_dims"],
        num_heads: tuple[int, ...] = SMALL["num_heads"],
        depths: tuple[int, ...] = SMALL["depths"],
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        aux_head: bool = True,
        **arguments: Any,
    ):
        stages = {"embed_dims": embed_dims, "num_heads": num_heads, "depths": depths, "mlp_ratios": mlp_ratios}
        check_stages(**stages)
        for width, heads in zip(embed_dims, num_heads, strict=True):
            head_width(width, heads)
        super().__init__(in_chans, num_classes, "avg", sr_ratios=1, **stages, **arguments)
        width = self.num_features
        self.patch_embed = Stem(in_chans, stem_width, self.feature_info[0]["num_chs"])
        for i, stage in enumerate(self.stages[: self.mixer_stages]):
            for block in stage.blocks:
                mixer = self.mixer.instead_of(block.attn)
                self.initialise_mixer(mixer, grid_of(img_size, i), self.feature_info[i]["num_chs"])
                block.attn = mixer.to(block.norm1.weight)
        last = self.stages[-1].blocks[-1].attn
        self.post_network = nn.ModuleList(
            [ClassBlock(width, last.num_heads, mlp_ratio=mlp_ratios[-1], qkv_bias=True, norm_layer=LayerNorm)]
        )
        # the last norm stands behind class attention
        self.norm, self.stages[-1].norm = self.stages[-1].norm, nn.Identity()
        self.aux_head = nn.Linear(width, num_classes) if aux_head and num_classes else nn.Identity()
        for new in (self.patch_embed, self.post_network, self.aux_head):
            new.apply(self._init_weights).to(self.norm.weight)
        self.global_pool = checked_pool(global_pool)

    def initialise_mixer(self, mixer: GridCall, grid: tuple[int, int], width: int) -> None:
        """Give a mixer the parameters of a stage's grid and width."""
        mixer.initialise(grid, width)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the mixers' weights for another image size."""
        for name, mixer in mixers_in(self).items():
            mixer.set_grid(grid_of(img_size, int(name.split(".")[1])))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^patch_embed", "blocks": [(r"^stages\.(\d+)", None), (r"^post_network|^norm", (99999,))]}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Start both heads anew; global_pool: token (class token), avg (of patches) or none."""
        factory = get_device_dtype(self)
        self.global_pool = self.global_pool if global_pool is None else checked_pool(global_pool)
        super().reset_classifier(num_classes)
        if isinstance(self.aux_head, nn.Linear):
            self.aux_head = nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()
            self.aux_head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of stages (B, D, H, W); the final one is that of `forward_features`."""
        x, intermediates = super().forward_intermediates(x, indices, norm, stop_early, output_fmt)
        if intermediates_only:
            return intermediates
        return self.class_attention(x) if x.shape[1] == self.norm.weight.shape[0] else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        stages = len(self.stages)
        indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.stages) < stages:
            self.post_network, self.aux_head = nn.ModuleList(), nn.Identity()
        return indices

    def class_attention(self, x: Tensor) -> Tensor:
        """Patches (B, D, H, W) -> class token and patches (B, 1 + N, D)."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        for block in self.post_network:
            x = block(x)
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> class token and patches (B, 1 + N, D)."""
        return self.class_attention(super().forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = {"token": x[:, 0], "avg": x[:, 1:].mean(1)}.get(self.global_pool, x)
        pooled = self.head_drop(pooled)
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if not self.global_pool or isinstance(self.aux_head, nn.Identity):
            return logits
        return logits + DENSE * self.aux_head(x[:, 1:]).amax(1)


class SVT(MixerPyramid):
    """Scattering Vision Transformer: the first stage mixes through a wavelet transform.

    Paper: Patro, Agneeswaran 2023, arXiv 2311.01310.
    """

    mixer = PyramidScatter
    mixer_stages = 1

    def initialise_mixer(self, mixer: GridCall, grid: tuple[int, int], width: int) -> None:
        if width % BLOCKS:
            raise SettingError(
                f"Found embed_dims with {width} channels where wavelets are mixed. Expected a multiple of {BLOCKS}, the blocks "
                f"of the mixer's layers. Give such a number, as {width - width % BLOCKS or BLOCKS}."
            )
        mixer.initialise(grid, width, BLOCKS)


def checked_pool(name: str) -> str:
    """The name of a pooling that these networks have; else SettingError."""
    if name not in ("token", "avg", ""):
        raise SettingError(f"Found global_pool={name!r}. Expected token, avg or an empty text (none). Give one of these.")
    return name


def grid_of(img_size: int | tuple[int, int], stage: int) -> tuple[int, int]:
    """(H, W) of the tokens of a stage: a place for 4 pixels, then 8, 16, 32, rounded up."""
    height, width = (-(-n // 2 ** (stage + 2)) for n in to_2tuple(img_size))
    return height, width


def filtered(tensors: dict[str, Tensor], model: SVT) -> dict[str, Tensor]:
    """A checkpoint of the authors' code under our names, its gains on the model's grid."""
    learned = {name: value for name, value in tensors.items() if ".xfm." not in name and ".ifm." not in name}  # no taps
    changed = renamed(checkpoint_filter_fn(learned, model), THEIRS)
    for path, mixer in mixers_in(model).items():
        if f"{path}.low" in changed:
            changed[f"{path}.low"] = interpolated(changed[f"{path}.low"], mixer.low.shape[1:])
    return changed


default_cfgs = generate_default_cfgs(dict.fromkeys(("svt_h_s", "svt_h_b", "svt_h_l"), config("arXiv:2311.01310", **PYRAMID)))


@register_model
def svt_h_s(pretrained: bool = False, **kwargs: Any) -> SVT:
    """SVT-H-S: 224 px; widths 64, 128, 320, 448; wavelets in 3 of 16 blocks."""
    return create(SVT, "svt_h_s", pretrained, filtered, None, **(SMALL | kwargs))


@register_model
def svt_h_b(pretrained: bool = False, **kwargs: Any) -> SVT:
    """SVT-H-B: 224 px; widths 64, 128, 320, 512; wavelets in 3 of 22 blocks."""
    return create(SVT, "svt_h_b", pretrained, filtered, None, **(BASE | kwargs))


@register_model
def svt_h_l(pretrained: bool = False, **kwargs: Any) -> SVT:
    """SVT-H-L: 224 px; widths 96, 192, 384, 512; wavelets in 3 of 30 blocks."""
    return create(SVT, "svt_h_l", pretrained, filtered, None, **(LARGE | kwargs))
