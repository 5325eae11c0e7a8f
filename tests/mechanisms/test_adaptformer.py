"""AdaptFormer against its formula as loops, its published counts, and what it must leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch.nn import functional as F

from vitreous import SPC, AdaptFormer, graft, new_parameters, parse, ungraft
from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.mechanisms.block.adaptformer import AdaptedBlock


def vit(**kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **settings | kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def learned(model):
    """Every adapter away from its start."""
    with torch.no_grad():
        for parameter in new_parameters(model).values():
            parameter.normal_()
    return model


def images(count=2):
    return torch.randn(count, 3, 16, 16, dtype=torch.float64)


def by_loops(adapter, row, strength):
    """What the adapter adds to one token: strength * (W_up relu(W_down x + b_down) + b_up), number by number."""
    hidden = [
        max(0.0, sum(w * x for w, x in zip(ws, row, strict=True)) + b) for ws, b in zip(*numbers(adapter.down), strict=True)
    ]
    return [
        strength * (sum(w * h for w, h in zip(ws, hidden, strict=True)) + b) for ws, b in zip(*numbers(adapter.up), strict=True)
    ]


def numbers(linear):
    return linear.weight.tolist(), linear.bias.tolist()


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}, {"block_fn": ResPostBlock}])
def test_adds_the_formula_to_the_hosts_block(options):
    model = vit(**options)
    graft(model, AdaptFormer(bottleneck=3, strength=0.7))
    block = learned(model).blocks[1]
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    behind_attention = block.attention_half(x)
    plain = block.host.forward(block, x)
    added = [[by_loops(block.adapter, row, 0.7) for row in image] for image in behind_attention.tolist()]
    assert (block(x) - (plain + torch.tensor(added, dtype=torch.float64))).abs().max() < 1e-12


def test_dropout_stands_in_the_bottleneck_and_only_in_training():
    adapter = learned(graft(vit(), AdaptFormer(dropout=0.5))).blocks[0].adapter.train()
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    hidden = adapter.down(x).clamp(min=0)
    torch.manual_seed(3)
    by_hand = 0.1 * adapter.up(F.dropout(hidden, 0.5))
    torch.manual_seed(3)
    assert torch.equal(adapter(x), by_hand)
    assert torch.equal(adapter.eval()(x), 0.1 * adapter.up(hidden))


def test_drop_path_takes_the_mlp_and_leaves_the_adapter():
    block = learned(graft(vit(), AdaptFormer(dropout=0.0))).blocks[0]
    block.drop_path2 = DropPath(1.0)
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    block.train()
    assert torch.equal(block.mlp_half(x), x + block.adapter(x))


@pytest.mark.parametrize(("bottleneck", "expected"), [(64, 1_189_632), (8, 156_768), (1, 27_660)])
def test_parameters_on_vit_base_are_the_published_number(bottleneck, expected):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    graft(model, AdaptFormer(bottleneck=bottleneck))
    new = sum(p.numel() for p in new_parameters(model).values())
    assert new == expected
    head = sum(p.numel() for p in model.head.parameters())
    assert bottleneck != 64 or new + head == 1_266_532  # 1.5 % of the model, as the paper says of CIFAR-100


def test_only_new_parameters_train():
    """With the rest frozen no host tensor gets a gradient, the loss falls, and removal gives back the host bit for bit."""
    model, x = vit(), images(8)
    before, labels = model(x), torch.arange(8) % 5
    graft(model, AdaptFormer())
    new = new_parameters(model)
    model.requires_grad_(False)
    for parameter in new.values():
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.SGD(new.values(), lr=0.5, momentum=0.9), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for name, p in model.named_parameters() if name not in new)
    assert ungraft(model).changed == ()
    assert torch.equal(model(x), before)


def test_strength_zero_stays_the_host():
    model, x = vit(), images()
    before = model(x)
    assert torch.equal(learned(graft(model, AdaptFormer(strength=0.0)))(x), before)


def test_start():
    """W_down is Kaiming-uniform with a = sqrt(5), which is uniform in +-1/sqrt(D); the rest is 0."""
    adapter = graft(vit(), AdaptFormer()).blocks[0].adapter
    w = adapter.down.weight
    assert w.abs().max() <= 1 / math.sqrt(24)
    assert math.isclose(w.std().item(), 1 / math.sqrt(3 * 24), rel_tol=0.05)
    assert not any(t.any() for t in (adapter.down.bias, adapter.up.weight, adapter.up.bias))
    assert torch.equal(w, graft(vit(), AdaptFormer()).blocks[0].adapter.down.weight)
    assert not torch.equal(w, graft(vit(), AdaptFormer(seed=1)).blocks[0].adapter.down.weight)


def test_the_adapter_survives_what_is_grafted_later():
    """Token steps join a block of ours and keep its class; the attention stays the host's own."""
    model = vit()
    attention = model.blocks[2].attn
    learned(graft(model, AdaptFormer()))
    x = images()
    alone = model(x)
    graft(model, SPC(after=3, read="gated"))
    assert type(model.blocks[2]) is AdaptedBlock
    assert model.blocks[2].attn is attention
    assert torch.equal(model(x), alone)


def test_real_weights(shared_data):
    """On the real ViT-Tiny the logits are the same bit for bit, with 297,984 parameters more."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:4]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(x)
        assert torch.equal(graft(model, AdaptFormer())(x), before)
    assert sum(p.numel() for p in new_parameters(model).values()) == 297_984


def test_bad_input():
    for text in ("bottleneck=0", "strength=-1.0", "dropout=1.0"):
        with pytest.raises(SettingError, match=f"Found {text}. Expected"):
            parse(f"adaptformer:{text}")
    with pytest.raises(SettingError, match="has 3 blocks"):
        graft(vit(), AdaptFormer(layers=(3,)))
    model = graft(vit(), AdaptFormer(layers=(1,)))
    with pytest.raises(GraftError, match=r"blocks\.1 is already of class AdaptedBlock.*Expected a plain block.*ungraft"):
        graft(model, AdaptFormer())
    graft(model, AdaptFormer(layers=(0, 2)))
    with pytest.raises(HostError, match=r"blocks\.0 is a ParallelScalingBlock.*cannot be run apart"):
        graft(vit(block_fn=ParallelScalingBlock), AdaptFormer())
