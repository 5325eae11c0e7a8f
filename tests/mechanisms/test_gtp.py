"""GTP against the formula in loops, the published token counts and operations, and the way back to the picture."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled

from vitreous import GTP, check, graft, ungraft
from vitreous.base.errors import HostError, MaskError, SettingError
from vitreous.hosts.host import embed, run
from vitreous.hosts.token_counts import BlockCost, block_costs, measured_counts, whole
from vitreous.layers.stream import Assignment, TokenState, restore, to_grid
from vitreous.mechanisms.tokens.gtp import Draw, Propagate, importance


def vit(cls=None, **kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 20, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5} | kwargs
    model = cls(**settings) if cls else timm.create_model("vit_tiny_patch16_224", **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def drawn(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images():
    return drawn(2, 3, 20, 20, seed=1)


def streams(model, x):
    """What each block hands on: (tokens, state)."""
    stream, handed_on = embed(model, x), []
    for i in range(len(model.blocks)):
        stream = run(model, stream, i, i + 1)
        handed_on.append((stream.x, stream.state))
    return handed_on


def graph_by_hand(patches, grid, kind, neighbours):
    """W of one image's patches (n, D), pair by pair."""
    n = len(patches)
    edges = [[False] * n for _ in range(n)]
    for i in range(n):
        cosines = {j: float(patches[i] @ patches[j] / patches[i].norm() / patches[j].norm()) for j in range(n) if j != i}
        nearest = sorted(cosines, key=lambda j, cosines=cosines: -cosines[j])[:neighbours]
        for j in cosines:
            rows, columns = abs(i // grid[1] - j // grid[1]), abs(i % grid[1] - j % grid[1])
            spatial, semantic = max(rows, columns) <= 1, j in nearest
            edges[i][j] = {"spatial": spatial, "semantic": semantic, "mixed": spatial or semantic}[kind]
    degree = [sum(row) for row in edges]
    return torch.tensor(
        [[edges[i][j] / math.sqrt(degree[i] * degree[j]) if edges[i][j] else 0.0 for j in range(n)] for i in range(n)],
        dtype=torch.float64,
    )


def by_hand(x, q, k, sizes, graph, count, alpha, prefix, inserted=0):
    """One image and block: tokens, sizes, the graph, and the weights of places, patch by patch."""
    n, heads = len(x) - inserted, range(len(q))
    rows = {
        (h, i): [math.exp(float(q[h, i] @ k[h, j])) * float(sizes[j]) for j in range(len(x))]
        for h in heads
        for i in range(len(x))
    }
    attention = {(h, i, j): rows[h, i][j] / sum(rows[h, i]) for h, i in rows for j in range(len(x))}
    rank = {
        j: max(attention[h, j, j] for h in heads) * max(sum(attention[h, i, j] for i in range(len(x))) for h in heads)
        for j in range(prefix, n)
    }
    order = sorted(rank, key=lambda j: -rank[j])
    kept, gone = order[: len(order) - count], order[len(order) - count :]
    weights = torch.zeros(prefix + len(kept), n, dtype=torch.float64)
    for token, i in enumerate([*range(prefix), *kept]):
        weights[token, i] = 1
        for j in gone if i >= prefix else ():
            weights[token, j] = alpha * graph[i - prefix, j - prefix]
    tokens = torch.stack([sum(w * x[j] for j, w in enumerate(row)) for row in weights])
    scales = torch.stack([sum(w * sizes[j] for j, w in enumerate(row)) for row in weights])
    stays = [i - prefix for i in kept]
    return torch.cat([tokens, x[n:]]), torch.cat([scales, sizes[n:]]), graph[stays][:, stays], weights


@pytest.mark.parametrize("kind", ["spatial", "semantic", "mixed"])
def test_the_graph_is_the_formulas(kind):
    x = drawn(2, 2 + 12 + 1, 6)
    state = TokenState(grid=(3, 4), prefix=2, read_out=(True,))
    out, after = Draw(kind, 3, 2)(x, state, None)
    assert out is x
    assert after.graph.shape == (2, 14, 14)
    assert not after.graph[:, :2].any()
    assert not after.graph[:, :, :2].any()
    for image, graph in zip(x, after.graph, strict=True):
        torch.testing.assert_close(graph[2:, 2:], graph_by_hand(image[2:14], (3, 4), kind, 3))


def test_the_graph_of_present_patches():
    """Places that were dropped are no neighbours, and a merged patch is one of all that its places touch."""
    index = torch.tensor([[0, 1, 1, -1, 2]])  # prefix, then a row of four: the first two merged, the third dropped
    state = TokenState(grid=(1, 4), prefix=1, assignment=Assignment(index, tokens=3, dropped=True))
    assert not Draw("spatial", 1, 1)(drawn(1, 3, 5), state, None)[1].graph.any()
    index = torch.tensor([[0, 1, 2, 1, 3]])
    state = TokenState(grid=(1, 4), prefix=1, assignment=Assignment(index, tokens=4))
    graph = Draw("spatial", 1, 1)(drawn(1, 4, 5), state, None)[1].graph[0, 1:, 1:]
    root = math.sqrt(0.5)
    torch.testing.assert_close(graph, torch.tensor([[0, root, root], [root, 0, 0], [root, 0, 0]]).double())


@pytest.mark.parametrize(("prefix", "inserted"), [(1, 0), (3, 2)])
@pytest.mark.parametrize("alpha", [0.3, 0.0])
def test_propagates_as_the_formula_says(prefix, inserted, alpha):
    n = prefix + 9 + inserted
    x, q, k, sizes = drawn(2, n, 6), drawn(2, 3, n, 4, seed=3), drawn(2, 3, n, 4, seed=4), 1 + drawn(2, n, seed=5).abs()
    state = TokenState(grid=(3, 3), prefix=prefix, read_out=(True,) * inserted, sizes=sizes)
    state = Draw("mixed", 2, prefix)(x, state, None)[1]
    out, after = Propagate(4, prefix, alpha)(x, state, (q, k, None))
    assert out.shape == (2, n - 4, 6)
    for b in range(2):
        tokens, scales, graph, weights = by_hand(
            x[b], q[b], k[b], sizes[b], state.graph[b, prefix:, prefix:], 4, alpha, prefix, inserted
        )
        torch.testing.assert_close(out[b], tokens)
        torch.testing.assert_close(after.sizes[b], scales)
        torch.testing.assert_close(after.graph[b, prefix:, prefix:], graph)
        torch.testing.assert_close(after.assignment.as_weights(torch.float64)[b], weights)
    assert after.dropped
    assert (after.assignment.weights is None) == (alpha == 0)


def test_in_a_model_block_by_block():
    """The host's own parts, and one graph for all blocks: drawn before the first, restricted and never normalised again."""
    model, host = graft(vit(), GTP(tokens=5, alpha=0.4, neighbours=3, layers=(0, 2))), vit().requires_grad_(False)
    x = host._pos_embed(host.patch_embed(images()))[0]
    graph, sizes = graph_by_hand(x[1:], (5, 5), "mixed", 3), torch.ones(26, dtype=torch.float64)
    for i, block in enumerate(host.blocks):
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 16)).permute(1, 2, 0, 3)  # (3, heads, n, 8)
        x = x + block.attn(block.norm1(x)[None], attn_mask=sizes.log().expand(1, 1, len(x), -1))[0]
        if i in (0, 2):
            x, sizes, graph, _ = by_hand(x, q / 4, k, sizes, graph, 5, 0.4, 1)
        x = x + block.mlp(block.norm2(x))
    tokens, state = streams(model, images())[-1]
    torch.testing.assert_close(tokens[0], x)
    torch.testing.assert_close(state.sizes[0], sizes)
    torch.testing.assert_close(model(images())[0], host.head(host.norm(x)[0]))
    assert (graft(vit(), GTP(tokens=5, alpha=0.0, layers=(0, 2)))(images()) - model(images())).abs().max() > 1e-6


