"""The spectral engine against numpy's SVD on planted spectra, on degenerate input, backwards, compiled and exported."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreous.base.errors import SettingError, UnknownName
from vitreous.layers.spectral import leading_subspace, product_singular_values, product_svd, singular_values, unit_rows

METHODS = ("exact", "cholesky_qr", "gram_schmidt")
SPECTRA = {"fast": lambda i: 0.7**i, "1/i": lambda i: 1 / i, "1/sqrt(i)": lambda i: i**-0.5}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def planted(shape, spectrum, seed=0, dtype=torch.float32):
    """x (B, N, D) with the singular values of a spectrum, and its true left vectors and values, in float64."""
    b, n, d = shape
    m = min(n, d)
    u, _ = torch.linalg.qr(noise(b, n, m, seed=seed, dtype=torch.float64))
    v, _ = torch.linalg.qr(noise(b, d, m, seed=seed + 1, dtype=torch.float64))
    s = SPECTRA[spectrum](torch.arange(1, m + 1, dtype=torch.float64)) if isinstance(spectrum, str) else spectrum
    return ((u * s) @ v.mT).to(dtype), u, s


def angle(found, true):
    """Sine of the largest principal angle, (B,), through scipy."""
    pairs = zip(found.double().numpy(), true.double().numpy(), strict=True)
    return np.array([np.sin(scipy.linalg.subspace_angles(f, t).max()) for f, t in pairs])


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def orthonormal_up_to(rank, t, tolerance=1e-5):
    """t (B, N, R): the first rank columns are orthonormal, the others zero."""
    wanted = torch.diag((torch.arange(t.shape[-1]) < rank).to(t.dtype))
    close(t.mT @ t, wanted.expand(len(t), -1, -1), tolerance)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 50, 96), (3, 96, 50), (2, 40, 40)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_exact_equals_numpy(shape, spectrum):
    x, _, _ = planted(shape, spectrum)
    u, s, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    found = leading_subspace(x, 6, method="exact")
    np.testing.assert_allclose(found.S, s[:, :6], rtol=1e-6)
    close((found.U.double() * torch.tensor(u[:, :, :6])).sum(1).abs(), torch.ones(shape[0], 6, dtype=torch.float64))
    close((found.V.double() * torch.tensor(vh[:, :6]).mT).sum(1).abs(), torch.ones(shape[0], 6, dtype=torch.float64))
    np.testing.assert_allclose(found.info.gap, (s[:, :6] - s[:, 1:7]) / s[:, :6], atol=1e-5)
    assert found.info.residual.eq(0).all()
    assert found.info.rank.eq(6).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_triples_belong_together(method, dtype):
    x, _, _ = planted((2, 60, 45), "fast", dtype=dtype)
    found = leading_subspace(x, 5, method=method)
    assert found.U.dtype == found.S.dtype == found.V.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-11
    close(x.mT @ found.U, found.V * found.S[:, None], tolerance)
    close(x @ found.V, found.U * found.S[:, None], 2e-6)
    orthonormal_up_to(5, found.U)
    orthonormal_up_to(5, found.V)


# Largest principal angle (sine), mean over 8 matrices of 197 x 192, at default settings: rank 8, 8 more columns, 2 steps.
# Measured: fast 4e-7, 1/i 0.02, 1/sqrt(i) 0.16; without the shift 7e-7, 0.04 and 0.30.
ANGLES = {"fast": 2e-6, "1/i": 0.04, "1/sqrt(i)": 0.25}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_angles_at_default_settings(spectrum):
    x, u, _ = planted((8, 197, 192), spectrum)
    found = {method: angle(leading_subspace(x, 8, method=method).U, u[:, :, :8]).mean() for method in METHODS}
    assert found["exact"] < 1e-6
    assert found["cholesky_qr"] < ANGLES[spectrum]
    assert found["gram_schmidt"] == pytest.approx(found["cholesky_qr"], rel=0.01, abs=1e-6)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_less_accurate_than_the_peer(spectrum):
    """torch.svd_lowrank (Householder QR in each half step) with as many columns and steps, over eight sketches each."""
    x, u, _ = planted((4, 200, 160), spectrum)
    ours, peer = [], []
    for seed in range(8):
        ours.append(angle(leading_subspace(x, 8, method="cholesky_qr", sketch=noise(160, 16, seed=seed)).U, u[..., :8]))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peer.append(angle(torch.svd_lowrank(x, q=16, niter=2)[0][..., :8], u[..., :8]))
    assert np.mean(ours) < np.mean(peer)


def test_more_power_is_more_accurate_and_residual_tells_so():
    x, u, _ = planted((4, 100, 120), "1/i")
    steps = [leading_subspace(x, 6, method="cholesky_qr", power=power) for power in range(5)]
    angles = [angle(step.U, u[:, :, :6]).mean() for step in steps]
    residuals = [step.info.residual.mean().item() for step in steps]
    assert angles == sorted(angles, reverse=True)
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] > 0.5 > 0.01 > residuals[4]
    for step in steps:  # the bound of the docstring
        error = torch.linalg.vector_norm(x @ step.V - step.U * step.S[:, None], dim=(1, 2))
        bound = step.info.residual * torch.linalg.vector_norm(step.S, dim=1) / step.S[:, -1].square()  # |x|_2 = 1
        assert (error <= bound + 1e-5).all()


def test_without_extra_columns_no_step_is_shifted():
    """A shift near s_1^2 / 2 would slow a sketch of one column down."""
    x, u, _ = planted((8, 100, 120), "1/i")
    plain, shifted = (leading_subspace(x, 1, oversample=extra, power=4, method="cholesky_qr") for extra in (0, 4))
    through = leading_subspace(x.clone().requires_grad_(), 1, oversample=0, power=4, method="cholesky_qr", gradient="through")
    assert torch.allclose(plain.U, through.U, atol=1e-5)
    assert angle(plain.U, u[:, :, :1]).mean() < 0.02
    assert angle(shifted.U, u[:, :, :1]).mean() < 1e-4


def test_a_wide_range_of_values_survives_float32():
    s = 10.0 ** -torch.arange(0, 8, dtype=torch.float64)
    x, u, _ = planted((2, 60, 8), s)
    for method in METHODS:
        found = leading_subspace(x, 6, method=method, oversample=2)
        np.testing.assert_allclose(found.S[:, :4], s[:4].expand(2, 4), rtol=1e-3)
        assert angle(found.U[..., :4], u[..., :4]).max() < 1e-3


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(method, scale):
    x = noise(2, 30, 20)
    one, other = leading_subspace(x, 3, method=method), leading_subspace(x * scale, 3, method=method)
    close(one.U, other.U, 1e-4)
    close(one.S, other.S / scale, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_last_gap(method):
    x = noise(2, 12, 9)
    s = singular_values(x)
    with_more = leading_subspace(x, 3, method=method, oversample=6).info.gap
    close(with_more[:, 2], 1 - s[:, 3] / s[:, 2], 1e-4)
    bare = leading_subspace(x, 3, method=method, oversample=0, power=40).info.gap
    assert (bare[:, 2] <= 1 - s[:, 3] / s[:, 2] + 1e-4).all()
    close(leading_subspace(x, 9, method=method, oversample=0).info.gap[:, 8], torch.ones(2))


# --- laws -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 3),
    n=st.integers(1, 24),
    d=st.integers(1, 24),
    rank=st.integers(1, 12),
    oversample=st.integers(0, 8),
    method=st.sampled_from(("auto", *METHODS)),
    seed=st.integers(0, 99),
)
def test_any_shape(b, n, d, rank, oversample, method, seed):
    x = noise(b, n, d, seed=seed)
    found = leading_subspace(x, rank, method=method, oversample=oversample, power=3)
    assert (found.U.shape, found.S.shape, found.V.shape) == ((b, n, rank), (b, rank), (b, d, rank))
    assert found.info.gap.shape == found.info.sign_confidence.shape == (b, rank)
    true = min(rank, n, d)
    assert found.info.rank.eq(true).all()
    assert found.info.finite.all()
    assert (found.S.diff(dim=1) <= 1e-6).all()
    orthonormal_up_to(true, found.U, 1e-4)
    orthonormal_up_to(true, found.V, 1e-3)
    exact = torch.tensor(np.linalg.svd(x.numpy(), compute_uv=False))[:, :true]
    assert (found.S[:, :true] <= exact * (1 + 1e-5) + 1e-5).all()  # Ritz values never exceed the true ones
    if rank + oversample >= min(n, d):
        close(found.S[:, :true], exact, 1e-4)


@settings(max_examples=15, deadline=None)
@given(method=st.sampled_from(METHODS), seed=st.integers(0, 99))
def test_permutation_and_rotation(method, seed):
    x, _, _ = planted((2, 20, 16), "fast", seed=seed)
    order = torch.randperm(20, generator=seeded(seed))
    turn, _ = torch.linalg.qr(noise(16, 16, seed=seed))
    plain = leading_subspace(x, 4, method=method)
    permuted = leading_subspace(x[:, order], 4, method=method)
    rotated = leading_subspace(x @ turn, 4, method=method)
    sure = plain.info.sign_confidence.gt(0.02)[:, None]  # near UNSURE rounding may change the rule
    for one, other in [
        (plain.U[:, order], permuted.U),
        (plain.V, permuted.V),
        (plain.U, rotated.U),
        (turn.T @ plain.V, rotated.V),
    ]:
        close(one * sure, other * sure, 1e-4)


def test_nothing_random_and_no_global_state():
    x = noise(2, 40, 30)
    before = torch.get_rng_state()
    first = leading_subspace(x, 4)
    torch.manual_seed(123)
    second = leading_subspace(x, 4)
    assert torch.equal(first.U, second.U)
    torch.set_rng_state(before)
    leading_subspace(x, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_changes_nothing(method):
    x = noise(2, 40, 30)
    plain = leading_subspace(x, 4, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = leading_subspace(x, 4, method=method)
    assert torch.equal(plain.U, cast.U)
    assert torch.equal(plain.S, cast.S)
    low = leading_subspace(x.bfloat16(), 4, method=method)
    assert low.U.dtype == torch.float32
    assert torch.equal(low.U, leading_subspace(x.bfloat16().float(), 4, method=method).U)


# --- degenerate input -------------------------------------------------------------------------------------------------


def degenerate():
    """name -> (x (1, 24, 16), true rank)."""
    rank3 = noise(1, 24, 3) @ noise(1, 3, 16, seed=1)
    return {
        "zero": (torch.zeros(1, 24, 16), 0),
        "constant": (torch.full((1, 24, 16), 3.0), 1),
        "equal rows": (noise(1, 1, 16).expand(1, 24, 16), 1),
        "rank 1": (noise(1, 24, 1) @ noise(1, 1, 16, seed=1), 1),
        "rank 3": (rank3, 3),
        "rank 3, doubled rows": (rank3[:, :12].repeat(1, 2, 1), 3),
        "one entry": (
            torch.zeros(1, 24, 16).index_put((torch.tensor(0), torch.tensor(5), torch.tensor(2)), torch.tensor(2.0)),
            1,
        ),
        "identity": (torch.eye(24, 16)[None], 5),
        "equal pairs": (planted((1, 24, 16), torch.tensor([2.0, 2, 1, 1, 0.5, 0.5] + [0.0] * 10).double())[0], 5),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", degenerate())
def test_degenerate_input(name, method):
    x, rank = degenerate()[name]
    found = leading_subspace(x, 5, method=method)
    assert found.info.rank.tolist() == [rank]
    assert found.info.finite.all()
    orthonormal_up_to(rank, found.U)
    orthonormal_up_to(rank, found.V)
    close(found.S[0], torch.tensor(np.linalg.svd(x[0].numpy(), compute_uv=False)[:5]), 1e-4)
    for value in vars(found.info).values():
        assert value.float().isfinite().all()


@pytest.mark.parametrize("gradient", ["detach", "through"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", degenerate())
def test_gradients_of_degenerate_input_are_finite(name, method, gradient):
    x = degenerate()[name][0].clone().requires_grad_()
    sketch = noise(16, 13, seed=3).requires_grad_()
    found = leading_subspace(x, 5, method=method, sketch=sketch, power=1, gradient=gradient)
    loss = ((found.U.mT @ x) * noise(5, 16, seed=4)).sum() + (found.V * noise(16, 5, seed=5)).sum() + found.S.sum()
    loss.backward()
    assert x.grad.isfinite().all()
    assert sketch.grad is None or sketch.grad.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient", ["detach", "through"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_sample_harms_no_other(method, gradient, value):
    clean = noise(3, 20, 14)
    bad = clean.clone()
    bad[1, 4, 2] = value
    bad.requires_grad_()
    alone = leading_subspace(clean[[0, 2]], 4, method=method, gradient=gradient)
    found = leading_subspace(bad, 4, method=method, gradient=gradient)
    assert found.info.finite.tolist() == [True, False, True]
    assert found.info.rank.tolist() == [4, 0, 4]
    for one, other in [(found.U, alone.U), (found.S, alone.S), (found.V, alone.V)]:
        assert one[1].eq(0).all()
        close(one[[0, 2]], other)
    if gradient == "detach":
        return
    (found.U * noise(20, 4, seed=1)).sum().backward()
    assert bad.grad.isfinite().all()
    assert bad.grad[1].eq(0).all()
    assert bad.grad[0].abs().sum() > 0


@pytest.mark.parametrize("gradient", ["detach", "through"])
@pytest.mark.parametrize("method", METHODS)
def test_a_huge_number_harms_no_other_sample(method, gradient):
    """1e30 is finite, its square is not: that sample is whole or zero, and says which."""
    clean = noise(3, 20, 14)
    huge = clean.clone()
    huge[1, 4, 2] = 1e30
    alone = leading_subspace(clean[[0, 2]], 4, method=method, gradient=gradient)
    found = leading_subspace(huge, 4, method=method, gradient=gradient)
    assert found.info.finite[[0, 2]].all()
    for one, other in [(found.U, alone.U), (found.S, alone.S), (found.V, alone.V)]:
        assert one.isfinite().all()
        assert found.info.finite[1] or one[1].eq(0).all()
        close(one[[0, 2]], other)


def test_a_bad_sketch_is_a_bad_sample():
    sketch = noise(3, 14, 12)
    sketch[2, 0, 0] = float("nan")
    found = leading_subspace(noise(3, 20, 14), 4, sketch=sketch)
    assert found.info.finite.tolist() == [True, True, False]
    assert found.U.isfinite().all()


# --- gradients --------------------------------------------------------------------------------------------------------


def settled(x, sketch, **settings):
    """U and V weighted with each other, so that no sign is left, and S."""
    found = leading_subspace(x, 3, gradient="through", sketch=sketch, **settings)
    return found.U @ found.V.mT, found.U @ found.U.mT, found.S


@pytest.mark.parametrize(
    ("method", "power"), [("exact", 0), ("cholesky_qr", 0), ("cholesky_qr", 1), ("cholesky_qr", 3), ("gram_schmidt", 1)]
)
@pytest.mark.parametrize("shape", [(2, 9, 6), (2, 6, 9)])
def test_gradcheck_on_separated_values(method, power, shape):
    x = planted(shape, 0.6 ** torch.arange(6, dtype=torch.float64), dtype=torch.float64)[0].requires_grad_()
    sketch = noise(2, shape[2], 5, seed=7, dtype=torch.float64)
    if method != "exact":
        sketch.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, o: settled(x, o, method=method, power=power), (x, sketch), atol=1e-4)


def test_the_exact_gradient_is_that_of_svd():
    x = planted((2, 10, 7), "fast", dtype=torch.float64)[0].requires_grad_()
    weight = noise(10, 7, dtype=torch.float64)
    found = leading_subspace(x, 3, method="exact", gradient="through")
    (ours,) = torch.autograd.grad((found.U @ found.V.mT * weight).sum(), x)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    (peer,) = torch.autograd.grad((u[:, :, :3] @ vh[:, :3] * weight).sum(), x)
    close(ours, peer, 1e-3 * peer.abs().max().item())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("power", [0, 2])
def test_float32_gradients_are_those_of_float64(spectrum, power):
    """Each half step divides gradients by a small singular value: rounding must not be magnified with them."""
    grads = []
    for dtype in (torch.float64, torch.float32):
        x = planted((2, 80, 60), spectrum, dtype=dtype)[0].requires_grad_()
        sketch = noise(60, 16, dtype=dtype)
        found = leading_subspace(x, 8, method="cholesky_qr", power=power, sketch=sketch, gradient="through")
        ((found.U.mT @ x) * noise(8, 60, seed=2, dtype=dtype)).sum().backward()
        grads.append(x.grad.double())
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[0].norm()


def test_gradients_stay_bounded_where_values_meet():
    """The exact derivative grows as 1 / gap without end."""
    norms = []
    for gap in (1e-1, 1e-3, 1e-6, 0.0):
        s = torch.tensor([2.0, 1.0, 1.0 - gap, 0.3, 0.1], dtype=torch.float64)
        x = planted((1, 12, 5), s)[0].requires_grad_()
        found = leading_subspace(x, 2, method="cholesky_qr", gradient="through")
        (found.U * noise(12, 2, seed=5)).sum().backward()
        norms.append(x.grad.norm().item())
    assert max(norms) < 1e4


def test_detached_by_default_and_the_sketch_matters_less_with_power():
    x = planted((2, 40, 30), "fast")[0].requires_grad_()
    assert not any(t.requires_grad for t in vars(leading_subspace(x, 3)).values() if isinstance(t, torch.Tensor))
    norms = []
    for power in (0, 1, 2):
        sketch = noise(30, 5).requires_grad_()
        found = leading_subspace(x, 3, sketch=sketch, power=power, gradient="through")
        (found.U @ found.U.mT * noise(40, 40, seed=2)).sum().backward()
        norms.append(sketch.grad.norm().item())
    assert norms[0] > 1.5 * norms[1] > 4 * norms[2]
    with torch.no_grad():
        assert not leading_subspace(x, 3, gradient="through").U.requires_grad


# --- compiled and exported --------------------------------------------------------------------------------------------


class Leading(torch.nn.Module):
    def __init__(self, rank, **settings):
        super().__init__()
        self.rank, self.settings = rank, settings

    def forward(self, x):
        found = leading_subspace(x, self.rank, **self.settings)
        return found.U, found.S, found.V, found.info.gap, found.info.residual


@pytest.mark.parametrize("gradient", ["detach", "through"])
@pytest.mark.parametrize("method", ["auto", "gram_schmidt"])
def test_compiles_as_one_graph(method, gradient):
    torch.compiler.reset()
    model = Leading(2, oversample=2, method=method, gradient=gradient)
    x, y = (noise(2, 12, 9).requires_grad_() for _ in range(2))
    for one, other in zip(torch.compile(model, fullgraph=True, backend="eager")(x), model(y), strict=True):
        close(one, other, 1e-6)
        if one.requires_grad:
            one.sum().backward(retain_graph=True)
            other.sum().backward(retain_graph=True)
    if gradient == "through":
        close(x.grad, y.grad)


def test_exports_and_runs_in_onnxruntime(tmp_path):
    """auto is the product-only method while exporting; no decomposition is left; degenerate samples do as in torch."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = Leading(2, oversample=1, power=1).eval(), noise(3, 12, 9)
    batch = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (x,), dynamic_shapes=batch)
    names = {str(node.target) for part in program.graph_module.modules() for node in part.graph.nodes}
    assert not any(word in name for name in names for word in ("eigh", "cholesky", "triangular", "svd", "linalg_qr"))
    path = tmp_path / "leading.onnx"
    torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    bad = noise(4, 12, 9, seed=1)
    bad[1], bad[2, 0, 0] = 0, float("nan")
    for images in (x, bad):
        wanted = Leading(2, oversample=1, power=1, method="gram_schmidt")(images)
        close(leading_subspace(images, 2, oversample=1, power=1, method="cholesky_qr").U, wanted[0], 1e-4)
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        for one, two, three in zip(found, program.module()(images), wanted, strict=True):
            close(torch.tensor(one), three)
            close(two, three)


