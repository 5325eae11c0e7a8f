"""The patch embedding of ours: the host's, bit for bit, and the grid of the images that it saw last."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import PatchEmbed

from vitreous.hosts.stream_ends import Embed, Grid


@pytest.mark.parametrize("options", [{}, {"output_fmt": "NHWC"}, {"norm_layer": torch.nn.LayerNorm, "bias": False}])
def test_equals_the_hosts(options):
    host = PatchEmbed(img_size=None, patch_size=4, embed_dim=8, **options)
    ours, x = Embed.of(host), torch.randn(2, 3, 12, 16)
    assert torch.equal(ours(x), host(x))
    assert ours.proj is host.proj
    assert ours.dynamic_feat_size((12, 16)) == (3, 4)
    assert ours.grid.shape == (3, 4)


def test_grid_follows_the_images_with_padding():
    ours = Embed.of(PatchEmbed(img_size=16, patch_size=4, embed_dim=8, strict_img_size=False, dynamic_img_pad=True))
    assert ours.grid == Grid((4, 4))
    ours(torch.randn(1, 3, 9, 21))
    assert ours.grid == Grid((3, 6))


def test_grid_is_shared_on_adoption_and_in_copies():
    ours = Embed.of(PatchEmbed(img_size=16, patch_size=4, embed_dim=8, strict_img_size=False))
    assert Embed.of(ours).grid is ours.grid
    for twin, grid in (copy.deepcopy((ours, ours.grid)), pickle.loads(pickle.dumps((ours, ours.grid)))):
        twin(torch.randn(1, 3, 8, 20))
        assert grid.shape == (2, 5)
        assert ours.grid.shape == (4, 4)