def test_importance_is_of_the_attention_that_the_host_computes():
    attention = vit().blocks[0].attn.requires_grad_(False)
    q, k, _ = attention.qkv(drawn(2, 9, 48)).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 4).softmax(-1)
    expected = torch.stack([weights[:, :, j, j].amax(1) * weights[:, :, :, j].sum(2).amax(1) for j in range(9)], dim=1)
    torch.testing.assert_close(importance(q / 4, k, None), expected)


# -- published numbers -------------------------------------------------------------------------------------------------

PUBLISHED = {("tiny", 8): 0.924, ("small", 8): 3.416, ("small", 14): 2.562, ("base", 8): 13.104}  # multiply-adds in G
BARE = {"tiny": 1.254, "small": 4.599, "base": 17.564}


def multiply_adds(attention, mlp, width):
    """Of a ViT of this width with 16 x 16 patches at 224 pixels, counted by the shapes of its matrix products."""
    blocks = sum(4 * n * width**2 + 2 * n * n * width + 8 * m * width**2 for n, m in zip(attention, mlp, strict=True))
    return (196 * 768 * width + 1000 * width + blocks) / 1e9


@pytest.mark.parametrize("size", BARE)
def test_tokens_and_operations_are_the_published_ones(size):
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224").eval()
    width = model.embed_dim
    assert round(multiply_adds([197] * 12, [197] * 12, width), 3) == BARE[size]
    for tokens in [tokens for of, tokens in PUBLISHED if of == size]:
        attention, mlp = zip(*GTP(tokens=tokens).token_counts(model), strict=True)  # a law: they are those of a pass
        assert list(mlp) == [197 - tokens * (i + 1) for i in range(12)]
        assert attention == (197, *mlp[:-1])
        assert round(multiply_adds(attention, mlp, width), 3) == PUBLISHED[size, tokens]


def test_a_budget_decides_the_tokens():
    """A share of a pass's own count, not of the card's."""
    model = graft(vit(), GTP(macs=0.7))
    counts = measured_counts(model, images())
    assert counts == GTP(macs=0.7).token_counts(vit())
    costs = block_costs(vit())
    assert 0.65 < sum(map(BlockCost.of, costs, counts)) / sum(map(BlockCost.of, costs, whole(vit()))) <= 0.7


