"""Token merging against a loop that walks every pair, the laws of sizes and sources, and the host at its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled

from vitreous import TokenMerging, check, graft, parse, ungraft
from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.layers.stream import Stream, TokenState, restore, to_grid
from vitreous.mechanisms.tokens.token_merging import Merge, match, schedule


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
    x, found = model._pos_embed(model.patch_embed(x)), []
    for block in model.blocks:
        x = block(x)
        found.append((x.x, x.state) if isinstance(x, Stream) else (x, TokenState()))
    return found


def drawn(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(x, k, sizes, merging, prefix, inserted):
    """The paper, one image at a time: (tokens, sizes, where each old one went), pair after pair."""
    tokens, counts, places = [], [], []
    for image, keys, size in zip(x, k.mean(1), sizes, strict=True):
        end = len(image) - inserted
        b, a = list(range(prefix, end, 2)), list(range(prefix + 1, end, 2))

        def cosine(i, j, keys=keys):
            return float(keys[i] @ keys[j]) / math.sqrt(float(keys[i] @ keys[i]) * float(keys[j] @ keys[j]))

        best = {i: max(b, key=lambda j, i=i: cosine(i, j)) for i in a}
        leaving = sorted(a, key=lambda i: -cosine(i, best[i]))[: min(merging, len(a))]
        order = [*range(prefix), *(i for i in a if i not in leaving), *b, *range(end, len(image))]
        group = {j: [j, *(i for i in leaving if best[i] == j)] for j in order}
        counts.append([sum(float(size[i]) for i in group[j]) for j in order])
        tokens.append(torch.stack([sum(size[i] * image[i] for i in group[j]) / sum(size[i] for i in group[j]) for j in order]))
        places.append([order.index(best[i] if i in leaving else i) for i in range(end)])
    return torch.stack(tokens), counts, places


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_merges_as_the_loop_does(data):
    prefix, inserted = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2))
    patches, merging = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 8))
    n, seed = prefix + patches + inserted, data.draw(st.integers(0, 10**6))
    x, k = drawn(2, n, 5, seed=seed), drawn(2, 3, n, 4, seed=seed + 1)
    sizes = torch.randint(1, 6, (2, n), generator=torch.Generator().manual_seed(seed)).double()
    known = data.draw(st.booleans())
    state = TokenState(sizes=sizes if known else None, read_out=(True,) * inserted)
    out, after = Merge(merging, prefix)(x, state, (None, k, None))
    if patches == 1:
        assert out is x
        assert after is state
        return
    expected, counts, places = by_hand(x, k, sizes if known else torch.ones(2, n), merging, prefix, inserted)
    torch.testing.assert_close(out, expected)
    assert after.sizes.tolist() == counts
    assert after.assignment.index.tolist() == places
    assert out.shape[1] == n - min(merging, patches // 2)


def test_matching_takes_the_most_similar_pairs():
    """Keys on a circle: A at 10, 95, 200 degrees, B at 0, 90, 180; lengths mean nothing."""
    degrees = torch.tensor([0.0, 10, 90, 95, 180, 200], dtype=torch.float64).deg2rad()
    keys = (torch.stack([degrees.cos(), degrees.sin()], dim=-1) * torch.arange(1.0, 7)[:, None])[None]
    leaving, staying, target = match(keys[:, None], 2)
    assert leaving.tolist() == [[1, 0]]  # 5 degrees apart, then 10
    assert target.tolist() == [[1, 0]]
    assert staying.tolist() == [[2]]


# -- laws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [{}, {"reg_tokens": 3}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_sources_partition_the_tokens_and_sizes_count_them(host, tokens):
    """In every block each token speaks for as many places as its size says, for one at least; the prefix for itself."""
    model = graft(vit(**host), TokenMerging(tokens=tokens))
    prefix, patches = model.num_prefix_tokens, 16
    for x, state in streams(model, images()):
        patches -= min(tokens, patches // 2)
        assert x.shape[1] == prefix + patches
        assert state.sizes.sum(1).tolist() == [prefix + 16.0] * 2
        for source, sizes in zip(state.assignment.index, state.sizes, strict=True):
            assert torch.bincount(source, minlength=x.shape[1]).tolist() == sizes.tolist()
            assert source[:prefix].tolist() == list(range(prefix))
    assert patches == (1 if tokens == 100 else 16 - 4 * tokens if tokens == 1 else 4)


@pytest.mark.parametrize("host", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}, {"cls": VisionTransformerDistilled}])
def test_no_merging_is_the_host(host):
    model = graft(vit(**host), TokenMerging(tokens=0))
    assert torch.equal(model(images()), vit(**host)(images()))
    assert TokenMerging(tokens=0).exact_at_init
    assert not TokenMerging().exact_at_init


def test_equal_patches_merge_without_a_trace():
    """Where patches are the same two by two, half of them says it all: attention and pool count by size."""
    model, host = graft(vit(global_pool="avg"), TokenMerging(tokens=8, layers=(0,))), vit(global_pool="avg")
    x = torch.cat([drawn(2, 1, 48), drawn(2, 8, 48, seed=3).repeat_interleave(2, dim=1)], dim=1)
    merged, expected = model.blocks(x), host.blocks(x)
    assert merged.x.shape[1] == 1 + 8
    assert merged.state.sizes[:, 1:].unique().tolist() == [2]
    torch.testing.assert_close(merged.tokens(), expected)
    torch.testing.assert_close(model.forward_head(model.norm(merged)), host.forward_head(host.norm(expected)))


def test_an_average_pooled_head_weighs_by_size():
    model = graft(vit(global_pool="avg", class_token=False), TokenMerging(tokens=3))
    tokens, state = streams(model, images())[-1]
    normed = model.norm.host.forward(model.norm, tokens)
    mean = (state.sizes[..., None] * normed).sum(1) / 16
    torch.testing.assert_close(model.pool(model.forward_features(images())), mean)


@pytest.mark.parametrize("proportional", [True, False])
def test_in_a_model_block_by_block(proportional):
    """The host's parts, walked by hand with the log of sizes on the scores, or without."""
    merging = TokenMerging(tokens=3, layers=(0, 2), proportional=proportional)
    model, host = graft(vit(), merging), vit().requires_grad_(False)
    x = host._pos_embed(host.patch_embed(images()))
    sizes = torch.ones(2, 17, dtype=torch.float64)
    for i, block in enumerate(host.blocks):
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 4).exp() * (sizes[:, None, None] if proportional else 1)
        z = (weights / weights.sum(-1, keepdim=True)) @ v
        x = x + block.attn.proj(z.transpose(1, 2).flatten(2))
        if i in (0, 2):
            x, counts, _ = by_hand(x, k, sizes, 3, 1, 0)
            sizes = torch.tensor(counts, dtype=torch.float64)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(streams(model, images())[-1][0], x)
    torch.testing.assert_close(model(images()), host.head(host.norm(x)[:, 0]))


