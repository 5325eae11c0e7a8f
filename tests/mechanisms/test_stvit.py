"""STViT against the formula in loops, the counts of the authors' code, and semantic tokens that come back to the picture."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitreous import check, graft, new_parameters, ungraft
from vitreous.base.errors import GraftError, HostError, MaskError, SettingError
from vitreous.hosts.host import embed, run
from vitreous.layers.stream import Assignment, TokenState, restore, to_grid
from vitreous.mechanisms.tokens.stvit import CrossBlock, Generate, Recover, STViT, around, layout, pool, pool_weights, windows


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


def block(width=8, heads=2, seed=5):
    """A cross block with large random weights."""
    made = CrossBlock(width, heads, 0.1, torch.Generator().manual_seed(seed)).double().requires_grad_(False)
    for i, parameter in enumerate(made.parameters()):
        parameter.copy_(0.4 * drawn(*parameter.shape, seed=seed + i) + (parameter.ndim == 1) * parameter)
    return made


def by_hand(cross, queries, keys, sizes, shortcut):
    """One image, token by token: (new tokens, attention (m, n), mean over heads)."""
    new, attention = [], []
    per = len(queries[0]) // cross.heads
    normed = [cross.norm1(key) for key in keys]
    k, v = ([cross.kv(y).chunk(2)[part] for y in normed] for part in (0, 1))
    for x in queries:
        q, z, row = cross.q(cross.norm1(x)), [], torch.zeros(len(keys), dtype=torch.float64)
        for head in range(cross.heads):
            own = slice(head * per, (head + 1) * per)
            e = [s * math.exp(float(q[own] @ y[own]) / math.sqrt(per)) for y, s in zip(k, sizes, strict=True)]
            z.append(sum(value / sum(e) * y[own] for value, y in zip(e, v, strict=True)))
            row += torch.tensor([value / sum(e) for value in e], dtype=torch.float64) / cross.heads
        y = cross.scale1 * cross.out(torch.cat(z))
        y = x + y if shortcut else y
        new.append(y + cross.scale2 * cross.down(F.gelu(cross.up(cross.norm2(y)))))
        attention.append(row)
    return torch.stack(new), torch.stack(attention)


# -- places ------------------------------------------------------------------------------------------------------------


def test_the_authors_windows_have_36_tokens_and_109_keys():
    """On 14 x 14 places; their neighbourhoods are an unfolding of kernel 10 and stride 4."""
    bins, near = layout((14, 14), 1, 7, 3)
    assert [len(bins), len(bins[0])] == [4, 9]
    assert len(bins) * len(bins[0]) == 36
    assert len(bins[0]) + len(near[0]) == 109
    unfolded = F.unfold(torch.arange(196.0).view(1, 1, 14, 14), 10, stride=4)[0].T.long()
    assert unfolded.tolist() == near


@pytest.mark.parametrize("how", ["avg", "max"])
@pytest.mark.parametrize(
    ("grid", "window", "side"), [((14, 14), None, 4), ((14, 14), 7, 3), ((4, 10), None, 3), ((8, 12), 4, 1)]
)
def test_bins_are_those_of_adaptive_pooling(grid, window, side, how):
    """In each window; the weights of a mean are its formula."""
    x = drawn(2, math.prod(grid), 5)
    bins = torch.tensor(layout(grid, 1, window, side)[0])
    pooled, picture = pool(x, bins, how), x.mT.unflatten(2, grid)
    operator = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}[how]
    number = 0
    for rows in windows(grid[0], window):
        for columns in windows(grid[1], window):
            part = operator(picture[:, :, rows.start : rows.stop, columns.start : columns.stop], side)
            torch.testing.assert_close(pooled[:, number].mT, part.flatten(2))
            number += 1
    assert number == pooled.shape[1]
    weights = pool_weights(bins, math.prod(grid), torch.float64)
    torch.testing.assert_close(weights.sum(2), torch.ones(bins.shape[:2], dtype=torch.float64))
    assert (weights.sum((0, 1)) > 0).all()
    if how == "avg":
        torch.testing.assert_close(weights @ x[:, None], pooled)


def test_maxima_do_not_see_the_order_of_patches_inside_a_bin():
    """One token of a window of 6 x 6: any order. 3 x 3 tokens: orders inside the bins of 2 x 2."""
    x = drawn(1, 144, 5)
    picture = x.unflatten(1, (12, 12))
    shuffled = picture.clone()
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    shuffled[:, :6, :6] = picture[:, :6, :6].flatten(1, 2)[:, order].unflatten(1, (6, 6))
    swapped = picture.clone()
    swapped[:, 2:4, 4:6] = picture[:, 2:4, 4:6].flip(1, 2)
    one, nine = (torch.tensor(layout((12, 12), 1, 6, side)[0]) for side in (1, 3))
    assert torch.equal(pool(shuffled.flatten(1, 2), one, "max"), pool(x, one, "max"))
    assert torch.equal(pool(swapped.flatten(1, 2), nine, "max"), pool(x, nine, "max"))
    assert not torch.equal(pool(shuffled.flatten(1, 2), nine, "max"), pool(x, nine, "max"))


def test_windows_of_any_grid_cover_it_once_and_their_keys_lie_inside():
    for length in range(1, 31):
        for window in (None, 1, 3, 7, 100):
            own = windows(length, window)
            assert [i for part in own for i in part] == list(range(length))
            for part in own:
                wide = around(part, length, window)
                assert set(part) <= set(wide) <= set(range(length))


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "inserted"), [(0, 0), (2, 1)])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize(("window", "tokens"), [(None, 4), (3, 1)])
def test_generates_as_the_formula_says(window, tokens, shortcut, prefix, inserted):
    """Tokens, and how much each place gives to each: pooling, and attention by the size of LayerScale."""
    n, grid, side = 24, (4, 6), math.isqrt(tokens)
    first, second = block(seed=5), block(seed=40)
    settings = STViT(tokens=tokens, window=window, pool="max" if window else "avg", shortcut=shortcut)
    x, state = drawn(2, prefix + n + inserted, 8), TokenState(grid=grid, prefix=prefix, read_out=(True,) * inserted)
    out, after = Generate(settings, first, second)(x, state, None)
    bins, near = layout(grid, 1, window, side)
    g1, g2 = (float(cross.scale1.abs().mean()) for cross in (first, second))
    count = len(bins) * tokens
    assert out.shape == (2, prefix + count + inserted, 8)
    assert after.assignment.weights.shape == (2, prefix + count, prefix + n)
    for b in range(2):
        patches, s, weights = x[b, prefix : prefix + n], [], []
        for parts, keys in zip(bins, near, strict=True):
            parts = [[place for place in places if place >= 0] for places in parts]
            made = [patches[places].amax(0) if window else patches[places].mean(0) for places in parts]
            new, attention = by_hand(first, made, [*made, *patches[keys]], [1] * (tokens + len(keys)), shortcut)
            for token, row, places in zip(new, attention, parts, strict=True):
                start = torch.zeros(n, dtype=torch.float64)
                start[places] = 1 / len(places)
                share = torch.zeros(n, dtype=torch.float64)
                for value, of in zip(row[:tokens], parts, strict=True):
                    share[of] += value / len(of)
                share[keys] += row[tokens:]
                s.append(token)
                weights.append((start + g1 * share) / (1 + g1) if shortcut else share)
        new, attention = by_hand(second, s, [*s, *patches], [1] * (count + n), True)
        weights = torch.stack(weights)
        weights = (weights + g2 * (attention[:, :count] @ weights + attention[:, count:])) / (1 + g2)
        torch.testing.assert_close(out[b], torch.cat([x[b, :prefix], new, x[b, prefix + n :]]))
        torch.testing.assert_close(after.assignment.weights[b, prefix:, prefix:], weights)
    assert after.sizes is None
    assert after.read_out == state.read_out


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_constant_comes_back_and_every_place_has_a_token(shortcut):
    settings = STViT(tokens=4, shortcut=shortcut, window=4)
    _, state = Generate(settings, block(), block(seed=40))(drawn(2, 65, 8), TokenState(grid=(8, 8), prefix=1), None)
    assignment = state.assignment
    torch.testing.assert_close(assignment.weights.sum(2), torch.ones(2, 17, dtype=torch.float64))
    assert (assignment.weights.sum(1) > 0).all()
    assert (assignment.weights[:, 1:, 1:] > 0).all()
    constant = torch.full((2, 65, 3), 0.7, dtype=torch.float64)
    torch.testing.assert_close(assignment.restore(assignment.gather(constant)), constant)


def test_at_layer_scale_0_tokens_are_the_pooled_patches():
    """And a place belongs to the bins that it lies in; recovered patches are those of before, and with g' alone, their MLP."""
    first, second, last = block(), block(seed=40), block(seed=80)
    for cross in (first, second, last):
        cross.scale1.zero_(), cross.scale2.zero_()
    x, state = drawn(2, 65, 8), TokenState(grid=(8, 8), prefix=1)
    out, after = Generate(STViT(tokens=16, recover=3), first, second)(x, state, None)
    pooled = F.adaptive_avg_pool2d(x[:, 1:].mT.unflatten(2, (8, 8)), 4).flatten(2).mT
    torch.testing.assert_close(out[:, 1:], pooled)
    torch.testing.assert_close(restore(out, after)[0][:, 1:], pooled.unflatten(1, (4, 4)).repeat_interleave(2, 1)
                               .repeat_interleave(2, 2).flatten(1, 2))  # fmt: skip
    changed = torch.cat([out[:, :1] + 1, 3 * out[:, 1:]], dim=1)
    recovered, final = Recover(last)(changed, after, None)
    assert torch.equal(recovered, torch.cat([x[:, :1] + 1, x[:, 1:]], dim=1))
    assert (final.assignment, final.aside) == (None, None)
    last.scale2.fill_(1.0)
    recovered, _ = Recover(last)(changed, after, None)
    patches = x[:, 1:]
    torch.testing.assert_close(recovered[:, 1:], patches + last.down(F.gelu(last.up(last.norm2(patches)))))