# --- the smaller functions --------------------------------------------------------------------------------------------


def test_unit_rows():
    x = noise(2, 6, 5)
    x[0, 2] = 0
    rows = unit_rows(x.bfloat16())
    assert rows.dtype == torch.float32
    wanted = x.bfloat16().float()
    for b in range(2):
        for i in range(6):
            wanted[b, i] /= max(wanted[b, i].norm().item(), 1e-12)
        wanted[b] -= wanted[b].mean(0)
    close(unit_rows(x.bfloat16()), wanted)
    x.requires_grad_()
    unit_rows(x).square().sum().backward()
    assert x.grad.isfinite().all()


def test_product_svd_equals_the_dense_one():
    a, b = noise(2, 3, 4, 20), noise(2, 3, 4, 20, seed=1)
    u, s, v = product_svd(a, b)
    close(u * s[..., None, :] @ v.mT, a.mT @ b, 1e-4)
    np.testing.assert_allclose(s, np.linalg.svd((a.mT @ b).numpy(), compute_uv=False)[..., :4], rtol=1e-4)
    for t in (u, v):
        close(t.mT @ t, torch.eye(4).expand(2, 3, 4, 4))


@pytest.mark.parametrize(("n", "m", "k"), [(30, 20, 8), (5, 20, 8), (5, 6, 8), (20, 5, 8), (8, 8, 8), (9, 1, 3)])
@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-12), (False, 1e-6)])
def test_product_singular_values_equal_those_of_the_product(n, m, k, exact, tolerance):
    a, b = (noise(2, 3, rows, k, seed=rows, dtype=torch.float64) for rows in (n, m))
    found = product_singular_values(a, b, exact=exact)
    assert found.shape == (2, 3, min(n, m, k))
    np.testing.assert_allclose(found, torch.linalg.svdvals(a @ b.mT)[..., : min(n, m, k)], atol=tolerance)
    each = scipy.linalg.svdvals((a[1, 2] @ b[1, 2].mT).numpy())
    np.testing.assert_allclose(found[1, 2], each[: min(n, m, k)], atol=tolerance)


