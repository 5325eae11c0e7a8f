"""Blocks with stations, size-weighted attention, and the norm that closes the stream; merging and dropping as steps."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

from contract.hosts import build, images
from vitreous import slots
from vitreous.base.errors import GraftError, HostError, MaskError
from vitreous.hosts.attention import Attention
from vitreous.hosts.block import HALVES, STATIONS, Block, check_halves, halves_of
from vitreous.layers.stream import PLAIN, Assignment, Stream, TokenState, reduce

D = 16
KINDS = {"pre": TimmBlock, "post": ResPostBlock, "scaling": ParallelScalingBlock}


def block(kind: str = "pre", **options) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        new = KINDS[kind](D, 2, qkv_bias=True, init_values=0.5, **options)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.normal_(std=0.3)
    return new.eval()


def tokens(n: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(seed))


class Merge(nn.Module):
    """A step: the last two of the present tokens become their size-weighted mean."""

    def forward(self, x, state, qkv):
        b, n = x.shape[:2]
        sizes = x.new_ones(b, n) if state.sizes is None else state.sizes
        step = Assignment(index=torch.arange(n).expand(b, n).clamp_max(n - 2), tokens=n - 1)
        return reduce(x, state, step, torch.cat([sizes[:, :-2], sizes[:, -2:].sum(1, keepdim=True)], dim=1))


class Note(nn.Module):
    """A step that changes nothing and keeps what it saw."""

    def forward(self, x, state, qkv):
        self.seen = x, qkv
        return x, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [{}, {"is_causal": True}, {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()}])
def test_without_steps_it_is_the_host(kind, mask):
    host = block(kind)
    assert torch.equal(Block.of(host)(tokens(), **mask), host(tokens(), **mask))
    assert list(Block.of(host).state_dict()) == list(host.state_dict())


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_the_two_halves_make_the_host(kind):
    """Bit for bit, with masks, and in train mode with every dropout under one seed."""
    host = block(kind, proj_drop=0.2, attn_drop=0.2, drop_path=0.3)
    ours, note = Block.of(host), Note()
    ours.attn = Attention.of(host.attn)
    ours.add_step("between", note)
    assert ours.splits_halves
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    for mask in ({}, {"is_causal": True}, {"attn_mask": lower}):
        assert torch.equal(ours(tokens(), **mask), host(tokens(), **mask))
    outputs = []
    for module in (host, ours):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            outputs.append(module.train()(tokens()))
    assert torch.equal(*outputs)
    q, k, v = note.seen[1]
    assert q.shape == k.shape == v.shape == (2, 2, 6, D // 2)


@pytest.mark.parametrize("cls", HALVES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("start", [None, 0.5])
def test_the_registered_halves_make_the_block(cls, start):
    """Bit for bit, with a mask and every dropout under one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        host = cls(D, 2, init_values=start, proj_drop=0.2, attn_drop=0.2, drop_path=0.3).train()
        halves, lower = halves_of(host), torch.ones(6, 6, dtype=torch.bool).tril()
        assert halves == HALVES[cls]
        for mask in ({}, {"attn_mask": lower}):
            torch.manual_seed(3)
            expected = host(tokens(), **mask)
            torch.manual_seed(3)
            assert torch.equal(halves.mlp(host, halves.attention(host, tokens(), **mask)), expected)


class Telling(Attention):
    """An attention that overrides the scores, and keeps which tokens it was told of."""

    def scores(self, q, k, state=PLAIN):
        self.told = state
        return super().scores(q, k)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_attention_with_scores_of_its_own_is_told_of_the_tokens(kind):
    """And computes the same, whether the block runs in halves for it or not."""
    plain, ours = Block.of(block(kind)), Block.of(block(kind))
    ours.attn = Telling.of(ours.attn)
    torch.testing.assert_close(ours(tokens()), plain(tokens()))
    assert ours.attn.told.plain
    state = TokenState(read_out=(True, False))
    torch.testing.assert_close(ours(Stream(tokens(), state)).x, plain(Stream(tokens(), state)).x)
    assert ours.attn.told is state


def test_attention_that_must_be_told_needs_known_halves():
    class Unknown(TimmBlock):
        pass

    ours = Block.of(Unknown(D, 2))
    ours.attn = Telling.of(ours.attn)
    with pytest.raises(HostError, match=r"is a Unknown, whose attention.*Expected one of"):
        ours(Stream(tokens(), TokenState(read_out=(True,))))


def test_between_needs_known_halves():
    for kind in ("pre", "post"):
        check_halves(block(kind), "blocks.0")
    for unfit in (block("scaling"), Block.of(block("scaling"))):
        with pytest.raises(
            HostError,
            match=r"blocks\.3 is a ParallelScalingBlock.*one of Block, .*PostNorm, or a block with",
        ):
            check_halves(unfit, "blocks.3")


def test_between_holds_one_step():
    """The queries and keys that a second one would get are those of the tokens before the first."""
    model = build("plain")
    model.blocks[1] = Block.of(model.blocks[1])
    model.blocks[1].add_step("between", Note())
    with pytest.raises(GraftError, match=r"blocks\.1 already holds Note.*Expected one step there\. Choose"):
        slots.add_step(model, 1, "between", Note())
    assert len(slots.add_step(model, 2, "between", Note())["blocks.2"].steps("between")) == 1
    assert len(slots.add_step(model, 1, "after", Note())["blocks.1"].steps("after")) == 1


