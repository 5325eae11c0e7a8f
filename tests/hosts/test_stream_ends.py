"""The ends of the stream: the patch embedding and the norm of the host, bit for bit, and the state between them."""

from __future__ import annotations

import pytest
import torch
from timm.layers import PatchDropout, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitreous.base.errors import GraftError
from vitreous.hosts.attention import Attention
from vitreous.hosts.block import Block
from vitreous.hosts.stream_ends import Embed, Opening, StreamEnd, collect_terms
from vitreous.layers.stream import Assignment, Stream, TokenState

D = 8


def tokens(n: int = 6) -> torch.Tensor:
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"output_fmt": "NHWC"}, {"norm_layer": torch.nn.LayerNorm, "bias": False}])
def test_equals_the_hosts(options):
    host = PatchEmbed(img_size=None, patch_size=4, embed_dim=8, **options)
    ours, x = Embed.of(host, prefix=2), torch.randn(2, 3, 12, 16)
    opening = ours(x)
    assert torch.equal(opening.x, host(x))
    assert opening.state == TokenState(grid=(3, 4), prefix=2)
    assert ours.proj is host.proj
    assert ours.dynamic_feat_size((12, 16)) == (3, 4)


def test_grid_is_that_of_the_images_with_padding():
    ours = Embed.of(PatchEmbed(img_size=16, patch_size=4, embed_dim=8, strict_img_size=False, dynamic_img_pad=True), 0)
    assert ours(torch.randn(1, 3, 9, 21)).state.grid == (3, 6)


def test_the_state_passes_through_what_a_host_does_with_patches():
    state, x, first = TokenState(grid=(2, 3), prefix=1), tokens(), torch.ones(2, 1, D)
    norm = nn.LayerNorm(D)
    opening = Opening(x.unflatten(1, (2, 3)), state)
    assert opening.shape == (2, 2, 3, D)
    opening = norm(nn.Dropout(0.5).eval()(torch.cat([first, opening.view(2, -1, D) + 1], dim=1)))
    assert opening.state is state
    assert torch.equal(opening.x, norm(torch.cat([first, x + 1], dim=1)))


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_state_ends_where_patches_are_dropped(prefix):
    out = PatchDropout(0.5, num_prefix_tokens=prefix)(Opening(tokens(), TokenState(grid=(2, 3))))
    assert isinstance(out, torch.Tensor)
    assert out.shape == (2, prefix + (6 - prefix) // 2, D)


def test_nothing_is_kept_on_a_module():
    ours = Embed.of(PatchEmbed(img_size=16, patch_size=4, embed_dim=8, strict_img_size=False), prefix=0)
    before = dict(vars(ours))
    ours(torch.randn(1, 3, 8, 20))
    assert vars(ours) == before


class Penalised(nn.Module):
    """A token step that hands on a value per image."""

    def forward(self, x, state, qkv):
        return x, TokenState(terms=(*state.terms, ("length", x.square().sum((1, 2)))))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_terms_are_means_over_images_and_sums_over_steps(checkpointing):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=D, depth=3, num_heads=1, num_classes=2)
    for i in range(3):
        model.blocks[i] = Block.of(model.blocks[i])
    model.norm = StreamEnd.of(model.norm, (0, 1), False)
    for i in (0, 2):
        model.blocks[i].add_step("after", Penalised())
    seen = [None] * 3
    for i in (0, 2):
        model.blocks[i].register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out.x))
    model.set_grad_checkpointing(checkpointing)
    x = torch.randn(4, 3, 8, 8)
    with collect_terms(model) as terms:
        logits = model(x)
    expected = sum(seen[i].detach().square().sum((1, 2)).mean() for i in (0, 2))
    torch.testing.assert_close(terms["length"].detach(), expected)
    terms["length"].backward()
    assert model.patch_embed.proj.weight.grad.abs().max() > 0
    with collect_terms(model) as none:
        pass
    assert none == {}
    assert torch.equal(model(x), logits)  # and no hook is left
    assert len(model.norm._forward_pre_hooks) == 0


class PenalisedAttention(Attention):
    """Plain attention with a value per image."""

    def terms(self, q, k, v, state):
        return (("scores", (q * k).sum((1, 2, 3))), ("prefix", q.new_full((len(q),), state.prefix)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_terms_of_attention_are_those_of_its_queries_and_keys(checkpointing):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=D, depth=2, num_heads=2, num_classes=2)
    x, inputs = torch.randn(4, 3, 8, 8), []
    expected = model(x)
    model.patch_embed = Embed.of(model.patch_embed, prefix=1)
    model.norm = StreamEnd.of(model.norm, (0, 1), False)
    for i in range(2):
        model.blocks[i] = Block.of(model.blocks[i])
        model.blocks[i].attn = PenalisedAttention.of(model.blocks[i].attn)
        model.blocks[i].attn.register_forward_pre_hook(lambda attention, args: inputs.append((attention, args[0].detach())))
    model.set_grad_checkpointing(checkpointing)
    with collect_terms(model) as terms:
        assert torch.equal(model(x), expected)
    pairs = [attention.project(tokens)[:2] for attention, tokens in inputs]
    torch.testing.assert_close(terms["scores"], sum((q * k).sum() / 4 for q, k in pairs))
    assert terms["prefix"] == 2
    terms["scores"].backward()
    assert model.blocks[1].attn.qkv.weight.grad.abs().max() > 0
    with torch.no_grad(), collect_terms(model) as none:
        assert model.blocks[0](model._pos_embed(model.patch_embed(x))).state.terms == ()
    assert none == {}


def test_a_head_that_pools_refuses_dropped_places():
    state = TokenState(assignment=Assignment(torch.tensor([[0, 1, 2, -1, 3, 4, 5]] * 2), dropped=True))
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
    out = end(Stream(x, TokenState(assignment=Assignment(torch.tensor([[2, 0, 1, 1]] * 2)), read_out=read)))
    placed = norm(x)[:, [2, 0, 1, 1]]
    torch.testing.assert_close(out[:, 0], (placed[:, 0] + norm(x)[:, 3] + norm(x)[:, 5]) / 3)
    assert torch.equal(out[:, 1:], placed[:, 1:])
    unread = end(Stream(x, TokenState(read_out=(False,) * 2)))
    assert torch.equal(unread, norm(x[:, :4]))
