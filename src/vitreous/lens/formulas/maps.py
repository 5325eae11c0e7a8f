"""Maps over patches: singular vectors with signs, artifacts, rollout, Gram filter.

Letters: B batch, R rank, H heads, N tokens, P patches in raster order on a grid (rows, cols), D
width. Features are those of the patches alone, without class or register tokens. Pure functions, in
float32 (float64 for float64).

A singular vector is known up to its sign, and nothing in it tells which side is the object. Three
references do, in this order of preference, each a number per patch that tends to be high on the
object: a *fixed* direction of the features, calibrated once for a model (`lens.direction`), the
*attention* of the class token, and the *border* distance of the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from vitreous.base.errors import SettingError, UnknownName
from vitreous.layers.spectral import leading_subspace, unit_rows

ROWS = ("auto", "raw", "unit")
POWER = 6  # power steps of the singular vectors: on real features the sketch then no longer shows (benchmarks/signs)
FEW = 0.04  # share of the patches that may be artifacts: 2 % are, in each late block of an ImageNet ViT-Tiny/16
SPIKE = 0.5  # a vector with more of its energy on these few patches is a spike: measured 0.04 to 0.09, or 0.98 to 1.00
HIGH = 4.0  # times the median norm: artifacts of ViT-Tiny/16 have 20 to 45, its other patches 1.5, objects in small models 3.5
CONFIDENT = 0.95  # a sign with less confidence is not shown as one
TOKENS = 1100  # up to which rollout and relevance are followed: their cost grows with the cube
BLUR = 0.5  # standard deviation, in patches

# Chance that a sign is right: sigmoid(slope |correlation| + agreement [attention agrees] +
# constant), for the first vector and for later ones. Logistic fits on the ECSSD images of even
# position, ViT-Tiny/16, ten features: benchmarks/signs.
RULES = {
    ("fixed", "attention"): ((5.96, 1.92, -1.48), (5.68, -0.17, 0.15)),
    ("fixed",): ((6.88, 0.0, -0.35), (5.55, 0.0, 0.06)),
    ("attention",): ((7.67, 0.0, -0.22), (3.28, 0.0, -0.17)),
    ("border",): ((6.31, 0.0, -0.16), (3.45, 0.0, -0.12)),
}


@dataclass(frozen=True)
class Signed:
    """Singular vectors with signs: maps (B, R, P).

    confidence: (B, R), 0 to 1, that the high side is the object.

    rule: the names of the references used, joined by "+"; "none" where there was none. Where
    `confidence` is below CONFIDENT the sign is a guess, and the map is to be shown without one: as
    its absolute value, or grey around zero. Of sure signs of the first vector under 1 % are wrong;
    of the second, 1 % on whole photographs and 4 % where the object is off the centre
    (benchmarks/signs).
    """

    maps: Tensor
    confidence: Tensor
    rule: str

    @property
    def sure(self) -> Tensor:
        """(B, R) bool: which signs may be shown."""
        return self.confidence >= CONFIDENT


# -- singular vectors ------------------------------------------------------------------------------


def singular_maps(
    features: Tensor, rank: int = 3, *, rows: str = "auto", sketch: Tensor | None = None
) -> tuple[Tensor, Tensor, str]:
    """Leading left singular vectors of features (B, P, D), as maps (B, R, P).

    Returns maps of unit norm, s (B, R) descending, and the rows that were taken.

    rows: "raw" takes the features as they are; "unit" brings every patch to unit length and takes
        out the mean (`unit_rows`); "auto" takes unit rows where the first raw vector is a spike on
        few patches of high norm (mean over the images of `spikes` above SPIKE). The answer says
        which; a caller with many batches decides on the first.
    sketch: as of `leading_subspace`; None is a fixed one.
    The sign of a map is as computed: see `signed`. Vectors beyond the true rank, and those of
    features that are not finite, are zero.
    """
    if rows not in ROWS:
        raise UnknownName(rows, "rows", ROWS)
    if rows != "unit":
        space = leading_subspace(features, rank, power=POWER, sketch=sketch)
        if rows == "auto":
            rows = "unit" if bool(spikes(space.U[:, :, 0], features).mean() > SPIKE) else "raw"
    if rows == "unit":
        z = unit_rows(features)
        alike = torch.linalg.vector_norm(z, dim=(1, 2)) <= 8 * torch.finfo(z.dtype).eps * z.shape[1] ** 0.5
        z = torch.where(alike[:, None, None], 0.0, z)  # patches that differ by rounding alone have no map
        space = leading_subspace(z, rank, power=POWER, sketch=sketch)
    return space.U.mT, space.S, rows


def spikes(u: Tensor, features: Tensor) -> Tensor:
    """Share (B,) of the energy of u (B, P) on the FEW patches of highest norm, 0 to 1.

    u: the first left singular vector of the features (B, P, D). About FEW where it is a map of the
    scene, near 1 where it is a spike on artifact tokens.
    """
    few = max(1, round(FEW * u.shape[1]))
    highest = _norms(features).topk(few, dim=1).indices
    return u.square().gather(1, highest).sum(1)


def artifacts(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Artifact tokens of tokens (B, P, D): which (B, P) bool, and all norms (B, P).

    tokens: the residual stream after a block.

    An artifact has more than HIGH times the median norm of its image. Darcet et al. 2024, arXiv
    2309.16588, cut at one norm for all images of a model; the median needs no such number. NaN
    norms are none.
    """
    norms = _norms(tokens)
    median = norms.median(dim=1, keepdim=True).values
    return (norms > HIGH * median) & (median > 0), norms


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


