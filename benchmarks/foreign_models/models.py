"""Small models of other packages with random weights, as `run.py` compares them.

A model that takes something else than images (B, 3, h, w) is called in its own way: clips are an
image that fades in, volumes an image whose slices fade.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Model:
    """size: of the images. step: of the places that are changed. gain: of random weights.

    chance: tokens are drawn by chance, for the whole batch. shifted: scores are known up to one
    number for each query. places: False where attention does not become silent, as with hard or
    normalised weights.
    """

    package: str
    build: Callable[[], nn.Module]
    size: tuple[int, int] = (64, 64)
    step: int = 16
    gain: float = 1.5
    chance: bool = False
    shifted: bool = False
    places: bool = True


class Takes(nn.Module):
    """A model that is called in its own way."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Any]):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, images: Tensor) -> Any:
        return self.call(self.model, images)


class Patches(nn.Sequential):
    """A filter of 16 x 16 pixels before some modules that take maps (B, 32, h, w)."""

    def __init__(self, *modules: nn.Module):
        super().__init__(nn.Conv2d(3, 32, 16, 16), *modules)


class Sequence(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


def frames(images: Tensor, count: int = 4) -> Tensor:
    """(B, 3, h, w) -> (B, T, 3, h, w): each image as a clip that fades in."""
    return torch.stack([images * (t + 1) / count for t in range(count)], 1)


def clip(images: Tensor) -> Tensor:
    """(B, 3, h, w) -> (B, 3, T, h, w)."""
    return frames(images).transpose(1, 2)


def volume(images: Tensor, depth: int = 16) -> Tensor:
    """(B, 3, h, w) -> (B, 1, depth, h, w)."""
    return images.mean(1)[:, None, None] * torch.linspace(0.3, 1, depth)[:, None, None]


OWN = {"size", "step", "gain", "chance", "shifted", "places"}


def of(
    package: str, path: str, *args: Any, call: Callable | None = None, around: Callable | None = None, **settings: Any
) -> Model:
    """A class or function by its path, with settings; those of `Model` are taken out of them.

    around: what is done with the object to make it a model.
    """
    own = {name: settings.pop(name) for name in OWN & set(settings)}

    def build() -> nn.Module:
        module, _, name = path.rpartition(".")
        given = settings | ({"encoder": settings["encoder"]()} if "encoder" in settings else {})
        model = getattr(importlib.import_module(module), name)(*args, **given)
        model = model if around is None else around(model)
        return model if call is None else Takes(model, call)

    return Model(package, build, **own)


def hf(kind: str, call: Callable | None = None, config: str = "", parts: Callable | None = None, **settings: Any) -> Model:
    """A class of transformers; kind: "ViT" for ViTModel and ViTConfig. parts: more settings, from transformers."""
    own = {name: settings.pop(name) for name in OWN & set(settings)}
    kind, config = (kind, config) if config else (f"{kind}Model", f"{kind}Config")

    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        given = settings if parts is None else settings | parts(transformers)
        model = getattr(transformers, kind)(getattr(transformers, config)(**given))
        return model if call is None else Takes(model, call)

    return Model("transformers", build, **own)


def take(model: nn.Module) -> nn.Module:
    return Patches(model)


def tokens(model: nn.Module) -> nn.Module:
    return Patches(Sequence(), model)


def vit_pytorch(path: str, **settings: Any) -> Model:
    return of("vit-pytorch", f"vit_pytorch.{path}", **settings)


def resnet(transformers: Any, stages: tuple[str, ...] = ("stage4",)) -> dict[str, Any]:
    """A backbone of small width for DETR and its kin."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", out_features=list(stages)
    )
    return {"backbone_config": config, "use_timm_backbone": False}


def resnets(transformers: Any) -> dict[str, Any]:
    return resnet(transformers, ("stage2", "stage3", "stage4"))


def rt_detr(transformers: Any) -> dict[str, Any]:
    config = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return {"backbone_config": config, "use_timm_backbone": False}


def sam2(transformers: Any) -> dict[str, Any]:
    config = transformers.Sam2HieraDetConfig(
        hidden_size=16, num_attention_heads=1, image_size=[128, 128], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 2, 4], window_size_per_stage=[4] * 4,
        window_positional_embedding_background_size=[7, 7], global_attention_blocks=[3],
    )  # fmt: skip
    return {"backbone_config": config}


def swin(transformers: Any) -> dict[str, Any]:
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return {"backbone_config": config, "use_timm_backbone": False}


def naflex(model: nn.Module, x: Tensor) -> Any:
    """SigLIP 2 takes patches, padded to one length, and the grid of each image."""
    patches = F.unfold(x, 16, stride=16).mT.unflatten(-1, (3, 16, 16)).permute(0, 1, 3, 4, 2).flatten(2)
    patches = torch.cat([patches, patches.new_zeros(len(x), 4, patches.shape[-1])], 1)
    mask = torch.cat([torch.ones(len(x), 24), torch.zeros(len(x), 4)], 1).long()
    return model(patches, mask, torch.tensor([[4, 6]] * len(x)))


def texts(ids: list[list[int]], count: int) -> Tensor:
    return torch.tensor(ids).expand(count, -1)


def coca(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, texts([[1, 5, 6, 7, 2, 0, 0, 0]], len(x)))["logits"]


def text_and_images(model: nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 3, 2]]), pixel_values=x).logits_per_image


def vilt(model: nn.Module, x: Tensor) -> Any:
    return model(input_ids=texts([[1, 5, 6, 2]], len(x)), pixel_values=x)


def seggpt(model: nn.Module, x: Tensor) -> Any:
    return model(pixel_values=x, prompt_pixel_values=x.flip(-1), prompt_masks=x.flip(-2))


def lucid_vit() -> nn.Module:
    return importlib.import_module("vit_pytorch.vit").ViT(**LUCID)


def x_encoder(**settings: Any) -> Model:
    """An encoder of x-transformers."""
    registers = settings.pop("registers", 0)
    own = {name: settings.pop(name) for name in OWN & set(settings)}

    def build() -> nn.Module:
        x = importlib.import_module("x_transformers")
        layers = x.Encoder(dim=32, depth=2, heads=2, attn_dim_head=16, **settings)
        return x.ViTransformerWrapper(
            image_size=64, patch_size=16, num_classes=5, num_register_tokens=registers, attn_layers=layers
        )

    return Model("x-transformers", build, **own)


RECT = (64, 96)
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 16}
SQUARE = VIT | {"image_size": 64}
PYRAMID = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 6,
}  # fmt: skip
LUCID = {
    "image_size": 64, "patch_size": 16, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64, "dim_head": 16
}  # fmt: skip
VIDEO = {k: v for k, v in LUCID.items() if k != "patch_size"} | {"image_patch_size": 16, "frames": 4, "frame_patch_size": 2}
FACTORS = {k: v for k, v in VIDEO.items() if k != "depth"} | {"spatial_depth": 1, "temporal_depth": 1}
ND = {k: v for k, v in LUCID.items() if k != "image_size"} | {"ndim": 2, "input_shape": 64}
MONAI = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2}
FLAT = MONAI | {"in_channels": 3, "spatial_dims": 2}
CLIP = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2, "output_dim": 16}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
JEPA = {
    "crop_size": 64, "patch_size": 16, "frames_per_clip": 4, "tubelet_size": 2, "hidden_size": 96, "num_attention_heads": 2,
    "num_hidden_layers": 2, "mlp_ratio": 2, "pred_hidden_size": 96, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
}  # fmt: skip
M = "monai.networks.nets"

TRANSFORMERS = {
    "ViTMAE with its default mask": hf("ViTMAE", **SQUARE, decoder_hidden_size=32, chance=True),
    "DINOv3": hf("DINOv3ViT", **SQUARE, num_register_tokens=4, size=RECT),
    "Dinov2 with registers": hf("Dinov2WithRegisters", **SQUARE),
    "MLCD": hf("MLCDVisionModel", config="MLCDVisionConfig", **SQUARE, num_key_value_groups=1),
    "SigLIP": hf("SiglipVisionModel", config="SiglipVisionConfig", **SQUARE),
    "SigLIP 2, padded patches": hf("Siglip2VisionModel", naflex, "Siglip2VisionConfig", **VIT, num_patches=16, size=RECT),
    "Hiera": hf("Hiera", image_size=[64, 64], embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], step=4),
    "SegFormer": hf("Segformer", **PYRAMID, size=RECT, step=8),
    "PVT": hf("Pvt", image_size=64, **PYRAMID, step=4),
    "LeViT": hf("Levit", image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
                key_dim=[8, 8, 8]),
    "MobileViT": hf("MobileViT", image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 40],
                    num_attention_heads=2, step=8, gain=3.0),
    "CvT": hf("Cvt", embed_dim=[16, 16, 32], num_heads=[1, 1, 2], depth=[1, 2, 3], size=RECT),
    "SwiftFormer": hf("SwiftFormer", depths=[1] * 4, embed_dims=[8, 16, 16, 32]),
    "FocalNet": hf("FocalNet", image_size=64, embed_dim=16, depths=[1] * 4),
    "PoolFormer": hf("PoolFormer", hidden_sizes=[8, 8, 16, 16], depths=[1] * 4),
    "DETR": hf("Detr", parts=resnet, **DETR, size=(128, 192), step=32),
    "Conditional DETR": hf("ConditionalDetr", parts=resnet, **DETR, size=(128, 192), step=32),
    "DAB-DETR": hf("DabDetr", parts=resnet, **{k: v for k, v in DETR.items() if k != "d_model"}, hidden_size=32,
                   size=(128, 192), step=32),
    "Deformable DETR": hf("DeformableDetr", parts=resnets, **DETR, num_feature_levels=3, size=RECT),
    "RT-DETR": hf("RTDetr", parts=rt_detr, **DETR, encoder_in_channels=[16, 16, 16], feat_strides=[8, 16, 32],
                  encoder_hidden_dim=32, decoder_in_channels=[32, 32, 32], num_denoising=0, size=RECT),
    "YOLOS": hf("Yolos", **VIT, image_size=[64, 96], num_detection_tokens=5, size=RECT),
    "Mask2Former": hf("Mask2Former", parts=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
                      encoder_feedforward_dim=32,
                      encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=5, step=8),
    "EoMT": hf("EomtForUniversalSegmentation", config="EomtConfig", **SQUARE | {"num_hidden_layers": 3}, num_blocks=1,
               num_queries=5, num_upscale_blocks=1, num_register_tokens=2),
    "SAM": hf("SamVisionModel", config="SamVisionConfig", **VIT, image_size=128, window_size=3, global_attn_indexes=[1],
              output_channels=16, num_pos_feats=16, size=(128, 128)),
    "SAM 2": hf("Sam2VisionModel", config="Sam2VisionConfig", parts=sam2, backbone_channel_list=[128, 64, 32, 16],
                backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]], fpn_hidden_size=16, size=(128, 128)),
    "SegGPT": hf("SegGptModel", seggpt, "SegGptConfig", **{k: v for k, v in VIT.items() if k != "intermediate_size"},
                 image_size=[128, 64], merge_index=0, intermediate_hidden_state_indices=[0, 1], decoder_hidden_size=8),
    "BEiT": hf("Beit", **SQUARE, use_relative_position_bias=True),
    "Data2Vec": hf("Data2VecVision", **SQUARE, use_shared_relative_position_bias=True),
    "Audio spectrogram transformer": hf("AST", lambda m, x: m(x[:, 0]), **VIT, num_mel_bins=96, max_length=64, time_stride=16,
                                        frequency_stride=16, size=RECT),
    "VideoMAE": hf("VideoMAE", lambda m, x: m(frames(x)), **SQUARE, num_frames=4),
    "TimeSformer": hf("Timesformer", lambda m, x: m(frames(x)), **SQUARE, num_frames=4),
    "ViViT": hf("Vivit", lambda m, x: m(frames(x)), **{k: v for k, v in SQUARE.items() if k != "patch_size"}, num_frames=4,
                tubelet_size=[2, 16, 16]),
    "V-JEPA 2 with its predictor": hf("VJEPA2", lambda m, x: m(frames(x)), **JEPA),
    "X-CLIP, video": hf("XCLIPVisionModel", lambda m, x: m(frames(x).flatten(0, 1)), "XCLIPVisionConfig", **SQUARE,
                        num_frames=4,
                        mit_hidden_size=32),
    "Perceiver": hf("PerceiverForImageClassificationLearned", lambda m, x: m(pixel_values=x), "PerceiverConfig", num_latents=8,
                    d_latents=32, d_model=64, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=2,
                    num_cross_attention_heads=2, image_size=32, num_labels=4, size=(32, 32), step=4),
    "GroupViT": hf("GroupViTVisionModel", config="GroupViTVisionConfig", hidden_size=32, depths=[1] * 3,
                   num_group_tokens=[8, 4, 0], num_output_groups=[8, 4, 0], num_hidden_layers=3, num_attention_heads=2,
                   intermediate_size=64, image_size=64),
    "I-JEPA": hf("IJepa", **SQUARE),
    "AIMv2": hf("Aimv2VisionModel", config="Aimv2VisionConfig", **SQUARE),
    "ViTDet": hf("VitDet", **VIT, image_size=96, window_block_indices=[0], window_size=4, use_relative_position_embeddings=True,
                 size=(96, 96)),
    "DPT": hf("DPTForDepthEstimation", config="DPTConfig", **SQUARE | {"num_hidden_layers": 4}, backbone_out_indices=[0, 1,
              2, 3],
              neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, readout_type="ignore"),
    "CLIP, images and three texts": hf("CLIPModel", text_and_images, "CLIPConfig", vision_config=SQUARE, projection_dim=16,
                                       text_config={k: v for k, v in VIT.items() if k != "patch_size"}
                                       | {"vocab_size": 20, "max_position_embeddings": 8}),
    "CLIPSeg": hf("CLIPSegForImageSegmentation", lambda m, x: m(pixel_values=x, conditional_embeddings=torch.ones(len(x), 16)),
                  "CLIPSegConfig", vision_config=SQUARE | {"num_hidden_layers": 3}, projection_dim=16, extract_layers=[0, 1],
                  text_config={k: v for k, v in VIT.items() if k != "patch_size"} | {"vocab_size": 20}, reduce_dim=16,
                  decoder_num_attention_heads=2, decoder_intermediate_size=32),
    "OWL-ViT": hf("OwlViTVisionModel", config="OwlViTVisionConfig", **SQUARE),
    "BLIP": hf("BlipVisionModel", config="BlipVisionConfig", **SQUARE),
    "BLIP-2, queries": hf("Blip2Model", lambda m, x: m.get_qformer_features(x), "Blip2Config", vision_config=SQUARE,
                          num_query_tokens=5, qformer_config={k: v for k, v in VIT.items() if k != "patch_size"}
                          | {"encoder_hidden_size": 32, "vocab_size": 20},
                          text_config={"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                       "ffn_dim": 32, "vocab_size": 20, "word_embed_proj_dim": 32}),
    "LayoutLMv3, images alone": hf("LayoutLMv3", lambda m, x: m(pixel_values=x), **VIT, vocab_size=20, coordinate_size=5,
                                   shape_size=6, input_size=64, shifted=True),
    "ViLT": hf("Vilt", vilt, **SQUARE, vocab_size=20, max_image_length=-1, chance=True),
    "FLAVA, images": hf("FlavaImageModel", config="FlavaImageConfig", **SQUARE),
    "InternVL, images": hf("InternVLVisionModel", config="InternVLVisionConfig", **VIT | {"image_size": [64, 64],
                                                                                         "patch_size": [16, 16]}),
    "Pixtral, packed": hf("PixtralVisionModel", lambda m, x: m(x, image_sizes=[(64, 96)] * len(x)), "PixtralVisionConfig",
                          **VIT,
                          image_size=96, head_dim=16, size=RECT),
    "MGP-STR": hf("Mgpstr", image_size=[32, 128], patch_size=[4, 16], hidden_size=32, num_hidden_layers=2,
                  num_attention_heads=2,
                  mlp_ratio=2, num_character_labels=5, num_bpe_labels=5, num_wordpiece_labels=5, max_token_length=4,
                  size=(32, 128), step=8),
    "ViTPose": hf("VitPoseBackbone", config="VitPoseBackboneConfig", **VIT | {"patch_size": [16, 16]}, image_size=[64, 96],
                  size=RECT),
    "Swin2SR": hf("Swin2SR", image_size=32, patch_size=1, num_channels=3, embed_dim=16, depths=[2], num_heads=[2],
                  window_size=8,
                  size=(32, 32), step=4),
    "Donut": hf("DonutSwin", image_size=64, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4, step=4),
}  # fmt: skip

VIT_PYTORCH = {
    "ViT": vit_pytorch("vit.ViT", **LUCID | {"image_size": RECT}, size=RECT),
    "SimpleViT": vit_pytorch("simple_vit.SimpleViT", **LUCID | {"image_size": RECT}, size=RECT),
    "registers": vit_pytorch("simple_vit_with_register_tokens.SimpleViT", **LUCID),
    "DeepViT": vit_pytorch("deepvit.DeepViT", **LUCID, places=False),
    "CaiT": vit_pytorch("cait.CaiT", **LUCID, cls_depth=1),
    "CrossViT": vit_pytorch("cross_vit.CrossViT", image_size=48, num_classes=5, sm_dim=16, lg_dim=32, sm_patch_size=12,
                            lg_patch_size=16, sm_enc_heads=2, lg_enc_heads=2, cross_attn_heads=2, depth=1, lg_enc_depth=1,
                            cross_attn_depth=1, sm_enc_dim_head=8, lg_enc_dim_head=8, cross_attn_dim_head=8, size=(48, 48),
                            step=4),
    "CrossFormer": vit_pytorch("crossformer.CrossFormer", num_classes=5, dim=(64,) * 4, depth=(1,) * 4,
                               global_window_size=(4, 2, 2, 1), local_window_size=2, step=8, gain=3.0),
    "CCT": vit_pytorch("cct.CCT", img_size=64, embedding_dim=32, n_conv_layers=2, kernel_size=3, stride=2, padding=1,
                       num_layers=2,
                       num_heads=2, mlp_ratio=2.0, num_classes=5, positional_embedding="learnable", step=8),
    "CvT": vit_pytorch("cvt.CvT", num_classes=5, s1_emb_dim=16, s1_heads=1, s2_emb_dim=16, s2_heads=2, s2_depth=1,
                       s3_emb_dim=32,
                       s3_heads=2, s3_depth=1, size=RECT, step=8),
    "small data sets": vit_pytorch("vit_for_small_dataset.ViT", **LUCID),
    "JetViT": vit_pytorch("jet_vit.JetViT", **LUCID),
    "JumboViT": vit_pytorch("jumbo_vit.JumboViT", **LUCID),
    "LeViT": vit_pytorch("levit.LeViT", image_size=128, num_classes=5, dim=(16, 16, 32), depth=(1, 1, 1), heads=(2, 2, 2),
                         mlp_mult=2, dim_key=8, dim_value=16, size=(128, 128)),
    "LocalViT": vit_pytorch("local_vit.LocalViT", **LUCID),
    "LookViT": vit_pytorch("look_vit.LookViT", image_size=128, dim=32, depth=2, heads=2, dim_head=16, patch_size=32,
                           highres_patch_size=16, cross_attn_heads=2, cross_attn_dim_head=16, num_classes=5, size=(128, 128)),
    "LoopedViT": vit_pytorch("looped_vit.LoopedViT", **{k: v for k, v in LUCID.items() if k != "depth"}, pre_loop_depth=1,
                             num_looped_blocks=1, post_loop_depth=1, loop_depth=2),
    "MaxViT": vit_pytorch("max_vit.MaxViT", num_classes=5, dim=16, depth=(1, 1), dim_head=8, dim_conv_stem=8, window_size=4,
                          step=4),
    "MaxViT, registers": vit_pytorch("max_vit_with_registers.MaxViT", num_classes=5, dim=16, depth=(1, 1), dim_head=8,
                                     dim_conv_stem=8, window_size=4, step=8),
    "MobileViT": vit_pytorch("mobile_vit.MobileViT", image_size=(128, 128), dims=[16, 24, 32],
                             channels=[8, 8, 16, 16, 24, 24, 32, 32, 32, 32, 40], num_classes=5, size=(128, 128)),
    "NaViT, packed": vit_pytorch("na_vit.NaViT", call=lambda m, x: m([list(x)]), **LUCID),
    "NaViT, an image a sequence": vit_pytorch("na_vit.NaViT", call=lambda m, x: m([[image] for image in x]), **LUCID),
    "NaViT, nested tensors": vit_pytorch("na_vit_nested_tensor.NaViT", call=lambda m, x: m(list(x)), **LUCID),
    "NesT": vit_pytorch("nest.NesT", image_size=64, patch_size=8, num_classes=5, dim=16, heads=2, num_hierarchies=2,
                        block_repeats=(1, 1), step=8, gain=3.0),
    "ViT-5": vit_pytorch("vit_5.ViT", **LUCID),
    "ViTDetPool": vit_pytorch("vit_detpool.ViTDetPool", **LUCID),
    "ViT of n dimensions, flex attention": vit_pytorch("vit_nd_rotary.ViTND", **ND),
    "ViT 3D": vit_pytorch("vit_3d.ViT", call=lambda m, x: m(clip(x)), **VIDEO),
    "ViViT": vit_pytorch("vivit.ViViT", call=lambda m, x: m(clip(x)), **FACTORS),
    "ViViT, factorized self-attention": vit_pytorch("vivit.ViViT", call=lambda m, x: m(clip(x)), **FACTORS,
                                                    variant="factorized_self_attention"),
    "patch dropout": vit_pytorch("vit_with_patch_dropout.ViT", **LUCID),
    "patch merger": vit_pytorch("vit_with_patch_merger.ViT", **LUCID | {"depth": 3}, patch_merge_layer=1,
                                patch_merge_num_tokens=4),
    "PiT": vit_pytorch("pit.PiT", image_size=64, patch_size=16, dim=32, num_classes=5, depth=(1, 1), heads=2, mlp_dim=64,
                       dim_head=16, step=8),
    "RegionViT": vit_pytorch("regionvit.RegionViT", dim=(8, 16, 16, 32), depth=(1,) * 4, window_size=7, num_classes=5,
                             size=(112, 112)),
    "RvT": vit_pytorch("rvt.RvT", **LUCID),
    "ScalableViT": vit_pytorch("scalable_vit.ScalableViT", num_classes=5, dim=16, heads=(2, 2), depth=(1, 1), ssa_dim_key=8,
                               reduction_factor=(4, 2), window_size=(4, None), step=8, gain=3.0),
    "SepViT": vit_pytorch("sep_vit.SepViT", num_classes=5, dim=16, dim_head=8, heads=(1, 2), depth=(1, 1), window_size=7,
                          size=(56, 56), step=8),
    "sparse gating": vit_pytorch("simple_vit_with_sparse_gating.SimpleViTWithSparseGating", **LUCID),
    "class token of its own weights": vit_pytorch("simple_vit_with_specialized_cls.SimpleViT", **LUCID),
    "hyper connections": vit_pytorch("simple_vit_with_hyper_connections.SimpleViT", **LUCID, num_residual_streams=2),
    "value residual": vit_pytorch("simple_vit_with_value_residual.SimpleViT", **LUCID),
    "tokens of frequencies": vit_pytorch("simple_vit_with_fft.SimpleViT", **LUCID, freq_patch_size=16),
    "relative bias": vit_pytorch("simple_vit_with_relative_proj_pos_bias.SimpleViT", **LUCID),
    "U-ViT": vit_pytorch("simple_uvit.SimpleUViT", **LUCID),
    "T2T": vit_pytorch("t2t.T2TViT", image_size=64, num_classes=5, dim=32, depth=1, heads=2, mlp_dim=64, dim_head=16,
                       t2t_layers=((7, 4), (3, 2)), step=8),
    "Twins": vit_pytorch("twins_svt.TwinsSVT", num_classes=5, s1_emb_dim=16, s1_local_patch_size=4, s1_global_k=4,
                         s2_emb_dim=16,
                         s2_local_patch_size=4, s2_global_k=4, s3_emb_dim=32, s3_local_patch_size=2, s3_global_k=2, s3_depth=1,
                         s4_emb_dim=32, s4_local_patch_size=2, s4_global_k=2, s4_depth=1, step=8, gain=3.0),
    "XCiT": vit_pytorch("xcit.XCiT", **LUCID, cls_depth=1),
    "adaptive token sampling": vit_pytorch("ats_vit.ViT", **LUCID, max_tokens_per_depth=(8, 4), chance=True),
    "MAE": vit_pytorch("mae.MAE", encoder=lucid_vit, decoder_dim=32, decoder_dim_head=16, decoder_heads=2, chance=True),
    "SimMIM": vit_pytorch("simmim.SimMIM", encoder=lucid_vit, chance=True),
    "WWT": vit_pytorch("wwt.WWT", **LUCID, num_slots=4, sigreg_slots=False),
    "parallel": vit_pytorch("parallel_vit.ViT", **LUCID, num_parallel_branches=2),
    "normalised": vit_pytorch("normalized_vit.nViT", **LUCID, gain=3.0),
}  # fmt: skip

OTHERS = {
    "ViT": of("monai", f"{M}.ViT", **FLAT, img_size=RECT, patch_size=16, num_layers=2, classification=True, size=RECT),
    "ViT of volumes": of("monai", f"{M}.ViT", **MONAI, in_channels=1, img_size=(16, 64, 64), patch_size=(8, 16, 16),
                         num_layers=2,
                         call=lambda m, x: m(volume(x))[0]),
    "UNETR": of("monai", f"{M}.UNETR", **FLAT, out_channels=2, img_size=64, feature_size=4),
    "UNETR of volumes": of("monai", f"{M}.UNETR", **MONAI, in_channels=1, out_channels=2, img_size=(16, 64, 64), feature_size=4,
                           call=lambda m, x: m(volume(x))),
    "SwinUNETR": of("monai", f"{M}.SwinUNETR", in_channels=3, spatial_dims=2, out_channels=2, feature_size=12, depths=(2, 1,
                    1, 1),
                    num_heads=(1, 2, 2, 4), window_size=4, step=8),
    "SwinUNETR of volumes": of("monai", f"{M}.SwinUNETR", in_channels=1, out_channels=2, feature_size=12, depths=(2, 1, 1, 1),
                               num_heads=(1, 2, 2, 4), window_size=4, size=(64, 64), step=16,
                               call=lambda m, x: m(volume(x, 32))),
    "SwinUNETR v2": of("monai", f"{M}.SwinUNETR", in_channels=3, spatial_dims=2, out_channels=2, feature_size=12,
                       depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=4, use_v2=True, step=8),
    "ViTAutoEnc": of("monai", f"{M}.ViTAutoEnc", **FLAT, img_size=64, patch_size=16, out_channels=3, num_layers=2),
    "MaskedAutoEncoderViT": of("monai", f"{M}.MaskedAutoEncoderViT", **FLAT, img_size=64, patch_size=16, num_layers=2,
                               decoder_hidden_size=32, decoder_mlp_dim=64, decoder_num_layers=1, decoder_num_heads=2,
                               chance=True),
    "DiffusionModelUNet": of("monai", f"{M}.DiffusionModelUNet", spatial_dims=2, in_channels=3, out_channels=3,
                             num_res_blocks=1,
                             channels=(8, 16), attention_levels=(False, True), norm_num_groups=4, num_head_channels=8,
                             call=lambda m, x: m(x, torch.zeros(len(x))), size=(32, 32), step=4),
    "AutoencoderKL": of("monai", f"{M}.AutoencoderKL", spatial_dims=2, in_channels=3, out_channels=3, channels=(8, 16),
                        num_res_blocks=1, attention_levels=(False, True), latent_channels=4, norm_num_groups=4,
                        call=lambda m, x: m.encode(x), size=(32, 32), step=4),
    "ViT ": of("open_clip_torch", "open_clip.transformer.VisionTransformer", **CLIP),
    "ViT, attentional pool": of("open_clip_torch", "open_clip.transformer.VisionTransformer", **CLIP, attentional_pool=True,
                                attn_pooler_queries=6, attn_pooler_heads=2),
    "ResNet": of("open_clip_torch", "open_clip.modified_resnet.ModifiedResNet", [1] * 4, 16, 2, image_size=64, width=8),
    "CoCa, one text": of("open_clip_torch", "open_clip.coca_model.CoCa", embed_dim=32, call=coca, multimodal_cfg=TEXT,
                         text_cfg=TEXT | {"embed_cls": True, "output_tokens": True},
                         vision_cfg={"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1,
                         "mlp_ratio": 2,
                                     "attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2,
                                     "output_tokens": True}),
    "encoder": x_encoder(),
    "registers, flash": x_encoder(registers=3, attn_flash=True),
    "talking heads": x_encoder(attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "rotary, one head of keys": x_encoder(rotary_pos_emb=True, attn_one_kv_head=True),
    "ALiBi, top-k": x_encoder(alibi_pos_bias=True, attn_sparse_topk=4, places=False),
    "memory keys": x_encoder(attn_num_mem_kv=3),
    "hard": x_encoder(attn_hard=True, places=False),
    "sigmoid": x_encoder(attn_sigmoid=True),
    "cosine": x_encoder(attn_qk_norm=True),
    "image encoder": of("segment_anything", "segment_anything.modeling.ImageEncoderViT", img_size=96, embed_dim=32, depth=2,
                        num_heads=2, out_chans=16, use_rel_pos=True, window_size=4, global_attn_indexes=(1,), size=(96, 96)),
    "VisionTransformer": of("kornia", "kornia.models.vit.VisionTransformer", image_size=64, patch_size=16, embed_dim=32,
                            depth=2,
                            num_heads=2),
    "MobileViT": of("kornia", "kornia.models.vit_mobile.MobileViT", size=(128, 128)),
    "TinyViT": of("kornia", "kornia.models.tiny_vit.TinyViT", img_size=128, embed_dims=(16, 16, 32, 32), depths=(1,) * 4,
                  num_heads=(1, 1, 2, 2), window_sizes=(4,) * 4, size=(128, 128)),
    "Perceiver": of("perceiver_pytorch", "perceiver_pytorch.Perceiver", input_channels=3, input_axis=2, num_freq_bands=2,
                    max_freq=8, depth=2, num_latents=6, latent_dim=32, cross_heads=1, latent_heads=2, cross_dim_head=16,
                    latent_dim_head=16, num_classes=5, call=lambda m, x: m(x.permute(0, 2, 3, 1)), size=(16, 16), step=2),
    "AxialAttention": of("axial_attention", "axial_attention.AxialAttention", dim=32, dim_index=1, heads=2, num_dimensions=2,
                         sum_axial_out=True, around=take, size=RECT),
    "SlotAttention": of("slot_attention", "slot_attention.SlotAttention", num_slots=3, dim=32, iters=2, around=tokens,
                        chance=True),
    "TimeSformer": of("timesformer_pytorch", "timesformer_pytorch.TimeSformer", dim=32, image_size=64, patch_size=16,
                      num_frames=4,
                      num_classes=5, depth=1, heads=2, dim_head=16, call=lambda m, x: m(frames(x))),
    "BottleStack": of("bottleneck_transformer_pytorch", "bottleneck_transformer_pytorch.BottleStack", dim=32, fmap_size=4,
                      dim_out=32, proj_factor=4, downsample=False, heads=2, dim_head=8, num_layers=2, around=take),
    "HaloAttention": of("halonet_pytorch", "halonet_pytorch.HaloAttention", dim=32, block_size=2, halo_size=1, dim_head=16,
                        heads=2,
                        around=take),
    "SegFormer": of("segmentation_models_pytorch", "segmentation_models_pytorch.Segformer", encoder_name="mit_b0",
                    encoder_weights=None, classes=3, size=RECT),
    "MAnet": of("segmentation_models_pytorch", "segmentation_models_pytorch.MAnet", encoder_name="resnet18",
                encoder_weights=None,
                classes=3),
    "MViT, video": of("pytorchvideo", "pytorchvideo.models.vision_transformers.create_multiscale_vision_transformers",
                      spatial_size=64, temporal_size=4, depth=3, patch_embed_dim=16, num_heads=1,
                      conv_patch_embed_kernel=(3, 7, 7), conv_patch_embed_stride=(2, 4, 4), conv_patch_embed_padding=(1, 3, 3),
                      embed_dim_mul=[[1, 2.0]], atten_head_mul=[[1, 2.0]], pool_q_stride_size=[[1, 1, 2, 2]],
                      pool_kv_stride_adaptive=[1, 4, 4], pool_kvq_kernel=[3, 3, 3], head_num_classes=5,
                      call=lambda m, x: m(clip(x)), step=8),
    "MaxVit": of("torchvision", "torchvision.models.MaxVit", (64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, step=8),
    "PSABlock": of("ultralytics", "ultralytics.nn.modules.block.PSABlock", 32, attn_ratio=0.5, num_heads=2, around=take,
                   size=RECT),
    "AAttn": of("ultralytics", "ultralytics.nn.modules.block.AAttn", 32, 2, area=2, around=take, size=RECT),
    "AIFI": of("ultralytics", "ultralytics.nn.modules.transformer.AIFI", 32, 64, 2, around=take, size=RECT),
}  # fmt: skip
MODELS = {
    f"{case.package}: {name.strip()}": case for part in (TRANSFORMERS, VIT_PYTORCH, OTHERS) for name, case in part.items()
}