# -- limits, and back to the picture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [{}, {"reg_tokens": 2}, {"cls": VisionTransformerDistilled}])
def test_no_tokens_is_the_host(host):
    assert torch.equal(graft(vit(**host), GTP(tokens=0))(images()), vit(**host)(images()))
    assert GTP(tokens=0).exact_at_init
    assert not GTP().exact_at_init


def test_alpha_zero_is_plain_pruning():
    """Kept patches stay bit for bit as they are, and count once."""
    x, q, k = drawn(2, 10, 6), drawn(2, 3, 10, 4, seed=3), drawn(2, 3, 10, 4, seed=4)
    state = Draw("spatial", 1, 1)(x, TokenState(grid=(3, 3), prefix=1), None)[1]
    out, after = Propagate(4, 1, 0.0)(x, state, (q, k, None))
    rank = importance(q, k, None)
    for b in range(2):
        kept = sorted(range(1, 10), key=lambda j, b=b: -rank[b, j])[:5]
        assert torch.equal(out[b], x[b, [0, *kept]])
    assert after.sizes.tolist() == [[1.0] * 6] * 2
    assert Propagate(4, 1, 0.0, proportional=False)(x, state, (q, k, None))[1].sizes is None


def test_scales_do_not_fall_and_the_class_token_stays():
    model = graft(vit(reg_tokens=2), GTP(tokens=7, alpha=0.5))
    before, n = torch.ones(2, 3), 25
    for tokens, state in streams(model, images()):
        n -= 7
        assert tokens.shape[1] == 3 + n
        assert (state.sizes >= 1).all()
        assert torch.equal(state.sizes[:, :3], before.to(state.sizes))
        weights = state.assignment.weights
        assert torch.equal(weights[:, :3, :3], torch.eye(3).double().expand(2, -1, -1))
        assert not weights[:, :3, 3:].any()
        assert not weights[:, 3:, :3].any()


def test_kept_patches_and_neighbours_come_back_to_the_picture():
    """A kept place shows its own token, one that left the mean of those that took it in, and 0 if nobody did."""
    model = graft(vit(), GTP(tokens=8, alpha=0.5, graph="spatial"))
    alone = 0
    for tokens, state in streams(model, images()):
        weights = state.assignment.weights
        restored = restore(tokens, state)[0]
        constant = state.assignment.restore(state.assignment.gather(torch.ones(2, 26, 1).double()))
        for b in range(2):
            for place in range(26):
                column = weights[b, :, place]
                if not column.any():
                    alone += 1
                    assert not restored[b, place].any()
                    assert not constant[b, place].any()
                    continue
                torch.testing.assert_close(restored[b, place], (column / column.sum()) @ tokens[b])
                assert constant[b, place].item() == pytest.approx(1)
        picture = to_grid(tokens, state, (5, 5), prefix=1)
        assert torch.equal(picture.flatten(1, 2), restored[:, 1:])
    assert alone > 0  # the last block leaves one patch of 25, so that some have no neighbour


def test_at_least_one_patch_stays():
    tokens, _ = streams(graft(vit(), GTP(tokens=100)), images())[-1]
    assert tokens.shape[1] == 2


# -- with others, and refusals -----------------------------------------------------------------------------------------


def test_with_merged_and_inserted_tokens():
    model = graft(vit(), "spc:after=1", "token_merging:tokens=4,layers=1", "gtp:tokens=5,layers=0+2", "svda:scale=sqrt")
    check(model, images())
    counts = [(tokens.shape[1], state.inserted) for tokens, state in streams(model, images())]
    assert counts == [(25, 4), (21, 4), (16, 4)]
    assert ungraft(model, all=True).changed == ()
    assert torch.equal(model(images()), vit()(images()))


def test_gradients_reach_what_left_through_its_neighbours():
    x, q, k = drawn(1, 10, 6).requires_grad_(), drawn(1, 3, 10, 4, seed=3), drawn(1, 3, 10, 4, seed=4)
    state = Draw("semantic", 8, 1)(x, TokenState(), None)[1]
    Propagate(4, 1, 0.1)(x, state, (q, k, None))[0].square().sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found tokens=-1\. Expected how many patches leave per block, 0 or more\. Give"):
        GTP(tokens=-1)
    with pytest.raises(SettingError, match=r"Found alpha=1\.5\. Expected a share.*Give"):
        GTP(alpha=1.5)
    with pytest.raises(SettingError, match=r"Found neighbours=0\. Expected 1 or more\. Give"):
        GTP(neighbours=0)
    with pytest.raises(HostError, match=r"pools over the patches.*Expected a head that reads class tokens"):
        graft(vit(global_pool="avg"), GTP())
    with pytest.raises(MaskError, match=r"without a graph.*Expected the one that the first block draws\. Run"):
        graft(vit(), GTP()).blocks[1](drawn(1, 26, 48))
    with pytest.raises(MaskError, match=r"places in the images are not known.*gtp out"):
        graft(vit(patch_drop_rate=0.5), GTP()).train()(images())
