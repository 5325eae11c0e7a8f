"""What a host is, which places it has, and what its head reads."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from contract.hosts import HOSTS, ROTARY, build, images
from vitreous import graft, slots
from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.hosts.block import Block
from vitreous.hosts.read_out import read_tokens
from vitreous.hosts.stream_ends import StreamEnd

# What the head of each host reads: (first, end) of the tokens, and whether it pools over them.
READS = {
    "plain": ((0, 1), False),
    "test_vit": ((0, 1), False),
    "test_vit2": ((1, None), True),
    "test_vit3": ((0, None), True),
    "test_vit4": ((1, None), True),
    "distilled": ((0, 2), False),
    "dinov2": ((0, 1), False),
    "clip": ((0, 1), False),
    "qk_norm": ((0, 1), False),
    "res_post": ((0, 1), False),
    "class_avg": ((1, None), True),
    "class_map": ((1, None), True),
    "class_map_all": ((0, None), True),
    "prr": ((0, None), True),
    "fc_norm": ((0, 1), False),
    "max": ((1, None), True),
    "parallel_scaling": ((0, 1), False),
    "parallel_things": ((0, 1), False),
    "diff_attention": ((0, 1), False),
}


@pytest.mark.parametrize("name", sorted(set(HOSTS) - ROTARY))
def test_which_tokens_the_head_reads(name):
    """Those that it says, and no other: every other token may be anything."""
    model = build(name)
    (start, stop), pooled = read_tokens(model)
    assert ((start, stop), pooled) == READS[name]
    features = model.forward_features(images())
    reads, other = features.clone(), torch.full_like(features, 7.0)
    other[:, start:stop] = features[:, start:stop]
    assert torch.equal(model.forward_head(other), model.forward_head(reads))
    n = features.shape[1]
    for i in range(start, n if stop is None else stop):
        moved = features.clone()
        moved[:, i] += 50.0 * torch.linspace(-1, 1, features.shape[2])
        assert not torch.equal(model.forward_head(moved), model.forward_head(features))


@pytest.mark.parametrize("name", ["plain", "test_vit2", "test_vit3", "distilled", "dinov2", "dinov3", "eva"])
def test_numbers_of_a_host(name):
    model = build(name)
    tokens = model.forward_features(images()).shape[1]
    assert slots.prefix(model) == tokens - 16
    assert slots.depth(model) == len(model.blocks)
    assert slots.width(model) == model.forward_features(images()).shape[2]


def test_layers_are_counted_from_zero_and_after_from_one():
    model = build("plain")
    assert slots.layer_indices(model, None) == (0, 1, 2, 3)
    assert slots.layer_indices(model, (3, 1)) == (3, 1)
    with pytest.raises(SettingError, match=r"layers=4\+7, but this model has 4 blocks\. Expected 0 to 3"):
        slots.layer_indices(model, (0, 4, 7))
    assert slots.block_count(model, None) == 3
    assert [slots.block_count(model, n) for n in (1, 4)] == [1, 4]
    for wrong in (0, 5):
        with pytest.raises(SettingError, match=rf"after={wrong}, but this model has 4 blocks\. Expected 1 to 4"):
            slots.block_count(model, wrong)
    shallow = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)
    assert slots.block_count(shallow, None) == 1


def test_attention_that_is_taken_is_refused():
    model = graft(build("plain"), "svda:layers=1")
    with pytest.raises(GraftError, match=r"blocks\.1\.attn already holds SpectralAttention.*Expected plain.*Take"):
        graft(model, "svda")
    graft(model, "svda:layers=0+2+3")


@pytest.mark.parametrize("text", ["svda:layers=4", "spc:after=5", "spc:after=0"])
def test_a_layer_that_is_not_there(text):
    model = build("plain")
    with pytest.raises(SettingError, match="this model has 4 blocks"):
        graft(model, text)
    assert "grafts" not in model.__dict__


def test_a_station_opens_the_stream_from_its_block_on():
    model = build("plain")
    changes = slots.add_step(model, 2, "before", nn.Identity())
    assert list(changes) == ["blocks.2", "blocks.3", "norm"]
    assert [type(value) for value in changes.values()] == [Block, Block, StreamEnd]
    assert len(changes["blocks.2"].steps("before")) == 1
    assert not changes["blocks.3"].steps("before")
    for path, value in changes.items():
        model.set_submodule(path, value)
    earlier, later = slots.add_step(model, 1, "after", nn.Identity()), slots.add_step(model, 3, "after", nn.Identity())
    assert list(earlier) == ["blocks.1"]  # the later ones and the norm are ours already
    assert list(later) == ["blocks.3"]


class OwnBlock(Block):
    """A block of ours with an MLP half of its own."""

    def mlp_half(self, x):
        return x


def test_a_station_keeps_the_class_of_a_block_of_ours():
    model = build("plain")
    model.blocks[2] = OwnBlock.of(model.blocks[2])
    changes = slots.add_step(model, 2, "after", nn.Identity())
    assert type(changes["blocks.2"]) is OwnBlock


def test_attention_is_matched_by_class_not_by_name():
    """timm has many a class called `Attention`; BEiT's takes other arguments."""
    beit = timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model = build("plain")
    model.blocks[1].attn = beit.blocks[0].attn
    assert type(model.blocks[1].attn).__name__ == "Attention"
    with pytest.raises(HostError, match=r"blocks\.1\.attn is a timm\.models\.beit\.Attention\. Expected one of timm\.layers"):
        graft(model, "svda")
