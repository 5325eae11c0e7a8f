"""Pairs of patches that merge: every second one with its best of the others.

A are patches 1, 3, ..., B are 0, 2, ..., of those that are present.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitreous.layers.stream import Assignment, TokenState, reduce, split, take


class Pairs(NamedTuple):
    """Who of A joins whom of B.

    leaving (B, r), and staying (B, |A| - r) in rising order, count in A; target (B, r) in B.
    """

    leaving: Tensor
    staying: Tensor
    target: Tensor


def best_pairs(similarity: Tensor, merging: int) -> Pairs:
    """The `merging` pairs of greatest similarity (B, |A|, |B|), with the best of B each."""
    best, nearest = similarity.max(-1)  # (B, |A|) each
    order = best.argsort(dim=1, descending=True)
    leaving, staying = order[:, :merging], order[:, merging:].sort(1).values
    return Pairs(leaving, staying, nearest.gather(1, leaving))


def merged(x: Tensor, state: TokenState, pairs: Pairs, prefix: int, proportional: bool) -> tuple[Tensor, TokenState]:
    """Patches of x (B, n, D) merged in pairs, as means weighed by size.

    Behind it stand the prefix, what is left of A, B with what merged into it, and inserted tokens.
    proportional: hand on sizes, which attention counts by; else, unless there are sizes already,
    they are counted anew from where places went.
    """
    end, merging = split(x, state)[0].shape[1], pairs.leaving.shape[1]
    proportional = proportional or state.sizes is not None  # an earlier graft counts by sizes
    sizes = x.new_ones(x.shape[:2], dtype=wide(x)) if state.sizes is None else state.sizes
    if not proportional and state.assignment is not None:
        sizes = state.assignment.counts(end).to(sizes.dtype)
    order, place = new_order(pairs, prefix, end)
    left = end - merging
    with torch.autocast(x.device.type, enabled=False):
        rows, counts = take(x, order), sizes.gather(1, order)
        tokens, sizes = joined(rows[:, :left], counts[:, :left], rows[:, left:], counts[:, left:], place[:, left:])
    step = Assignment(index=torch.zeros_like(order).scatter(1, order, place), tokens=left)
    return reduce(x, state, step, sizes if proportional else None, tokens=tokens)


def joined(b: Tensor, size_b: Tensor, a: Tensor, size_a: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens b (B, m, D), and sizes, after each of a (B, r, D) joined its target (B, r).

    Means weighted by size, as a product of matrices, whose sums have one order on every device; a
    token that nothing joins stays as it is.
    """
    into = (target[:, None] == torch.arange(b.shape[1], device=b.device)[:, None]).to(size_b.dtype)  # (B, m, r)
    size = size_b + (into * size_a[:, None]).sum(-1)
    mean = torch.baddbmm((size_b / size)[..., None] * b, into * size_a[:, None] / size[..., None], a.to(size.dtype))
    return mean.to(b.dtype), size


def new_order(pairs: Pairs, prefix: int, end: int) -> tuple[Tensor, Tensor]:
    """(order, place), (B, end) each: original tokens, and where each is after the merge.

    In the order prefix, what stays of A, B, what leaves.
    """
    leaving, staying, target = pairs
    every = torch.arange(end, device=target.device).expand(target.shape[0], -1)
    order = torch.cat([every[:, :prefix], prefix + 1 + 2 * staying, every[:, prefix::2], prefix + 1 + 2 * leaving], dim=1)
    place = torch.cat([every[:, : end - leaving.shape[1]], prefix + staying.shape[1] + target], dim=1)
    return order, place


def class_attention(q: Tensor, k: Tensor, sizes: Tensor | None) -> Tensor:
    """The class token's attention (B, n), mean over heads.

    q (already scaled) and k (B, H, n, K); sizes (B, n), or None for one each.
    """
    scores = (q[:, :, :1] @ k.transpose(-2, -1)).squeeze(2)  # (B, H, n)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sizes is not None:
        scores = scores + sizes.log()[:, None]
    return scores.softmax(-1).mean(1)


def wide(x: Tensor) -> torch.dtype:
    """At least float32, in which sizes are whole numbers and similarities can be told apart."""
    return torch.promote_types(x.dtype, torch.float32)
