"""The spectral engine at the sizes that vision transformers have: known triples, a textbook's algorithm, laws, bad input."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from layers.planted import SPECTRA, noise, planted, rotation, sine, values
from vitreous.layers.spectral import Subspace, leading_subspace

TOKENS, WIDTHS, RANKS = (50, 197, 577, 1025), (192, 384, 768, 1024), (1, 4, 8, 16)
SIZES = list(itertools.product(TOKENS, WIDTHS))
METHODS = ("exact", "cholesky_qr", "gram_schmidt")
BY_METHOD = [(n, d, m) for n, d in SIZES for m in METHODS if m != "exact" or min(n, d) <= 384]  # exact grows as min(n, d)^3
EPS = torch.finfo(torch.float32).eps

at_every_size = pytest.mark.parametrize(("n", "d"), SIZES)


@functools.lru_cache(maxsize=1)  # tests of one size follow each other
def given(n: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One matrix per spectrum, x (3, n, d) in float32, with its true U (3, n, 16), S (3, 17), V (3, d, 16) in float64."""
    made = [planted(n, d, values(spectrum, min(n, d)), seed=2 * i) for i, spectrum in enumerate(SPECTRA)]
    x, u, v = (torch.stack(part) for part in zip(*((x, u[:, :16], v[:, :16]) for x, u, v in made), strict=True))
    return x.float(), u, torch.stack([values(spectrum, 17) for spectrum in SPECTRA]), v


def rounding(s: Tensor, rank: int) -> Tensor:
    """What float32 may add to the sine of R = rank vectors, (B,): Wedin's |E| / (s_R - s_R+1), of s (B, R + 1 or more).

    |E| is 2 EPS s_1, and 8 EPS are for the rounding of the vectors themselves.
    """
    return EPS * (8 + 2 * s[:, 0] / (s[:, rank - 1] - s[:, rank]))