def test_a_schedule_is_a_line_with_the_same_sum():
    """Against the loop of the authors' definition: from r (1 - c) in equal steps to r (1 + c), rounded down."""
    for r in (0, 1, 8, 13):
        for c in (-1.0, -0.5, 0.0, 0.3, 1.0):
            counts = schedule(r, c, 12)
            least = int(r * (1 - c))
            for i, count in enumerate(counts):
                assert count == int(least + (2 * r - least - least) / 11 * i)
            assert abs(sum(counts) - 12 * r) <= 12
    assert schedule(8, -1.0, 5) == [16, 12, 8, 4, 0]
    assert schedule(8, 1.0, 5) == [0, 4, 8, 12, 16]
    assert schedule(8, 0.0, 1) == [8]
    model = graft(vit(img_size=32), TokenMerging(tokens=4, inflection=-1.0))
    assert [tokens.shape[1] for tokens, _ in streams(model, images(1, 32))] == [65 - 8, 65 - 13, 65 - 15, 65 - 15]


def test_counts_in_a_deit():
    """DeiT-S at 13 per block: 197 tokens fall to 41. Tokens are counted in a narrow network, operations from their shapes."""
    model = graft(vit(img_size=224, patch_size=16, depth=12, embed_dim=8, num_heads=1), TokenMerging(tokens=13))
    found = streams(model, images(1, 224))
    assert [tokens.shape[1] for tokens, _ in found] == [197 - 13 * i for i in range(1, 13)]
    attention, mlp = [197 - 13 * i for i in range(12)], [197 - 13 * i for i in range(1, 13)]
    blocks = sum(4 * n * 384**2 + 2 * n**2 * 384 for n in attention) + sum(8 * n * 384**2 for n in mlp)
    assert round((blocks + 196 * 768 * 384 + 384 * 1000) / 1e9, 1) == 2.7


