"""Interpretability indicators of SVDA, published and corrected, and of others.

Paper: Arampatzakis, Pavlidis, Mitianoudis, Papamarkos, 2026, arXiv 2602.10994 (classification),
2602.11005 (depth). *Paper form*: as the public experiments execute it, with natural logarithms and
eps = 1e-8. *Corrected form*: what can be compared between heads, models and token counts. Which
function gives which:

    indicator                paper form                  corrected form
    spectral entropy         spectral_entropy(sigma)     spectral_entropy(sigma, eps=0)
    effective rank           effective_rank(sigma)       effective_rank(sigma, eps=0),
                                                         effective_rank_l1(sigma)
    spectral sparsity        spectral_sparsity(sigma)    relative_sparsity(sigma)
    angular alignment        angular_alignment(q, k),    the same, over a whole set
                             of one noisy image

The indicators of whole maps, selectivity and perturbation robustness, are sums over rows: see
`row_statistics`. Of others: head_redundancy (how alike the heads of a layer are), rank_collapse
(how alike the tokens after a layer are).

sigma is (..., K), q and k are (B, H, N, K). Spectra give one value per head, (...); the others give
one per image and head, (B, H), so that sums and counts over batches of images make the mean over a
set. Half precision is computed in float32, float64 stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAPER_EPS = 1e-8


def spectral_entropy(sigma: Tensor, *, eps: float = PAPER_EPS) -> Tensor:
    """Entropy of the energies sigma_k^2, in nats, 0 to log K: how many axes share the energy.

    (..., K) -> (...).

    H = - sum_k p_k log(p_k + eps), p_k = sigma_k^2 / (sum sigma^2 + eps). The paper's eps lets H
    depend on the scale of small spectra (|sigma| below about 1e-3) and fall short of 0 by about
    eps; eps=0 is exact and free of scale. A spectrum of zeros has entropy 0.
    """
    return _entropy(_wide(sigma).square(), eps)


def effective_rank(sigma: Tensor, *, eps: float = PAPER_EPS) -> Tensor:
    """exp of `spectral_entropy`: the number of axes that share the energy, 1 to K.

    (..., K) -> (...).

    The paper averages this over heads and layers (the mean of exponentials). A spectrum of zeros
    has effective rank 1.
    """
    return spectral_entropy(sigma, eps=eps).exp()


def effective_rank_l1(sigma: Tensor) -> Tensor:
    """Roy and Vetterli's effective rank, 1 to K. (..., K) -> (...).

    As `effective_rank(eps=0)`, but of |sigma| / sum |sigma|.

    It weighs magnitudes, not energies, hence is never the smaller of the two. A spectrum of zeros
    has rank 1. Source: Roy, Vetterli, 2007, "The effective rank: a measure of effective
    dimensionality", eq. 3 and 4.
    """
    return _entropy(_wide(sigma).abs(), 0.0).exp()


def spectral_sparsity(sigma: Tensor, threshold: float = 1e-3) -> Tensor:
    """Share of axes with |sigma_k| < threshold, an absolute one, 0 to 1. (..., K) -> (...)."""
    size = _wide(sigma).abs()
    return (size < threshold).to(size.dtype).mean(dim=-1)


def relative_sparsity(sigma: Tensor, threshold: float = 1e-3) -> Tensor:
    """Share of axes with |sigma_k| <= threshold * max |sigma|, 0 to 1, free of scale.

    1 for a spectrum of zeros.
    """
    size = _wide(sigma).abs()
    return (size <= threshold * size.amax(dim=-1, keepdim=True)).to(size.dtype).mean(dim=-1)


def angular_alignment(q: Tensor, k: Tensor, counts: Tensor | None = None) -> Tensor:
    """Cosine between a token's own query and key, mean over tokens, -1 to 1.

    (B, H, N, K) twice -> (B, H). counts: (B or 1, N), how many tokens each stands for.

    Rows are brought to unit length here, so q and k may be given as projected, without sigma.
    Rotary embedding turns both alike and changes nothing. A row of zeros counts as cosine 0.
    """
    q, k = _wide(q), _wide(k)
    lengths = [torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-12) for x in (q, k)]
    cosine = (q * k).sum(dim=-1) / lengths[0] / lengths[1]
    if counts is None:
        return cosine.mean(dim=-1)
    return (cosine * counts[:, None]).sum(dim=-1) / counts.sum(dim=-1, keepdim=True)


def head_redundancy(gram: Tensor) -> Tensor:
    """Mean cosine of a head's map with the other heads' maps, from their inner products.

    (B, H, H) -> (B, H); NaN for one head.

    0 to 1 for attention, which has no negative entries: 1 where all heads attend alike, 0 where no
    two share a token. Uniform heads count as alike.
    """
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    cosine = gram / norm[..., :, None] / norm[..., None, :]
    others = gram.shape[-1] - 1
    return (cosine.sum(dim=-1) - cosine.diagonal(dim1=-2, dim2=-1)) / (others or torch.nan)


def rank_collapse(tokens: Tensor) -> Tensor:
    """|X - 1 mean|_F / |X|_F, 0 to 1: how far tokens are from all being the same one.

    (B, N, D) -> (B).

    **Low is collapsed**: 0 for equal tokens, 1 for tokens of mean zero. Source: Dong, Cordonnier,
    Loukas 2021, arXiv 2103.03404, who take sqrt(|.|_1 |.|_inf) for both norms; Frobenius (ours) has
    the mean as its exact minimiser.
    """
    x = _wide(tokens)
    rest = torch.linalg.vector_norm(x - x.mean(dim=-2, keepdim=True), dim=(-2, -1))
    return rest / torch.linalg.vector_norm(x, dim=(-2, -1))


def _entropy(weights: Tensor, eps: float) -> Tensor:
    """- sum p log(p + eps) over the last axis, p = weights / (sum + eps).

    0 log 0 = 0, and p = 0 if all are 0.
    """
    total = (weights.sum(dim=-1, keepdim=True) + eps).clamp_min(torch.finfo(weights.dtype).tiny)
    p = weights / total
    return -torch.special.xlogy(p, p + eps).sum(dim=-1)


def _wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