def textbook(x: Tensor, sketch: Tensor, rank: int, power: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1, with a Householder QR in each half step."""
    x, sketch = x.to(dtype), sketch.to(dtype)
    y, _ = torch.linalg.qr(x @ sketch)
    for _ in range(power):
        half, _ = torch.linalg.qr(x.mT @ y)
        y, _ = torch.linalg.qr(x @ half)
    u, s, vh = torch.linalg.svd(y.mT @ x, full_matrices=False)
    return (y @ u)[..., :rank], s, vh.mT[..., :rank]


def close(one: Tensor, other: Tensor, tolerance: float = 16 * EPS) -> None:
    torch.testing.assert_close(one.double(), other.double(), atol=tolerance, rtol=0)


def orthonormal(t: Tensor, rank: int) -> None:
    """t (B, N, R): the first rank columns are orthonormal, the others zero; float32 products leave a few EPS."""
    wanted = torch.diag((torch.arange(t.shape[-1]) < rank).double())
    t = t.double()
    close(t.mT @ t, wanted.expand(len(t), -1, -1))


def lawful(x: Tensor, found: Subspace) -> None:
    """What holds for the triples whatever the sketch: orthonormal, descending, finite, x^T U = V S to the rounding of s_1."""
    rank = found.S.shape[1]
    for t in (found.U, found.S, found.V, *vars(found.info).values()):
        assert t.isfinite().all()
    assert found.U.dtype == found.S.dtype == found.V.dtype == torch.float32
    assert found.info.finite.all()
    assert found.info.rank.eq(rank).all()
    assert (found.S.diff(dim=1) <= 0).all()
    orthonormal(found.U, rank)
    orthonormal(found.V, rank)
    error = torch.linalg.matrix_norm(x.double().mT @ found.U.double() - found.V.double() * found.S[:, None].double())
    assert (error < 16 * EPS * found.S[:, 0]).all()


# --- oracles ----------------------------------------------------------------------------------------------------------


@at_every_size
def test_exact_is_the_planted_truth(n, d):
    x, u, s, v = given(n, d)
    found = leading_subspace(x, 16, method="exact")
    lawful(x, found)
    close(found.S / s[:, :16], torch.ones(3, 16))
    back = torch.linalg.matrix_norm(x.double() @ found.V.double() - found.U.double() * found.S[:, None].double())
    assert (back < 16 * EPS * s[:, 0]).all()  # and x V = U S
    assert found.info.residual.eq(0).all()
    for rank in RANKS:  # all triples are computed, whatever the rank
        assert (sine(found.U[..., :rank], u[..., :rank]) < rounding(s, rank)).all()
        assert (sine(found.V[..., :rank], v[..., :rank]) < rounding(s, rank)).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(leading_subspace(x, 16, method="exact").U, found.U)


@pytest.mark.parametrize("method", ["cholesky_qr", "gram_schmidt"])
@at_every_size
def test_equals_the_textbook_with_the_same_sketch(n, d, method):
    """Rayleigh-Ritz on a given span has one answer: in slow spectra too, where it is far from the truth."""
    x, _, _, _ = given(n, d)
    for rank, power in itertools.product(RANKS, (0, 1)):
        sketch = noise(d, rank + 8, seed=rank)
        found = leading_subspace(x, rank, method=method, power=power, sketch=sketch)
        u, s, v = textbook(x, sketch, rank, power)
        lawful(x, found)
        close(found.S / s[:, :rank], torch.ones(3, rank))
        assert (sine(found.U, u) < rounding(s, rank)).all()
        assert (sine(found.V, v) < rounding(s, rank)).all()


@at_every_size
def test_the_shift_takes_a_tenth_off_the_textbooks_angle(n, d):
    """Measured on slow spectra: a fifth or more. Values lie between the true ones and what the angle allows."""
    x, u, true, _ = given(n, d)
    for rank in RANKS:
        sketch = noise(d, rank + 8, seed=rank)
        s, u_r = true[:, :rank], u[..., :rank]
        found = leading_subspace(x, rank, sketch=sketch)
        lawful(x, found)
        ours, book = sine(found.U, u_r), sine(textbook(x, sketch, rank, 2)[0], u_r)
        assert (ours <= 0.9 * book + rounding(true, rank)).all()
        assert (s * (1 + 8 * EPS) >= found.S).all()  # Ritz values never exceed the true ones
        least = s * (1 - ours.square()).sqrt()[:, None]
        assert (least * (1 - 8 * EPS) - 8 * EPS * s[:, :1] <= found.S).all()


@at_every_size
def test_no_larger_an_angle_than_svd_lowrank(n, d):
    """As many columns and steps, the larger of left and right, the geometric mean over eight sketches of each.

    Such means scatter. The worst of 192 cells: 1.27 of the peer's over eight sketches, 1.14 over sixteen, both in the fast
    spectrum at rank 1; over sixteen, all cells of the two slow spectra and of the other ranks were below 0.98.
    """
    x, u, _, v = given(n, d)
    for rank in RANKS:
        u_r, v_r = u[..., :rank], v[..., :rank]
        ours, peer = [], []
        for seed in range(8):
            found = leading_subspace(x, rank, sketch=noise(d, rank + 8, seed=seed))
            ours.append(torch.maximum(sine(found.U, u_r), sine(found.V, v_r)).log())
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                left, _, right = torch.svd_lowrank(x, q=rank + 8, niter=2)
            peer.append(torch.maximum(sine(left[..., :rank], u_r), sine(right[..., :rank], v_r)).log())
        ours, peer = (torch.stack(angles).mean(0).exp() for angles in (ours, peer))
        assert (ours <= 1.3 * peer).all()
        assert ours.log().mean() < peer.log().mean()  # over the three spectra


CLIFFS = {  # of the i-th singular value, below a few large ones: far down, but above NOISE
    "1e-4": lambda i: torch.where(i > 2, 1e-4, 1.0) / i,
    "1e-5": lambda i: torch.where(i > 1, 1e-5, 1.0) * i**-0.5,
    "powers of e": lambda i: torch.exp(1 - i),
}


@pytest.mark.parametrize("method", ["cholesky_qr", "gram_schmidt"])
@pytest.mark.parametrize("cliff", CLIFFS)
@pytest.mark.parametrize(("n", "d"), [(50, 768), (197, 192), (197, 768), (1025, 384)])
def test_below_a_cliff_as_exact_as_householder_in_float32(n, d, cliff, method):
    """A step conditions once, where the textbook does so twice. Means of angles: measured, at most twice the textbook's."""
    s = CLIFFS[cliff](torch.arange(1, min(n, d, 100) + 1, dtype=torch.float64))
    x, u, v = planted(n, d, s)
    x = x[None].float()
    for rank, power in itertools.product((2, 4, 8), (2, 4)):
        ours, book = [], []
        for seed in range(4):
            sketch = noise(d, rank + 8, seed=seed)
            found = leading_subspace(x, rank, method=method, power=power, sketch=sketch)
            assert found.info.rank.tolist() == [rank]
            ours += [sine(found.U, u[:, :rank]), sine(found.V, v[:, :rank])]
            householder = textbook(x, sketch, rank, power, torch.float32)
            book += [sine(householder[0], u[:, :rank]), sine(householder[2], v[:, :rank])]
        assert torch.cat(ours).mean() < 3 * torch.cat(book).mean() + 16 * EPS


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "method"), BY_METHOD)
def test_permuted_tokens_and_lower_precision(n, d, method):
    x, _, _, _ = given(n, d)
    plain = leading_subspace(x, 8, method=method)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    permuted = leading_subspace(x[:, order], 8, method=method)
    close(permuted.S, plain.S)
    sure = (plain.info.sign_confidence > 0.02).double()[:, None]  # near 0.01 rounding may change the rule of signs
    worst = 200 * EPS  # single vectors turn within their span by rounding / gap, and gaps are 1/18 at 1 / sqrt(8)
    close(permuted.U * sure, plain.U[:, order] * sure, worst)
    close(permuted.V * sure, plain.V * sure, worst)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = leading_subspace(x, 8, method=method)
    low, single = (leading_subspace(t, 8, method=method) for t in (x.bfloat16(), x.bfloat16().float()))
    for one, other in ((cast, plain), (low, single)):
        assert torch.equal(one.U, other.U)
        assert torch.equal(one.S, other.S)
        assert torch.equal(one.V, other.V)


