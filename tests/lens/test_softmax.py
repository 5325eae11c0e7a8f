"""The softmax route: every spelling gives the map that was used, found by data flow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitreous.base.errors import HostError
from vitreous.lens.tap import watch

HEADS, WIDTH, TOKENS, BATCH = 2, 8, 16, 3
SCALE = WIDTH**-0.5


class Net(nn.Module):
    """Patches of 4 x 4, one attention that `attend(self, q, k, v)` writes, (B, H, N, K) each -> (B, N, D), and a head."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.qkv = nn.Conv2d(3, HEADS * WIDTH, 4, 4), nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.head, self.act, self.attend = nn.Linear(HEADS * WIDTH, 5), nn.Softmax(dim=-1), attend
        self.mix, self.conv = nn.Linear(HEADS, HEADS), nn.Conv2d(HEADS, HEADS, 1)
        self.query = nn.Parameter(torch.randn(1, HEADS, 1, WIDTH))

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.given = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(self.attend(self, q, k, v).mean(1))


def images(batch=BATCH):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def join(z):
    return z.transpose(1, 2).flatten(2)


def plain(q, k):
    """The map that all of SPELLINGS mean, as a sum over exponentials in float64."""
    e = (torch.einsum("bhnk,bhmk->bhnm", q.double(), k.double()) * SCALE).exp()
    return e / e.sum(-1, keepdim=True)


def seen(net, x=None):
    """What a tap shows of a net: the output, and for each call its fields with q, k, v, map and effective map copied."""
    calls = []

    def see(call):
        names = ("name", "route", "kind", "mixed", "stochastic", "error", "note", "verified")
        kept = {name: getattr(call, name) for name in names}
        kept |= {"map": call.map(), "effective": call.map(effective=True), "v": call.v.clone(), "output": call.output.clone()}
        calls.append(kept | {side: None if getattr(call, side) is None else getattr(call, side).clone() for side in "qk"})

    found = watch(net.eval(), images() if x is None else x, see)
    return found, calls


def folded(net, q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    z = torch.bmm(torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1), v)
    return join(z.unflatten(0, (-1, HEADS)))


def added(net, q, k, v):
    scores = torch.baddbmm(q.new_zeros(1, 1, TOKENS), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=SCALE)
    return join((F.softmax(scores, dim=-1) @ v.flatten(0, 1)).unflatten(0, (-1, HEADS)))


def turned(net, q, k, v):
    """Channels first, as in LeViT-conv: V A^T."""
    weights = ((q.mT * SCALE).transpose(-2, -1) @ k.mT).softmax(-1)
    return (v.mT @ weights.transpose(-2, -1)).flatten(1, 2).transpose(1, 2)


def columns(net, q, k, v):
    """Keys along the rows: softmax over another axis than the last."""
    weights = torch.softmax(k @ q.mT * SCALE, dim=-2)
    return join(weights.mT @ v)


def several_axes(net, q, k, v):
    """V of a window for each query and key, as in SepViT: its places move as one."""
    weights = torch.softmax(q @ k.mT * SCALE, dim=-1)
    return join(torch.einsum("bhij,bhjwd->bhiwd", weights, v.unflatten(-1, (2, -1))).flatten(-2))


def letters(net, q, k, v):
    weights = torch.einsum("b h i d, b h j d -> b i j h", q, k).mul(SCALE).softmax(dim=2)
    return torch.einsum("bijh,bhjd->bihd", weights, v).flatten(2)


def unfolded(net, q, k, v):
    """Heads into the batch and apart again between product and V, as windows are when a mask is added."""
    scores = (q.flatten(0, 1) @ k.flatten(0, 1).mT * SCALE).view_as(q.new_empty(len(q), HEADS, TOKENS, TOKENS))
    scores = (scores.view(1, -1, HEADS, TOKENS, TOKENS) + q.new_zeros(1, 1, TOKENS, TOKENS)).view(-1, HEADS, TOKENS, TOKENS)
    return join((scores.softmax(-1).reshape(-1, TOKENS, TOKENS) @ v.reshape(-1, TOKENS, WIDTH)).view_as(v))


def cast(net, q, k, v):
    weights = F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float64).to(q.dtype)
    return join(F.dropout(weights, 0.5, training=net.training).contiguous() @ v)


def in_place(net, q, k, v):
    scores = q @ k.mT
    scores *= SCALE
    scores[:] = scores
    return join(scores.softmax(-1) @ v)


