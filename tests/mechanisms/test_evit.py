"""EViT against the formula in loops, the published token counts and operations, and the way back to the picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled

from contract.hosts import HOSTS, build, refused
from contract.hosts import images as hosts_images
from vitreous import EViT, check, graft, parse, ungraft
from vitreous.base.errors import GraftError, HostError, NotReached, SettingError
from vitreous.hosts.host import embed, run
from vitreous.layers.stream import Assignment, TokenState, to_grid
from vitreous.mechanisms.tokens.evit import Reorganize, class_attention
from vitreous.reducer import staying


def vit(cls=None, **kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5} | kwargs
    model = cls(**settings) if cls else timm.create_model("vit_tiny_patch16_224", **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def images(count=2, size=16):
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def streams(model, x):
    """What each block hands on: (tokens, state)."""
    stream, handed_on = embed(model, x), []
    for i in range(len(model.blocks)):
        stream = run(model, stream, i, i + 1)
        handed_on.append((stream.x, stream.state))
    return handed_on


def drawn(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(x, q, k, keep, prefix, inserted=0):
    """The paper, one image at a time: the reorganised tokens, and for each old one where it went (fused: the last)."""
    tokens, places = [], []
    for image, queries, keys in zip(x, q, k, strict=True):
        scores = [0.0] * len(image)
        for head in range(len(queries)):
            row = [math.exp(sum(a * b for a, b in zip(queries[head, 0], key, strict=True))) for key in keys[head]]
            scores = [s + weight / sum(row) / len(queries) for s, weight in zip(scores, row, strict=True)]
        patches = range(prefix, len(image) - inserted)
        stay = sorted(patches, key=lambda j: -scores[j])[: math.ceil(keep * len(patches))]
        fused = sum(scores[j] * image[j] for j in patches if j not in stay)
        tokens.append(torch.stack([*image[:prefix], *(image[j] for j in stay), fused, *image[len(image) - inserted :]]))
        places.append([*range(prefix), *(prefix + (stay.index(j) if j in stay else len(stay)) for j in patches)])
    return torch.stack(tokens), places


@pytest.mark.parametrize(("prefix", "inserted"), [(1, 0), (3, 0), (1, 2), (2, 1)])
def test_keeps_and_fuses_as_the_formula_says(prefix, inserted):
    n = prefix + 11 + inserted
    x, q, k = drawn(2, n, 6), drawn(2, 3, n, 4, seed=3), drawn(2, 3, n, 4, seed=4)
    state = TokenState(read_out=(True,) * inserted)
    out, after = Reorganize(EViT(keep=0.6), prefix)(x, state, (q, k, None))
    expected, places = by_hand(x, q, k, 0.6, prefix, inserted)
    assert out.shape == (2, prefix + 7 + 1 + inserted, 6)
    torch.testing.assert_close(out, expected)
    assert after.assignment.index.tolist() == places
    assert after.sizes is None
    assert after.read_out == state.read_out


def test_scores_are_the_attention_that_the_host_computes():
    """Mean over heads of the class row, on the host's own weights; merged tokens count with their size."""
    attention = vit().blocks[0].attn.requires_grad_(False)
    x = drawn(2, 17, 48)
    q, k, _ = attention.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(16)).softmax(-1)
    torch.testing.assert_close(class_attention(q / math.sqrt(16), k, None), weights[:, :, 0].mean(1))
    twice = torch.cat([k, k[:, :, -1:]], dim=2)
    sizes = torch.ones(2, 17, dtype=torch.float64)
    sizes[:, -1] = 2
    row = (q[:, :, :1] @ twice.transpose(-2, -1)).softmax(-1)[:, :, 0].mean(1)
    together = torch.cat([row[:, :16], row[:, 16:].sum(1, keepdim=True)], dim=1)
    torch.testing.assert_close(class_attention(q, k, sizes), together)