# -- signs -----------------------------------------------------------------------------------------


def signed(u: Tensor, *, fixed: Tensor | None = None, attention: Tensor | None = None, border: Tensor | None = None) -> Signed:
    """Turn vectors u (B, R, P) so that they correlate with the best reference there is.

    References are (B, P) or None.

    The first of fixed, attention, border decides. Attention beside a fixed reference adds to the
    confidence where it agrees. Confidence is 0 where nothing can be known: a vector or reference
    that is constant or not finite.
    """
    named = {"fixed": fixed, "attention": attention, "border": border}
    names = tuple(name for name, reference in named.items() if reference is not None)
    names = names[: 2 if names[:2] == ("fixed", "attention") else 1]
    if not names:
        return Signed(u, torch.zeros_like(u[..., 0]), "none")
    correlations = [correlation(u, named[name][:, None]) for name in names]
    match, agrees = correlations[0], correlations[-1] * correlations[0] > 0
    first, later = torch.tensor(RULES[names], dtype=u.dtype, device=u.device)
    slope, agreement, constant = torch.stack([first, *[later] * (u.shape[1] - 1)], dim=1)  # (R,) each
    p = torch.sigmoid(slope * match.abs() + agreement * agrees + constant)
    factor = torch.where(match < 0, -1.0, 1.0).to(u)
    return Signed(u * factor[..., None], torch.where(match == 0, 0.0, p), "+".join(names))


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Correlation over the last dimension, -1 to 1, leading ones broadcast.

    0 where either is constant or not finite.
    """
    product = (standardised(x) * standardised(y)).mean(-1)
    return torch.where(product.isfinite(), product, 0.0).clamp(-1.0, 1.0)


def border_distance(keys: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, P): distance of each key from the mean key of the patches at the border.

    |k_p - mean of k|, of keys (B, P, D) brought to unit length. High on the object.
    """
    k = normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    at_border = torch.ones(grid, dtype=torch.bool, device=k.device)
    at_border[1:-1, 1:-1] = False
    return _norms(k - k[:, at_border.flatten()].mean(1, keepdim=True))


def log_attention(attention: Tensor) -> Tensor:
    """(B, P), standardised: mean over heads of the logarithm of attention (B, H, P).

    attention: the class token's to the patches.
    """
    floor = torch.finfo(torch.float32).tiny
    return standardised(attention.to(torch.promote_types(attention.dtype, torch.float32)).clamp_min(floor).log().mean(1))


# -- rollout ---------------------------------------------------------------------------------------


def rollout_step(joint: Tensor | None, blocks: Iterable[tuple[slice, Tensor]], out: Tensor | None = None) -> Tensor:
    """Attention rollout through one more layer: (0.5 A + 0.5 I) joint, A the mean over heads.

    Shape (B, N, N).

    joint: the rollout so far, None before the first layer. blocks: the rows of the layer's maps as
    they come, each with the slice of queries that it holds (B, H, n, N). out: where to write, such
    as the matrix before last; not joint. Abnar and Zuidema 2020, arXiv 2005.00928.
    """
    for where, rows in blocks:
        mean = rows.mean(1)  # (B, n, N)
        tokens = mean.shape[-1]
        if out is None:
            out = mean.new_empty(len(mean), tokens, tokens)
        if joint is not None and joint.shape != out.shape:
            raise SettingError(
                f"rollout_step found {tokens} tokens after {joint.shape[-1]}. Expected as many in every layer. Give only "
                "layers whose queries and keys are the same tokens."
            )
        if joint is None:
            out[:, where] = 0.5 * mean
            out[:, where].diagonal(where.start or 0, 1, 2).add_(0.5)
        else:
            torch.baddbmm(joint[:, where], mean, joint, beta=0.5, alpha=0.5, out=out[:, where])
    return out


