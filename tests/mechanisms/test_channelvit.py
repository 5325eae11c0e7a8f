"""ChannelViT against its formula as loops, its symmetries, channels that come and go, and its sampling in training."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from vitreous import ChannelViT, check, graft, new_parameters, ungraft
from vitreous.base.errors import DataError, GraftError, HostError, SettingError
from vitreous.layers.stream import TokenState, opened
from vitreous.mechanisms.embed.channelvit import present, sample

SMALL = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | {"reg_tokens": 1} | options).double().eval()


def pictures(channels=3, size=(8, 12)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, *size, dtype=torch.float64, generator=generator)


def begun(model, x):
    """What the first block gets: tokens, and the state that the stream begins with."""
    return opened(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))))


def tokens(model, x):
    return begun(model, x)[0]


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}, {"no_embed_class": True}])
def test_tokens_are_the_papers(options):
    """x[c, n] = w * patch + b + position[n] + channel_embed[c], channel by channel behind one copy of the prefix."""
    host = vit(**options)
    prefix = tokens(host, pictures())[:, :2]
    model = graft(host, ChannelViT())
    embed, x = model.patch_embed, pictures()
    position = model.pos_embed[0] if "no_embed_class" in options else model.pos_embed[0, 2:]
    found = tokens(model, x)
    assert found.shape == (2, 2 + 3 * 6, 24)
    assert torch.equal(found[:, :2], prefix)
    for b, c, row, column in np.ndindex(2, 3, 2, 3):
        patch = x[b, c, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        projected = torch.stack([(kernel[0] * patch).sum() for kernel in embed.proj.weight]) + embed.proj.bias
        n = 3 * row + column
        expected = projected + position[n] + embed.channel_embed[c]
        torch.testing.assert_close(found[b, 2 + 6 * c + n], expected, atol=1e-12, rtol=1e-12)


def test_published_sizes():
    """S/16: 21.47 M parameters without head, 589 tokens, 15.76 G multiply-adds; 8 channels at S/8: 21.62 M, 6,273 tokens."""
    with torch.device("meta"):
        small = graft(timm.create_model("vit_small_patch16_224", num_classes=0), "channelvit").eval()
        x = torch.empty(1, 3, 224, 224)
        assert sum(p.numel() for p in small.parameters()) == 21_470_208
        assert tokens(small, x).shape == (1, 589, 384)
        with FlopCounterMode(display=False) as counter:
            small(x)
        assert round(counter.get_total_flops() / 2e9, 2) == 15.76
        dense = timm.create_model("vit_small_patch8_224", num_classes=0, in_chans=8).eval()
        graft(dense, "channelvit")
        assert round(sum(p.numel() for p in dense.parameters()) / 1e6, 2) == 21.62
        assert tokens(dense, torch.empty(1, 8, 224, 224)).shape == (1, 6273, 384)


def test_one_channel_is_the_grey_host_with_one_vector_added():
    host = vit(in_chans=1)
    expected = tokens(host, pictures(1))
    model = graft(host, ChannelViT())
    embed = model.patch_embed.channel_embed
    assert embed.shape == (1, 24)
    torch.testing.assert_close(tokens(model, pictures(1))[:, 2:], expected[:, 2:] + embed, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        embed.zero_()
    logits = model(pictures(1))
    ungraft(model)
    torch.testing.assert_close(logits, model(pictures(1)), atol=1e-12, rtol=1e-12)


def test_start_is_the_hosts_view_of_a_grey_image():
    host, grey = vit(), pictures(1)
    seen = host.patch_embed(grey.expand(-1, 3, -1, -1))
    embed = graft(host, ChannelViT()).patch_embed
    found = embed(grey.expand(-1, 3, -1, -1)).x.unflatten(0, (2, 3)) - embed.channel_embed[:, None]
    for c in range(3):
        torch.testing.assert_close(found[:, c], seen, atol=1e-6, rtol=1e-6)
    assert embed.channel_embed.abs().max() <= 0.04
    assert set(new_parameters(host)) == {f"patch_embed.{name}" for name in ("channel_embed", "proj.weight", "proj.bias")}


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_order_of_channels_means_nothing(pool):
    model = graft(vit(global_pool=pool), ChannelViT())
    expected = model(pictures())
    present(model, (2, 0, 1))
    torch.testing.assert_close(model(pictures()[:, [2, 0, 1]]), expected, atol=1e-12, rtol=1e-12)
    present(model, None)
    assert not torch.allclose(model(pictures()[:, [2, 0, 1]]), expected, atol=1e-6)  # without their names it does


@pytest.mark.parametrize("ids", [(0,), (2,), (0, 2), (1, 0)])
def test_any_subset_of_channels_is_the_tokens_of_these(ids):
    model = graft(vit(), ChannelViT())
    every = tokens(model, pictures())
    prefix, patches = every[:, :2], every[:, 2:].unflatten(1, (3, 6))
    expected = torch.cat([prefix, *(patches[:, i] for i in ids)], dim=1)
    present(model, ids)
    check(model, pictures()[:, list(ids)])
    torch.testing.assert_close(tokens(model, pictures()[:, list(ids)]), expected, atol=1e-12, rtol=1e-12)


def test_more_channels_than_the_host_has():
    model = graft(vit(), ChannelViT(channels=8))
    assert tokens(model, pictures(8)).shape == (2, 2 + 8 * 6, 24)
    assert model(pictures(8)).shape == (2, 5)


def test_sampling_is_hierarchical():
    """m is uniform on 1..4 and every set of m channels equally likely: chi-square over 6,000 draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = Counter(tuple(sample(4)) for _ in range(6000))
    sizes = Counter({m: sum(n for ids, n in drawn.items() if len(ids) == m) for m in range(1, 5)})
    assert scipy.stats.chisquare(list(sizes.values())).pvalue > 0.01
    for m in range(1, 4):
        sets = list(itertools.combinations(range(4), m))
        assert scipy.stats.chisquare([drawn[ids] for ids in sets]).pvalue > 0.01
    assert len(drawn) == 2**4 - 1