class MergingBlock(Block):
    """A block that attends with all tokens and goes on with one less."""

    def attention_step(self, x, state, arguments):
        x, state = super().attention_step(x, state, arguments)
        return Merge()(x, state, None)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_the_first_half_may_merge_tokens(kind):
    host, ours = block(kind), MergingBlock.of(block(kind))
    out = ours(tokens())
    halves = halves_of(host)
    torch.testing.assert_close(out.x, halves.mlp(host, Merge()(halves.attention(host, tokens()), PLAIN, None)[0]))
    assert out.state.sizes.tolist() == [[1, 1, 1, 1, 2]] * 2
    with pytest.raises(MaskError, match="is_causal"):
        ours(tokens(), is_causal=True)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_the_input_of_attention_is_what_it_gets(kind):
    host, inputs = block(kind), []
    host.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    host(tokens())
    assert torch.equal(inputs[0], halves_of(host).attention_input(host, tokens()))


def test_merging_within_and_steps_between_refuse_each_other():
    model = build("plain")
    model.blocks[1] = slots.block_of(model, 1, MergingBlock)
    with pytest.raises(GraftError, match=r"blocks\.1 is already of class MergingBlock.*Expected a block that leaves"):
        slots.add_step(model, 1, "between", Note())
    model.blocks[2] = Block.of(model.blocks[2])
    model.blocks[2].add_step("between", Note())
    with pytest.raises(GraftError, match=r"blocks\.2 already holds Note.*MergingBlock would merge before.*Expected no step"):
        slots.block_of(model, 2, MergingBlock)

    class Known(TimmBlock):
        attention_half = mlp_half = None

    model.blocks[3] = Known(32, 2)
    with pytest.raises(HostError, match=r"blocks\.3 is a Known, of which.*Expected one of Block, EvaBlock"):
        slots.block_of(model, 3, MergingBlock)


def test_stations_belong_to_one_block():
    """A block made of another keeps its steps and class, and what is added to it stays there."""

    class Own(Block):
        pass

    first = Own.of(block())
    for station in STATIONS:
        first.add_step(station, Note())
    second = type(first).of(first)
    second.add_step("after", Note())
    assert type(second) is Own
    assert second.host is TimmBlock
    assert [len(first.steps(name)) for name in STATIONS] == [1, 1, 1]
    assert [len(second.steps(name)) for name in STATIONS] == [1, 1, 2]
    assert second.steps("after")[0] is first.steps("after")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_in_attention_equal_duplicated_tokens(kind):
    """One token of size 3 does what three equal ones do."""
    host, x = block(kind), tokens(4)
    ours = Block.of(host)
    assignment = Assignment(torch.tensor([[0, 1, 2, 3, 3, 3]] * 2))
    out = ours(Stream(x, TokenState(sizes=torch.tensor([[1.0, 1, 1, 3]] * 2), assignment=assignment)))
    apart = host(torch.cat([x, x[:, -1:], x[:, -1:]], dim=1))
    torch.testing.assert_close(out.tokens(), apart, atol=1e-5, rtol=1e-5)
    half = ours.bfloat16()(Stream(x.bfloat16(), TokenState(sizes=torch.tensor([[1.0, 1, 1, 3]] * 2))))
    assert half.x.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "state",
    [
        TokenState(read_out=(True,)),
        TokenState(sizes=torch.ones(2, 6)),
        TokenState(assignment=Assignment(torch.arange(6).expand(2, 6))),
    ],
    ids=["inserted", "sizes", "assignment"],
)
@pytest.mark.parametrize("mask", [{"attn_mask": torch.ones(6, 6).bool()}, {"is_causal": True}], ids=["mask", "causal"])
def test_a_mask_on_other_tokens_is_refused(state, mask):
    ours = Block.of(block())
    with pytest.raises(MaskError, match=next(iter(mask))):
        ours(Stream(tokens(), state), **mask)


@pytest.mark.parametrize("mask", [{"attn_mask": torch.ones(6, 6).bool()}, {"is_causal": True}], ids=["mask", "causal"])
def test_a_step_that_changes_tokens_under_a_mask_is_refused_in_its_own_block(mask):
    """There may be no later block that would notice."""
    ours = Block.of(block())
    ours.attn = Attention.of(ours.attn)
    ours.add_step("between", Merge())
    ours(tokens())
    with pytest.raises(MaskError, match=next(iter(mask))):
        ours(tokens(), **mask)


@pytest.mark.parametrize("station", ["between", "after"])
def test_merging_in_a_model(station):
    """Restored everywhere: shapes as the host's, pools weigh by size, single tokens of merged places are equal."""
    model = build("test_vit4")
    for path, value in slots.add_step(model, 3, station, Merge()).items():
        model.set_submodule(path, value.eval())
    plain = build("test_vit4")
    final, here = model.forward_intermediates(images())
    assert final.shape == plain.forward_features(images()).shape
    assert all(torch.equal(a, b) for a, b in zip(here[:3], plain.forward_intermediates(images())[1][:3], strict=True))
    assert torch.equal(final[:, -1], final[:, -2])
    grid = here[-1]
    assert torch.equal(grid[:, :, 3, 3], grid[:, :, 3, 2])
    stream = model.blocks(model._pos_embed(model.patch_embed(images())))
    assert stream.x.shape[1] == final.shape[1] - 1
    normed, sizes = plain.norm(stream.x)[:, 1:], stream.state.sizes[:, 1:, None]
    mean = (normed * sizes).sum(1) / sizes.sum(1)
    torch.testing.assert_close(model.pool(final), mean, atol=1e-6, rtol=1e-5)
    with pytest.raises(MaskError, match=r"some were merged or dropped.*Call the model without a mask"):
        model(images(), is_causal=True)
