"""Singular values and vectors of batches of token matrices: the one home of every decomposition.

Letters: B batch, N tokens, D width, R rank asked for, k = R + oversample (width of the sketch), m = min(N, D).

`leading_subspace` finds the leading R singular triples of every x (N, D). Two routes lead to a small symmetric problem:

    exact                    the Gram matrix of the smaller side, m x m
    cholesky_qr, products    Y = X Omega; `power` times Y <- (X X^T - a I) Y; then Rayleigh-Ritz on span(Y), k x k
                             (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1; shifts a as in Feng,
                             Yu, Xie, Tang 2024, arXiv 2404.09276: from the second step on, half the least |X^T y|^2)

No tall matrix meets a Householder QR or an SVD. Only span(Y) matters for the outcome, so after each step Y is conditioned
by a k x k factor of its Gram matrix; once that is done its rows are graded, and the two products of a step lose little.
All k x k and m x m algebra is float64, where squaring the condition number does float32 data no harm: one shifted Cholesky
factor, which cannot fail, replaces a ladder of retries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vitreous.base.errors import SettingError, UnknownName
from vitreous.layers.signs import signs

METHODS = ("auto", "exact", "cholesky_qr", "gram_schmidt")
GRADIENTS = ("detach", "through")
SEED = 20110909  # of the fixed sketch
CLOSE = 1e-3  # relative gap of squared singular values below which gradients are damped
SQUARINGS = 12  # the product-only eigensolver works with the 2^12-th power
NOISE = 2e-6  # singular values below this share of s_1 are rounding: of float32 data, or of a float64 Gram matrix
TINY = 1e-62  # squared norms below this are zero: keeps 1 / norm within float32


@dataclass(frozen=True)
class SubspaceInfo:
    """How far a `Subspace` can be trusted, per sample.

    gap (B, R): (s_i - s_{i+1}) / s_i, in [0, 1]; 0 where s_i = 0. s_{R+1} comes from the oversampled block; without
        oversampling, from its upper bound sqrt(|X|_F^2 - sum s_i^2), so that the last gap is a lower bound.
    residual (B,): |(U - P U) S|_F / |S|_2, in [0, 1], P the projector on the column space before the last power step: the
        share of U S V^T that it still moved. |X V - U S|_F <= |X|_2^2 residual |S|_2 / s_R^2. 0 for "exact", 1 for power 0.
    finite (B,) bool: False where x, or the sketch, holds NaN or Inf, or numbers so large that products overflow.
    rank (B,) int64: how many singular values, of R, are above NOISE s_1.
    sign_confidence (B, R): |cosine| of u_i with the reference, or what stands in for it (`signs`); 0 where s_i = 0.
    """

    gap: Tensor
    residual: Tensor
    finite: Tensor
    rank: Tensor
    sign_confidence: Tensor


@dataclass(frozen=True)
class Subspace:
    """Leading singular triples U (B, N, R), S (B, R) descending, V (B, D, R); zero columns beyond the true rank.

    info: how far they can be trusted; computed whenever it is asked for, so that who wants triples alone does not pay.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    _told: Callable[[], SubspaceInfo] = field(repr=False)

    @property
    def info(self) -> SubspaceInfo:
        with torch.autocast(self.U.device.type, enabled=False), torch.no_grad():
            return self._told()