def test_training_leaves_channels_out_and_evaluation_does_not():
    model = graft(vit(), ChannelViT())
    every = tokens(model, pictures())[:, 2:].unflatten(1, (3, 6))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seen = set()
        for _ in range(40):
            found, state = begun(model.train(), pictures())
            parts = found[:, 2:].split(6, dim=1)
            ids = tuple(next(c for c in range(3) if torch.allclose(part, every[:, c])) for part in parts)
            seen.add(ids)
            assert (state.grid, state.prefix, state.groups) == ((2, 3), 2, len(ids))
            assert state.groups_present.tolist() == [c in ids for c in range(3)]
    assert seen == {ids for m in (1, 2, 3) for ids in itertools.combinations(range(3), m)}
    assert torch.equal(tokens(model.eval(), pictures()), tokens(model, pictures()))
    whole = graft(vit(), ChannelViT(sampling=False)).train()
    assert tokens(whole, pictures()).shape == (2, 20, 24)


def test_feature_maps_lie_below_each_other():
    """In training as well, where the features of channels that are absent are 0, and others stay in their places."""
    model = graft(vit(), ChannelViT())
    for mode in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            maps = model.train(mode).forward_intermediates(pictures(), output_fmt="NCHW", intermediates_only=True)[-1]
            torch.manual_seed(3)
            rows = model.forward_intermediates(pictures(), output_fmt="NLC", intermediates_only=True)[-1]
            torch.manual_seed(3)
            chosen = sample(3) if mode else [0, 1, 2]
        assert len(chosen) == (2 if mode else 3)
        assert maps.shape == (2, 24, 2 * 3, 3)
        for c, row, column in np.ndindex(3, 2, 3):
            assert torch.equal(maps[:, :, 2 * c + row, column], rows[:, 6 * c + 3 * row + column])
            assert (maps[:, :, 2 * c + row, column] == 0).all() == (c not in chosen)


def test_positions_of_other_sizes_are_shared_too():
    model = graft(vit(dynamic_img_size=True), ChannelViT())
    x = pictures(size=(12, 8))
    position = resample_abs_pos_embed(model.pos_embed, new_size=(3, 2), old_size=(2, 3), num_prefix_tokens=2)[0, 2:]
    bare = model.patch_embed(x).x.flatten(1, 2)
    found = tokens(model, x)[:, 2:].unflatten(1, (3, 6)).flatten(0, 1)
    torch.testing.assert_close(found, bare + position, atol=1e-12, rtol=1e-12)


def test_patch_dropout_of_the_host_goes_on():
    model = graft(vit(patch_drop_rate=0.5), ChannelViT(sampling=False))
    with torch.random.fork_rng():
        assert tokens(model.train(), pictures()).shape == (2, 2 + 9, 24)
    assert tokens(model.eval(), pictures()).shape == (2, 2 + 18, 24)


def test_places_of_all_channels_share_the_gaussian_mask():
    model = graft(vit(), "gaussian_mask", "channelvit")
    check(model, pictures())
    mask = model.blocks[0].attn.mask(2 + 18, TokenState(grid=(2, 3), prefix=2, groups=3))
    one = mask[:, 2:8, 2:8]
    assert torch.equal(mask[:, 2:, 2:], one.repeat(1, 3, 3))
    assert (mask[:, :2] == 1).all()


def test_bad_input():
    model = graft(vit(), ChannelViT())
    with pytest.raises(DataError, match=r"images of 5 channels\. Expected 3: channels 0\+1\+2 of the 3 .*channels=n"):
        model(pictures(5))
    with pytest.raises(SettingError, match=r"channels \(0, 3\)\. Expected .* ids from 0 to 2"):
        present(model, (0, 3))
    with pytest.raises(SettingError, match=r"channels \(1, 1\)"):
        present(model, (1, 1))
    with pytest.raises(SettingError, match=r"channels \(\)"):
        present(model, ())
    with pytest.raises(HostError, match=r"no ChannelViT.*Expected one"):
        present(vit(), (0,))
    with pytest.raises(SettingError, match=r"channels=0\. Expected 1 or more"):
        ChannelViT(channels=0)
    with pytest.raises(GraftError, match=r"already holds ChannelEmbed, which channelvit would undo"):
        graft(model, "channelvit")