def test_recovers_as_the_formula_says():
    last, x = block(seed=80), drawn(2, 17, 8)
    out, after = Generate(STViT(tokens=4, recover=3), block(), block(seed=40))(x, TokenState(grid=(4, 4), prefix=1), None)
    later = out + drawn(2, 5, 8, seed=9)
    recovered, state = Recover(last)(later, after, None)
    for b in range(2):
        expected, _ = by_hand(last, x[b, 1:], later[b, 1:], [1] * 4, True)
        torch.testing.assert_close(recovered[b], torch.cat([later[b, :1], expected]))
    assert state == TokenState(grid=(4, 4), prefix=1)


# -- in a model --------------------------------------------------------------------------------------------------------


def test_semantic_tokens_run_through_the_hosts_blocks():
    """Plain form: the blocks behind run on prefix and semantic tokens, and feature maps keep their shape."""
    model, host = graft(vit(), STViT(tokens=4, after=2, scale=0.5)), vit().requires_grad_(False)
    found = streams(model, images())
    assert [tokens.shape[1] for tokens, _ in found] == [17, 5, 5, 5]
    x = host.blocks[1](host.blocks[0](host._pos_embed(host.patch_embed(images()))))
    (step,) = model.blocks[1].steps("after")
    x, _ = step(x, TokenState(grid=(4, 4), prefix=1), None)
    x = host.blocks[3](host.blocks[2](x))
    torch.testing.assert_close(found[-1][0], x)
    torch.testing.assert_close(model(images()), host.head(host.norm(x)[:, 0]))
    _, features = model.forward_intermediates(images(), output_fmt="NCHW")
    assert [feature.shape for feature in features] == [(2, 48, 4, 4)] * 4
    torch.testing.assert_close(features[-1].permute(0, 2, 3, 1), to_grid(*found[-1], (4, 4), prefix=1))
    step.second.scale1.data.zero_()  # and they depend on what attention draws
    assert (streams(model, images())[-1][0] - x).abs().max() > 1e-3