def leading_subspace(
    x: Tensor,
    rank: int,
    *,
    method: str = "auto",
    oversample: int = 8,
    power: int = 2,
    sketch: Tensor | None = None,
    sign: Tensor | None = None,
    gradient: str = "detach",
) -> Subspace:
    """The leading `rank` singular triples of every matrix in x (B, N, D): x V = U S, x^T U = V S.

    Computes and answers in float32 (float64 for float64 input) under any autocast. A sample's result does not depend on
    its batch mates. NaN, Inf: zeros and finite = False for that sample. Zero, constant or rank-deficient x, and rank >
    min(N, D): orthonormal columns up to the true rank, zero columns with s = 0 beyond it.

    method: "exact", to the rounding of x; "cholesky_qr", in 2 power + 2 products with x; "gram_schmidt", the same from
        matrix products and comparisons only, for torch.export and ONNX (singular values closer than 1e-4 relative may
        share their vectors); "auto": gram_schmidt while exporting, exact where a sketch would leave nothing out, else
        cholesky_qr.
    oversample, power: extra sketch columns and power steps; "exact" needs neither, nor a sketch. From the second step on
        they are shifted, which halves the error on slowly falling spectra, unless gradient="through" or without extra columns.
        After one step vectors far below s_1 are less exact than float32 allows: below 1e-3 s_1, by 1e-3 in the worst trial.
    sketch: (D, k) or (B, D, k), k >= min(rank, N, D); None is a fixed Gaussian, the same on every device, that leaves
        the global random state alone. It sits on the feature side: permuted tokens permute U and keep V.
    sign: a number per token, (N,) or (B, N), with which every u_i shall correlate; None uses their sum (`signs`).
    gradient: "detach" (none), or "through": that of the computation itself, to x and to the sketch, damped where
        singular values meet. The more power steps, the less the sketch matters: train it with power 0 or 1.
    Raises SettingError or UnknownName for settings and shapes that do not fit.
    """
    _validate(x, rank, method, oversample, power, sketch, sign, gradient)
    n, d = x.shape[1:]
    k = min(rank + oversample, n, d) if sketch is None else sketch.shape[-1]
    if method == "auto":
        exporting = torch.compiler.is_exporting()
        method = "gram_schmidt" if exporting else "exact" if sketch is None and k == min(n, d) else "cholesky_qr"
    through = gradient == "through" and torch.is_grad_enabled()
    with torch.autocast(x.device.type, enabled=False), torch.set_grad_enabled(through):
        x, omega = _at_least_float32(x), None
        if method != "exact":
            omega = _fixed_sketch(d, k, x) if sketch is None else sketch.to(x)
        if through:  # masking the outcome stops no NaN backwards
            sound = _finite(x) if omega is None else _finite(x) & _finite(omega)
            x, omega = _zero_unless(sound, x), omega if omega is None else _zero_unless(sound, omega.expand(x.shape[0], d, k))
        if omega is None:
            u, s, v, before, finite = _by_gram(x, rank)
        else:
            products, shifted = method == "gram_schmidt", gradient == "detach" and k > rank  # at k = rank it may take from s_R
            u, s, v, before, finite = _by_range(x, rank, omega, power, products=products, shifted=shifted)
        finite = finite & sound if through else finite
        u, v = _zero_unless(finite, u), _zero_unless(finite, v)  # s is zero there
        with torch.no_grad():
            factor, confidence = signs(u, sign)
            beyond = _beyond(s, x) if s.shape[1] <= rank and s.shape[1] < min(n, d) else None
        u, v = u * factor[:, None], v * factor[:, None]

    def told() -> SubspaceInfo:
        residual = torch.zeros_like(s[:, 0]) if before is None else _zero_unless(finite, _residual(u.mT, s, before))
        values = _padded(s if beyond is None else torch.cat([s, beyond], dim=1), rank + 1)
        return SubspaceInfo(_gaps(values, rank), residual, finite, (s[:, :rank] > 0).sum(1), _padded(confidence, rank))

    return Subspace(_padded(u, rank), _padded(s[:, :rank], rank), _padded(v, rank), told)


def unit_rows(x: Tensor) -> Tensor:
    """Tokens x (B, N, D) to unit length, then minus their mean over the tokens; zero tokens stay zero before the mean.

    Takes the high-norm artifact tokens of late blocks out of the leading vectors. Float32, or float64 for float64.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = torch.nn.functional.normalize(_at_least_float32(x), dim=-1)
        return x - x.mean(dim=-2, keepdim=True)


def product_svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of a^T b from its factors a, b (..., K, D), K <= D: U (..., D, K), S (..., K), V (..., D, K).

    Use: the exact spectrum of a head's bilinear form W_Q^T W_K. Two QRs of weights and one K x K SVD instead of a D x D
    one. In float64; answers in float32, or float64 for float64.
    """
    dtype = _at_least_float32(a).dtype
    qa, ra = torch.linalg.qr(a.double().mT)
    qb, rb = torch.linalg.qr(b.double().mT)
    u, s, vh = torch.linalg.svd(ra @ rb.mT)
    return (qa @ u).to(dtype), s.to(dtype), (qb @ vh.mT).to(dtype)


