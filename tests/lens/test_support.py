"""The support matrix: attention classes of timm, torchvision and Hugging Face, each against a map written out by hand.

docs/support.md shows what this file finds. `python tests/lens/test_support.py` writes the page again.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from timm import models as T
from torch import Tensor, nn
from torchvision.models import swin_transformer as torchvision_swin
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention
from transformers.models.swin.modeling_swin import SwinAttention
from transformers.models.vit.modeling_vit import ViTAttention

from vitreous import graft
from vitreous.base.errors import HostError
from vitreous.lens.coordinates.layout import Layout
from vitreous.lens.tap import AttentionCall, trace, watch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens.by_hand import BATCH, BY_HAND, hugging_face, hugging_face_swin, separate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One small model. fused: the states of timm's switch under which it is built; () for libraries without it.

    gain: how large the weights of its attention are, as standard deviation of what they make of unit inputs.
    """

    name: str
    size: tuple[int, int]
    build: Callable[[], nn.Module]
    fused: tuple[bool, ...] = (True, False)
    gain: float = 1.5


@dataclass
class Row:
    """What was found of one attention class of one model."""

    model: str
    attention: str
    routes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    error: float = 0.0
    results: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        joined = [" / ".join(dict.fromkeys(map(str, values))) for values in (self.routes, self.kinds, self.calls)]
        shown = ["; ".join(dict.fromkeys(values)) for values in (self.places, self.results)]
        return [self.model, self.attention, *joined, shown[0], f"{self.error:.0e}" if self.calls != [0] else "", shown[1]]


def timm_case(model: str, note: str = "", size: tuple[int, int] = (64, 96), gain: float = 1.5, **settings) -> Case:
    return Case(f"{model}, {note}" if note else model, size, lambda: timm.create_model(model, **settings), gain=gain)


def with_svda(case: Case, settings: str = "scale=sqrt") -> Case:
    """The model with SVDA in the linear layers of its attention, whose maps are then those of the grafted model."""
    return replace(case, name=f"{case.name}, svda:{settings}", build=lambda: graft(case.build(), f"svda:{settings}"))


# --- the models -------------------------------------------------------------------------------------------------------

VIT = dict(embed_dim=32, depth=2, num_heads=2, img_size=(64, 96))
SQUARE = VIT | dict(img_size=64)
SWIN = dict(img_size=(64, 96), window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4))
PVT = dict(embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
MVIT = dict(depths=(1, 2), embed_dim=(16, 32), num_heads=(1, 2), stride_q=((1, 1), (2, 2)))
LEVIT = dict(img_size=128, embed_dim=(32, 32, 32), num_heads=(2, 2, 2), depth=(1, 1, 1))
FOUR = dict(depths=(1, 1, 1, 1))
HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=16)
V = T.vision_transformer
SWIN_T = timm_case("swin_tiny_patch4_window7_224", **SWIN)
PVT_B0 = timm_case("pvt_v2_b0", **PVT)
TWINS = timm_case(
    "twins_svt_small",
    img_size=(64, 96),
    embed_dims=(16, 16, 32, 32),
    depths=(2, 2, 2, 2),
    num_heads=(1, 2, 2, 2),
    wss=(4, 4, 2, 1),
)
VOLO = dict(layers=(1, 1, 1, 1), img_size=64, embed_dims=(16, 32, 32, 32), stem_hidden_dim=16, num_heads=(2, 2, 2, 2))
VOLO_D = Case("volo", (64, 64), lambda: T.volo.VOLO(**VOLO), gain=3.0)
CAIT = timm_case("cait_xxs24_224", **VIT)
BRANCHES = dict(img_size=96, img_scale=(1.0, 1.0), embed_dim=(16, 32), num_heads=(2, 2), depth=((1, 1, 0), (1, 1, 0)))
CROSSVIT = timm_case("crossvit_9_240", size=(96, 96), **BRANCHES)