def test_recovered_patches_run_on_and_no_two_are_alike():
    """With recovery the last block has one token per place again, and gradients reach all that is new."""
    model = graft(vit(reg_tokens=2), STViT(tokens=4, after=1, recover=3, scale=0.5))
    found = streams(check(model, images()), images())
    assert [tokens.shape[1] for tokens, _ in found] == [7, 7, 19, 19]
    assert found[-1][1].assignment is None
    features = model.forward_features(images())
    assert torch.linalg.matrix_rank(features[0, 3:].detach()) == 16  # four tokens alone would span four dimensions
    features.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in new_parameters(model).values())
    assert ungraft(model).changed == ()
    assert torch.equal(model(images()), vit(reg_tokens=2)(images()))


def test_the_papers_head_pools_and_needs_no_class_token():
    """A host without one pools over places: by how much each token stands for."""
    model = graft(vit(class_token=False, global_pool="avg"), STViT(tokens=4, after=1))
    tokens, state = streams(model, images())[-1]
    restored = state.assignment.restore(tokens)
    torch.testing.assert_close(model.forward_features(images()), model.norm.host.forward(model.norm, restored))
    shares = state.assignment.counts(4) / 16
    torch.testing.assert_close(restored.mean(1), (shares[..., None] * tokens).sum(1))


