"""Token transforming against the formula in loops, pruning and merging as its special cases, and the laws of soft reducers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch

from vitreous import check, graft, look, new_parameters, ungraft
from vitreous.base.errors import HostError, SettingError
from vitreous.hosts.host import embed, run
from vitreous.layers.stream import Assignment, TokenState, normalized, restore, to_grid
from vitreous.mechanisms.tokens.evit import EViT, Reorganize
from vitreous.mechanisms.tokens.token_merging import Merge
from vitreous.mechanisms.tokens.token_transforming import (
    TokenTransforming,
    Transform,
    patch_scores,
    similarity_weights,
    transform,
)


def vit(**kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5} | kwargs
    model = timm.create_model("vit_tiny_patch16_224", **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def images(count=2, size=16):
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def drawn(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def streams(model, x):
    """What each block hands on: (tokens, state)."""
    stream, handed_on = embed(model, x), []
    for i in range(len(model.blocks)):
        stream = run(model, stream, i, i + 1)
        handed_on.append((stream.x, stream.state))
    return handed_on


def received(queries, keys, j, sizes):
    """Attention to token j, mean over heads and over the given queries; each token counts as its size."""
    rows = [
        [s * math.exp(float(query @ key)) for key, s in zip(keys[head], sizes, strict=True)]
        for head in range(len(keys))
        for query in queries[head]
    ]
    return sum(row[j] / sum(row) for row in rows) / len(rows)


def by_hand(x, q, k, sizes, settings, prefix, inserted):
    """One image: (tokens, sizes) after the step, number by number."""
    end = len(x) - inserted
    patches = range(prefix, end)
    queries = q[:, :1] if settings.score == "class" else q
    scores = [received(queries, k, j, sizes) for j in range(len(x))]
    anchors = sorted(patches, key=lambda j: -scores[j])[: math.ceil(settings.keep * len(patches))]
    rows = k.mean(0) if settings.similarity == "keys" else x
    unit = [row / row.norm() for row in rows]
    e = {(i, j): math.exp(float(unit[i] @ unit[j]) / settings.temperature) for i in anchors for j in patches}
    if settings.normalize == "sources":
        p = {(i, j): e[i, j] / sum(e[i, other] for other in patches) for i, j in e}
    else:
        p = {(i, j): e[i, j] / sum(e[other, j] for other in anchors) for i, j in e}
    tokens, counts = [*x[:prefix]], [*sizes[:prefix]]
    for i in anchors:
        weight = {j: sizes[j] * p[i, j] for j in patches}
        tokens.append(sum(weight[j] / sum(weight.values()) * x[j] for j in patches))
        counts.append(sum(sizes[j] * p[i, j] / sum(p[other, j] for other in anchors) for j in patches))
    return torch.stack([*tokens, *x[end:]]), [float(s) for s in (*counts, *sizes[end:])]


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(("prefix", "inserted"), [(1, 0), (3, 2)])
@pytest.mark.parametrize("score", ["class", "received"])
@pytest.mark.parametrize("similarity", ["keys", "tokens"])
@pytest.mark.parametrize("normalize", ["sources", "anchors"])
def test_transforms_as_the_formula_says(normalize, similarity, score, prefix, inserted, sized):
    n = prefix + 7 + inserted
    x, q, k = drawn(2, n, 6), drawn(2, 3, n, 4, seed=3), drawn(2, 3, n, 4, seed=4)
    sizes = 1.0 + torch.arange(2 * n, dtype=torch.float64).reshape(2, n) % 3 if sized else None
    settings = TokenTransforming(keep=0.5, score=score, similarity=similarity, normalize=normalize, temperature=0.3)
    state = TokenState(read_out=(True,) * inserted, sizes=sizes)
    out, after = Transform(settings, prefix)(x, state, (q, k, None))
    assert out.shape == (2, prefix + 4 + inserted, 6)
    for b in range(2):
        before = [1.0] * n if sizes is None else sizes[b].tolist()
        tokens, counts = by_hand(x[b], q[b], k[b], before, settings, prefix, inserted)
        torch.testing.assert_close(out[b], tokens)
        assert after.sizes[b].tolist() == pytest.approx(counts)
    assert after.assignment.weights.shape == (2, prefix + 4, prefix + 7)
    assert after.read_out == state.read_out


def test_the_class_tokens_row_is_the_hosts_attention():
    attention, x = vit().blocks[0].attn.requires_grad_(False), drawn(2, 17, 48)
    q, k, _ = attention.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 4).softmax(-1)
    torch.testing.assert_close(patch_scores(q / 4, k, None, "class"), weights[:, :, 0].mean(1))
    torch.testing.assert_close(patch_scores(q / 4, k, None, "received"), weights.mean((1, 2)))
    torch.testing.assert_close(patch_scores(q, k, None, "received").sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("normalize", ["sources", "anchors"])
def test_rows_sum_to_one_and_no_place_is_lost(normalize):
    """So a constant stays what it is, there and back, no feature leaves the range it had, and sizes sum to the patches."""
    settings = TokenTransforming(keep=0.4, normalize=normalize, temperature=0.05)
    x, q, k = drawn(2, 12, 6), drawn(2, 3, 12, 4, seed=3), drawn(2, 3, 12, 4, seed=4)
    out, after = Transform(settings, 1)(x, TokenState(), (q, k, None))
    weights = after.assignment.weights
    rows = normalized(weights, 2)
    torch.testing.assert_close(rows @ x, out)
    torch.testing.assert_close(rows.sum(2), torch.ones(2, 6, dtype=torch.float64))
    assert (weights.sum(1) > 0).all()
    assert (weights[:, 1:, 1:] > 0).all()  # every one draws from every one: neither pruning nor merging
    assert torch.equal(weights[:, 0, 1:], torch.zeros(2, 11, dtype=torch.float64))
    assert (out.amax(1) <= x.amax(1) + 1e-12).all()
    assert (out.amin(1) >= x.amin(1) - 1e-12).all()
    torch.testing.assert_close(after.sizes.sum(1), torch.full((2,), 12.0, dtype=torch.float64))
    constant = torch.full((2, 12, 3), 0.7, dtype=torch.float64)
    assignment = after.assignment
    torch.testing.assert_close(assignment.gather(constant), constant[:, :6])
    torch.testing.assert_close(assignment.restore(assignment.gather(constant)), constant)


# -- pruning, merging and nothing as special cases ---------------------------------------------------------------------


def test_one_hot_weights_prune():
    """W with one place per row is EViT without fusion, for one and the same choice; so is the limit of small T."""
    x, q, k = drawn(2, 12, 6), drawn(2, 3, 12, 4, seed=3), drawn(2, 3, 12, 4, seed=4)
    pruned, hard = Reorganize(EViT(keep=0.5, fuse=False), 1)(x, TokenState(), (q, k, None))
    top = patch_scores(q, k, None, "class")[:, 1:].topk(6).indices
    one_hot = torch.nn.functional.one_hot(top, 11).double()
    out, soft = transform(x, TokenState(), one_hot, 1)
    assert torch.equal(out, pruned)
    assert torch.equal(restore(out, soft)[0], restore(pruned, hard)[0])
    assert torch.equal(soft.sizes, torch.ones(2, 7, dtype=torch.float64))
    torch.testing.assert_close(similarity_weights(x[:, 1:], top, 1e-4, "sources"), one_hot)
    cold = TokenTransforming(keep=0.5, score="class", temperature=0.025)
    assert (Transform(cold, 1)(x, TokenState(), (q, k, None))[0] - pruned).abs().max() < 0.05


def test_disjoint_means_merge():
    """W of a matching's disjoint means is token merging: tokens, sizes and the way back, also upon an earlier merge."""
    x, state = drawn(2, 13, 6), TokenState()
    for count, merging in ((12, 4), (8, 3)):
        k = drawn(2, 3, 1 + count, 4, seed=count)
        merged, hard = Merge(merging, 1)(x, state, (None, k, None))
        matching = destination_of(k, merging)
        weights = Assignment(matching, tokens=1 + count - merging).as_weights(torch.float64)[:, 1:, 1:]
        out, soft = transform(x, state, weights, 1)
        torch.testing.assert_close(out, merged)
        torch.testing.assert_close(soft.sizes, hard.sizes)
        torch.testing.assert_close(restore(out, soft)[0], restore(merged, hard)[0])
        x, state = merged, hard
    assert state.sizes.max() > 2