def relative(net, q, k, v):
    """Decomposed relative positions: products of the queries too, one for rows and one for columns; q k^T comes last."""
    tables = 0 * torch.arange(4 * WIDTH).view(4, WIDTH).float()
    rows, columns = (torch.einsum("bhnk,ik->bhni", q, table * 1.0) for table in (tables, tables))
    bias = (rows[..., None] + columns[..., None, :]).flatten(-2)
    return join((bias + q @ k.mT * SCALE).softmax(-1) @ v)


def chosen(net, q, k, v):
    scores = q @ k.mT * SCALE
    return join(torch.where(torch.ones(TOKENS, TOKENS, dtype=torch.bool), scores, -math.inf).softmax(-1) @ v)


SPELLINGS = {
    "method": lambda net, q, k, v: join((q @ k.mT * SCALE).softmax(-1) @ v),
    "torch": lambda net, q, k, v: join(torch.matmul(torch.softmax(torch.matmul(q * SCALE, k.mT), dim=-1), v)),
    "F": lambda net, q, k, v: join(F.softmax((q @ k.mT) / SCALE**-1, -1).matmul(v)),
    "special": lambda net, q, k, v: join(torch.special.softmax(q @ k.mT * SCALE, -1) @ v),
    "module": lambda net, q, k, v: join(net.act(q @ k.mT * SCALE) @ v),
    "operator": lambda net, q, k, v: join(torch.ops.aten._softmax(q @ k.mT * SCALE, -1, False) @ v),
    "overload": lambda net, q, k, v: join(torch.ops.aten._softmax.default(q @ k.mT * SCALE, -1, False) @ v),
    "softmin": lambda net, q, k, v: join(F.softmin(-(q @ k.mT) * SCALE, dim=-1) @ v),
    "logarithm": lambda net, q, k, v: join(torch.log_softmax(q @ k.mT * SCALE, -1).exp() @ v),
    "folded": folded,
    "baddbmm": added,
    "V A^T": turned,
    "columns": columns,
    "several axes of V": several_axes,
    "einsum": letters,
    "unfolded": unfolded,
    "cast": cast,
    "in place": in_place,
    "relative positions": relative,
    "where": chosen,
}


@pytest.mark.parametrize("attend", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_gives_the_map_that_was_used(attend):
    net = Net(attend)
    with torch.no_grad():
        before = net.eval()(images())
    found, (call,) = seen(net)
    q, k, v = net.given
    assert torch.equal(found.output, before)
    assert found.refused == []
    assert (call["name"], call["route"], call["kind"], call["mixed"]) == ("", "softmax", "token", False)
    torch.testing.assert_close(call["map"][:, 0].double(), plain(q, k), atol=1e-6, rtol=1e-5)
    assert torch.equal(call["map"], call["effective"])
    assert torch.equal(call["v"][:, 0], v)
    scores = torch.einsum("bhnk,bhmk->bhnm", call["q"][:, 0], call["k"][:, 0])
    ratio = (scores / torch.einsum("bhnk,bhmk->bhnm", q, k)).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=1e-2, rtol=1e-2)  # q may hold the scale already
    assert call["error"] < 1e-6
    assert "score entries" in call["verified"]


def test_scores_under_a_mask_of_the_lowest_number_are_checked_elsewhere():
    """As multi_head_attention_forward adds masks of padded keys: s + lowest - lowest is 0, not s."""
    mask = torch.zeros(1, 1, TOKENS)
    mask[..., -3:] = torch.finfo(torch.float32).min

    def attend(net, q, k, v):
        scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=SCALE)
        return join((scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, (-1, HEADS)))

    net = Net(attend)
    found, (call,) = seen(net)
    q, k, _ = net.given
    assert found.refused == []
    torch.testing.assert_close(call["map"][:, 0, :, :, :-3].double(), plain(q, k[:, :, :-3]), atol=1e-6, rtol=1e-5)
    assert call["error"] < 1e-6