@pytest.mark.parametrize("window", [None, 2])
def test_equal_patches_that_were_merged_count_as_many(window):
    """Behind an exact merge the semantic tokens and their places are those of all patches."""
    patches = drawn(2, 2, 8, 8).repeat_interleave(2, dim=2).flatten(1, 2)  # neighbours in a row are alike, on 4 x 8 places
    x = torch.cat([drawn(2, 1, 8, seed=3), patches], dim=1)
    index = torch.cat([torch.zeros(1), 1 + torch.arange(32) // 2]).long().expand(2, -1)
    merging = Assignment(index=index, tokens=17)
    merged, sizes = merging.gather(x), merging.counts(17).double()
    step = Generate(STViT(tokens=1 if window else 4, window=window), block(), block(seed=40))
    state = TokenState(grid=(4, 8), prefix=1)
    expected, whole = step(x, state, None)
    out, after = step(merged, TokenState(grid=(4, 8), prefix=1, assignment=merging, sizes=sizes), None)
    torch.testing.assert_close(out, expected)
    if window is None:  # the surroundings of a window may hold one of two places alone
        torch.testing.assert_close(restore(out, after)[0], restore(expected, whole)[0])
    assert after.sizes is None


@pytest.mark.parametrize("order", [1, -1])
def test_inserted_tokens_and_other_reducers_in_between(order):
    """SPC's tokens and a merge among the semantic tokens; recovery leaves the first and undoes the second."""
    both = ["stvit:tokens=9,after=1,recover=3", "token_merging:tokens=3,layers=1"][::order]
    model = graft(vit(), *both, "spc:after=2")
    check(model, images())
    counts = [(tokens.shape[1], state.inserted) for tokens, state in streams(model, images())]
    assert counts == [(10, 0), (11, 4), (21, 4), (21, 4)]
    assert ungraft(model, all=True).changed == ()
    assert torch.equal(model(images()), vit()(images()))


# -- operations and refusals -------------------------------------------------------------------------------------------


def test_operations_of_a_deit_small():
    """4 full, 2 generation and 6 semantic-only blocks: 1.91 G of 4.6, so a host of 10 blocks; counted on real shapes."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", class_token=False, global_pool="avg", depth=10).eval()
    model = graft(model, STViT(after=4)).to("meta")
    assert sum(p.numel() for p in new_parameters(model).values()) == 2 * (12 * 384**2 + 15 * 384)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 2) == 1.91


def test_a_budget_decides_where_semantic_tokens_begin():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    reducer = STViT(macs=0.4)
    assert [count.mlp for count in reducer.token_counts(model)] == [197] * 4 + [17] * 8
    assert [count.mlp for count in STViT().token_counts(model)] == [197] * 4 + [17] * 8
    recovering = STViT(macs=0.4, recover=11)
    assert [count.mlp for count in recovering.token_counts(model)] == [197] * 3 + [17] * 8 + [197]
    assert STViT(macs=1.0).exact_at_init
    assert torch.equal(graft(vit(), STViT(macs=1.0))(images()), vit()(images()))


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found tokens=15\. Expected a square number, 1 or more\. Give"):
        STViT(tokens=15)
    with pytest.raises(SettingError, match=r"Found after=3 and recover=3 of 4 blocks\. Expected 1 <= after < recover <= 4"):
        graft(vit(), STViT(tokens=4, after=3, recover=3))
    with pytest.raises(HostError, match="fixed list of tokens"):
        graft(timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2), STViT(tokens=4))
    model = graft(vit(), STViT(tokens=4, after=1, recover=3))
    with pytest.raises(MaskError, match="attn_mask"):
        model.forward_features(images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(GraftError, match=r"not put aside\. Expected the blocks of stvit"):
        Recover(block(48, 3))(drawn(2, 17, 48), TokenState(grid=(4, 4), prefix=1), None)
