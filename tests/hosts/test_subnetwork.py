"""Sub-networks: masks compute exactly what the sliced weights do, in every kind of plain ViT."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from vitreous import graft
from vitreous.base.errors import HostError
from vitreous.hosts.subnetwork import Subnetwork, check_plain, cut_out, masked_logits, masked_norm, whole

PARTS = [Subnetwork(1, 9, 1), Subnetwork(2, 16, 3), Subnetwork(3, 20, 2), Subnetwork(4, 64, 3)]
KINDS = {
    "plain": {},
    "average": {"global_pool": "avg", "reg_tokens": 2},
    "scaled": {"init_values": 0.5, "qk_norm": True},
    "pre_norm": {"pre_norm": True, "class_token": False, "global_pool": "max"},
    "any size": {"dynamic_img_size": True, "no_embed_class": True, "qkv_bias": False},
}


def vit(**options):
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2.0, "depth": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **small | options).double().eval()
    for parameter in model.parameters():  # so that nothing hides behind a start of 0 or 1
        nn.init.normal_(parameter, std=0.3)
    return model


def pictures(count=4):
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def counts(parts):
    return (torch.tensor([getattr(part, name) for part in parts]) for name in ("heads", "hidden", "depth"))


@pytest.mark.parametrize("options", KINDS.values(), ids=list(KINDS))
def test_masks_are_the_sliced_weights(options):
    """Four images of one batch, each in a sub-network of its own."""
    model, x = vit(**options), pictures()
    logits = masked_logits(model, x, *counts(PARTS))
    expected = torch.cat([cut_out(model, part).double()(image[None]) for part, image in zip(PARTS, x, strict=True)])
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)
    for i, smaller in ((1, Subnetwork(1, 16, 3)), (1, Subnetwork(2, 15, 3)), (1, Subnetwork(2, 16, 2))):
        other = masked_logits(model, x[i : i + 1], *counts([smaller]))
        assert (other - logits[i]).abs().max() > 1e-4  # each of the three choices counts


def test_the_whole_is_the_model():
    model, x = vit(), pictures()
    part = whole(model)
    assert part == Subnetwork(4, 64, 3)
    torch.testing.assert_close(masked_logits(model, x, *counts([part] * 4)), model(x), atol=1e-10, rtol=1e-10)
    assert torch.equal(cut_out(model, part).double()(x), model(x))


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = vit(proj_drop_rate=0.1, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        masked_logits(model, pictures(), *counts(PARTS)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name


def test_masked_norm_is_that_of_the_slice():
    norm, x = nn.LayerNorm(10).double(), 3 + torch.randn(2, 5, 10, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for width in (1, 4, 10):
        mask = (torch.arange(10) < width).double().expand(2, 1, 10)
        expected = nn.functional.layer_norm(x[..., :width], (width,), norm.weight[:width], norm.bias[:width])
        found = masked_norm(norm, x * mask, mask)
        torch.testing.assert_close(found[..., :width], expected, atol=1e-12, rtol=1e-12)
        assert not found[..., width:].any()


def test_a_part_has_the_parameters_of_its_size():
    part = cut_out(vit(), Subnetwork(2, 20, 2))
    assert (part.embed_dim, len(part.blocks), part.blocks[0].attn.num_heads) == (16, 2, 2)
    assert part.blocks[1].mlp.fc1.weight.shape == (20, 16)


def test_others_are_refused():
    for model in (
        graft(vit(), "svda"),
        vit(block_fn=ResPostBlock),
        vit(global_pool="map"),
        vit(norm_layer="rmsnorm"),
        timm.create_model("test_convnext"),
    ):
        with pytest.raises(HostError, match=r"^Found .* of another kind\. Expected timm's VisionTransformer .*\. Use"):
            check_plain(model)
    check_plain(vit())
