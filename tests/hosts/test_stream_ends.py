"""The patch embedding of ours: the host's, bit for bit, and the grid of the images that it saw last."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import PatchEmbed
from torch import nn

from vitreous.base.errors import GraftError
from vitreous.hosts.stream_ends import Embed, Grid, StreamEnd
from vitreous.layers.stream import Stream, TokenState

D = 8


def tokens(n: int = 6) -> torch.Tensor:
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(0))


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


def test_a_head_that_pools_refuses_dropped_places():
    state = TokenState(source=torch.tensor([[0, 1, 2, -1, 3, 4, 5]] * 2), dropped=True)
    assert StreamEnd.of(nn.LayerNorm(D), (0, 1), False)(Stream(tokens(), state)).shape == (2, 7, D)
    with pytest.raises(GraftError, match=r"nothing stands for them\. Expected a head that reads class tokens\. Merge"):
        StreamEnd.of(nn.LayerNorm(D), (1, None), True)(Stream(tokens(), state))


def test_the_norm_ends_the_stream():
    norm = nn.LayerNorm(D)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    end = StreamEnd.of(norm, (0, 1), False)
    x = tokens()
    assert torch.equal(end(x), norm(x))
    read = (True, False, True)
    out = end(Stream(x, TokenState(source=torch.tensor([[2, 0, 1, 1]] * 2), read_out=read)))
    placed = norm(x)[:, [2, 0, 1, 1]]
    torch.testing.assert_close(out[:, 0], (placed[:, 0] + norm(x)[:, 3] + norm(x)[:, 5]) / 3)
    assert torch.equal(out[:, 1:], placed[:, 1:])
    unread = end(Stream(x, TokenState(read_out=(False,) * 2)))
    assert torch.equal(unread, norm(x[:, :4]))
