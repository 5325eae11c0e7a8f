import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lens import whole_maps
from vitreous.lens.formulas import indicators as lens

EPS = 1e-8
N = 7


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found, expected, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


# -- against the published formulas as plain loops -----------------------------------------------------------------


def test_spectrum_equals_loops():
    sigma = random(3, 2, 9)
    sigma[0, 0, :4] *= 1e-4
    for layer in range(3):
        for head in range(2):
            values = sigma[layer, head].tolist()
            total = sum(v * v for v in values) + EPS
            entropy = -sum(v * v / total * math.log(v * v / total + EPS) for v in values)
            sizes = [abs(v) / sum(map(abs, values)) for v in values]
            close(lens.spectral_entropy(sigma)[layer, head], entropy)
            close(lens.effective_rank(sigma)[layer, head], math.exp(entropy))
            close(lens.effective_rank_l1(sigma)[layer, head], math.exp(-sum(p * math.log(p) for p in sizes)))
            close(lens.spectral_sparsity(sigma)[layer, head], sum(abs(v) < 1e-3 for v in values) / 9)
            top = max(map(abs, values))
            close(lens.relative_sparsity(sigma, 0.5)[layer, head], sum(abs(v) <= 0.5 * top for v in values) / 9)


def test_attention_equals_loops():
    q, k = random(2, 3, N, 4, seed=1), random(2, 3, N, 4, seed=2)
    a = (q @ k.mT).softmax(dim=-1)
    b = (1.1 * q @ k.mT).softmax(dim=-1)
    for image in range(2):
        total = 0.0
        for head in range(3):
            at = image, head
            cosine, gini, tokens, entropy, change, size = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for i in range(N):
                qi, ki = q[at][i].tolist(), k[at][i].tolist()
                dot = sum(x * y for x, y in zip(qi, ki, strict=True))
                cosine += dot / math.hypot(*qi) / math.hypot(*ki) / N
                row, other = a[at][i].tolist(), b[at][i].tolist()
                squares = sum(x * x for x in row)
                gini += (1 - squares / (sum(row) ** 2 + EPS)) / N
                tokens += 1 / squares / N
                entropy -= sum(x * math.log(x) for x in row) / N
                change += sum((x - y) ** 2 for x, y in zip(row, other, strict=True))
                size += squares
            total += change
            close(lens.angular_alignment(q, k)[at], cosine)
            close(whole_maps.selectivity(a)[at], gini)
            close(whole_maps.effective_tokens(a)[at], tokens)
            close(whole_maps.attention_entropy(a)[at], entropy)
            close(whole_maps.relative_change(a, b)[at], math.sqrt(change / size))
        close(whole_maps.perturbation_robustness(a, b)[image], math.sqrt(total) / (3 * N * N))


def test_reach_redundancy_and_collapse_equal_loops():
    a = random(2, 3, N, N + 2).softmax(dim=-1)
    queries, keys = 10 * random(N, 2, seed=1), 10 * random(N + 2, 2, seed=2)
    queries[0], keys[1], keys[4, 0] = torch.nan, torch.nan, torch.nan  # no place
    far = whole_maps.distances(queries, keys)
    there = [j for j in range(N + 2) if j not in (1, 4)]
    for image in range(2):
        maps = [a[image, head].flatten().tolist() for head in range(3)]
        for head in range(3):
            steps, squares = [], []
            for i in range(1, N):
                row = a[image, head, i].tolist()
                mass = sum(row[j] for j in there)
                offsets = {j: math.dist(queries[i].tolist(), keys[j].tolist()) for j in there}
                steps.append(sum(row[j] * offsets[j] for j in there) / mass)
                squares.append(sum(row[j] * offsets[j] ** 2 for j in there) / mass)
            close(whole_maps.mean_distance(a, far)[image, head], sum(steps) / (N - 1))
            close(whole_maps.attention_width(a, far)[image, head], math.sqrt(sum(squares) / (N - 1) / 2))
            cosines = [
                sum(x * y for x, y in zip(maps[head], other, strict=True)) / math.hypot(*maps[head]) / math.hypot(*other)
                for at, other in enumerate(maps)
                if at != head
            ]
            close(lens.head_redundancy(whole_maps.head_gram(a))[image, head], sum(cosines) / 2)
    tokens = random(2, N, 4) + 1
    for image in range(2):
        columns = [tokens[image, :, d].tolist() for d in range(4)]
        rest = sum((x - sum(column) / N) ** 2 for column in columns for x in column)
        close(lens.rank_collapse(tokens)[image], math.sqrt(rest / sum(x * x for column in columns for x in column)))


