"""Extra class tokens and registers against networks walked by hand."""

from __future__ import annotations

import pytest
import timm
import torch

from vitreous import ExtraTokens, graft, ungraft
from vitreous.base.errors import HostError, SettingError


def vit(**kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **settings | kwargs).double().eval()


def test_extra_class_tokens_go_through_the_same_read_out():
    """CLS=5: the mean of the class token and the four learned ones behind the norm."""
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model._pos_embed(model.patch_embed(images))
    graft(model, ExtraTokens())
    learned = model.blocks[0].before[0].learned
    assert learned.shape == (1, 4, 24)
    ungraft(model)
    x = model.norm(model.blocks(torch.cat([x, learned.expand(2, -1, -1)], dim=1)))
    by_hand = model.head(torch.cat([x[:, :1], x[:, 17:]], dim=1).mean(1))
    graft(model, ExtraTokens())
    assert (model(images) - by_hand).abs().max() < 1e-12


def test_registers_are_not_read():
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model._pos_embed(model.patch_embed(images))
    graft(model, ExtraTokens(kind="register", tokens=2))
    learned = model.blocks[0].before[0].learned
    grafted = model(images)
    ungraft(model)
    by_hand = model.head(model.norm(model.blocks(torch.cat([x, learned.expand(2, -1, -1)], dim=1)))[:, 0])
    assert (grafted - by_hand).abs().max() < 1e-12


def test_after_a_block_they_have_not_been_through_it():
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.blocks[0](model._pos_embed(model.patch_embed(images)))
    graft(model, ExtraTokens(after=1))
    learned = model.blocks[0].after[0].learned
    grafted = model(images)
    ungraft(model)
    x = model.norm(model.blocks[1](torch.cat([x, learned.expand(2, -1, -1)], dim=1)))
    by_hand = model.head(torch.cat([x[:, :1], x[:, 17:]], dim=1).mean(1))
    assert (grafted - by_hand).abs().max() < 1e-12
    with pytest.raises(SettingError, match="2 blocks"):
        graft(model, ExtraTokens(after=3))


def test_registers_work_where_the_head_cannot_read_and_class_tokens_are_refused_there():
    model = vit(global_pool="max")
    graft(model, ExtraTokens(kind="register"))
    assert model(torch.randn(1, 3, 16, 16, dtype=torch.float64)).isfinite().all()
    ungraft(model)
    with pytest.raises(HostError, match="global_pool='max'"):
        graft(model, ExtraTokens())


def test_bad_input():
    with pytest.raises(SettingError, match="tokens=0"):
        ExtraTokens(tokens=0)
    with pytest.raises(SettingError, match="Expected one of 'class', 'register'"):
        ExtraTokens(kind="cls")