def fused_rollout_step(
    joint: Tensor | None, blocks: Iterable[tuple[slice, Tensor]], fusion: str = "mean", discard: float = 0.0
) -> Tensor:
    """`rollout_step` with heads fused by "mean", "max" or "min", and low attention set to 0.

    discard: the share of the entries of each fused map that is set to 0, the lowest ones, except
    that of token 0 to itself. Rows of 0.5 A + 0.5 I are then brought to sum 1. As in Gildenblat
    2020 (vit-explain), which divides columns by the sums of rows.
    """
    fused = {"mean": Tensor.mean, "max": Tensor.amax, "min": Tensor.amin}[fusion]
    a = torch.cat([fused(rows, 1) for _, rows in blocks], dim=1)  # (B, N, N)
    flat, first = a.flatten(1), a[:, 0, 0].clone()
    lowest = flat.topk(int(flat.shape[1] * discard), largest=False).indices
    flat.scatter_(1, lowest, 0.0)[:, 0] = first
    a = 0.5 * flat.view_as(a) + 0.5 * torch.eye(a.shape[-1], device=a.device)
    a = a / a.sum(-1, keepdim=True)
    return a if joint is None else a @ joint


def rollout_map(joint: Tensor, patches: slice, has_class: bool) -> Tensor:
    """(B, P): what of the patches reached the class token, token 0. Sums to <= 1.

    Without a class token: all patches on average.
    """
    return joint[:, 0, patches] if has_class else joint[:, patches, patches].mean(1)


def relevance_step(joint: Tensor, blocks: Iterable[tuple[slice, Tensor]], own: bool = True) -> Tensor:
    """Relevance through one more layer: R + C R, or C R where queries are others.

    joint: D = R - 1 (B, N, M) of N tokens from the first M of them, zeros at the start: what tokens
    have of themselves would hide the rest. blocks: rows of (A * dS/dA)+ of the layer, each with the
    slice of queries (B, H, n, N); C is their mean over heads. own: queries are the N tokens. Chefer
    et al. 2021, arXiv 2103.15679, equations 5 and 6; without `own` 10, for attention to others.
    """
    parts = []
    for where, rows in blocks:
        c = rows.mean(1)
        part = c @ joint + c[..., : joint.shape[-1]]  # C R
        parts.append(part + joint[:, where] if own else part)
    return torch.cat(parts, dim=1)


# -- filters on the grid ---------------------------------------------------------------------------


def standardised(maps: Tensor) -> Tensor:
    """Maps (..., P) less their mean, over their standard deviation.

    Zero where they are constant but for rounding.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    centred = maps - maps.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    rounding = 8 * torch.finfo(maps.dtype).eps * maps.abs().amax(-1, keepdim=True)
    return torch.where(deviation <= rounding, 0.0, centred / deviation.clamp_min(torch.finfo(maps.dtype).tiny))


def gram_filter(features: Sequence[Tensor], seed: Tensor) -> Tensor:
    """G(s) = sum_f Z_f Z_f^T s / |Z_f|_F^2 of a seed s (B, P). Shape (B, P).

    features: unit, centred rows Z_f (B, P, D_f).

    That is sum_i s_i^2 u_i (u_i^T s): all left singular vectors, weighted by their energy. No sign
    enters, and no decomposition: what comes out is the similarity of each patch to the
    seed-weighted mean patch.
    """
    total = torch.zeros_like(seed)
    for z in features:
        energy = z.square().sum((1, 2)).clamp_min(torch.finfo(z.dtype).tiny)
        total = total + (z @ (z.mT @ seed[..., None]))[..., 0] / energy[:, None]
    return total


def blurred(maps: Tensor, grid: tuple[int, int], sigma: float = BLUR) -> Tensor:
    """Maps (..., P) through a Gaussian of `sigma` patches on the grid."""
    down, across = (gaussian(n, sigma).to(maps) for n in grid)
    return (down @ maps.unflatten(-1, grid) @ across.mT).flatten(-2)


def gaussian(n: int, sigma: float) -> Tensor:
    """Gaussian weights (n, n) between places on a line; rows sum to one, also at its ends."""
    place = torch.arange(n, dtype=torch.float64)
    weights = torch.exp(-(place[:, None] - place).square() / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


def resampled(maps: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Maps (B, P) of one grid on another: bilinear, averaged where the other is coarser."""
    if grid == to:
        return maps
    picture = maps.unflatten(-1, grid)[:, None]
    return interpolate(picture, size=to, mode="bilinear", antialias=True, align_corners=False)[:, 0].flatten(1)
