"""Leverage: scores against numpy, merging against a loop, limits, the calibrated guide, and the class token."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreous import EViT, Leverage, calibrate, check, graft, parse, ungraft
from vitreous.base.errors import HostError, SettingError
from vitreous.hosts.host import embed, run
from vitreous.layers.geometry import centre_prior
from vitreous.layers.spectral import unit_rows
from vitreous.layers.stream import TokenState
from vitreous.mechanisms.tokens.leverage import Keep, leverage
from vitreous.reducer import staying


def vit(**kwargs):
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5} | kwargs
    model = timm.create_model("vit_tiny_patch16_224", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def images(count=2):
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def drawn(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- the formula -------------------------------------------------------------------------------------------------------


def test_leverage_is_the_diagonal_of_the_projector_on_the_leading_directions():
    x = drawn(3, 12, 20)
    scores = leverage(x, 4)
    for image, found in zip(x.numpy(), scores, strict=True):
        u = np.linalg.svd(image)[0][:, :4]
        assert np.allclose(found, np.diag(u @ u.T))
    assert torch.allclose(scores.sum(1), torch.full((3,), 4.0, dtype=torch.float64))
    assert (leverage(x, 100) - 1).abs().max() < 1e-10  # all directions: every patch counts fully


def by_hand(x, sizes, scores, keys, count, prefix, inserted):
    """One image at a time: (tokens, sizes, where each old one went)."""
    tokens, counts, places = [], [], []
    for image, size, score, key in zip(x, sizes, scores, keys.mean(1), strict=True):
        end = len(image) - inserted
        stay = sorted(sorted(range(end - prefix), key=lambda i, s=score: -s[i])[:count])
        order = [*range(prefix), *(prefix + i for i in stay)]

        def cosine(i, j, key=key):
            return float(key[i] @ key[j] / (key[i].norm() * key[j].norm()))

        went = [i if i in order else max(order[prefix:], key=lambda j, i=i: cosine(i, j)) for i in range(end)]
        group = {j: [i for i in range(end) if went[i] == j] for j in order}
        total = [sum(float(size[i]) for i in group[j]) for j in order]
        merged = [sum(size[i] * image[i] for i in group[j]) / t for j, t in zip(order, total, strict=True)]
        tokens.append(torch.stack([*merged, *image[end:]]))
        counts.append([*total, *[float(s) for s in size[end:]]])
        places.append([order.index(j) for j in went])
    return torch.stack(tokens), counts, places


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_merges_as_the_loop_does(data):
    prefix, inserted, patches = (data.draw(st.integers(*ends)) for ends in ((1, 3), (0, 2), (2, 12)))
    by, keep = (
        data.draw(st.sampled_from([("leverage",), ("attention",), ("leverage", "attention")])),
        data.draw(st.floats(0.05, 0.9)),
    )
    n, seed = prefix + patches + inserted, data.draw(st.integers(0, 10**6))
    x, q, k, v = drawn(2, n, 5, seed=seed), *(drawn(2, 3, n, 4, seed=seed + i) for i in (1, 2, 3))
    sizes = torch.randint(1, 6, (2, n), generator=torch.Generator().manual_seed(seed)).double()
    known = data.draw(st.booleans())
    state = TokenState(sizes=sizes if known else None, read_out=(True,) * inserted)
    out, after = Keep(Leverage(keep=keep, by=by, rank=2), prefix, None)(x, state, (q, k, v))
    if staying(patches, keep) == patches:
        assert out is x
        return
    sizes = sizes if known else torch.ones_like(sizes)
    end = prefix + patches
    weights = sizes[:, None] * (q[:, :, :1] @ k.mT).squeeze(2).exp()
    scores = (weights / weights.sum(-1, keepdim=True)).mean(1)[:, prefix:end] if "attention" in by else 1
    rank = 1 if patches < 4 else 2
    scores = scores * (leverage(unit_rows(v.transpose(1, 2).flatten(2)[:, prefix:end]), rank) if "leverage" in by else 1)
    expected, counts, places = by_hand(x, sizes, scores, k, staying(patches, keep), prefix, inserted)
    torch.testing.assert_close(out, expected)
    assert after.sizes.tolist() == counts
    assert after.assignment.index.tolist() == places


def test_a_planted_outlier_stays_and_copies_merge():
    """Patches of one kind, and one that points elsewhere: it alone spans a direction, whatever its length."""
    v = torch.zeros(1, 1, 9, 4, dtype=torch.float64)
    v[:, :, 1:, 0] = 5 + drawn(8, seed=3).abs()
    v[:, :, 1:, 1] = 0.1 * drawn(8, seed=4)
    v[0, 0, 6] = torch.tensor([0.0, 0.0, 0.1, 0.0])
    q, k = drawn(1, 1, 9, 4), drawn(1, 1, 9, 4, seed=5)
    _, state = Keep(Leverage(keep=1 / 8, rank=1), 1, None)(drawn(1, 9, 4), TokenState(), (q, k, v))
    assert state.assignment.index.tolist() == [[0] + [1] * 8]
    _, dropping = Keep(Leverage(keep=1 / 8, rank=1, merge=False), 1, None)(drawn(1, 9, 4), TokenState(), (q, k, v))
    assert dropping.assignment.index.tolist() == [[0, -1, -1, -1, -1, -1, 1, -1, -1]]


# -- limits and laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["leverage:keep=1", "leverage:macs=1.0", "leverage:keep=1.0,by=attention"])
def test_keeping_all_is_the_host(text):
    model = graft(vit(reg_tokens=2), text)
    assert torch.equal(model(images()), vit(reg_tokens=2)(images()))
    assert parse(text).exact_at_init
    assert not Leverage().exact_at_init


def test_equal_patches_merge_without_a_trace():
    """Each patch has a twin that has no leverage left beside it: merged, attention and pool count by size."""
    model, host = graft(vit(), Leverage(keep=0.5, layers=(0,), rank=8)), vit()
    x = torch.cat([drawn(2, 1, 48), drawn(2, 8, 48, seed=3).repeat_interleave(2, dim=1)], dim=1)
    step = model.blocks[0].steps("between")[0]
    step.scores = lambda qkv, end, state: torch.arange(16.0).remainder(2).expand(2, -1)  # one of each pair
    merged, expected = model.blocks(x), host.blocks(x)
    assert merged.state.sizes.tolist() == [[1.0] + [2.0] * 8] * 2
    torch.testing.assert_close(merged.tokens(), expected)


def test_tokens_of_deit_small_at_a_budget():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    mechanism = Leverage(macs=0.65)
    assert 0.645 < mechanism.share(model) <= 0.65
    assert [count.mlp for count in Leverage().token_counts(model)] == [197] * 3 + [139] * 3 + [98] * 3 + [69] * 3


def test_random_is_a_control_that_does_not_see_the_image():
    model = graft(vit(), Leverage(by=("random",)))
    stream = run(model, embed(model, images()))
    kept = [[index.tolist().count(j) for j in range(stream.x.shape[1])] for index in stream.state.assignment.index]
    again = run(model, embed(model, images()))
    assert torch.equal(stream.x, again.x)
    assert min(map(min, kept)) >= 1
    assert not torch.equal(model(images()), graft(vit(), Leverage())(images()))


# -- the guide by a calibrated direction -------------------------------------------------------------------------------


def test_calibration_sets_the_direction_of_the_formula_and_moves_the_output():
    model = graft(vit(), Leverage(by=("leverage", "foreground"), layers=(1,), rank=4))
    before = model(images())
    assert torch.equal(before, graft(vit(), Leverage(layers=(1,), rank=4))(images()))  # no direction: leverage alone
    calibrate(model, images(3))
    host = vit()
    with torch.no_grad():
        stream = run(host, embed(host, images(3)), 0, 1)
        block = host.blocks[1]
        values = block.attn.qkv(block.norm1(stream.x))[..., 96:]  # (3, 17, 48)
        expected = (centre_prior((4, 4))[None, None] @ unit_rows(values[:, 1:])).mean(0).squeeze(0)
    step = model.blocks[1].steps("between")[0]
    torch.testing.assert_close(step.direction, expected)
    assert not torch.equal(model(images()), before)
    assert ungraft(model).changed == ()


def test_the_direction_is_saved_and_loaded():
    model = calibrate(graft(vit(), Leverage(by=("leverage", "foreground"), layers=(1,))), images(3))
    again = graft(vit(), Leverage(by=("leverage", "foreground"), layers=(1,)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images()), model(images()))
    assert model.blocks[1].steps("between")[0].direction.any()


# -- refusals, and the real model --------------------------------------------------------------------------------------


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found keep=0\.0\. Expected a fraction above 0, up to 1\. Give"):
        Leverage(keep=0)
    with pytest.raises(SettingError, match=r"Found rank=0\. Expected how many leading directions count, 1 or more\. Give"):
        Leverage(rank=0)
    for by in (("leverage", "leverage"), ("chance",)):
        with pytest.raises(SettingError, match=r"Found by=.*Expected one or more of leverage, attention, .*Give"):
            Leverage(by=by)
    with pytest.raises(HostError, match=r"no class token.*Expected a host with one"):
        graft(vit(class_token=False, global_pool="avg"), Leverage(by=("attention",)))
    with pytest.raises(HostError, match=r"pools over the patches.*Expected a head that reads class tokens"):
        graft(vit(global_pool="avg"), Leverage(merge=False))


def test_beside_another_reducer():
    model = check(graft(vit(), EViT(keep=0.5, layers=(0,)), Leverage(keep=0.5, layers=(2,)), "spc:after=2"), images())
    stream = run(model, embed(model, images()))
    assert stream.x.shape[1] == 1 + 5 + stream.state.inserted  # 16 -> 8 + 1 -> 5
    assert ungraft(model, all=True).changed == ()


def test_the_real_model(shared_data):
    """keep=1 gives its logits bit for bit; at 0.8 most photographs keep their class."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:4]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(x)
        assert torch.equal(graft(model, Leverage(keep=1))(x), before)
        ungraft(model)
        assert (graft(model, Leverage(keep=0.8))(x).argmax(1) == before.argmax(1)).float().mean() >= 0.5