# -- closed forms --------------------------------------------------------------------------------------------------


def test_flat_spectrum_fills_every_axis():
    for scale in (1.0, -3.0):
        sigma = torch.full((2, 64), scale, dtype=torch.float64)
        close(lens.spectral_entropy(sigma, eps=0), math.log(64))
        close(lens.effective_rank(sigma, eps=0), 64.0)
        close(lens.effective_rank_l1(sigma), 64.0)
        close(lens.spectral_entropy(sigma), math.log(64), atol=1e-6)  # the paper's: log K - K eps
        assert lens.spectral_sparsity(sigma).sum() == lens.relative_sparsity(sigma).sum() == 0


@pytest.mark.parametrize("rank", [1, 3, 64])
def test_planted_low_rank_spectrum(rank):
    sigma = torch.zeros(64, dtype=torch.float64)
    sigma[:rank] = 2.0
    close(lens.effective_rank(sigma, eps=0), rank)
    close(lens.effective_rank_l1(sigma), rank)
    close(lens.effective_rank(sigma), rank, atol=1e-4)
    close(lens.spectral_sparsity(sigma), 1 - rank / 64)
    close(lens.relative_sparsity(sigma), 1 - rank / 64)


def test_uniform_attention():
    a = torch.full((2, 3, N, N), 1 / N, dtype=torch.float64)
    close(whole_maps.selectivity(a), 1 - 1 / N / (1 + EPS))
    close(whole_maps.effective_tokens(a), N)
    close(whole_maps.attention_entropy(a), math.log(N))


@pytest.mark.parametrize("target", [torch.arange(N), torch.full((N,), 2)], ids=["identity", "one token for all"])
def test_one_hot_attention(target):
    a = F.one_hot(target, N).double().expand(2, 3, N, N)
    close(whole_maps.selectivity(a), 1 - 1 / (1 + EPS))
    close(whole_maps.effective_tokens(a), 1.0)
    close(whole_maps.attention_entropy(a), 0.0)


def test_two_attentions():
    eye = torch.eye(N, dtype=torch.float64).expand(2, 3, N, N)
    cyclic = eye.roll(1, dims=-1)  # every row moves its weight of one: |dA|_F^2 = 2 N, |A|_F^2 = N per head
    close(whole_maps.relative_change(eye, cyclic), math.sqrt(2))
    close(whole_maps.perturbation_robustness(eye, cyclic), math.sqrt(2 * 3 * N) / (3 * N * N))
    assert (
        whole_maps.relative_change(eye, eye).count_nonzero()
        == whole_maps.perturbation_robustness(eye, eye).count_nonzero()
        == 0
    )


def test_alignment_of_equal_opposite_and_orthogonal_rows():
    q = random(2, 3, N, 4)
    close(lens.angular_alignment(q, 5 * q), 1.0)
    close(lens.angular_alignment(q, -q), -1.0)
    turned = torch.stack([-q[..., 1], q[..., 0], -q[..., 3], q[..., 2]], dim=-1)
    close(lens.angular_alignment(q, turned), 0.0)


def test_a_gaussian_head_returns_its_width():
    """Weights exp(-d^2 / (2 s^2)) from the middle of a grid of pitch 16 that is large against s."""
    axis = torch.arange(-30, 31, dtype=torch.float64) * 16
    far = whole_maps.distances(torch.zeros(1, 2), torch.cartesian_prod(axis, axis))
    for width in (16.0, 40.0, 90.0):
        a = (-far.square() / (2 * width**2)).softmax(dim=-1)[None, None]
        close(whole_maps.attention_width(a, far), width, atol=1e-3 * width)
        close(whole_maps.mean_distance(a, far), width * math.sqrt(math.pi / 2), atol=0.05 * width)  # 4 % at one pitch


def test_distance_of_uniform_and_identity():
    places = torch.stack([torch.zeros(N), 16 * torch.arange(N)], dim=-1).double()
    far = whole_maps.distances(places, places)
    close(whole_maps.mean_distance(torch.full((1, 1, N, N), 1 / N).double(), far), 16 * (N**2 - 1) / (3 * N))
    eye = torch.eye(N, dtype=torch.float64)[None, None]
    assert whole_maps.mean_distance(eye, far).item() == whole_maps.attention_width(eye, far).item() == 0
    assert whole_maps.mean_distance(eye, torch.full((N, N), torch.nan)).isnan().all()


