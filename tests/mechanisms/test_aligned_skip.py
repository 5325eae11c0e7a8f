"""Pruning behind a decaying mixer: alignment against the dense mixer, the published schedule, and the contract."""

from __future__ import annotations

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from vitreous import AlignedSkip, Retention, check, graft, ungraft
from vitreous.base.errors import GraftError, HostError, MaskError, SettingError
from vitreous.bench.operation_count import operations
from vitreous.hosts.host import embed, run
from vitreous.hosts.token_counts import Count, block_costs, measured_counts, multiply_adds, whole
from vitreous.layers.stream import Assignment, TokenState, to_grid
from vitreous.mechanisms.mixer.retention import inverse, parallel, sequence
from vitreous.mechanisms.tokens.aligned_skip import Skip, importance, kept
from vitreous.testing import contract_checks, laws_reducers
from vitreous.testing import hosts as small
from vitreous.testing.contract import laws

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}


def vit(**options):
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL | {"reg_tokens": 1} | options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def retaining(*grafts, form="parallel", **options):
    """A ViT whose blocks hold retention with weights away from their small start, and further grafts."""
    model = graft(vit(**options), Retention(form=form, chunk=5))
    for i, block in enumerate(model.blocks):
        for j, parameter in enumerate(block.attn.parameters()):
            parameter.data = drawn(*parameter.shape, seed=10 * i + j) / (
                parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 3
            )
    return graft(model, *grafts)


def drawn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pictures(count=2):
    return drawn(count, 3, 16, 16)


def streams(model, x):
    stream, handed_on = embed(model, x), []
    for i in range(len(model.blocks)):
        stream = run(model, stream, i, i + 1)
        handed_on.append((stream.x, stream.state))
    return handed_on


# -- alignment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
@pytest.mark.parametrize("inserted", [(), (True, False)])
def test_pruned_is_dense_with_inputs_of_zero_and_not_a_plain_gather(form, inserted):
    """Two prefix tokens, 16 places of which each image keeps seven of its own, in any order; inserted tokens behind."""
    module = retaining(form=form).blocks[0].attn
    m, x = len(inserted), drawn(2, 18 + len(inserted), 24)
    keep = torch.stack([drawn(16, seed=5 + i).argsort()[:7] for i in range(2)])
    places = torch.cat([torch.arange(2).expand(2, 2), 2 + keep], dim=1)  # (2, 9), not in raster order
    dense = TokenState(grid=(4, 4), prefix=2, read_out=inserted)
    state = TokenState(grid=(4, 4), prefix=2, read_out=inserted, assignment=Assignment.keeping(keep, 16, 2))
    present = torch.cat([x[torch.arange(2)[:, None], places], x[:, 18:]], dim=1)
    found = module(present, state=state)

    order = sequence(18 + m, dense)
    q, k, v = module.project(x[:, order])
    gone = torch.ones(2, 18 + m, dtype=torch.bool)
    gone[torch.arange(2)[:, None], places] = False
    gone[:, 18:] = False
    v = v.masked_fill(gone[:, order][:, None, :, None], 0)
    o = parallel(q, k, v, module.log_decay(q)).transpose(1, 2).flatten(2)
    y = module.proj(F.gelu(module.norm(o)))[:, inverse(order)]
    expected = torch.cat([y[torch.arange(2)[:, None], places], y[:, 18:]], dim=1)
    assert (found - expected).abs().max() < 1e-10

    raster = keep.sort(1).values
    gathered = torch.cat([torch.arange(2).expand(2, 2), 2 + raster], dim=1)
    naive = module(x[torch.arange(2)[:, None], gathered], state=TokenState(grid=(1, 7), prefix=2))
    aligned = TokenState(grid=(4, 4), prefix=2, assignment=Assignment.keeping(raster, 16, 2))
    assert (module(x[torch.arange(2)[:, None], gathered], state=aligned) - naive).abs().max() > 1e-3