def from_config(kind: str, implementation: str, **settings) -> Case:
    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(**settings, attn_implementation=implementation)
        return getattr(transformers, f"{kind}Model")(config)

    return Case(f"Hugging Face {kind}, {implementation}", (64, 64), build, ())


class Einsum(nn.Module):
    """A ViT block as one writes it by hand: no attention module of any library, einsum, scores divided by a number."""

    def __init__(self, width: int = 32, heads: int = 2):
        super().__init__()
        self.heads, self.stem, self.token = heads, nn.Conv2d(3, width, 16, 16), nn.Parameter(torch.zeros(1, 1, width))
        self.attention = EinsumAttention(width, heads)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.repeat(len(x), 1, 1), x], dim=1)
        return (x + self.attention(nn.functional.layer_norm(x, x.shape[-1:])))[:, 0]


class EinsumAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("b n h k, b m h k -> b h n m", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhk->bnhk", torch.softmax(scores, dim=-1), v).flatten(2)


class Stem(nn.Sequential):
    """A filter of 16 x 16 pixels before one attention of maps (B, C, h, w)."""

    def __init__(self, attention: nn.Module):
        super().__init__(nn.Conv2d(3, 32, 16, 16), attention)


class Tokens(nn.Sequential):
    """Patches as tokens before a PyTorch encoder."""

    def __init__(self):
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        super().__init__(nn.Conv2d(3, 32, 16, 16), nn.Flatten(2), Transposed(), encoder)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Flatten()))