def test_redundancy_of_equal_disjoint_and_single_heads():
    eye = torch.eye(N, dtype=torch.float64)
    close(lens.head_redundancy(whole_maps.head_gram(eye.expand(1, 4, N, N))), 1.0)
    close(lens.head_redundancy(whole_maps.head_gram(torch.stack([eye, eye.roll(1, 0), eye.roll(2, 0)])[None])), 0.0)
    assert lens.head_redundancy(whole_maps.head_gram(eye[None, None])).isnan().all()
    a = random(1, 3, 9, 5).softmax(dim=-1)
    close(whole_maps.head_gram(a[:, :, :4]) + whole_maps.head_gram(a[:, :, 4:]), whole_maps.head_gram(a))


def test_collapse_of_equal_and_of_opposite_tokens():
    close(lens.rank_collapse(torch.ones(2, N, 4)), 0.0)
    close(lens.rank_collapse(torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])), 1.0, atol=1e-6)


# -- the conventions at zero ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [lens.PAPER_EPS, 0.0])
def test_spectrum_of_zeros(eps):
    zeros = torch.zeros(2, 8)
    assert lens.spectral_entropy(zeros, eps=eps).tolist() == [0.0, 0.0]
    assert lens.effective_rank(zeros, eps=eps).tolist() == lens.effective_rank_l1(zeros).tolist() == [1.0, 1.0]
    assert lens.spectral_sparsity(zeros).tolist() == lens.relative_sparsity(zeros).tolist() == [1.0, 1.0]


def test_paper_entropy_depends_on_the_scale_of_small_spectra_and_the_exact_one_does_not():
    sigma = random(64)
    close(lens.spectral_entropy(1e-6 * sigma, eps=0), lens.spectral_entropy(sigma, eps=0))
    close(lens.relative_sparsity(1e-6 * sigma), lens.relative_sparsity(sigma))
    assert lens.spectral_entropy(1e-6 * sigma) < 0.1 < 3 < lens.spectral_entropy(sigma)
    assert lens.spectral_sparsity(1e-6 * sigma) == 1


def test_single_token_and_rows_of_zeros():
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    close(whole_maps.selectivity(one), EPS, atol=1e-15)
    close(whole_maps.effective_tokens(one), 1.0)
    close(whole_maps.attention_entropy(one), 0.0)
    close(lens.angular_alignment(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)), 0.0)


def test_half_precision_is_computed_in_float32():
    tiny = torch.full((1, 1, 2, 4), 1e-6, dtype=torch.float16)
    close(lens.angular_alignment(tiny, tiny), 1.0, atol=1e-6)  # |q|^2 underflows in float16
    sigma = torch.full((64,), 100.0, dtype=torch.float16)  # sum of squares overflows in float16
    assert lens.effective_rank(sigma).dtype == torch.float32
    close(lens.effective_rank(sigma), 64.0, atol=1e-3)


# -- what the paper starts from, and ranges ------------------------------------------------------------------------


def test_start_of_the_paper():
    """sigma ~ N(1, 0.1^2), width 64: entropy 4.1395 and effective rank 62.77, within three standard errors."""
    starts = torch.stack([1 + 0.1 * random(64, seed=seed) for seed in range(200)])
    for values, expected in ((lens.spectral_entropy(starts), 4.1395), (lens.effective_rank(starts), 62.77)):
        error = values.std() / math.sqrt(200)
        assert abs(values.mean() - expected) < 3 * error, (values.mean(), error)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0.01, 30))
def test_ranges(seed, n, sharpness):
    sigma = random(3, n, seed=seed)
    ranks = lens.effective_rank(sigma, eps=0)
    assert (ranks >= 1 - 1e-9).all()
    assert (ranks <= lens.effective_rank_l1(sigma) + 1e-9).all()  # energies are the more peaked distribution
    assert (lens.effective_rank_l1(sigma) <= n + 1e-9).all()
    a = (sharpness * random(1, 2, n, n, seed=seed)).softmax(dim=-1)
    assert ((whole_maps.selectivity(a) > 0) & (whole_maps.selectivity(a) <= 1 - 1 / n + 2 * EPS)).all()
    assert ((whole_maps.effective_tokens(a) > 1 - 1e-9) & (whole_maps.effective_tokens(a) < n + 1e-9)).all()
    assert ((whole_maps.attention_entropy(a) >= 0) & (whole_maps.attention_entropy(a) <= math.log(n) + 1e-9)).all()
    row = a[:, :, :1]  # of one row, exp(entropy) is never below 1 / sum A^2
    assert (whole_maps.attention_entropy(row).exp() >= whole_maps.effective_tokens(row) - 1e-9).all()