def test_pruned_blocks_of_a_model_are_the_dense_ones_on_what_stays():
    """Through a whole model: behind the step, places that were pruned give nothing to any later block."""
    model, x = retaining(AlignedSkip(keep=0.5, layers=(1,))), pictures()
    (_, _), (tokens, state), *later = streams(model, x)
    index = state.assignment.index  # (2, 18)
    for i in (2, 3):
        block, expected = model.blocks[i], []
        for image in range(2):
            there = (index[image] >= 0).nonzero().squeeze(1)
            normed = torch.zeros(1, 18, 24, dtype=torch.float64)
            normed[0, there] = block.norm1(tokens[image])
            order = sequence(18, TokenState(grid=(4, 4), prefix=2))
            q, k, v = block.attn.project(normed[:, order])
            v = v * (index[image][order] >= 0)[None, None, :, None]
            o = parallel(q, k, v, block.attn.log_decay(q)).transpose(1, 2).flatten(2)
            y = tokens[image] + block.attn.proj(F.gelu(block.attn.norm(o)))[0, inverse(order)][there]
            expected.append(y + block.mlp(block.norm2(y)))
        tokens = later[i - 2][0]
        assert (tokens - torch.stack(expected)).abs().max() < 1e-10


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
def test_any_reducer_that_drops_may_stand_before_retention(form):
    """EViT hands its patches on by score: the same answer as with the same patches in raster order."""
    answers = []
    for layers in ("1", "1"):
        model = graft(vit(), f"evit:keep=0.5,fuse=false,layers={layers}", Retention(layers=(2, 3), form=form, chunk=3))
        answers.append(check(model, pictures())(pictures()))
    tokens, state = streams(model, pictures())[1]
    place = state.assignment.own_places(tokens.shape[1])
    order = place.argsort(1)
    assert not torch.equal(order, torch.arange(10).expand(2, -1))
    raster = TokenState(grid=(4, 4), prefix=2, assignment=Assignment.keeping(place.gather(1, order)[:, 2:] - 2, 16, 2))
    mixer, rows = model.blocks[2].attn, torch.arange(2)[:, None]
    assert (mixer(tokens, state=state)[rows, order] - mixer(tokens[rows, order], state=raster)).abs().max() < 1e-12


def test_merged_and_then_dropped_is_refused():
    merged = Assignment(index=torch.tensor([[0, 1, 2, 2, 3]]), tokens=4)
    dropped = merged.then(Assignment(index=torch.tensor([[0, 1, -1, 2]]), tokens=3, dropped=True, single=True))
    state = TokenState(grid=(1, 3), prefix=2, assignment=dropped)
    with pytest.raises(MaskError, match="some places have no token, but RetentionMixer"):
        retaining().blocks[0].attn(drawn(1, 3, 24), state=state)


# -- what stays --------------------------------------------------------------------------------------------------------


def test_the_largest_clipped_outputs_stay_in_their_order():
    x, y = drawn(2, 15, 24), drawn(2, 15, 24, seed=2)
    out, state = Skip(0.5, 2)(x, TokenState(read_out=(True,)), y)
    assert out.shape == (2, 2 + 6 + 1, 24)
    for i in range(2):
        scores = [sum(max(0.0, value) for value in row) for row in y[i, 2:14].tolist()]
        assert importance(y)[i, 2:14].tolist() == pytest.approx(scores, abs=1e-12)
        stay = sorted(sorted(range(12), key=lambda j, scores=scores: -scores[j])[:6])
        assert torch.equal(out[i], x[i, [0, 1, *(2 + j for j in stay), 14]])
        assert [int(j) for j in state.assignment.index[i]] == [
            0,
            1,
            *(2 + stay.index(j) if j in stay else -1 for j in range(12)),
        ]
    assert importance(y.clamp(max=0)).abs().max() == 0


def test_the_step_gets_the_output_of_its_mixer():
    model, outputs = retaining(AlignedSkip(keep=0.5, layers=(2,))), []
    model.blocks[2].attn.register_forward_hook(lambda module, args, out: outputs.append(out))
    _, state = streams(model, pictures())[2]
    top = importance(outputs[0])[:, 2:].topk(8).indices.sort(1).values
    assert torch.equal(state.assignment.index, Assignment.keeping(top, 16, 2).index)
    picture = to_grid(*streams(model, pictures())[3], (4, 4), prefix=2)
    assert ((picture == 0).all(-1).sum((1, 2)) == 8).all()  # places that were pruned