def product_singular_values(a: Tensor, b: Tensor, *, exact: bool = True) -> Tensor:
    """Singular values of a b^T from its factors a (..., N, K), b (..., M, K), descending: (..., min(N, M, K)).

    Use: spectra of scores Q K^T without the N x M matrix, and of a head's bilinear form. The triangular factors of two QRs
    and one SVD of at most K x K; a factor with fewer rows than columns needs no QR. `exact=False` takes eigenvalues of
    R_b a^T a R_b^T instead, in two thirds of the time: values below 1e-8 of the largest are rounding.
    In float64; answers in float32, or float64 for float64. NaN where a factor is not finite.
    """
    rb = _triangle(b.double())
    core = _triangle(a.double()) @ rb.mT if exact else rb @ _gram(a.mT) @ rb.mT
    finite = core.isfinite().all(dim=(-2, -1), keepdim=True)
    core = torch.where(finite, core, 0.0)
    s = torch.linalg.svdvals(core) if exact else torch.linalg.eigvalsh(core).flip(-1).clamp_min(0.0).sqrt()
    s = s[..., : min(a.shape[-2], b.shape[-2], a.shape[-1])]
    return torch.where(finite[..., 0], s, torch.nan).to(_at_least_float32(a).dtype)


def _triangle(x: Tensor) -> Tensor:
    """R of x = Q R if x is tall, else x itself: the fewest rows with the same Gram matrix x^T x."""
    return torch.linalg.qr(x, mode="r").R if x.shape[-2] > x.shape[-1] else x


def singular_values(x: Tensor) -> Tensor:
    """All singular values of x (..., N, D), descending, (..., min(N, D)); NaN for a matrix that is not finite.

    Use: spectra of attention maps and weights, where every value counts. In float64; answers in float32, or float64.
    """
    finite = x.isfinite().flatten(-2).all(-1)[..., None]
    s = torch.linalg.svdvals(torch.where(finite[..., None], x, 0.0).double())
    return torch.where(finite, s, torch.nan).to(_at_least_float32(x).dtype)


# The two routes. Each answers U (B, N, r), S (B, K) with all values it has, V (B, D, r), what `_residual` needs, and finite
# (B,); r <= rank, K. A sample that is not finite leaves garbage in U and V and zeros in S.


