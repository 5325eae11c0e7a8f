"""MCTF against the formula in loops, the published token schedules, and the host and token merging at its limits."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock

from vitreous import MCTF, check, graft, look, ungraft
from vitreous.base.errors import GraftError, HostError, MaskError, SettingError
from vitreous.hosts.host import embed, run
from vitreous.layers.stream import to_grid
from vitreous.lens.tap import watch
from vitreous.mechanisms.tokens import token_merging
from vitreous.mechanisms.tokens.mctf import match, scores


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


def weight(x, received, sizes, i, j, taus):
    """W of two tokens of one image, with I and S divided by their greatest values as in the paper."""
    similarity, information, size = taus
    w = 1.0
    if similarity:
        cosine = float(x[i] @ x[j]) / float(x[i].norm() * x[j].norm())
        w *= ((cosine + 1) / 2) ** (1 / similarity)
    if information:
        most = max(1 / a for a in received)
        w *= ((1 / received[i] / most) * (1 / received[j] / most)) ** (1 / information)
    if size:
        most = max(1 / s for s in sizes)
        w *= ((1 / sizes[i] / most) * (1 / sizes[j] / most)) ** (1 / size)
    return w


def matched_by_hand(x, received, sizes, count, prefix, end, taus, both_ways):
    """One image: the groups in their new order, each with the token that stands for it first."""
    b, a = list(range(prefix, end, 2)), list(range(prefix + 1, end, 2))
    w = {(i, j): weight(x, received, sizes, i, j, taus) for i in a for j in b}
    group = {i: [i] for i in range(len(x))}
    best = {i: max(b, key=lambda j, i=i: w[i, j]) for i in a}
    leaving = sorted(a, key=lambda i: -w[i, best[i]])[: count // 2 if both_ways else count]
    for i in leaving:
        group[best[i]] += group.pop(i)
    a = [i for i in a if i not in leaving]
    if both_ways:
        best = {j: max(a, key=lambda i, j=j: w[i, j]) for j in b}
        b = sorted(b, key=lambda j: -w[best[j], j])
        for j in b[: count - count // 2]:
            group[best[j]] += group.pop(j)
        b = b[count - count // 2 :]
    return [group[i] for i in [*range(prefix), *a, *b, *range(end, len(x))]]


def block_by_hand(block, x, sizes, count, settings, prefix=1, inserted=0):
    """The paper on one image: fused x behind the block, sizes and groups; the attention between groups is written out."""
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 16)).permute(1, 2, 0, 3)
    attention = (q @ k.mT / 4 + sizes.log()).softmax(-1)
    received = [float(column) for column in attention.mean((0, 1))]
    taus = settings.tau
    groups = matched_by_hand(x, received, sizes.tolist(), count, prefix, len(x) - inserted, taus, settings.both_ways)
    pooling = [(received[j] if settings.pooling == "attention" else 1) * float(sizes[j]) for j in range(len(x))]
    total = [sum(pooling[j] for j in group) for group in groups]
    fused = torch.stack([sum(pooling[j] * x[j] for j in group) / t for group, t in zip(groups, total, strict=True)])
    sizes = torch.stack([sum(sizes[j] for j in group) for group in groups])
    q, k, v = block.attn.qkv(block.norm1(fused)).unflatten(-1, (3, 3, 16)).permute(1, 2, 0, 3)
    if settings.precise:
        attention = (q @ k.mT / 4 + sizes.log()).softmax(-1)
    else:
        columns = torch.stack([sum(attention[:, :, j] for j in group) for group in groups], dim=2)
        rows = [sum(pooling[i] * columns[:, i] for i in group) / t for group, t in zip(groups, total, strict=True)]
        attention = torch.stack(rows, dim=1)
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    fused = fused + block.attn.proj((attention @ v).transpose(0, 1).flatten(1))
    return fused + block.mlp(block.norm2(fused)), sizes, groups


@pytest.mark.parametrize(
    "settings",
    [
        MCTF(tokens=7, layers=(0, 2)),
        MCTF(tokens=7, layers=(0, 2), precise=True),
        MCTF(tokens=6, layers=(0, 2), both_ways=False, pooling="size", tau=(2.0, 3.0, 5.0)),
        MCTF(tokens=5, layers=(0, 2), tau=(0.0, 20.0, 40.0)),
    ],
    ids=["default", "precise", "one_way", "not_by_similarity"],
)
@pytest.mark.parametrize("prefix", [1, 3])
def test_in_a_model_block_by_block(settings, prefix):
    model, host = graft(vit(reg_tokens=prefix - 1), settings), vit(reg_tokens=prefix - 1).requires_grad_(False)
    handed_on = streams(model, images())
    for b in range(2):
        x = host._pos_embed(host.patch_embed(images()))[b]
        sizes, places = torch.ones(len(x), dtype=torch.float64), [[i] for i in range(len(x))]
        for i, block in enumerate(host.blocks):
            if i == 1:
                x = x + block.attn(block.norm1(x)[None], attn_mask=sizes.log().expand(1, 1, len(x), -1))[0]
                x = x + block.mlp(block.norm2(x))
            else:
                x, sizes, groups = block_by_hand(block, x, sizes, settings.tokens, settings, prefix)
                places = [[place for j in group for place in places[j]] for group in groups]
            tokens, state = handed_on[i]
            torch.testing.assert_close(tokens[b], x)
            torch.testing.assert_close(state.sizes[b], sizes)
            for token, stands_for in enumerate(places):
                assert (state.assignment.index[b] == token).nonzero().flatten().tolist() == sorted(stands_for)
        torch.testing.assert_close(model(images())[b], host.head(host.norm(x)[0]))


def test_each_part_of_the_score_moves_the_output():
    whole = graft(vit(), MCTF(tokens=7))(images())
    for text in (
        "tau=0.0+20.0+40.0",
        "tau=1.0+0.0+40.0",
        "tau=1.0+20.0+0.0",
        "both_ways=false",
        "pooling=size",
        "precise=true",
    ):
        assert (graft(vit(), f"mctf:tokens=7,{text}")(images()) - whole).abs().max() > 1e-6, text


def test_scores_are_the_logarithms_of_the_formula():
    x, sizes = drawn(1, 7, 6), torch.tensor([[1.0, 2, 3, 1, 1, 5, 1]]).double()
    received = drawn(1, 7, seed=3).abs() + 0.1
    for settings in (MCTF(), MCTF(tau=(2.0, 3.0, 4.0)), MCTF(tau=(0.0, 20.0, 40.0)), MCTF(tau=(1.0, 0.0, 40.0))):
        pairs = scores(x, received, sizes, settings)[0].exp()
        taus = settings.tau
        by_hand = [
            [weight(x[0], received[0].tolist(), sizes[0].tolist(), i, j, taus) for j in range(0, 7, 2)] for i in (1, 3, 5)
        ]
        torch.testing.assert_close(pairs / pairs.max(), torch.tensor(by_hand).double() / max(map(max, by_hand)))


def test_a_key_that_nobody_attends_to_is_no_division_by_zero():
    received = torch.full((1, 4), torch.finfo(torch.float32).tiny)
    assert scores(torch.tensor([[[1.0], [-1], [1], [1]]]), received, torch.ones(1, 4), MCTF()).isfinite().all()


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_by_similarity_alone_and_one_way_it_is_bipartite_merging_of_x(tokens):
    """Matches those of token merging with x in the place of keys, and sizes as weights."""
    settings = MCTF(tokens=tokens, layers=(1,), both_ways=False, tau=(1.0, 0.0, 0.0), pooling="size")
    x = drawn(2, 17, 6)
    staying, leaving, target = match(scores(x, torch.ones(2, 17), torch.ones(2, 17), settings), tokens, both_ways=False)
    from_a, rest, into = token_merging.match(x[:, None], tokens)
    assert torch.equal(leaving, 2 * from_a + 1)
    assert torch.equal(target, rest.shape[1] + into)
    assert torch.equal(staying, torch.cat([2 * rest + 1, torch.arange(0, 17, 2).expand(2, -1)], dim=1))
    (x, _), (_, state) = streams(vit(), images())[0], streams(graft(vit(), settings), images())[1]
    merge = token_merging.Merge(tokens, 1)
    merged = merge(x, streams(vit(), images())[0][1], (None, x[:, None], None))[1]
    assert torch.equal(merged.assignment.index, state.assignment.index)
    assert torch.equal(merged.sizes, state.sizes)


@pytest.mark.parametrize("host", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}, {"cls": VisionTransformerDistilled}])
def test_no_tokens_is_the_host(host):
    assert torch.equal(graft(vit(**host), MCTF(tokens=0))(images()), vit(**host)(images()))
    assert MCTF(tokens=0).exact_at_init
    assert not MCTF().exact_at_init
    assert not MCTF(tokens=0, ratio=0.2).exact_at_init


def test_precise_and_ahead_agree_where_tokens_are_equal():
    """Groups of equal tokens: the attention between them is the same, computed before or after."""
    model = vit(block_fn=ResPostBlock, pos_embed="none", class_token=False, global_pool="avg", img_size=24)
    x = drawn(2, 3, 24, 12, seed=1).unflatten(3, (3, 4)).repeat_interleave(2, dim=3).flatten(3)  # columns in pairs
    before = model(x)
    for precise in (False, True):
        fused = graft(vit(block_fn=ResPostBlock, pos_embed="none", class_token=False, global_pool="avg", img_size=24),
                      MCTF(tokens=18, layers=(1,), both_ways=False, precise=precise))  # fmt: skip
        torch.testing.assert_close(fused(x), before)
        assert streams(fused, x)[-1][0].shape[1] == 18


# -- published numbers -------------------------------------------------------------------------------------------------

SCHEDULE = [197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21]
FAST = [197] * 3 + [129] * 3 + [85] * 3 + [56] * 3


def multiply_adds(before, after, width, reused=True):
    """In G. before, after: tokens at the start of each block and behind its fusion; queries and keys are of the first.

    reused: the weighted sum as in the authors' code, of attention between groups; else of all tokens.
    """
    blocks = sum(
        2 * n * width**2 + n * n * width + 10 * m * width**2 + (m * m if reused else n * n) * width
        for n, m in zip(before, after, strict=True)
    )
    return (196 * 768 * width + 1000 * width + blocks) / 1e9


@pytest.mark.parametrize(
    ("size", "settings", "schedule", "authors", "ours", "published"),
    [
        ("tiny", MCTF(), SCHEDULE, 0.697, 0.704, 0.71),
        ("small", MCTF(), SCHEDULE, 2.577, 2.592, 2.60),
        ("tiny", MCTF(ratio=0.35, layers=(3, 6, 9)), FAST, 0.742, 0.749, 0.75),
        ("small", MCTF(ratio=0.35, layers=(3, 6, 9)), FAST, 2.744, 2.758, 2.76),
    ],
)
def test_tokens_and_operations_are_the_published_ones(size, settings, schedule, authors, ours, published):
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224").eval()
    attention, mlp = zip(*settings.token_counts(model), strict=True)  # a law: they are those of a pass
    assert list(attention) == list(mlp) == schedule
    before, width = [197, *schedule[:-1]], model.embed_dim
    assert round(multiply_adds(before, schedule, width), 3) == authors
    assert round(multiply_adds(before, schedule, width, reused=False), 3) == ours
    assert ours == pytest.approx(published, rel=0.01)


def test_at_least_ten_tokens_stay():
    assert [tokens.shape[1] for tokens, _ in streams(graft(vit(), MCTF(tokens=9)), images())] == [26, 17, 10]
    assert [tokens.shape[1] for tokens, _ in streams(graft(vit(), MCTF(tokens=99, layers=(0,))), images())] == [14] * 3


# -- laws, and with others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [{}, {"reg_tokens": 3}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}])
def test_sizes_count_places_and_the_prefix_stays(host):
    model = graft(vit(**host), MCTF(tokens=5, layers=(0, 1, 2)))
    prefix = model.num_prefix_tokens
    for x, state in streams(model, images()):
        assert state.sizes.sum(1).tolist() == [prefix + 25.0] * 2
        for source, sizes in zip(state.assignment.index, state.sizes, strict=True):
            assert torch.bincount(source, minlength=x.shape[1]).tolist() == sizes.tolist()
            assert source[:prefix].tolist() == list(range(prefix))
        picture = to_grid(x, state, (5, 5), prefix)
        assert torch.equal(picture[1, 2, 3], x[1, state.assignment.index[1, prefix + 13]])


@pytest.mark.parametrize("precise", [False, True])
def test_attention_is_read_and_verified(precise):
    """`look` gets the map that weighs values: of the tokens before the fusion, or with precise of those after."""
    model, x, calls = graft(vit(), MCTF(tokens=6, precise=precise)), images(), {}
    states = [None, *(state.assignment for _, state in streams(model, x))]

    def keep(call):
        expected = states[int(call.name.split(".")[1]) + precise]
        assert (call.assignment is None) == (expected is None)
        assert expected is None or torch.equal(call.assignment.index, expected.index)
        assert call.verified == f"{'' if precise or call.route == 'fused' else 'score entries and '}output recomputed"
        assert call.error < 1e-5
        calls[call.name] = call.map().shape[-1]

    watch(model, x, keep)
    assert list(calls) == [f"blocks.{i}.attn" for i in range(3)]
    assert list(calls.values()) == ([26, 20, 14] if precise else [26, 26, 20])
    reading = look(model, x, probes=["attention_rows"], noise=0)
    assert sorted(set(reading.table()["layer"].tolist())) == [0, 1, 2]


def test_with_inserted_tokens_and_other_reducers():
    model = graft(vit(), "spc:after=1", "token_merging:tokens=4,layers=0", "mctf:tokens=5")
    check(model, images())
    assert [(tokens.shape[1], state.inserted) for tokens, state in streams(model, images())] == [(26, 4), (21, 4), (16, 4)]
    assert ungraft(model, all=True).changed == ()
    assert torch.equal(model(images()), vit()(images()))


@pytest.mark.parametrize("precise", [False, True])
def test_gradients_flow(precise):
    model = graft(vit(), MCTF(tokens=5, precise=precise))
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    rows = model.blocks[1].attn.qkv.weight.grad.unflatten(0, (3, -1))
    assert (rows.abs().sum((1, 2)) > 0).all()


def test_an_adapted_projection_is_called():
    """Queries, keys and values are cut from the layer's weight only where nobody else holds it."""
    plain, hooked, calls = graft(vit(), MCTF(tokens=5)), graft(vit(), MCTF(tokens=5)), []
    for block in hooked.blocks:
        block.attn.qkv.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[1]))
    torch.testing.assert_close(hooked(images()), plain(images()))
    assert calls == [26, 26, 21, 21, 16]