def test_schedule_is_the_published_one():
    """Vim-S at 224 pixels: 197, 157, 125, 101 tokens behind layers 5, 10 and 15 of 24."""
    options = {"img_size": 28, "patch_size": 2, "depth": 24, "embed_dim": 6, "reg_tokens": 0, "num_heads": 1}
    model = graft(vit(**options), Retention(form="chunkwise"), AlignedSkip())
    found = [count.mlp for count in measured_counts(model, drawn(1, 3, 28, 28))]
    assert found == [197] * 5 + [157] * 5 + [125] * 5 + [101] * 9
    assert [kept(n, 0.8) for n in (196, 156, 124)] == [156, 124, 100]
    assert [kept(15, 1.0), kept(15, 0.99), kept(1, 0.1)] == [15, 14, 1]


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}])
def test_keep_one_is_the_host(options):
    assert torch.equal(retaining(AlignedSkip(keep=1), **options)(pictures()), retaining(**options)(pictures()))


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_multiply_adds_of_retention_are_those_that_are_counted(form):
    model, mechanism = retaining(form=form), AlignedSkip(keep=0.5, layers=(1,))
    expected = multiply_adds(block_costs(model), mechanism.token_counts(model))
    assert mechanism.token_counts(model)[1:3] == (Count(18, 10), Count(10, 10))
    assert expected < multiply_adds(block_costs(model), whole(model))
    graft(model, mechanism)
    stream = embed(model, pictures(1))
    assert operations(lambda: run(model, stream)).total // 2 == expected


def test_a_budget_needs_a_form_with_a_formula():
    assert AlignedSkip(macs=0.7).share(retaining()) <= 0.7
    with pytest.raises(HostError, match=r"RetentionMixer, whose multiply-adds have no formula here"):
        graft(retaining(form="chunkwise"), "aligned_skip:macs=0.7")


# -- the contract, in a host with retention ----------------------------------------------------------------------------


def with_retention(**options):
    model = graft(small.vit(**options)(), "retention")
    del model.__dict__["grafts"]  # a host of its own
    return model


@pytest.mark.parametrize("text", ["aligned_skip", *AlignedSkip.examples])
def test_contract(text, monkeypatch):
    """All laws at its defaults; of the examples those of reducers, what they claim, and removal."""
    monkeypatch.setitem(small.HOSTS, "retention", with_retention)
    checks = contract_checks(text, hosts=["retention"])
    some = [law.__name__ for law in laws(laws_reducers)] + ["is_described", "exact_at_init", "removal_is_exact", "exports"]
    chosen = checks if ":" not in text else [one for one in checks if one.law.__name__ in some]
    assert {one.law.__name__ for one in chosen} >= set(some)
    for one in chosen:
        one.run()


def test_hosts_without_a_decaying_mixer_are_refused_by_name():
    for host in (vit(), graft(vit(), "spectral_gate")):
        with pytest.raises(
            HostError, match=r"^No block of this timm VisionTransformer holds a mixer whose weights decay.*Graft"
        ):
            graft(host, "aligned_skip")
    with pytest.raises(HostError, match=r"lays positions over a fixed list"):
        graft(Eva(**SMALL), "aligned_skip")
    with pytest.raises(HostError, match=r"^blocks\.1\.attn is a Attention.* blocks 0\+3 hold one\. Choose layers among them"):
        graft(vit(), Retention(layers=(0, 3)), AlignedSkip(layers=(0, 1)))
    with pytest.raises(HostError, match=r"^blocks\.3\.attn is a Gate.* blocks 0\+1 hold one"):
        graft(vit(), Retention(layers=(0, 1)), "spectral_gate:layers=3", AlignedSkip(layers=(1,)))
    with pytest.raises(HostError, match=r"pools over the patches"):
        graft(retaining(global_pool="avg"), "aligned_skip")


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found keep=0\.0\. Expected a fraction above 0, up to 1\. Give"):
        AlignedSkip(keep=0.0)
    with pytest.raises(SettingError, match=r"layers=7.*4 blocks"):
        graft(retaining(), AlignedSkip(layers=(7,)))
    with pytest.raises(GraftError, match=r"already holds Skip between attention and MLP"):
        graft(retaining(), AlignedSkip(layers=(1,)), AlignedSkip(layers=(1,)))


def test_attention_may_stand_behind_it():
    model = graft(vit(), Retention(layers=(0, 1)), AlignedSkip(keep=0.5, layers=(0,)))
    assert check(model, pictures())(pictures()).isfinite().all()
    assert [count.attention for count in measured_counts(model, pictures())] == [18, 10, 10, 10]
    assert ungraft(model, all=True).changed == ()
    assert torch.equal(model(pictures()), vit()(pictures()))