CASES = [
    timm_case("vit_tiny_patch16_224", **VIT),
    timm_case("vit_medium_patch16_reg4_gap_256", **VIT, qk_norm=True),
    timm_case("vit_tiny_patch16_224", "blocks in parallel", **VIT, block_fn=V.ParallelScalingBlock),
    timm_case("vit_tiny_patch16_224", "attn_layer=diff", **VIT, attn_layer="diff"),
    timm_case("vit_tiny_patch16_224", "diff in parallel", **VIT, block_fn=V.DiffParallelScalingBlock),
    timm_case("vit_tiny_patch16_224", "global_pool=prr", **VIT, global_pool="prr", class_token=False),
    timm_case("vit_base_patch16_siglip_224", **VIT),
    timm_case("deit_tiny_distilled_patch16_224", **VIT),
    timm_case("beit_base_patch16_224", **VIT),
    timm_case("eva02_tiny_patch14_224", **VIT | dict(img_size=(56, 84)), size=(56, 84)),
    timm_case("vit_small_patch16_dinov3", **VIT),
    timm_case("vit_small_patch16_rope_224", "attn_type=rope, one head of keys", **VIT, attn_type="rope", qkv_fused=False,
              num_kv_heads=1),
    timm_case("vit_relpos_small_patch16_224", "rel_pos_type=bias", **VIT, rel_pos_type="bias"),
    timm_case("samvit_base_patch16_224", **VIT, window_size=2, global_attn_indexes=(1,), use_rel_pos=True),
    timm_case("naflexvit_base_patch16_gap", embed_dim=32, depth=2, num_heads=2),
    SWIN_T,
    timm_case("swinv2_tiny_window8_256", **SWIN),
    timm_case("swinv2_cr_tiny_ns_224", **SWIN),
    timm_case("maxvit_nano_rw_256", img_size=(64, 96), embed_dim=(32, 32), depths=(1, 1), stem_width=16),
    timm_case("coatnet_nano_rw_224", gain=4.0, img_size=(64, 96), embed_dim=(32, 32, 32, 32), stem_width=16, **FOUR),
    timm_case("hiera_tiny_224", img_size=(64, 96), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
    timm_case("hieradet_small", size=(64, 64), gain=3.0, embed_dim=16, num_heads=1, stages=(1, 1, 2, 1),
              global_att_blocks=(3,)),
    Case("mvitv2", (64, 64), lambda: T.mvitv2.MultiScaleVit(T.mvitv2.MultiScaleVitCfg(**MVIT), 64)),
    Case("mvitv2, class token", (64, 64), lambda: T.mvitv2.MultiScaleVit(
        T.mvitv2.MultiScaleVitCfg(**MVIT, use_cls_token=True), 64)),
    PVT_B0,
    timm_case("pvt_v2_b2_li", gain=3.0, **PVT),
    TWINS,
    VOLO_D,
    CAIT,
    CROSSVIT,
    *map(with_svda, (SWIN_T, PVT_B0, TWINS, CAIT, CROSSVIT)),
    with_svda(VOLO_D, "scale=sqrt,layers=1-5"),
    timm_case("levit_128s", size=(128, 128), **LEVIT),
    timm_case("levit_conv_128s", size=(128, 128), **LEVIT),
    timm_case("xcit_nano_12_p16_224", img_size=(64, 96), embed_dim=32, depth=1, num_heads=2, cls_attn_layers=1),
    Case("coat", (64, 64), lambda: T.coat.CoaT(64, 4, embed_dims=(16, 16, 16, 16), serial_depths=(1, 1, 1, 1)), gain=3.0),
    timm_case("davit_tiny", embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 2), window_size=4),
    timm_case("tnt_s_patch16_224", size=(64, 64), img_size=64, embed_dim=32, inner_dim=16, depth=1, num_heads_inner=2,
              num_heads_outer=2),
    timm_case("visformer_tiny", size=(64, 64), img_size=64, embed_dim=32, depth=(0, 1, 1), num_heads=2),
    timm_case("convit_tiny", size=(64, 64), img_size=64, embed_dim=8, depth=3, num_heads=4, local_up_to_layer=2),
    Case("nest", (64, 64), lambda: T.nest.Nest(64, embed_dims=(16, 16, 16), num_heads=(1, 2, 2), depths=(1, 1, 1))),
    timm_case("pit_ti_224", size=(64, 64), img_size=64, base_dims=(8, 8, 8), depth=(1, 1, 1), heads=(1, 2, 2)),
    timm_case("tiny_vit_5m_224", embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2), window_sizes=(4, 4, 4, 4), **FOUR),
    timm_case("efficientformer_l1", size=(224, 224), embed_dims=(8, 8, 16, 32), depths=(1, 1, 1, 2), num_vit=1),
    timm_case("efficientformerv2_s0", size=(128, 128), img_size=128, embed_dims=(8, 8, 16, 32), num_vit=1, **FOUR),
    Case("caformer", (64, 96), lambda: T.metaformer.MetaFormer(
        dims=(16, 16, 32, 32), token_mixers=[T.metaformer.SepConv] * 2 + [T.metaformer.Attention] * 2,
        norm_layers=[T.metaformer.LayerNorm2dNoBias] * 2 + [T.metaformer.LayerNormNoBias] * 2, **FOUR)),
    Case("gcvit", (64, 64), lambda: T.gcvit.GlobalContextVit(img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 2),
                                                            window_ratio=(16, 16)), gain=3.0),
    Case("nextvit", (64, 64), lambda: T.nextvit.NextViT(3, stem_chs=(8, 8, 8), depths=(1, 1, 5, 1), mix_block_ratio=0.5)),
    timm_case("fastvit_sa12", size=(64, 64), layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 32)),
    timm_case("efficientvit_m0", size=(128, 128), img_size=128, embed_dim=(16, 16, 16), depth=(1, 1, 1), key_dim=(4, 4, 4),
              num_heads=(2, 2, 2)),
    timm_case("shvit_s1", size=(128, 128), embed_dim=(16, 32, 32), depth=(1, 1, 1), partial_dim=(8, 16, 16)),
    timm_case("mobilevit_xxs", size=(128, 128), gain=3.0),
    timm_case("edgenext_xx_small", size=(64, 64), depths=(1, 1, 2, 1), dims=(8, 16, 16, 32)),
    Case("attention of mobilenetv4", (128, 192), lambda: Stem(timm.layers.MultiQueryAttention2d(32, num_heads=2, kv_stride=2))),
    Case("attention of botnet", (128, 128), lambda: Stem(timm.layers.bottleneck_attn.BottleneckAttn(32, 32, 8, num_heads=2))),
    Case("attention of halonet", (128, 128), lambda: Stem(timm.layers.halo_attn.HaloAttn(32, 32, num_heads=2, block_size=4,
                                                                                        halo_size=1))),
    Case("head of resnet50_clip", (96, 96), lambda: Stem(timm.layers.AttentionPool2d(32, 6, num_heads=2, qkv_separate=True))),
    Case("torchvision VisionTransformer", (64, 64), lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 32), ()),
    Case("torchvision SwinTransformer", (64, 96), lambda: torchvision.models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4]), ()),
    Case("torchvision SwinTransformer v2", (64, 96), lambda: torchvision.models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], block=torchvision_swin.SwinTransformerBlockV2,
        downsample_layer=torchvision_swin.PatchMergingV2), ()),
    *(from_config(kind, how, **HF) for kind in ("ViT", "Dinov2", "CLIPVision") for how in ("sdpa", "eager")),
    *(from_config("Swin", how, image_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
      for how in ("sdpa", "eager")),
    Case("nn.TransformerEncoder", (64, 96), Tokens, ()),
    Case("einsum by hand", (64, 96), Einsum, ()),
    Case("mixer", (64, 64), lambda: T.mlp_mixer.MlpMixer(img_size=64, embed_dim=32, num_blocks=1), ()),
    timm_case("mobilevitv2_050", size=(64, 64)),
    Case("scripted modules", (64, 64), scripted, ()),
]  # fmt: skip
BY_HAND = BY_HAND | {
    ViTAttention: hugging_face, Dinov2Attention: hugging_face, CLIPAttention: hugging_face, SwinAttention: hugging_face_swin,
    EinsumAttention: separate,
}  # fmt: skip