def talking(net, q, k, v):
    """CaiT: heads are mixed before and after the softmax."""
    scores = net.mix((q @ k.mT * SCALE).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    net.probabilities = scores.softmax(-1)
    net.effective = net.mix(net.probabilities.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return join(net.effective @ v)


def convolved(net, q, k, v):
    net.probabilities = (q @ k.mT * SCALE).softmax(-1)
    net.effective = net.conv(net.probabilities)
    return join(net.effective @ v)


def lettered(net, q, k, v):
    net.probabilities = (q @ k.mT * SCALE).softmax(-1)
    net.effective = torch.einsum("bhij,hg->bgij", net.probabilities, net.mix.weight)
    return join(net.effective @ v)


def gated(net, q, k, v):
    """ConViT: two softmaxes in one map, still stochastic."""
    net.probabilities = (q @ k.mT * SCALE).softmax(-1)
    fixed = torch.linspace(0, 1, TOKENS * TOKENS).view(1, 1, TOKENS, TOKENS).softmax(-1)
    net.effective = 0.75 * net.probabilities + 0.25 * fixed
    return join(net.effective @ v)


def difference(net, q, k, v):
    """Differential attention: one softmax over two maps."""
    twice = torch.stack([(q @ k.mT * SCALE), (q @ k.mT)], dim=1).softmax(-1)
    net.probabilities = twice[:, 0]
    net.effective = twice[:, 0] - 0.5 * twice[:, 1]
    return join(net.effective @ v)


@pytest.mark.parametrize(
    ("attend", "stochastic"), [(talking, False), (convolved, False), (lettered, False), (gated, True), (difference, False)]
)
def test_what_multiplies_v_is_kept_apart_from_probabilities(attend, stochastic):
    net = Net(attend)
    found, (call,) = seen(net)
    assert call["mixed"]
    assert call["stochastic"] is stochastic
    torch.testing.assert_close(call["map"][:, 0], net.probabilities, atol=0, rtol=0)
    torch.testing.assert_close(call["effective"][:, 0], net.effective, atol=0, rtol=0)
    assert call["error"] < 1e-6
    assert found.refused == []


def test_probabilities_that_were_overwritten_are_not_made_up():
    def overwritten(net, q, k, v):
        weights = (q @ k.mT * SCALE).softmax(-1)
        weights *= 0.5
        return join(weights @ v)

    net = Net(overwritten)
    _, (call,) = seen(net)
    assert call["mixed"]
    assert not call["stochastic"]
    assert "gone" in call["note"]
    torch.testing.assert_close(call["effective"][:, 0].double(), 0.5 * plain(*net.given[:2]), atol=1e-6, rtol=1e-5)


def test_keys_left_out_at_v_are_said():
    def sink(net, q, k, v):
        scores = torch.cat([q @ k.mT * SCALE, q.new_zeros(*q.shape[:3], 1)], dim=-1)
        return join(scores.softmax(-1)[..., :-1] @ v)

    _, (call,) = seen(Net(sink))
    assert call["mixed"]
    assert not call["stochastic"]
    assert "left out" in call["note"]
    assert call["q"] is None  # the scores were put among others


def test_one_key_head_is_broadcast_to_all_query_heads():
    def multi_query(net, q, k, v):
        return join((q @ k[:, :1].mT * SCALE).softmax(-1) @ v[:, :1])

    net = Net(multi_query)
    _, (call,) = seen(net)
    q, k, _ = net.given
    assert call["v"].shape == (BATCH, 1, HEADS, TOKENS, WIDTH)
    torch.testing.assert_close(call["map"][:, 0].double(), plain(q, k[:, :1].expand_as(k)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(call["k"][:, 0], k[:, :1].expand_as(k))


def test_one_kv_head_in_an_einsum():
    def shared(net, q, k, v):
        weights = torch.einsum("bhid,bjd->bhij", q, k[:, 0]).mul(SCALE).softmax(-1)
        return torch.einsum("bhij,bjd->bhid", weights, v[:, 0]).transpose(1, 2).flatten(2)

    net = Net(shared)
    _, (call,) = seen(net)
    q, k, v = net.given
    torch.testing.assert_close(call["map"][:, 0].double(), plain(q, k[:, :1].expand_as(k)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(call["v"][:, 0], v[:, :1].expand_as(v))


@pytest.mark.parametrize("second", ["a product", "rolled", "taken by a list"])
def test_queries_and_keys_are_not_guessed(second):
    """Scores that are a sum of two products, or whose entries were moved, have a map but no q and k."""

    def attend(net, q, k, v):
        scores = q @ k.mT * SCALE
        if second == "a product":
            scores = scores + v @ v.mT * SCALE
        else:
            scores = scores.roll(1, dims=-1) if second == "rolled" else scores[:, [1, 0]]
        net.weights = scores.softmax(-1)
        return join(net.weights @ v)

    net = Net(attend)
    _, (call,) = seen(net)
    assert call["q"] is None
    assert call["k"] is None
    assert call["kind"] == "token"
    assert torch.equal(call["map"][:, 0], net.weights)


def test_weights_whose_entries_were_moved_are_refused():
    with pytest.raises(HostError, match="never contracted"):
        seen(Net(lambda net, q, k, v: join((q @ k.mT * SCALE).softmax(-1).flip(-1) @ v)))


def test_rows_masked_in_full_are_nan_as_the_model_has_them():
    def masked(net, q, k, v):
        hidden = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
        hidden[3] = True
        return join(((q @ k.mT * SCALE).masked_fill(hidden, -math.inf).softmax(-1) @ v).nan_to_num())

    _, (call,) = seen(Net(masked))
    assert call["map"][..., 3, :].isnan().all()
    assert not call["map"][..., [0, 1, 2, 4], :].isnan().any()
    assert call["error"] < 1e-6


def test_weights_over_places_without_a_product_are_pooling():
    def context(net, q, k, v):
        """GC block: one softmax over places, made by a linear layer."""
        weights = net.qkv.weight[0, :WIDTH] * k
        return join((weights.sum(-1, keepdim=True).mT.softmax(-1) @ v).expand_as(v))

    _, (call,) = seen(Net(context))
    assert (call["kind"], call["q"], call["map"].shape) == ("pooling", None, (BATCH, 1, HEADS, 1, TOKENS))


def test_channel_attention_is_told_by_places():
    def channels(net, q, k, v):
        """XCiT: the map is K x K, contracted over places."""
        weights = (q.mT @ k * SCALE).softmax(-1)
        return join((weights @ v.mT).mT)

    net = Net(channels)
    _, (call,) = seen(net)
    assert (call["kind"], call["map"].shape) == ("channel", (BATCH, 1, HEADS, WIDTH, WIDTH))

    def fused(net, q, k, v):
        return join(F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT)

    _, (call,) = seen(Net(fused))
    assert (call["kind"], call["route"]) == ("channel", "fused")


def unused(net, q, k, v):
    (q @ k.mT).softmax(-1)
    return join(v)


def wrong_axis(net, q, k, v):
    return join((q @ k.mT).softmax(-2) @ v)


def by_hand(net, q, k, v):
    e = (q @ k.mT * SCALE).exp()
    return join(e / e.sum(-1, keepdim=True) @ v)


def by_hand_later(net, q, k, v):
    scores = q @ k.mT * SCALE
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return join(e.mul(e.sum(-1, keepdim=True).reciprocal()) @ v)


def logarithms(net, q, k, v):
    return join((q @ k.mT).log_softmax(-1) @ v)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (unused, "never contracted"),
        (wrong_axis, "never contracted along its axis"),
        (by_hand, "exp and a division"),
        (by_hand_later, "exp and a division"),
        (logarithms, "logarithms"),
        (lambda net, q, k, v: join(v), "no softmax"),
        (lambda net, q, k, v: join((q @ k.mT).sigmoid() @ v), "no softmax"),
    ],
)
def test_what_is_no_map_is_refused_with_the_reason(attend, reason):
    with pytest.raises(HostError, match=reason):
        seen(Net(attend))


def test_a_softmax_that_is_never_used_is_listed_beside_maps():
    def both(net, q, k, v):
        k.mean(1).softmax(-1)
        return join((q @ k.mT * SCALE).softmax(-1) @ v)

    found, calls = seen(Net(both))
    assert len(calls) == 1
    assert [refusal.reason for refusal in found.refused] == [
        "a softmax was never contracted along its axis: its weights are no map"
    ]


def test_slots_that_compete_for_places_are_no_mixed_heads():
    """Slot attention: the softmax runs over the slots, its weights sum places into slots, and slots then attend to places."""

    def slots(net, q, k, v):
        given = (q[:, :, :4] @ k.mT * SCALE).softmax(-2)
        found = (given / given.sum(-1, keepdim=True)) @ v  # (B, H, 4 slots, K)
        return join((found @ k.mT * SCALE).softmax(-1) @ v)

    found, calls = seen(Net(slots))
    assert [refusal.reason for refusal in found.refused] == [
        "a softmax was never contracted along its axis: its weights are no map"
    ]
    assert len(calls) == 1
    torch.testing.assert_close(calls[0]["effective"].sum(-1), torch.ones(BATCH, 1, HEADS, 4))
    assert calls[0]["q"].shape == (BATCH, 1, HEADS, 4, WIDTH)


def test_weights_that_are_split_at_nothing_keep_their_map():
    def split(net, q, k, v):
        none, weights = (q @ k.mT * SCALE).softmax(-1).split([0, TOKENS], dim=-1)
        assert none.transpose(2, 3).shape == (len(q), HEADS, 0, TOKENS)
        return join(weights @ v)

    found, calls = seen(Net(split))
    assert (len(calls), found.refused) == (1, [])
    torch.testing.assert_close(calls[0]["map"][:, 0].double(), plain(calls[0]["q"][:, 0], calls[0]["k"][:, 0]))


def test_a_product_that_was_overwritten_is_noticed():
    def spoiled(net, q, k, v):
        weights = (q @ k.mT * SCALE).softmax(-1)
        k.mul_(2)  # q and k are no longer those that entered the product
        return join(weights @ v)

    with pytest.raises(HostError, match="off by"):
        seen(Net(spoiled))