def test_bad_input():
    with pytest.raises(
        SettingError, match=r"Found tokens=-1\. Expected how many patches fuse away per block, 0 or more\. Give"
    ):
        MCTF(tokens=-1)
    with pytest.raises(SettingError, match=r"Found ratio=0\.7\. Expected a share above 0, up to 0\.5.*Give"):
        MCTF(ratio=0.7)
    with pytest.raises(SettingError, match=r"Found macs=0\.5 and ratio=0\.3\. Expected one of the two.*Leave"):
        MCTF(ratio=0.3, macs=0.5)
    with pytest.raises(SettingError, match=r"Found tau=1\.0\+20\.0\+-1\.0\. Expected three temperatures.*Give"):
        MCTF(tau=(1.0, 20.0, -1.0))
    with pytest.raises(HostError, match=r"blocks\.0 is a ParallelScalingBlock"):
        graft(timm.create_model("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock), MCTF())
    with pytest.raises(GraftError, match=r"blocks\.1\.attn already holds SpectralAttention.*Expected plain"):
        graft(vit(), "svda", MCTF())
    with pytest.raises(MaskError, match="attn_mask"):
        graft(vit(), MCTF(tokens=5)).blocks[1](drawn(1, 26, 48), attn_mask=torch.ones(26, 26).bool().tril())