# --- what is found ----------------------------------------------------------------------------------------------------


def enlarge(model: nn.Module, images: Tensor, size: float) -> None:
    """Seeded weights of which attention makes something: sharp maps, values of size one, no table and no scale at zero.

    Batch norms, which would let values grow from layer to layer, are given the statistics of the images.
    """
    generator = torch.Generator().manual_seed(0)
    sharp = {id(p) for m in model.modules() if type(m) in BY_HAND for p in m.parameters()}

    def draw(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.split(".")[-1]
            if last in ("logit_scale", "gating_param") or last.startswith("lambda"):
                continue
            if last == "sigma":
                parameter.copy_(draw(parameter, 6.0))
            elif last == "temperature":
                parameter.fill_(8.0)
            elif last in ("weight", "in_proj_weight") and parameter.ndim > 1:
                gain = size if id(parameter) in sharp else 1.0
                parameter.copy_(draw(parameter, gain / parameter[0].numel() ** 0.5))
            elif parameter.ndim == 1 and "bias" not in last:
                parameter.copy_(1 + draw(parameter, 0.1))
            else:
                parameter.copy_(draw(parameter, 0.3))
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train().momentum = 1.0
        if norms:
            model(images)
        for norm in norms:
            norm.eval()


def captured(model: nn.Module, images: Tensor) -> tuple[list[tuple[AttentionCall, Tensor, Tensor, Tensor]], dict, list[str]]:
    """(every call with its map, V and output; what each attention module was given; reasons of refusals)."""
    calls, given, hooks = [], {}, []

    def keep(name: str):
        def hook(module, args, kwargs):
            given.setdefault(name, []).append(doubled((args, kwargs)))

        return hook

    def see(call: AttentionCall) -> None:
        calls.append((call, call.map(effective=True), call.v.clone(), call.output.clone()))

    layouts = trace(model, images)
    for name, module in model.named_modules():
        if type(module) in BY_HAND:
            hooks.append(module.register_forward_pre_hook(keep(name), with_kwargs=True))
    try:
        seen = watch(model, images, see, layouts=layouts)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, given, [f"{refusal.name}: {refusal.reason}" for refusal in seen.refused]


def doubled(value):
    """Tensors in float64, also inside."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(entry) for key, entry in value.items()}
    return type(value)(map(doubled, value)) if type(value) in (list, tuple) else value


def described(layout: Layout | None) -> str:
    if layout is None:
        return "none"
    grid, keys = ("no grid" if g is None else f"{g[0]} x {g[1]}" for g in (layout.grid, layout.key_grid))
    text = grid if grid == keys else f"{grid} to {keys}"
    text += f" + {layout.prefix}" if layout.prefix else ""
    return text + (f", {layout.windows} windows" if layout.windows > 1 else "")


def compare(model: nn.Module, images: Tensor, name: str, rows: dict[type, Row]) -> None:
    """One pass: every call against the map by hand of the module it is in."""
    calls, given, refused = captured(model, images)
    by_name: dict[str, list] = {}
    for entry in calls:
        by_name.setdefault(entry[0].name, []).append(entry)
    assert by_name.keys() == given.keys(), "attention was seen elsewhere than in its modules"
    found: dict[type, list] = {}
    for path, inputs in given.items():
        module = model.get_submodule(path)
        twin = copy.deepcopy(module).double()
        with torch.no_grad():
            want = [pair for args, kwargs in inputs for pair in BY_HAND[type(module)](twin, *args, **kwargs)]
        assert len(want) == len(by_name[path])
        for (call, maps, v, output), (own_maps, own_v) in zip(by_name[path], want, strict=True):
            found.setdefault(type(module), []).append((call, error(maps, v, output, own_maps, own_v)))
    for call, *_ in calls:
        check_picture(call)
    for kind, entries in found.items():
        row = rows.setdefault(kind, Row(name, kind.__qualname__))
        row.routes.append(" + ".join(dict.fromkeys(call.route for call, _ in entries)))
        row.kinds += [call.kind for call, _ in entries]
        row.calls.append(len(entries))
        row.places += [described(call.layout) for call, _ in entries]
        row.error = max(row.error, *(worst for _, worst in entries))
        row.results += [result(call) for call, _ in entries]
    assert not refused, refused


def check_picture(call: AttentionCall) -> None:
    """Grids without holes: none of these models drops tokens."""
    layout = call.layout
    if layout is not None and layout.grid is not None:
        assert layout.picture(torch.ones(layout.queries.shape[:2])).isfinite().all(), call.name
    if layout is not None and layout.key_grid is not None:
        assert layout.key_picture(torch.ones(layout.keys.shape[:2])).isfinite().all(), call.name


def error(maps: Tensor, v: Tensor, output: Tensor, own_maps: Tensor, own_v: Tensor) -> float:
    """Largest difference of A V, by map and by the model's own output, relative to the largest |V|; also that of the map."""
    assert maps.shape == own_maps.shape
    assert v.shape == own_v.shape
    size = own_v.abs().max()
    keys = own_maps.shape[-1]
    assert size > 0.3, "values are too small to mean anything"
    assert keys < 8 or own_maps.abs().amax(-1).mean() > 2 / keys, "maps are too even to mean anything"
    product = own_maps @ own_v
    differences = (maps.double() @ v.double() - product, output.double() - product)
    return float(max(*(d.abs().max() / size for d in differences), (maps - own_maps).abs().max()))


def result(call: AttentionCall) -> str:
    kinds = {"token": "map", "channel": "map of channels", "pooling": "weights over places"}
    return kinds[call.kind] + ("" if call.stochastic else ", rows do not sum to one")


@cache
def found(case: Case) -> list[Row]:
    """The rows of one model, from every state of timm's switch."""
    rows: dict[type, Row] = {}
    before = timm.layers.config._USE_FUSED_ATTN
    try:
        for fused in case.fused or (None,):
            if fused is not None:
                timm.layers.set_fused_attn(fused, experimental=fused)
            model = case.build().eval()
            images = torch.randn(BATCH, 3, *case.size, generator=torch.Generator().manual_seed(1))
            try:
                if not isinstance(model, torch.jit.ScriptModule):
                    enlarge(model, images, case.gain)
                compare(model, images, case.name, rows)
            except HostError as refusal:
                return [Row(case.name, "none", calls=[0], results=[f"refused: {refusal}"])]
    finally:
        timm.layers.config._USE_FUSED_ATTN = before
    return list(rows.values())


# --- the page ---------------------------------------------------------------------------------------------------------

COLUMNS = ["Model", "Attention", "Route", "Kind", "Calls", "Places", "Error", "Result"]
ABOUT = """# Which models can be looked at

Written by `python tests/lens/test_support.py`, checked by the tests. Every line is a small model with random weights, large
enough for sharp maps, of which each attention was compared with a map written out by hand (tests/lens/by_hand.py) from
the module's own weights and what it was given. There is no line of code for any of these models in Vitreous: attention is
found by watching the calls of PyTorch functions, and places by sending image coordinates through the same calls.

- *Route*: `fused` is `scaled_dot_product_attention`, whose map is computed again; `softmax` is written out in the model. Two
  routes with a slash: with timm's fused attention (experimental ones included) switched on / off.
- *Kind*: `token` places attend to places; `channel` channels to channels; `pooling` weights over places without a product
  of queries and keys.
- *Calls* in one pass. *Places*: grid of the queries (to that of the keys) + tokens before it without a place, windows.
- *Error*: largest difference of map times V, or of the map, relative to the largest |V|, as it was on the machine that
  wrote this page; at most 1e-5 wherever the tests run.
"""


OTHERS = "\n# Models of other packages"  # the second table, which benchmarks/foreign_models writes


def written() -> str:
    """The whole page, with the second table as it is."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for case in CASES for row in found(case))]
    table = "".join("| " + " | ".join(cells) + " |\n" for cells in rows)
    return f"{ABOUT}\n{table}" + "".join(PAGE.read_text().partition(OTHERS)[1:])


def committed() -> list[list[str]]:
    """The cells of the page as it is."""
    lines = [line for line in PAGE.read_text().partition(OTHERS)[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines][2:]


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_maps_are_those_by_hand_and_the_page_says_so(case):
    rows = found(case)
    assert rows
    assert max(row.error for row in rows) <= TOLERANCE, rows
    stated = [cells for cells in committed() if cells[0] == case.name]
    error = COLUMNS.index("Error")
    assert [cells[:error] + cells[error + 1 :] for cells in stated] == [
        cells[:error] + cells[error + 1 :] for cells in (row.cells() for row in rows)
    ], "write the page again: python tests/lens/test_support.py"
    assert all(float(cells[error]) <= TOLERANCE for cells in stated if cells[error])


def test_the_page_lists_these_models_and_few_refusals():
    assert PAGE.read_text().startswith(ABOUT)
    assert list(dict.fromkeys(cells[0] for cells in committed())) == [case.name for case in CASES]
    refused = [cells for cells in committed() if cells[-1].startswith("refused: ")]
    assert len(refused) <= 5
    assert len(committed()) - len(refused) >= 70


def attention_classes(*modules) -> set[type]:
    """Classes of a module, its imports included, whose own forward calls the fused function."""
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return {
        kind
        for kind in found
        if issubclass(kind, nn.Module) and "scaled_dot_product_attention" in inspect.getsource(kind.forward)
    }


def test_every_attention_class_of_the_vit_modules_is_here():
    kinds = attention_classes(T.vision_transformer, T.eva, T.beit, T.deit, T.naflexvit)
    assert {timm.layers.Attention, T.eva.EvaAttention, T.beit.Attention} <= kinds
    assert kinds <= BY_HAND.keys()
    assert {kind.__qualname__ for kind in kinds} <= {cells[1] for cells in committed()}
    families = {kind.__module__ for kind in BY_HAND if kind.__module__.startswith("timm.models.")}
    assert len(families) >= 25


if __name__ == "__main__":
    PAGE.write_text(written())