def _by_gram(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
    """Exact triples from the Gram matrix of the smaller side."""
    tall = x.shape[1] > x.shape[2]
    wide = (x.mT if tall else x).double()  # (B, m, M)
    gram = torch.bmm(wide, wide.mT)
    finite = _finite(gram.to(x.dtype))
    s, short, inverse = _roots(*_eigen(_zero_unless(finite, gram), None), rank)
    long = wide.mT @ (short * inverse)
    u, v = (long, short) if tall else (short, long)
    return u.to(x.dtype), s.to(x.dtype), v.to(x.dtype), None, finite


def _by_range(
    x: Tensor, rank: int, omega: Tensor, power: int, *, products: bool, shifted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Triples of the range that omega (D, k) or (B, D, k) leads to: Rayleigh-Ritz on span((X X^T)^power X omega).

    Vectors lie in rows here, y (B, k, N) and b (B, k, D): a product of few rows with x reads x as it lies in memory.
    """
    y = _orthonormal(torch.bmm(x, omega.expand(x.shape[0], -1, -1)).mT, products)
    before = torch.zeros_like(y)
    for step in range(power):
        before, b = y, torch.bmm(y, x)  # (B, k, D)
        lengths = torch.linalg.vector_norm(b.detach(), dim=2, keepdim=True).clamp_min(TINY**0.5)
        y = torch.bmm(x, (b / lengths).mT).mT  # rows of length 1 neither overflow nor underflow
        if shifted and step:  # the least |X^T y|^2 is about s_k^2: take half of it off the spectrum of X X^T
            least = lengths.amin(1, keepdim=True)
            y = torch.addcmul(y, least * (least / lengths), before, value=-0.5)
        y = _orthonormal(y, products)
    b = torch.bmm(y, x)
    inner = _gram(b)
    finite, k = _finite(inner), y.shape[1]
    count = k if torch.is_grad_enabled() else min(rank + 1, k)  # the backward pass needs all vectors
    values, vectors = _eigen(_zero_unless(finite, inner), count if products else None)
    s, c, inverse = _roots(values, vectors, rank)
    u, v = torch.bmm(c.mT.to(x.dtype), y), torch.bmm((c * inverse).mT.to(x.dtype), b)  # (B, r, N), (B, r, D)
    return u.mT, s.to(x.dtype), v.mT, before, finite


def _residual(u: Tensor, s: Tensor, before: Tensor) -> Tensor:
    """|(U - P U) S| / |S| (B,) of u (B, r, N) and s (B, K), P the projector on the rows of before (B, k, N), orthonormal."""
    s = s[:, : u.shape[1]]
    moved = torch.linalg.vector_norm(u - torch.bmm(torch.bmm(u, before.mT), before), dim=2)  # (B, r)
    return torch.linalg.vector_norm(moved * s, dim=1) / torch.linalg.vector_norm(s, dim=1).clamp_min(TINY**0.5)


def _orthonormal(y: Tensor, products: bool) -> Tensor:
    """y (B, k, N), its rows made orthonormal to the rounding of its dtype, dependent ones zero.

    The outcome depends on the span of y alone, so the whitener is a constant to the gradient, and gradients within the span,
    which are zero but for rounding, are taken out before the whitener magnifies them.
    """
    wide = y.double()
    q = torch.bmm(_whitener(wide.detach(), products), wide)
    if q.requires_grad:
        within = torch.bmm(q, q.detach().mT)
        q = q - torch.bmm(within - within.detach(), q.detach())
    return q.to(y.dtype)


@torch.no_grad()
def _whitener(y: Tensor, products: bool) -> Tensor:
    """T (B, k, k) with T y orthonormal, of y float64; zero rows where rows of y (B, k, N) depend on earlier ones.

    The shift exceeds the rounding of the factorisation, so that no pivot is negative (shifted Cholesky-QR: Fukaya et al.
    2020, arXiv 1809.11085); each row has its own, a share of its square, so that short rows are none the less exact. A pivot
    near the shift is noise.
    """
    k = y.shape[1]
    eye = torch.eye(k, dtype=y.dtype, device=y.device)
    gram = torch.baddbmm(TINY * eye, y, y.mT)
    shift = gram.diagonal(dim1=1, dim2=2) * (4 * k * k * torch.finfo(y.dtype).eps)  # (B, k)
    gram = torch.addcmul(gram, shift[:, None], eye)
    if products:
        inverse, pivots = _eliminated(gram)
    else:
        factor = torch.linalg.cholesky_ex(gram).L
        inverse, pivots = torch.linalg.solve_triangular(factor, eye, upper=False), factor.diagonal(dim1=1, dim2=2).square()
    return inverse * (pivots > 4 * shift)[:, :, None]


def _eliminated(gram: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 (B, k, k) and the pivots (B, k) of gram = L L^T: eliminating [G | I] leaves the coefficients of Gram-Schmidt.

    Pursell, Trimble 1991, Gram-Schmidt orthogonalization by Gauss elimination, American Mathematical Monthly 98(6).
    """
    k = gram.shape[-1]
    eye = torch.eye(k, dtype=gram.dtype, device=gram.device)
    below = torch.ones_like(eye).tril(-1)
    work = torch.cat([gram, eye.expand_as(gram)], dim=-1)  # (B, k, 2k)
    for j in range(k):
        row = work[:, j : j + 1]
        work = work - work[:, :, j : j + 1] / row[:, :, j : j + 1] * below[:, j : j + 1] * row
    pivots = (work[:, :, :k] * eye).sum(-1)
    return work[:, :, k:] / pivots[:, :, None].sqrt(), pivots


def _eigen(a: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues l (B, K) descending and vectors W (B, k, K) of Gram matrices a (B, k, k), float64.

    count = None: all, by eigh; a number: so many, by matrix products.
    """
    if a.requires_grad:
        return _Eigen.apply(a, count)
    if count is None:
        values, vectors = torch.linalg.eigh(-a)
        values = -values
    else:
        values, vectors = _leading_by_squaring(a, count)
    return values.clamp_min(0.0), vectors


class _Eigen(torch.autograd.Function):
    """`_eigen` with a backward pass that is exact if K = k and the values are apart.

    1 / g, g = l_j - l_i, becomes g / e^2 where |g| < e = CLOSE (l_i + l_j), and stays finite when they meet.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        return _eigen(a.detach(), count)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, int | None], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx, grad_values: Tensor, grad_vectors: Tensor) -> tuple[Tensor, None]:
        values, vectors = ctx.saved_tensors
        row, column = values[:, :, None], values[:, None, :]
        gap = column - row
        square = torch.maximum(gap.abs(), CLOSE * (column + row)).square()
        inverse = torch.where(square > 0, gap / torch.where(square > 0, square, 1.0), 0.0)
        inner = vectors.mT @ grad_vectors * inverse + torch.diag_embed(grad_values)
        grad = vectors @ inner @ vectors.mT
        return (grad + grad.mT) / 2, None


def _leading_by_squaring(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading `count` eigenpairs of a positive semidefinite a (B, k, k) from matrix products, with deflation.

    a^(2^SQUARINGS) is all but a projector on the leading eigenvector, along which its column of largest diagonal lies.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    rest, found = a, a[:, :, :0]
    for _ in range(count):
        p = rest
        for step in range(SQUARINGS):
            if step % 3 == 0:  # meanwhile the norm falls by a factor of k^3.5 at most
                p = p / p.square().sum((1, 2), keepdim=True).sqrt().clamp_min(TINY)
            p = p @ p
        vector = p @ eye[(p * eye).sum(-1).argmax(-1)][:, :, None]
        for _ in range(2):
            vector = vector / vector.square().sum(1, keepdim=True).sqrt().clamp_min(TINY)
            vector = vector - found @ (found.mT @ vector)
        length = vector.square().sum(1, keepdim=True).sqrt()
        vector = torch.where(length > 0.5, vector / length.clamp_min(0.5), 0.0)  # else a is exhausted
        found = torch.cat([found, vector], dim=-1)
        away = eye - vector @ vector.mT
        rest = away @ rest @ away
    values, order = (found * (a @ found)).sum(1).sort(descending=True)
    return values, found.gather(2, order[:, None].expand_as(found))


def _roots(values: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """s = sqrt(values) (B, K), the leading vectors (B, k, r) and 1 / s (B, 1, r); zero, also backwards, in noise."""
    floor = NOISE**2 * values[:, :1].detach() + TINY
    live = (values > floor).to(values)
    safe = torch.maximum(values, floor).sqrt()
    return safe * live, vectors[:, :, :rank] * live[:, None, :rank], (live / safe)[:, None, :rank]


def _beyond(s: Tensor, x: Tensor) -> Tensor:
    """A bound (B, 1) on the next singular value of x after those in s (B, K): what is left of |x|_F^2."""
    left = (x.square().sum((1, 2)) - s.square().sum(1)).clamp_min(0.0).sqrt()
    return torch.minimum(left, s[:, -1])[:, None]


def _gaps(s: Tensor, rank: int) -> Tensor:
    """Relative gaps (B, rank) of descending values s (B, rank + 1)."""
    left, right = s[:, :rank], s[:, 1 : rank + 1]
    return (left - right).clamp_min(0.0) / left.clamp_min(TINY**0.5)


def _padded(t: Tensor, width: int) -> Tensor:
    """t with zeros appended to its last dimension up to `width`."""
    return t if t.shape[-1] >= width else torch.nn.functional.pad(t, (0, max(width - t.shape[-1], 0)))


def _zero_unless(finite: Tensor, t: Tensor) -> Tensor:
    """t (B, ...), zero in the samples where finite (B,) is False."""
    return torch.where(finite.view(-1, *[1] * (t.ndim - 1)), t, 0.0)


def _finite(t: Tensor) -> Tensor:
    """(B,) bool: no NaN or Inf in t (B, ...); (1,) for a sketch (D, k) of all samples."""
    t = t.detach()
    return torch.linalg.vector_norm(t if t.ndim == 3 else t[None], ord=torch.inf, dim=(1, 2)) < torch.inf


def _gram(y: Tensor) -> Tensor:
    """Inner products of the rows of y (..., k, N) in float64: (..., k, k)."""
    y = y.double()
    return y @ y.mT


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.lru_cache(maxsize=64)
def _gaussian(d: int, k: int) -> np.ndarray:
    return np.random.default_rng(SEED).standard_normal((d, k))


@torch.compiler.assume_constant_result
def _constant_sketch(d: int, k: int) -> Tensor:
    """The default sketch (d, k), on the CPU. The cache holds numpy's array: a tensor made while tracing is a fake."""
    return torch.tensor(_gaussian(d, k))


@functools.lru_cache(maxsize=64)
def _kept_sketch(d: int, k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(_gaussian(d, k), device=device, dtype=dtype)


def _fixed_sketch(d: int, k: int, x: Tensor) -> Tensor:
    """The default sketch (d, k) in x's dtype and on its device, where it stays between calls."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):  # a fake x would leave a fake in the cache
        return _constant_sketch(d, k).to(x)
    return _kept_sketch(d, k, x.device, x.dtype)


def _fits(shape: torch.Size, b: int, n: int) -> bool:
    """True for (n,) and (b, n). Lengths first: comparing b with n would bind an exported model to b != n."""
    return len(shape) in (1, 2) and shape[-1] == n and (len(shape) == 1 or shape[0] == b)


def _validate(x, rank, method, oversample, power, sketch, sign, gradient) -> None:
    """Refuse what does not fit, in three parts."""
    if method not in METHODS:
        raise UnknownName(method, "method of leading_subspace", METHODS)
    if gradient not in GRADIENTS:
        raise UnknownName(gradient, "gradient of leading_subspace", GRADIENTS)
    b, n, d = x.shape if x.ndim == 3 else (0, 0, 0)
    least = min(rank, n, d)
    if n * d == 0 or not x.is_floating_point():
        found, expected = f"{x.dtype} of shape {tuple(x.shape)}", "floating point (B, N, D), N and D from 1"
        advice = "Give a single matrix as x[None]."
    elif rank < 1 or oversample < 0 or power < 0:
        found, expected = f"rank={rank}, oversample={oversample}, power={power}", "rank from 1, the others from 0"
        advice = "Raise the number."
    elif sketch is not None and not (_fits(sketch.shape[:-1], b, d) and sketch.shape[-1] >= least):
        found, expected = f"a sketch {tuple(sketch.shape)}", f"({d}, k) or ({b}, {d}, k), k from {least}"
        advice = "Match it to the width of the tokens and the rank."
    elif sign is not None and not _fits(sign.shape, b, n):
        found, expected = f"a sign reference {tuple(sign.shape)}", f"({n},) or ({b}, {n}), a number per token"
        advice = "Add or drop the entries of prefix tokens."
    else:
        return
    raise SettingError(f"leading_subspace found {found}. Expected {expected}. {advice}")