def test_back_to_the_picture():
    model = graft(vit(reg_tokens=2), TokenMerging(tokens=5))
    tokens, state = streams(model, images())[1]
    picture = to_grid(tokens, state, (4, 4), prefix=3)
    assert torch.equal(picture.flatten(1, 2), restore(tokens, state)[0][:, 3:])
    sizes = to_grid(state.sizes, state, (4, 4), prefix=3)
    assert (1 / sizes).sum((1, 2)).tolist() == pytest.approx([6.0] * 2)  # 16 patches in six tokens
    _, features = model.forward_intermediates(images(), output_fmt="NCHW")
    assert torch.equal(features[1].permute(0, 2, 3, 1), picture)


def test_half_precision_counts_exactly():
    model = graft(vit().bfloat16(), TokenMerging(tokens=8))
    tokens, state = streams(model, images().bfloat16())[-1]
    assert tokens.dtype == torch.bfloat16
    assert state.sizes.dtype == torch.float32
    assert state.sizes.sum(1).tolist() == [17.0] * 2


def test_autocast_matches_and_merges_in_full_precision():
    x, k = drawn(2, 40, 16).float(), drawn(2, 2, 40, 8, seed=3).float()
    out, state = Merge(9, 1)(x, TokenState(), (None, k, None))
    with torch.autocast("cpu", torch.bfloat16):
        again, same = Merge(9, 1)(x, TokenState(), (None, k, None))
    assert torch.equal(again, out)
    assert torch.equal(same.assignment.index, state.assignment.index)


# -- with others, and refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_inserted_tokens_are_never_merged(order):
    model = graft(vit(), *["spc:after=2", "token_merging:tokens=5"][::order], "svda:scale=sqrt")
    check(model, images())
    found = streams(model, images())
    assert [(tokens.shape[1], state.inserted) for tokens, state in found] == [(12, 0), (11, 4), (8, 4), (7, 4)]
    for _, state in found:
        assert state.sizes.sum(1).tolist() == [17.0 + state.inserted] * 2
        assert state.sizes[:, state.sizes.shape[1] - state.inserted :].eq(1).all()
    assert ungraft(model, all=True).changed == ()
    assert torch.equal(model(images()), vit()(images()))


@pytest.mark.parametrize("order", [1, -1])
def test_with_another_reducer_in_other_blocks(order):
    """Sources compose over both; in one block the second is refused."""
    both = ["evit:keep=0.5,layers=1", "token_merging:tokens=3,layers=0+2"][::order]
    model = graft(vit(), *both)
    check(model, images())
    found = streams(model, images())
    assert [tokens.shape[1] for tokens, _ in found] == [14, 9, 6, 6]  # 16 -> 13 -> 7 + 1 -> 5 patches
    tokens, state = found[-1]
    assert state.assignment.index.unique().tolist() == list(range(6))
    assert to_grid(tokens, state, (4, 4), prefix=1).shape == (2, 4, 4, 48)
    for pair in (["evit", "token_merging"], ["token_merging", "evit"]):
        with pytest.raises(GraftError, match=r"already holds (Merge|Reorganize) between.*Choose other layers"):
            graft(vit(), *pair)


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found tokens=-1\. Expected how many.*0 or more\. Give"):
        TokenMerging(tokens=-1)
    with pytest.raises(SettingError, match=r"Expected a whole number\. Give"):
        parse("token_merging:tokens=0.5")
    with pytest.raises(SettingError, match=r"layers=7.*4 blocks"):
        graft(vit(), TokenMerging(layers=(7,)))
    with pytest.raises(HostError, match="fixed list of tokens"):
        graft(timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1), TokenMerging())


def test_the_real_model(shared_data):
    """Without training most photographs keep their class when a third of the tokens has merged away."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:8]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(x)
        assert torch.equal(graft(model, TokenMerging(tokens=0))(x), before)
        ungraft(model)
        agree = (graft(model, TokenMerging(tokens=5))(x).argmax(1) == before.argmax(1)).float().mean()
        assert agree >= 0.5
        assert streams(model, x)[-1][0].shape[1] == 197 - 12 * 5
