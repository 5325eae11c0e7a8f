"""Indicators of whole attention maps, formula by formula: what sums over blocks of rows must come to."""

from __future__ import annotations

import torch
from torch import Tensor

from vitreous.lens.formulas.indicators import PAPER_EPS


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def selectivity(attention: Tensor) -> Tensor:
    """Gini-Simpson index of the rows, mean over rows: **high is diffuse**, low is selective.

    (B, H, N, N) -> (B, H).

    1 - sum_j A_ij^2 / ((sum_j A_ij)^2 + eps), from 0 (each row on one token) to 1 - 1/N (uniform),
    the reverse of what the name suggests. The paper's eps lifts the lower end, and the value for a
    single token, to 1e-8.
    """
    rows = wide(attention)
    return (1 - rows.square().sum(dim=-1) / (rows.sum(dim=-1).square() + PAPER_EPS)).mean(dim=-1)


def effective_tokens(attention: Tensor) -> Tensor:
    """1 / sum_j A_ij^2, mean over rows: the number of tokens that a row attends to, 1 to N.

    (B, H, N, N) -> (B, H).
    """
    return wide(attention).square().sum(dim=-1).reciprocal().mean(dim=-1)


def attention_entropy(attention: Tensor) -> Tensor:
    """Entropy of the rows, in nats, 0 to log N, mean over rows; 0 log 0 = 0.

    (B, H, N, N) -> (B, H).
    """
    return torch.special.entr(wide(attention)).sum(dim=-1).mean(dim=-1)


def perturbation_robustness(clean: Tensor, noisy: Tensor) -> Tensor:
    """|A - A'|_F / (H N^2), all heads of a layer together: **low is robust**.

    (B, H, N, N) twice -> (B).

    At the same relative change it shrinks with the number of tokens and of heads: never compare it
    across those. The paper takes one image.
    """
    change = wide(noisy) - wide(clean)
    return torch.linalg.vector_norm(change, dim=(-3, -2, -1)) / change[0].numel()


def relative_change(clean: Tensor, noisy: Tensor) -> Tensor:
    """|A - A'|_F / |A|_F per head, 0 = untouched; comparable across token counts.

    (B, H, N, N) twice -> (B, H).
    """
    clean, noisy = wide(clean), wide(noisy)
    return torch.linalg.vector_norm(noisy - clean, dim=(-2, -1)) / torch.linalg.vector_norm(clean, dim=(-2, -1))


def distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Distances (N, M) in pixels between places (y, x), (N, 2) and (M, 2).

    NaN where either has no place.
    """
    offset = queries[..., :, None, :] - keys[..., None, :, :]
    return torch.linalg.vector_norm(offset, dim=-1)


def mean_distance(attention: Tensor, distance: Tensor) -> Tensor:
    """How far a row looks, in the units of `distance`, mean over rows. -> (B, H).

    sum_j A_ij d_ij / sum_j A_ij, of attention (B, H, N, M).

    distance: (N, M), see `distances`; NaN is no place (class token, registers, padding). Sums run
    over keys with a place, so weight on a class token neither shortens nor lengthens a head's
    reach; rows without a place, or with all weight on keys without one, are left out; NaN if none
    is left. A head whose weights fall off as a Gaussian of width s has distance s sqrt(pi / 2).
    Source: Dosovitskiy et al. 2021, arXiv 2010.11929; what becomes of the class token is our
    choice.
    """
    return _over_places(attention, distance, distance)


def attention_width(attention: Tensor, distance: Tensor) -> Tensor:
    """Width of the Gaussian that looks as far, in the units of `distance`. -> (B, H).

    sqrt(mean square distance / 2).

    The mean over keys and rows as in `mean_distance`, root taken last. A head with weights exp(-d^2
    / (2 s^2)) has width s, on a grid as well as in the plane. Squares make it the more sensitive of
    the two to a little weight far away.
    """
    return (_over_places(attention, distance, distance.square()) / 2).sqrt()


def head_gram(attention: Tensor) -> Tensor:
    """Inner products of the heads' maps, each flattened: (B, H, N, M) -> (B, H, H).

    Adds up over blocks of rows.
    """
    flat = wide(attention).flatten(-2)
    return flat @ flat.mT


def _over_places(attention: Tensor, distance: Tensor, value: Tensor) -> Tensor:
    """Mean of value (N, M) under the rows' weights on keys with a place.

    Over the rows that have such weight.
    """
    has_place = distance.isfinite()
    rows = wide(attention) * has_place
    mass = rows.sum(dim=-1)
    mean = (rows * torch.where(has_place, value, 0.0)).sum(dim=-1) / mass
    return torch.where(mass > 0, mean, torch.nan).nanmean(dim=-1)