def destination_of(keys, merging):
    """Where each token goes in a merge of these keys alone."""
    return Merge(merging, 1)(drawn(2, keys.shape[2], 2), TokenState(), (None, keys, None))[1].assignment.index


def test_cold_anchors_take_their_nearest_patches():
    """normalize=anchors, T to 0: each patch goes to its most similar anchor, and tokens are the means."""
    x, top = drawn(2, 11, 6), torch.tensor([[0, 4, 7], [10, 3, 2]])
    unit = x / x.norm(dim=2, keepdim=True)
    nearest = (torch.stack([unit[b, top[b]] for b in range(2)]) @ unit.mT).argmax(1)
    out, state = transform(x, TokenState(), similarity_weights(x, top, 1e-5, "anchors"), 0)
    for b in range(2):
        for i in range(3):
            own = [j for j in range(11) if nearest[b, j] == i]
            torch.testing.assert_close(out[b, i], x[b, own].mean(0))
            assert float(state.sizes[b, i]) == pytest.approx(len(own))


def test_the_unit_matrix_is_the_identity():
    x = drawn(2, 12, 6)
    out, state = transform(x, TokenState(read_out=(True,)), torch.eye(9).double().expand(2, -1, -1), 2)
    assert torch.equal(out, x)
    assert torch.equal(state.sizes, torch.ones(2, 12, dtype=torch.float64))
    assert torch.equal(state.assignment.restore(x[:, :11]), x[:, :11])