@at_every_size
def test_large_batches(n, d):
    """8, 32 and 128 matrices. Sample b has the tokens of a spectrum's matrix, moved on by b places: U moves, S and V stay."""
    x, _, _, _ = given(n, d)
    alone = leading_subspace(x, 8)
    sure = (alone.info.sign_confidence > 0.02).double()[:, None]
    batch = torch.stack([x[b % 3].roll(b, 0) for b in range(128)])
    for count in (8, 32, 128):
        found = leading_subspace(batch[:count], 8)
        kinds = torch.arange(count) % 3
        close(found.S, alone.S[kinds])
        close(found.V * sure[kinds], (alone.V * sure)[kinds], 200 * EPS)
        moved = torch.stack([(alone.U * sure)[b % 3].roll(b, 0) for b in range(count)])
        close(found.U * sure[kinds], moved, 200 * EPS)
        assert found.info.finite.all()


@pytest.mark.parametrize(("n", "d"), [(50, 192), (197, 192), (197, 768), (577, 384), (577, 1024)])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_full_svd(n, d, method):
    """Through U, S and V, where the sketch leaves out nothing that float32 sees."""
    s = values("fast", min(n, d)).square() + 1e-7 * values("1/i", min(n, d))
    made = planted(n, d, s)[0][None]  # the tail is below what float32 sees, and has no equal values, for torch's gradient
    weight, other = noise(n, d, seed=3), noise(4, seed=4)

    def loss(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """Without a sign: projections from both sides, the truncated matrix, and the values."""
        parts = (u @ (u.mT @ x.double()), (x.double() @ v) @ v.mT, (u * s[:, None]) @ v.mT)
        return sum((part * weight).sum() for part in parts) + (s * other).sum()

    exact = made.clone().requires_grad_()
    u, t, vh = torch.linalg.svd(exact, full_matrices=False)
    loss(exact, u[..., :4], t[:, :4], vh.mT[..., :4]).backward()
    x = made.float().requires_grad_()
    found = leading_subspace(x, 4, method=method, gradient="through")
    loss(x, found.U.double(), found.S.double(), found.V.double()).backward()
    assert (x.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()  # measured: 2e-6


# --- degenerate input -------------------------------------------------------------------------------------------------

KINDS = ("sound", "zero", "constant", "rank 3", "pairs", "nan", "huge", "tiny", "inf")
RANK_OF = {"zero": 0, "constant": 1, "rank 3": 3, "nan": 0, "inf": 0}


def troubled(n: int, d: int) -> tuple[Tensor, Tensor]:
    """A batch of KINDS (9, n, d) in float32, and the 9 leading singular values (9, 9) of each in float64."""
    sound = values("fast", 24).square()
    pairs = sound[::2].repeat_interleave(2)
    spectra = {"rank 3": sound[:3], "pairs": pairs, "zero": 0 * sound, "huge": 1e18 * sound, "tiny": 1e-18 * sound}
    x = torch.stack([planted(n, d, spectra.get(kind, sound))[0] for kind in KINDS])
    s = torch.stack([torch.nn.functional.pad(spectra.get(kind, sound)[:9], (0, 9))[:9] for kind in KINDS])
    constant = KINDS.index("constant")
    x[constant], s[constant], s[constant, 0] = 3.0, 0.0, 3.0 * (n * d) ** 0.5
    for kind, value in (("nan", float("nan")), ("inf", float("inf"))):
        x[KINDS.index(kind), n // 2, d // 3], s[KINDS.index(kind)] = value, 0.0
    return x.float(), s


@pytest.mark.parametrize(("n", "d", "method"), BY_METHOD)
def test_degenerate_samples_in_one_batch(n, d, method):
    x, s = troubled(n, d)
    found = leading_subspace(x, 8, method=method)
    for i, kind in enumerate(KINDS):
        rank = RANK_OF.get(kind, 8)
        assert found.info.finite[i] == (kind not in ("nan", "inf")), kind
        assert found.info.rank[i] == rank, kind
        orthonormal(found.U[i : i + 1], rank)
        orthonormal(found.V[i : i + 1], rank)
        close(found.S[i] / s[i, 0].clamp_min(1e-30), s[i, :8] / s[i, 0].clamp_min(1e-30))
    sound, huge, tiny = (KINDS.index(kind) for kind in ("sound", "huge", "tiny"))
    alone = leading_subspace(x[sound][None], 8, method=method)
    u, v = rotation(n)[:, :8], rotation(d, 1)[:, :8]
    for i in (sound, huge, tiny):
        assert sine(found.U[i], u) < rounding(s, 8)[sound]
        assert sine(found.V[i], v) < rounding(s, 8)[sound]
    close(found.U[sound], alone.U[0], 200 * EPS)  # whatever its mates are
    pairs = KINDS.index("pairs")  # within a pair vectors are free, the space of four pairs is not
    assert sine(found.U[pairs], u) < rounding(s, 8)[pairs]
    assert found.info.gap[pairs, 0::2].abs().max() < 16 * EPS


@pytest.mark.parametrize(("n", "d", "rank"), [(5, 768, 8), (1, 1024, 16), (197, 4, 8), (50, 768, 60), (1025, 12, 16)])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_more_vectors_asked_for_than_there_are(n, d, rank, method):
    count = min(n, d)
    x, u, v = planted(n, d, values("1/i", count))
    found = leading_subspace(x[None].float(), rank, method=method)
    assert found.info.rank.tolist() == [count]
    orthonormal(found.U, count)
    orthonormal(found.V, count)
    close(found.S[0, :count] / values("1/i", count), torch.ones(count), 16 * EPS)
    assert found.S[0, count:].eq(0).all()
    assert sine(found.U[..., :count], u) < 32 * EPS
    assert sine(found.V[..., :count], v) < 32 * EPS