def test_the_step_gets_the_attention_of_its_block():
    """In a model: block by block with the host's parts, the second reduction on top of the first."""
    model, host = graft(vit(), EViT(layers=(0, 2), keep=0.5)), vit().requires_grad_(False)
    x = host._pos_embed(host.patch_embed(images()))
    sources = [list(range(17))] * 2
    for i, block in enumerate(host.blocks):
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        x = x + block.attn(block.norm1(x))
        if i in (0, 2):
            x, places = by_hand(x, q / math.sqrt(16), k, 0.5, 1)
            sources = [[place[j] for j in source] for source, place in zip(sources, places, strict=True)]
        x = x + block.mlp(block.norm2(x))
    tokens, state = streams(model, images())[-1]
    torch.testing.assert_close(tokens, x)
    assert state.assignment.index.tolist() == sources
    torch.testing.assert_close(model(images()), host.head(host.norm(x)[:, 0]))


# -- published numbers -------------------------------------------------------------------------------------------------

PUBLISHED = {0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3}  # DeiT-S, multiply-adds in G
SCHEDULE = [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3  # tokens in the MLP of each block, keep = 0.7


@pytest.fixture(scope="module")
def deit():
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224").eval()


def counted(model, keep):
    """Tokens in attention and in the MLP of each block."""
    graft(model, EViT(keep=keep))
    seen, handles = {"attn": [], "mlp": []}, []
    for block in model.blocks:
        for name, found in seen.items():
            note = lambda module, args, out, found=found: found.append(out.shape[1])  # noqa: E731
            handles.append(getattr(block, name).register_forward_hook(note))
    model(torch.zeros(1, 3, 224, 224, device="meta"))
    for handle in handles:
        handle.remove()
    ungraft(model)
    return seen["attn"], seen["mlp"]


def multiply_adds(attention, mlp, width=384, classes=1000):
    """Of a ViT of this width with 16 x 16 patches at 224 pixels, counted by the shapes of its matrix products."""
    patches = 196 * (3 * 16 * 16) * width
    products = sum(n * width * 3 * width + 2 * n * n * width + n * width * width for n in attention)
    return patches + products + sum(2 * n * width * 4 * width for n in mlp) + width * classes


@pytest.mark.parametrize("keep", PUBLISHED)
def test_operations_are_the_published_ones(deit, keep):
    assert round(multiply_adds(*counted(deit, keep)) / 1e9, 1) == PUBLISHED[keep]


def test_token_schedule_is_the_published_one(deit):
    attention, mlp = counted(deit, 0.7)
    assert mlp == SCHEDULE
    assert attention == [197, *SCHEDULE[:-1]]  # a block attends with the tokens that the one before left
    assert round(multiply_adds([197] * 12, [197] * 12) / 1e9, 1) == 4.6


def test_counts_are_rounded_up_but_not_by_rounding_errors():
    assert [staying(n, 0.7) for n in (196, 139, 99)] == [138, 98, 70]
    assert 0.55 * 100 > 55
    assert staying(100, 0.55) == 55
    assert [staying(16, keep) for keep in (1e-3, 0.5, 0.51, 1.0)] == [1, 8, 9, 16]


# -- limits, and back to the picture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}, {"cls": VisionTransformerDistilled}])
def test_keep_one_is_the_host(host):
    model = graft(vit(**host), EViT(keep=1))
    assert torch.equal(model(images()), vit(**host)(images()))
    assert EViT(keep=1).exact_at_init
    assert not EViT().exact_at_init


def test_kept_and_fused_tokens_come_back_to_the_picture():
    """Every place shows its own token or the fused one of its image, after one reduction and after two."""
    model = graft(vit(reg_tokens=2), EViT(keep=0.4, layers=(1, 3)))
    found = streams(model, images())
    for i, count in ((1, 7), (3, 4)):  # 16 patches -> 7 + fused -> ceil(3.2) = 4 + fused
        tokens, state = found[i]
        assert tokens.shape[1] == 3 + count + 1
        picture = to_grid(tokens, state, (4, 4), prefix=3)
        assert picture.shape == (2, 4, 4, 48)
        for image, source in zip(range(2), state.assignment.index, strict=True):
            for place in range(16):
                assert torch.equal(picture[image, place // 4, place % 4], tokens[image, source[3 + place]])
            assert sorted(source.unique().tolist()) == list(range(3 + count + 1))
            assert source[:3].tolist() == [0, 1, 2]
    _, features = model.forward_intermediates(images(), output_fmt="NCHW")
    assert torch.equal(features[1].permute(0, 2, 3, 1), to_grid(*found[1], (4, 4), prefix=3))


def test_dropped_places_are_zero_and_no_head_pools_over_them():
    model = graft(vit(), EViT(keep=0.5, layers=(1,), fuse=False))
    tokens, state = streams(model, images())[1]
    assert tokens.shape[1] == 1 + 8
    picture = to_grid(tokens, state, (4, 4), prefix=1)
    assert ((picture == 0).all(-1).sum((1, 2)) == 8).all()
    fused = graft(vit(), EViT(keep=0.5, layers=(1,)))
    assert torch.equal(streams(fused, images())[1][1].assignment.index == 9, state.assignment.index == -1)
    assert (fused(images()) - model(images())).abs().max() > 1e-6
    assert model.forward_features(images()).shape == (2, 17, 48)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images()), model(images()))
    model.reset_classifier(5, "avg")
    with pytest.raises(NotReached, match="head now reads"):
        check(model.double(), images())


def test_gradients_flow_to_kept_and_to_fused_tokens():
    x, q, k = (drawn(1, *shape).requires_grad_() for shape in ((12, 6), (3, 12, 4), (3, 12, 4)))
    out, state = Reorganize(EViT(keep=0.5), 1)(x, TokenState(), (q, k, None))
    out.square().sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    fused = state.assignment.index[0] == 7
    assert (k.grad[0, :, fused].abs().sum(-1) > 0).all()  # through the scores that weigh them


# -- the schedule in training ------------------------------------------------------------------------------------------


def test_keep_falls_as_a_cosine():
    mechanism = EViT(keep=0.6, warmup=0.2, until=0.6)
    progress = np.linspace(0, 1, 21)
    expected = [1 if p <= 0.2 else 0.6 if p >= 0.6 else 0.8 + 0.2 * math.cos(math.pi * (p - 0.2) / 0.4) for p in progress]
    assert np.allclose([mechanism.keep_at(p) for p in progress], expected)
    assert mechanism.keep_at(0.4) == pytest.approx(0.8)
    at_once, step = EViT(keep=0.6, warmup=0, until=0), EViT(keep=0.6, warmup=0.3, until=0.3)
    assert [at_once.keep_at(p) for p in (0.0, 1.0)] == [0.6, 0.6]
    assert [step.keep_at(p) for p in (0.0, 0.29, 0.3)] == [1, 1, 0.6]


def test_the_schedule_is_for_training_alone():
    model = graft(vit(), EViT(keep=0.5))
    steps = [module for module in model.modules() if hasattr(module, "schedule")]
    assert len(steps) == 3
    counts = {}
    for progress in (None, 0.0, 0.3, 1.0):
        for step in steps if progress is not None else ():
            step.schedule(progress)
        counts[progress] = [[tokens.shape[1] for tokens, _ in streams(model.train(mode), images())] for mode in (True, False)]
    falling = [17, 10, 7, 5]
    assert counts[None] == [falling, falling]  # a loop that knows no schedule trains what is tested
    assert counts[0.0] == [[17] * 4, falling]
    assert counts[1.0] == [falling, falling]
    assert counts[0.3][0][-1] in range(6, 17)


# -- with others, and refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1])
def test_inserted_tokens_stay(order):
    """SPC's tokens come after block 1; reductions before and after leave them whole, and they are read."""
    model = graft(vit(), *["spc:after=2", "evit:keep=0.5,layers=0+2"][:: 1 - 2 * order], "svda:scale=sqrt")
    check(model, images())
    counts = [(tokens.shape[1], state.inserted) for tokens, state in streams(model, images())]
    assert counts == [(10, 0), (14, 4), (11, 4), (11, 4)]  # 16 patches -> 8 + 1 -> 5 + 1
    tokens, state = streams(model, images())[-1]
    normed = model.norm.host.forward(model.norm, tokens)
    expected = torch.cat([normed[:, :1], normed[:, -4:]], dim=1).mean(1)
    torch.testing.assert_close(model(images()), model.head(expected))
    assert state.assignment.index.max() == 6
    assert ungraft(model, all=True).changed == ()
    assert torch.equal(model(images()), vit()(images()))


def test_sizes_travel_on():
    """Behind merged tokens the kept ones keep their sizes; the fused one counts once, as it does alone."""
    sizes = torch.tensor([[1.0, 3, 1, 2, 5, 1, 1, 2, 1]])
    x, q, k = drawn(1, 9, 6), drawn(1, 2, 9, 4), drawn(1, 2, 9, 4)
    source = torch.tensor([[0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4, 5, 6, 7, 7]])
    out, state = Reorganize(EViT(keep=0.5), 1)(
        x, TokenState(sizes=sizes, assignment=Assignment(source), read_out=(True,)), (q, k, None)
    )
    assert out.shape[1] == state.sizes.shape[1] == 1 + 4 + 1 + 1
    top = class_attention(q, k, sizes)[0, 1:8].argsort(descending=True)[:4] + 1
    assert state.sizes.tolist() == [[1, *sizes[0, top].tolist(), 1, 1]]
    went = {0: 0} | {j: 1 + top.tolist().index(j) if j in top else 5 for j in range(1, 8)}
    assert state.assignment.index.tolist() == [[went[j] for j in source[0].tolist()]]


def test_bad_input():
    for keep in (0, -0.5, 1.1):
        with pytest.raises(SettingError, match=rf"Found keep={float(keep)}\. Expected a fraction above 0, up to 1\. Give"):
            EViT(keep=keep)
    with pytest.raises(SettingError, match=r"Found evit:keep='most'\. Expected a number\. Give"):
        parse("evit:keep=most")
    with pytest.raises(SettingError, match=r"warmup=0\.6, until=0\.5\. Expected 0 <= warmup <= until <= 1"):
        EViT(warmup=0.6)
    with pytest.raises(SettingError, match=r"layers=4.*4 blocks"):
        graft(vit(), EViT(layers=(0, 4)))
    with pytest.raises(HostError, match=r"no class token.*Expected a host with one\. Use .*token_merging"):
        graft(vit(class_token=False, global_pool="avg"), EViT())
    with pytest.raises(HostError, match=r"fuse=false.*Expected a head that reads class tokens"):
        graft(vit(global_pool="avg"), EViT(fuse=False))
    with pytest.raises(GraftError, match=r"blocks\.2 already holds Reorganize.*Choose other layers"):
        graft(vit(), EViT(), EViT(layers=(2,)))


def test_dropping_is_refused_by_every_head_that_pools():
    taken = []
    for name in HOSTS:
        try:
            check(graft(build(name), "evit:fuse=false"), hosts_images())
            taken.append(name)
        except HostError as error:
            assert " Expected " in str(error)
    assert set(HOSTS) - set(taken) == refused("evit:fuse=false")
    assert {"plain", "dinov2", "distilled"} <= set(taken)


def test_the_real_model(shared_data):
    """keep=1 gives its logits bit for bit; at 0.9 most photographs keep their class."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:4]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(x)
        assert torch.equal(graft(model, EViT(keep=1))(x), before)
        ungraft(model)
        agree = (graft(model, EViT(keep=0.9))(x).argmax(1) == before.argmax(1)).float().mean()
        assert agree >= 0.5
        assert [tokens.shape[1] for tokens, _ in streams(model, x)][::3] == [197, 179, 163, 148]