@pytest.mark.parametrize("exact", [True, False])
def test_product_singular_values_of_dependent_and_bad_factors(exact):
    a, b = noise(4, 30, 8), noise(4, 20, 8, seed=1)
    a[0, :, 4:] = a[0, :, :4]  # rank 4
    a[1] = 0
    b[2, 3, 3] = float("inf")
    found = product_singular_values(a, b, exact=exact)
    assert found.dtype == torch.float32
    wanted = torch.linalg.svdvals((a.double() @ b.double().mT)[[0, 1, 3]])[:, :8].float()
    close(found[[0, 1, 3]], wanted, 1e-4)
    assert (found[0, 4:] < 1e-7 * found[0, 0]).all()  # squares in float32 would leave 1e-4
    assert found[1].eq(0).all()
    assert found[2].isnan().all()


def test_singular_values_with_one_bad_matrix():
    x = noise(2, 3, 6, 4)
    x[0, 1, 2, 2] = float("nan")
    s = singular_values(x)
    assert s[0, 1].isnan().all()
    good = torch.ones(2, 3, dtype=torch.bool)
    good[0, 1] = False
    np.testing.assert_allclose(s[good], np.linalg.svd(x[good].numpy(), compute_uv=False), rtol=1e-5)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"power": -1}, "power=-1"),
        ({"sketch": torch.zeros(7, 9)}, r"sketch \(7, 9\). Expected \(9, k\) or \(2, 9, k\), k from 3"),
        ({"sketch": torch.zeros(9, 2)}, "k from 3"),
        ({"sign": torch.zeros(9)}, r"sign reference \(9,\). Expected \(12,\) or \(2, 12\)"),
        ({"x": torch.zeros(12, 9)}, r"x\[None\]"),
        ({"x": torch.zeros(2, 12, 9, dtype=torch.int64)}, "torch.int64"),
        ({"x": torch.zeros(2, 0, 9)}, "N and D from 1"),
    ],
)
def test_refuses_what_does_not_fit(settings, message):
    with pytest.raises(SettingError, match=message):
        leading_subspace(**{"x": torch.zeros(2, 12, 9), "rank": 3, **settings})


def test_unknown_names():
    with pytest.raises(UnknownName, match="cholesky_qr"):
        leading_subspace(torch.zeros(2, 12, 9), 3, method="cholesky-qr")
    with pytest.raises(UnknownName, match="through"):
        leading_subspace(torch.zeros(2, 12, 9), 3, gradient="trough")
