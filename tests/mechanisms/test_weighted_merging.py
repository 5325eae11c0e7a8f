"""Weighted merging against a loop over all pairs, its limits, and token merging, which it extends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch

from vitreous import ClassQuery, WeightedMerging, check, graft, ungraft
from vitreous.base.errors import HostError, SettingError
from vitreous.hosts.host import embed, run
from vitreous.layers.matching import best_pairs
from vitreous.layers.stream import TokenState
from vitreous.mechanisms.tokens.weighted_merging import WeightedMerge, costs


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


def by_hand(x, q, k, sizes, merging, prefix, inserted, power):
    """The formula, one image at a time: (tokens, sizes), pair after pair."""
    tokens, counts = [], []
    for image, queries, keys, size in zip(x, q, k, sizes, strict=True):
        end = len(image) - inserted
        b, a = list(range(prefix, end, 2)), list(range(prefix + 1, end, 2))
        attention = [0.0] * len(image)
        for head in range(len(queries)):
            row = [float(s) * math.exp(float(queries[head, 0] @ key)) for key, s in zip(keys[head], size, strict=True)]
            attention = [total + weight / sum(row) / len(queries) for total, weight in zip(attention, row, strict=True)]
        vectors = [torch.cat([keys[head, i] for head in range(len(keys))]) for i in range(len(image))]

        def cost(i, j, vectors=vectors, attention=attention):
            cosine = float(vectors[i] @ vectors[j]) / float(vectors[i].norm() * vectors[j].norm())
            return (1 - cosine) * (attention[i] + attention[j]) ** power

        best = {i: min(b, key=lambda j, i=i: cost(i, j)) for i in a}
        leaving = sorted(a, key=lambda i: cost(i, best[i]))[: min(merging, len(a))]
        order = [*range(prefix), *(i for i in a if i not in leaving), *b, *range(end, len(image))]
        group = {j: [j, *(i for i in leaving if best[i] == j)] for j in order}
        counts.append([sum(float(size[i]) for i in group[j]) for j in order])
        tokens.append(torch.stack([sum(size[i] * image[i] for i in group[j]) / sum(size[i] for i in group[j]) for j in order]))
    return torch.stack(tokens), counts


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("patches", "merging", "prefix", "more"), [(9, 3, 1, 0), (12, 6, 3, 2), (5, 8, 1, 1), (2, 1, 1, 0)])
def test_merges_as_the_loop_does(patches, merging, prefix, more, power):
    n = prefix + patches + more
    x, q, k = drawn(2, n, 5), drawn(2, 3, n, 4, seed=4), drawn(2, 3, n, 4, seed=3)
    sizes = torch.randint(1, 6, (2, n), generator=torch.Generator().manual_seed(0)).double()
    for known in (sizes, None):
        state = TokenState(sizes=known, read_out=(True,) * more)
        out, after = WeightedMerge(merging, prefix, power)(x, state, (q, k, None))
        expected, counts = by_hand(x, q, k, torch.ones(2, n) if known is None else sizes, merging, prefix, more, power)
        torch.testing.assert_close(out, expected)
        assert after.sizes.tolist() == counts


def test_what_the_class_token_attends_to_merges_last():
    """Of pairs that are equally alike the one with less attention; power 0 does not know the difference."""
    keys = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]], dtype=torch.float64)[None, None]
    for low in (0, 1):
        attention = torch.full((1, 4), 0.4)
        attention[:, 2 * low : 2 * low + 2] = 0.1
        assert best_pairs(-costs(keys, attention, 0.5), 1).leaving.tolist() == [[low]]
    once = costs(keys, attention, 0.0)
    assert torch.equal(once, costs(keys, torch.rand(1, 4, generator=torch.Generator().manual_seed(0)), 0.0))


def test_in_a_model_block_by_block():
    """The host's parts, walked by hand; merging in the inner blocks alone, as by default."""
    model, host = graft(vit(), WeightedMerging(tokens=3)), vit().requires_grad_(False)
    x, sizes = host._pos_embed(host.patch_embed(images())), torch.ones(2, 17, dtype=torch.float64)
    for i, block in enumerate(host.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 4).exp() * sizes[:, None, None]
        x = x + block.attn.proj(((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2))
        if i in (1, 2):
            x, counts = by_hand(x, q / 4, k, sizes, 3, 1, 0, 0.5)
            sizes = torch.tensor(counts, dtype=torch.float64)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(run(model, embed(model, images())).x, x)
    torch.testing.assert_close(model(images()), host.head(host.norm(x)[:, 0]))


def test_no_merging_is_the_host():
    assert torch.equal(graft(vit(), WeightedMerging(tokens=0))(images()), vit()(images()))
    assert WeightedMerging(tokens=0).exact_at_init
    assert not WeightedMerging().exact_at_init


def test_with_the_class_query():
    """Merging ends before the last block, where only the class token asks."""
    merging = graft(vit(), WeightedMerging(tokens=3))
    model = check(graft(vit(), WeightedMerging(tokens=3), ClassQuery()), images())
    torch.testing.assert_close(model(images()), merging(images()), atol=1e-12, rtol=1e-12)
    assert (merging(images()) - vit()(images())).abs().max() > 1e-3


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found tokens=-1\. Expected how many.*0 or more\. Give"):
        WeightedMerging(tokens=-1)
    with pytest.raises(SettingError, match=r"Found power=-1\.0\. Expected 0 \(attention has no weight\) or more\. Give"):
        WeightedMerging(power=-1.0)
    with pytest.raises(HostError, match="no class token, which weighted_merging reads"):
        graft(vit(class_token=False, global_pool="avg"), WeightedMerging())


def test_the_real_model(shared_data):
    """Without training photographs keep their class when half of the multiply-adds have gone."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:8]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(x)
        assert torch.equal(graft(model, WeightedMerging(tokens=0))(x), before)
        ungraft(model)
        agree = (graft(model, WeightedMerging(), ClassQuery())(x).argmax(1) == before.argmax(1)).float().mean()
        assert agree >= 0.5
