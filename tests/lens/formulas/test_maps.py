"""Maps over patches, each against plain loops, numpy's SVD, or what was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreous.base.errors import SettingError, UnknownName
from vitreous.layers.spectral import unit_rows
from vitreous.lens.formulas import maps

GRID = (6, 7)
P = GRID[0] * GRID[1]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(values: tuple[float, ...], seed: int = 0, batch: int = 3) -> torch.Tensor:
    """(batch, P, 12) with these leading singular values and smaller ones behind them."""
    rest = [values[-1] / 4 / (i + 1) for i in range(12 - len(values))]
    x = []
    for b in range(batch):
        u, _ = np.linalg.qr(noise(P, 12, seed=seed + b).numpy())
        v, _ = np.linalg.qr(noise(12, 12, seed=seed + 50 + b).numpy())
        x.append(u * np.array([*values, *rest]) @ v.T)
    return torch.tensor(np.stack(x))


# -- singular vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["raw", "unit"])
def test_singular_maps_are_those_of_numpys_svd(rows):
    x = with_spectrum((9.0, 5.0, 2.5))
    found, s, said = maps.singular_maps(x, 3, rows=rows)
    assert said == rows
    assert found.shape == (3, 3, P)
    for b in range(len(x)):
        a = x[b].numpy()
        if rows == "unit":
            a = a / np.linalg.norm(a, axis=1, keepdims=True)
            a = a - a.mean(0)
        u, values, _ = np.linalg.svd(a, full_matrices=False)
        np.testing.assert_allclose(s[b], values[:3], rtol=1e-4)
        np.testing.assert_allclose(np.abs((found[b].numpy() * u[:, :3].T).sum(1)), 1, atol=1e-3)


def test_singular_maps_follow_the_patches_and_not_the_batch():
    x = with_spectrum((9.0, 5.0, 2.5)).float()
    order = torch.randperm(P, generator=torch.Generator().manual_seed(1))
    whole, s, _ = maps.singular_maps(x)
    moved, again, _ = maps.singular_maps(x[:, order])
    torch.testing.assert_close(moved, whole[:, :, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(again, s)
    alone, _, _ = maps.singular_maps(x[1:2])
    torch.testing.assert_close(alone[0], whole[1], atol=1e-6, rtol=0)


def test_vectors_that_do_not_exist_are_zero():
    flat = torch.ones(1, P, 5)
    found, s, _ = maps.singular_maps(flat, 3, rows="raw")
    assert (s[0, 1:] == 0).all()
    assert (found[0, 1:] == 0).all()
    assert s[0, 0] > 0
    found, s, _ = maps.singular_maps(flat, 3, rows="unit")
    assert (found == 0).all()
    flat[0, 0, 0] = torch.nan
    assert (maps.singular_maps(flat, 3, rows="raw")[0] == 0).all()


def first_spikes(x):
    """`spikes` of the first left singular vector of x."""
    return maps.spikes(maps.leading_subspace(x, 1, power=maps.POWER).U[:, :, 0], x)


def test_rows_become_unit_where_the_raw_vector_is_a_spike():
    x = with_spectrum((9.0, 5.0, 2.5))
    assert maps.singular_maps(x)[2] == "raw"
    assert (first_spikes(x) < 0.4).all()
    x[:, 17] = 100 * x[:, 17] / x[:, 17].norm(dim=-1, keepdim=True)
    assert (first_spikes(x) > 0.99).all()
    found, _, said = maps.singular_maps(x)
    assert said == "unit"
    torch.testing.assert_close(found, maps.singular_maps(x, rows="unit")[0])
    assert (found[:, 0, 17].square() < 0.2).all()  # the spike is gone


def test_spikes_are_the_energy_on_the_few_patches_of_highest_norm():
    x = with_spectrum((9.0, 5.0, 2.5), seed=7)
    few = max(1, round(maps.FEW * P))
    for b in range(len(x)):
        u = np.linalg.svd(x[b].numpy())[0][:, 0]
        high = np.argsort(-np.linalg.norm(x[b].numpy(), axis=1))[:few]
        assert first_spikes(x)[b].item() == pytest.approx((u[high] ** 2).sum(), abs=1e-3)


def test_unknown_rows_are_refused():
    with pytest.raises(UnknownName, match=r"rows 'units'.*'unit'"):
        maps.singular_maps(noise(1, P, 4), rows="units")


def test_planted_artifacts_are_found():
    x = noise(2, P, 16) + 3
    x[0, [3, 40]] *= 8
    found, norms = maps.artifacts(x)
    assert found[0].nonzero().flatten().tolist() == [3, 40]
    assert not found[1].any()
    np.testing.assert_allclose(norms, np.linalg.norm(x.numpy(), axis=-1))


@pytest.mark.parametrize("x", [torch.zeros(1, P, 4), torch.ones(1, P, 4), torch.full((1, P, 4), torch.nan)])
def test_no_artifacts_where_all_tokens_are_alike(x):
    assert not maps.artifacts(x)[0].any()


# -- signs -------------------------------------------------------------------------------------------------------------


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An object (4, P) of ones in zeros at different places, and vectors (4, 2, P) that show it with a random sign."""
    inside = torch.zeros(4, *GRID, dtype=torch.float64)
    for b, (row, col) in enumerate([(0, 0), (2, 2), (3, 4), (1, 3)]):
        inside[b, row : row + 3, col : col + 3] = 1
    inside = inside.flatten(1)
    u = inside[:, None] - inside.mean(1)[:, None, None] + 0.05 * noise(4, 2, P, seed=seed)
    u = u / u.norm(dim=-1, keepdim=True)
    flips = torch.tensor([[1, -1], [-1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    return inside, u * flips[..., None]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("name", ["fixed", "attention", "border"])
def test_planted_objects_get_their_sign_and_confidence(name):
    inside, u = planted()
    reference = 3 * inside + 0.3 * noise(4, P, seed=5) + 7
    found = maps.signed(u, **{name: reference})
    assert found.rule == name
    assert found.confidence.shape == (4, 2)
    assert ((found.maps * (inside[:, None] - 0.5)).sum(-1) > 0).all()
    torch.testing.assert_close(found.maps.abs(), u.abs())
    assert found.sure[:, 0].all()
    for b in range(4):
        for r in range(2):
            slope, _, constant = maps.RULES[name,][min(r, 1)]
            match = abs(np.corrcoef(u[b, r], reference[b])[0, 1])
            assert found.confidence[b, r].item() == pytest.approx(sigmoid(slope * match + constant), abs=1e-6)


def test_a_fixed_direction_comes_first_and_attention_adds_to_it():
    inside, u = planted()
    wrong = -inside + 0.3 * noise(4, P, seed=6)
    both = maps.signed(u, fixed=inside, attention=inside, border=wrong)
    against = maps.signed(u, fixed=inside, attention=wrong, border=inside)
    assert both.rule == against.rule == "fixed+attention"
    assert ((both.maps * (inside[:, None] - 0.5)).sum(-1) > 0).all()
    torch.testing.assert_close(both.maps, against.maps)
    assert (both.confidence[:, 0] > against.confidence[:, 0]).all()
    for b in range(4):
        slope, agreement, constant = maps.RULES["fixed", "attention"][0]
        match = abs(np.corrcoef(u[b, 0], inside[b])[0, 1])
        assert both.confidence[b, 0].item() == pytest.approx(sigmoid(slope * match + agreement + constant), abs=1e-6)
        assert against.confidence[b, 0].item() == pytest.approx(sigmoid(slope * match + constant), abs=1e-6)
    by_attention = maps.signed(u, attention=inside, border=wrong)
    assert by_attention.rule == "attention"
    torch.testing.assert_close(by_attention.maps, both.maps)


def test_the_outcome_does_not_depend_on_the_sign_that_comes_in():
    inside, u = planted(seed=3)
    a, b = (maps.signed(x, fixed=inside) for x in (u, -u))
    torch.testing.assert_close(a.maps, b.maps)
    torch.testing.assert_close(a.confidence, b.confidence)


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
def test_nothing_is_signed_where_nothing_can_be_known(value):
    _, u = planted()
    useless = torch.full((4, P), value, dtype=torch.float64)
    found = maps.signed(u, fixed=useless, attention=useless)
    assert (found.confidence == 0).all()
    assert not found.sure.any()
    torch.testing.assert_close(found.maps, u)
    none = maps.signed(u)
    assert none.rule == "none"
    assert not none.sure.any()
    blank = maps.signed(torch.zeros_like(u), fixed=noise(4, P))
    assert (blank.confidence == 0).all()


def test_a_chance_correlation_is_not_sure():
    found = maps.signed(noise(200, 2, 196, seed=1), fixed=noise(200, 196, seed=2), attention=noise(200, 196, seed=3))
    assert not found.sure.any()


def test_no_sure_sign_flips_over_a_hundred_sketches():
    """Objects that stand out clearly, a little, or not at all; the sketch decides nothing that is shown as sure."""
    inside = planted()[0].repeat(3, 1)
    contrast = torch.tensor([3.0, 0.5, 0.0]).repeat_interleave(4).double()
    x = contrast[:, None, None] * inside[..., None] * noise(12, seed=1) + noise(12, P, 12, seed=2)
    first, flips = None, 0
    for seed in range(100):
        u, _, _ = maps.singular_maps(x, 2, rows="unit", sketch=noise(12, 10, seed=seed))
        found = maps.signed(u, fixed=inside + 0.5 * noise(12, P, seed=3))
        first = found if first is None else first
        flips += (((found.maps * first.maps).sum(-1) < 0) & first.sure).sum().item()
    assert flips == 0
    assert first.sure[:4, 0].all()
    assert not first.sure[8:].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0, 5))
def test_confidence_is_a_probability_and_grows_with_the_match(seed, rank, share):
    u, other = noise(3, rank, P, seed=seed), noise(3, P, seed=seed + 1)
    for name in ("fixed", "attention", "border"):
        near = maps.signed(u, **{name: other + share * u[:, 0]}).confidence
        assert ((near >= 0) & (near <= 1)).all()
        exact = maps.signed(u, **{name: u[:, 0]}).confidence[:, 0]
        assert (near[:, 0] <= exact + 1e-9).all()


def test_correlation_is_numpys():
    x, y = noise(5, P, seed=1), noise(5, P, seed=2) * 3 + 10
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(maps.correlation(x, y), expected, atol=1e-12)
    torch.testing.assert_close(maps.correlation(x.float(), 1e6 + y.float()), maps.correlation(x, y).float(), atol=0.02, rtol=0)


def test_border_distance_is_the_formula():
    keys = noise(2, P, 5)
    found = maps.border_distance(keys, GRID)
    for b in range(2):
        unit = [k / math.sqrt(sum(v * v for v in k)) for k in keys[b].numpy()]
        places = [(i // GRID[1], i % GRID[1]) for i in range(P)]
        edge = [u for u, (y, x) in zip(unit, places, strict=True) if y in (0, GRID[0] - 1) or x in (0, GRID[1] - 1)]
        assert len(edge) == 2 * sum(GRID) - 4
        mean = sum(edge) / len(edge)
        for p in range(P):
            assert found[b, p].item() == pytest.approx(math.sqrt(sum((unit[p] - mean) ** 2)))


def test_log_attention_is_the_formula_and_survives_zeros():
    attention = noise(2, 3, P).softmax(-1)
    raw = np.array([[np.mean([math.log(attention[b, h, p]) for h in range(3)]) for p in range(P)] for b in range(2)])
    expected = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
    np.testing.assert_allclose(maps.log_attention(attention), expected, atol=1e-9)
    assert maps.log_attention(torch.zeros(1, 3, P)).isfinite().all()


# -- rollout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 11])
def test_rollout_is_the_product_of_half_identity_matrices(size):
    layers = [noise(2, 3, 11, 11, seed=i).softmax(-1) for i in range(4)]
    buffers, joint, expected = [torch.empty(2, 11, 11, dtype=torch.float64) for _ in range(2)], None, torch.eye(11).double()
    for i, a in enumerate(layers):
        rows = ((slice(n, min(n + size, 11)), a[:, :, n : n + size]) for n in range(0, 11, size))
        joint = maps.rollout_step(joint, rows, out=buffers[i % 2])
        expected = (0.5 * a.mean(1) + 0.5 * torch.eye(11)) @ expected
        torch.testing.assert_close(joint, expected)
    assert joint is buffers[1]
    torch.testing.assert_close(joint.sum(-1), torch.ones(2, 11).double())
    patches = slice(2, 11)
    torch.testing.assert_close(maps.rollout_map(joint, patches, True), expected[:, 0, 2:])
    torch.testing.assert_close(maps.rollout_map(joint, patches, False), expected[:, 2:, 2:].mean(1))


def test_rollout_makes_its_own_matrix_and_refuses_other_tokens():
    a = noise(1, 2, 5, 5).softmax(-1)
    joint = maps.rollout_step(None, [(slice(0, 5), a)])
    torch.testing.assert_close(joint, 0.5 * a.mean(1) + 0.5 * torch.eye(5))
    with pytest.raises(SettingError, match="4 tokens after 5"):
        maps.rollout_step(joint, [(slice(0, 4), noise(1, 2, 4, 4))])


@pytest.mark.parametrize(("fusion", "discard"), [("mean", 0.0), ("max", 0.0), ("min", 0.3), ("max", 0.9)])
def test_rollout_with_heads_fused_and_low_attention_discarded_is_that_of_loops(fusion, discard):
    layers, joint, n = [noise(2, 3, 7, 7, seed=i).softmax(-1) for i in range(3)], None, 7
    fuse = {"mean": lambda x: sum(x) / len(x), "max": max, "min": min}[fusion]
    for a in layers:
        joint = maps.fused_rollout_step(joint, [(slice(0, 4), a[:, :, :4]), (slice(4, 7), a[:, :, 4:])], fusion, discard)
    for image in range(2):
        expected = torch.eye(n, dtype=torch.float64)
        for a in layers:
            fused = torch.tensor([[fuse([float(a[image, h, i, j]) for h in range(3)]) for j in range(n)] for i in range(n)])
            order = sorted((float(fused[i, j]), i, j) for i in range(n) for j in range(n))
            for _, i, j in order[: int(n * n * discard)]:
                if (i, j) != (0, 0):
                    fused[i, j] = 0
            step = 0.5 * fused.double() + 0.5 * torch.eye(n)
            expected = step / step.sum(1, keepdim=True) @ expected
        torch.testing.assert_close(joint[image], expected, rtol=1e-6, atol=1e-8)


# -- filters on the grid -----------------------------------------------------------------------------------------------


def test_gram_filter_weighs_singular_vectors_by_their_energy():
    features, seed = [unit_rows(noise(2, P, d, seed=d)) for d in (5, 9)], noise(2, P, seed=1)
    found = maps.gram_filter(features, seed)
    for b in range(2):
        expected = np.zeros(P)
        for z in features:
            u, s, _ = np.linalg.svd(z[b].numpy(), full_matrices=False)
            expected += sum(s[i] ** 2 * u[:, i] * (u[:, i] @ seed[b].numpy()) for i in range(len(s))) / (s**2).sum()
        np.testing.assert_allclose(found[b], expected, atol=1e-12)
    turned = [z @ torch.tensor(np.linalg.qr(noise(z.shape[-1], z.shape[-1]).numpy())[0]) for z in features]
    torch.testing.assert_close(maps.gram_filter(turned, seed), found)
    assert (maps.gram_filter([torch.zeros(2, P, 3)], seed.float()) == 0).all()


def test_blur_is_a_normalised_gaussian():
    x = noise(2, P)
    found = maps.blurred(x, GRID, 0.8).unflatten(1, GRID)
    pixels = [(r, c) for r in range(GRID[0]) for c in range(GRID[1])]
    for y, c in pixels:
        weights = np.array([math.exp(-((y - r) ** 2 + (c - q) ** 2) / (2 * 0.8**2)) for r, q in pixels])
        np.testing.assert_allclose(found[:, y, c], x.numpy() @ (weights / weights.sum()), atol=1e-12)
    torch.testing.assert_close(maps.blurred(torch.ones(1, P), GRID), torch.ones(1, P))


def test_standardised_maps_and_constant_ones():
    x = noise(3, P).float() * 5 + 100
    found = maps.standardised(x)
    torch.testing.assert_close(found.mean(-1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.square().mean(-1), torch.ones(3), atol=1e-4, rtol=0)
    assert (maps.standardised(torch.full((2, P), 0.1)) == 0).all()


def test_resampling_keeps_constants_ramps_and_means():
    x = noise(2, P)
    assert maps.resampled(x, GRID, GRID) is x
    torch.testing.assert_close(maps.resampled(torch.ones(1, P), GRID, (3, 14)), torch.ones(1, 42))
    fine = noise(2, 12 * 14).unflatten(1, (12, 14))
    ramp = torch.linspace(0, 1, 12)[None, :, None].expand(1, 12, 14).flatten(1)
    half = maps.resampled(ramp, (12, 14), GRID).unflatten(1, GRID)
    assert (half.diff(dim=1) > 0).all()
    assert torch.allclose(half[:, :, 0], half[:, :, 6])
    coarse = maps.resampled(fine.flatten(1), (12, 14), GRID)
    assert coarse.shape == (2, P)
    assert coarse.std() < fine.std()