@pytest.mark.parametrize("host", [{}, {"reg_tokens": 2}, {"global_pool": "avg", "class_token": False}])
def test_keep_one_is_the_host_and_nothing_is_learned(host):
    model = graft(vit(**host), TokenTransforming(keep=1))
    assert torch.equal(model(images()), vit(**host)(images()))
    assert TokenTransforming(keep=1).exact_at_init
    assert TokenTransforming(macs=1.0).exact_at_init
    assert not TokenTransforming().exact_at_init
    model = graft(vit(**host), TokenTransforming())
    assert new_parameters(model) == {}
    assert (model(images()) - vit(**host)(images())).abs().max() > 1e-3


# -- in a model --------------------------------------------------------------------------------------------------------


def test_in_a_model_block_by_block():
    """The host's parts, walked by hand with the log of sizes on the scores."""
    settings = TokenTransforming(keep=0.5, layers=(0, 2), temperature=0.2)
    model, host = graft(vit(), settings), vit().requires_grad_(False)
    x, sizes = host._pos_embed(host.patch_embed(images())), torch.ones(2, 17, dtype=torch.float64)
    for i, block in enumerate(host.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 4).exp() * sizes[:, None, None]
        z = (weights / weights.sum(-1, keepdim=True)) @ v
        x = x + block.attn.proj(z.transpose(1, 2).flatten(2))
        if i in (0, 2):
            done = [by_hand(x[b], q[b] / 4, k[b], sizes[b].tolist(), settings, 1, 0) for b in range(2)]
            x, sizes = torch.stack([tokens for tokens, _ in done]), torch.tensor([counts for _, counts in done]).double()
        x = x + block.mlp(block.norm2(x))
    tokens, state = streams(model, images())[-1]
    torch.testing.assert_close(tokens, x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(state.sizes, sizes, atol=1e-6, rtol=1e-6)
    assert tokens.shape[1] == 1 + 4


def test_proportional_false_counts_each_token_once():
    settings = {"keep": 0.5, "layers": (0, 2)}
    plain = graft(vit(), TokenTransforming(**settings, proportional=False))
    assert all(state.sizes is None for _, state in streams(plain, images()))
    sized = graft(vit(), TokenTransforming(**settings))
    torch.testing.assert_close(streams(plain, images())[0][0], streams(sized, images())[0][0])
    assert (plain(images()) - sized(images())).abs().max() > 1e-4


def test_attention_behind_several_steps_comes_back_to_the_picture():
    """The products of a step attend to patches alone, and are not taken for attention of the tokens around it."""
    reading = look(graft(vit().float(), TokenTransforming(keep=0.5)), images().float(), probes=["attention_maps"], noise=0)
    names = [layer["name"] for layer in reading.layers]
    assert [name for name in names if name.endswith("attn")] == [f"blocks.{i}.attn" for i in range(4)]
    for number, name in enumerate(names):
        if name.endswith("attn"):
            assert reading.maps["attention", number].shape == (2, 4, 4)
        else:  # behind a reduction the patches of a step differ from image to image
            assert (("attention", number) in reading.maps) == (name == "blocks.1.between.0")


@pytest.mark.parametrize("other", ["token_merging:tokens=3,layers=0+2", "evit:keep=0.5,layers=0+2"])
def test_two_reducers_are_their_then_and_come_back_to_the_picture(other):
    model = graft(vit(reg_tokens=2), "token_transforming:keep=0.6,layers=1+3", other)
    check(model, images())
    first = graft(vit(reg_tokens=2), other.replace("0+2", "0"))
    _, before = streams(first, images())[0]
    tokens, state = streams(model, images())[1]
    assert state.assignment.weights.shape == (2, tokens.shape[1], 3 + 16)
    torch.testing.assert_close(state.assignment.restore(torch.ones_like(tokens)), torch.ones(2, 19, 48, dtype=torch.float64))
    picture = to_grid(tokens, state, (4, 4), prefix=3)
    index = before.assignment.index[:, 3:]
    for b, i, j in np.ndindex(2, 16, 16):  # places that the first one put into one token stay alike
        if index[b, i] == index[b, j]:
            torch.testing.assert_close(picture.flatten(1, 2)[b, i], picture.flatten(1, 2)[b, j])
    _, features = model.forward_intermediates(images(), output_fmt="NCHW")
    torch.testing.assert_close(features[1].permute(0, 2, 3, 1), picture)
    assert ungraft(model, all=True).changed == ()
    assert torch.equal(model(images()), vit(reg_tokens=2)(images()))


def test_operations_fall_by_what_was_asked_for():
    """DeiT-S, 4.6 G multiply-adds: macs=0.6 leaves 60 % of those in the blocks, the products that make W come on top.

    Tokens are counted in a narrow network, operations from their shapes.
    """
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    reducer = TokenTransforming(macs=0.6)
    counts = reducer.token_counts(model)
    assert 0.59 < reducer.share(model) <= 0.6
    narrow = vit(img_size=224, patch_size=16, depth=12, embed_dim=8, num_heads=1)
    graft(narrow, TokenTransforming(keep=reducer.strength(model)))
    assert [tokens.shape[1] for tokens, _ in streams(narrow, images(1, 224))] == [count.mlp for count in counts]
    width, outside = 384, 196 * 768 * 384 + 384 * 1000

    def operations(pairs):
        return outside + sum(4 * n * width**2 + 2 * n**2 * width + 8 * m * width**2 for n, m in pairs)

    steps = [(n, m) for n, m in counts if m < n]
    own = sum(2 * (m - 1) * (n - 1) * width + n**2 * width for n, m in steps)  # similarities, means; attention again
    assert len(steps) == 3
    assert round(operations([(197, 197)] * 12) / 1e9, 1) == 4.6
    assert round(operations(counts) / 1e9, 2) == 2.77
    assert round(own / 1e9, 2) == 0.05


def test_bad_input():
    for keep in (0, 1.1):
        with pytest.raises(SettingError, match=rf"Found keep={float(keep)}\. Expected a fraction above 0, up to 1\. Give"):
            TokenTransforming(keep=keep)
    with pytest.raises(SettingError, match=r"Found temperature=0\.01\. Expected more than 0 and, for normalize=sources"):
        TokenTransforming(temperature=0.01)
    assert TokenTransforming(temperature=0.01, normalize="anchors").temperature == 0.01
    with pytest.raises(HostError, match="no class token"):
        graft(vit(class_token=False, global_pool="avg"), TokenTransforming(score="class"))


def test_the_real_model(shared_data):
    """Without training most photographs keep their class when four tenths of the operations are gone."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:8]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(x)
        assert torch.equal(graft(model, TokenTransforming(keep=1))(x), before)
        ungraft(model)
        assert (graft(model, TokenTransforming(macs=0.6))(x).argmax(1) == before.argmax(1)).float().mean() >= 0.6
