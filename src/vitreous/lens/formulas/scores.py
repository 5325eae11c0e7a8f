"""Does a map lie on the object? Scores against masks, baselines, intervals over images.

Maps are (..., P), P patches in raster order, any real values, higher meaning more foreground; only
`energy_inside` cares for the sign and size of a value, the others for the order alone (`iou_otsu`
for distances). `cover` (..., P) is the share of each patch that the mask covers, 0 to 1
(`coverage`), and a patch is foreground if more than half of it is covered. Leading dimensions
broadcast: maps (B, H, P) go with cover (B, 1, P). Everything is computed in float64.

    energy_inside       share of the map's positive mass that lies on the object, every patch's mass
                        spread evenly over it
    auroc               chance that a foreground patch has a higher value than another patch, ties
                        counting one half
    average_precision   mean over foreground patches of the precision at their own value, ties taken
                        together
    pointing            1 if the maximum is on the foreground; of several equal maxima the share
                        that is
    iou_otsu            intersection over union of the foreground and what is above Otsu's threshold
                        of the map
    iou_best            the same at the threshold that is best for this image: an upper bound, which
                        knows the mask

All run from 0 to 1, 1 being best; `auroc` is 0.5 by chance. A map that is the same everywhere gets
what the area gives. An image without a foreground patch, or without any other, has no score (NaN),
nor has a map that is not all finite. Sources: pointing game, Zhang et al. 2016, arXiv 1608.00507;
threshold, Otsu 1979, IEEE Trans. SMC 9, 62.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vitreous.base.errors import DataError
from vitreous.base.statistics import bootstrap
from vitreous.layers.geometry import centre_prior

MEASURES = ("energy_inside", "auroc", "average_precision", "pointing", "iou_otsu", "iou_best")
BASELINES = ("centre", "random", "area")
KEYS = ("component", "layer", "head")
COVERED = 0.5  # a patch is foreground if more than this share of it is
Columns = dict[str, np.ndarray]

# -- masks on the grid -----------------------------------------------------------------------------


def coverage(mask: Tensor | np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Share of each patch that a mask covers, by exact area, 0 to 1.

    mask (..., h, w), grid (rows, cols) -> (..., P).

    mask: as the model sees the image, after resizing and cropping. bool; uint8, foreground above
    127, or above 0 where it holds only 0 and 1; or float shares of pixels, 0 to 1. Patches need not
    be whole pixels.
    """
    mask = torch.as_tensor(mask)
    rows, cols = grid
    if mask.ndim < 2 or min(rows, cols) < 1 or mask.numel() == 0:
        raise DataError(
            f"Found a mask of shape {tuple(mask.shape)} for a grid of {rows} x {cols}; expected (..., height, width) with "
            "pixels, and at least one patch. Give the mask of the image as the model sees it."
        )
    if mask.dtype == torch.uint8:
        levels = torch.where(mask.amax((-2, -1), keepdim=True) > 1, 127, 0)
        mask = mask > levels
    mask = mask.double()
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise DataError(
            f"Found mask values from {mask.min().item():g} to {mask.max().item():g}; expected 0 to 1, bool or uint8. "
            "Convert the mask first."
        )
    share = _overlap(mask.shape[-2], rows) @ mask @ _overlap(mask.shape[-1], cols).mT  # (..., rows, cols)
    return share.clamp(0, 1).flatten(-2)


def _overlap(pixels: int, patches: int) -> Tensor:
    """Share of patch i that pixel j fills, along one side (patches, pixels); rows sum to one."""
    edges = torch.arange(patches + 1, dtype=torch.float64) * pixels / patches
    pixel = torch.arange(pixels, dtype=torch.float64)
    end = torch.minimum(edges[1:, None], pixel + 1)
    start = torch.maximum(edges[:-1, None], pixel)
    return (end - start).clamp_min(0) * patches / pixels


# -- scores ----------------------------------------------------------------------------------------


def scores(maps: Tensor, cover: Tensor) -> dict[str, Tensor]:
    """Every measure of every map: {measure: (...)} float64.

    maps (..., P) and cover (..., P) broadcast against each other.
    """
    functions = (energy_inside, auroc, average_precision, pointing, iou_otsu, iou_best)
    return {name: function(maps, cover) for name, function in zip(MEASURES, functions, strict=True)}


def energy_inside(maps: Tensor, cover: Tensor) -> Tensor:
    """Share of the positive mass on the object, to be read beside the area.

    Without any positive value it is the area.
    """
    maps, cover, inside = _prepared(maps, cover)
    mass = maps.clamp_min(0)
    mass = mass / mass.amax(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)  # else tiny masses vanish in sums
    mass = torch.where(mass.any(-1, keepdim=True), mass, torch.ones_like(mass))
    return _scored((mass * cover).sum(-1) / mass.sum(-1), maps, inside)


def auroc(maps: Tensor, cover: Tensor) -> Tensor:
    """Area under the receiver operating characteristic of foreground against other patches.

    Mann-Whitney's U.
    """
    maps, _, inside = _prepared(maps, cover)
    ones = inside.double().sum(-1)
    u = (ranks(maps) * inside).sum(-1) - ones * (ones + 1) / 2
    return _scored(u / (ones * (inside.shape[-1] - ones)).clamp_min(1), maps, inside)


def average_precision(maps: Tensor, cover: Tensor) -> Tensor:
    """Sum over the distinct thresholds of precision times gain in recall.

    A map in random order gets about the area.
    """
    maps, _, inside = _prepared(maps, cover)
    hits, chosen = _above(maps, inside)
    return _scored((hits / chosen * inside).sum(-1) / inside.sum(-1).clamp_min(1), maps, inside)


def pointing(maps: Tensor, cover: Tensor) -> Tensor:
    """Pointing game on patches: does the maximum fall on the foreground?

    Share of the equal maxima that do.
    """
    maps, _, inside = _prepared(maps, cover)
    top = maps == maps.amax(-1, keepdim=True)
    return _scored((top & inside).sum(-1).double() / top.sum(-1), maps, inside)


def iou_otsu(maps: Tensor, cover: Tensor) -> Tensor:
    """Intersection over union of the foreground and what is above Otsu's threshold.

    The threshold is exact: see `otsu`.
    """
    maps, _, inside = _prepared(maps, cover)
    above = maps > otsu(maps)[..., None]
    above |= (maps == maps[..., :1]).all(-1, keepdim=True)  # nothing to part: all of it
    union = (above | inside).sum(-1).double()
    return _scored((above & inside).sum(-1) / union.clamp_min(1), maps, inside)


def iou_best(maps: Tensor, cover: Tensor) -> Tensor:
    """Highest intersection over union of the foreground and a thresholded map.

    Patches from any one value of the map upwards.
    """
    maps, _, inside = _prepared(maps, cover)
    hits, chosen = _above(maps, inside)
    union = chosen + inside.sum(-1, keepdim=True) - hits
    return _scored((hits / union).amax(-1), maps, inside)


def otsu(maps: Tensor) -> Tensor:
    """Otsu's threshold of each map, exact: the highest value of its lower class.

    (..., P) -> (...).

    It parts the values so that the variance between the means of the two classes is greatest; the
    lowest such threshold.
    """
    ordered, _ = maps.double().sort(dim=-1)
    low, high = ordered[..., :1], ordered[..., -1:]
    unit = (ordered - low) / (high - low).clamp_min(torch.finfo(ordered.dtype).tiny)  # free of scale and offset
    count = torch.arange(1, unit.shape[-1] + 1, dtype=unit.dtype, device=unit.device)
    total, rest = unit.cumsum(-1), unit.shape[-1] - count
    means = total / count, (total[..., -1:] - total) / rest.clamp_min(1)
    between = count * rest * (means[0] - means[1]).square()
    ends_here = torch.ones_like(between, dtype=torch.bool)
    ends_here[..., :-1] = ordered[..., 1:] > ordered[..., :-1]  # equal values stay together
    best = torch.where(ends_here, between, -1.0).argmax(-1, keepdim=True)
    return ordered.gather(-1, best)[..., 0]


def ranks(maps: Tensor) -> Tensor:
    """Rank of each value in its map, 1 to P, equal values sharing their mean rank.

    (..., P) -> (..., P) float64.
    """
    maps = maps.contiguous()
    ordered, _ = maps.sort(dim=-1)
    below, upto = torch.searchsorted(ordered, maps), torch.searchsorted(ordered, maps, right=True)
    return (below + upto + 1).double() / 2


def _prepared(maps: Tensor, cover: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """maps, cover, foreground, all of one shape (..., P), float64 and bool."""
    maps, cover = torch.as_tensor(maps), torch.as_tensor(cover)
    if maps.ndim < 1 or cover.ndim < 1 or maps.shape[-1] != cover.shape[-1] or not maps.shape[-1]:
        raise DataError(
            f"Found maps of shape {tuple(maps.shape)} and cover of shape {tuple(cover.shape)}; expected the same number of "
            "patches in both. Use the coverage() of the maps' own grid, and flatten the maps to (..., P)."
        )
    maps, cover = torch.broadcast_tensors(maps.double(), cover.to(maps.device).double())
    return maps.contiguous(), cover, cover > COVERED


def _above(maps: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Of each patch: how many foreground patches, and patches, are at least as high (..., P)."""
    ordered, order = maps.sort(dim=-1)
    below = torch.searchsorted(ordered, maps)
    hits = inside.gather(-1, order).double().flip(-1).cumsum(-1).flip(-1)  # from each place upwards
    return hits.gather(-1, below.clamp_max(maps.shape[-1] - 1)), (maps.shape[-1] - below).double()


def _scored(values: Tensor, maps: Tensor, inside: Tensor) -> Tensor:
    """values with NaN where an image or a map has no score."""
    fit = inside.any(-1) & ~inside.all(-1) & maps.isfinite().all(-1)
    return torch.where(fit, values, torch.nan)


# -- baselines -------------------------------------------------------------------------------------


def baselines(grid: tuple[int, int], images: Iterable[int], seed: int = 0) -> dict[str, Tensor]:
    """Maps that look at no image, for the images of these numbers.

    {"centre", "random", "area": (B, P)}.

    centre: `centre_prior`. random: uniform, drawn by `seed` and an image's number alone, whatever
    the batches. area: the same everywhere, so that `energy_inside` is the share of the area; its
    AUROC is 0.5.
    """
    images, patches = list(images), grid[0] * grid[1]
    noise = [np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, image])).random(patches) for image in images]
    random = torch.from_numpy(np.array(noise, np.float64).reshape(len(images), patches))
    centre = centre_prior(grid).expand(len(images), patches)
    return dict(zip(BASELINES, (centre, random, torch.ones_like(random)), strict=True))


# -- intervals and summaries -----------------------------------------------------------------------


def summary(table: Mapping[str, Sequence], draws: int = 2000, seed: int = 0) -> Columns:
    """Mean and interval over images.

    Columns component, layer, head, measure, mean, low, high, images.

    table: columns image, component, layer, head and any of MEASURES, one row per map, as in
    scores.csv. images counts those that have a value. Rows come in the order of first appearance,
    measures in that of MEASURES.
    """
    columns = {name: np.asarray(column) for name, column in table.items()}
    measures = [name for name in MEASURES if name in columns]
    values = np.stack([columns[name].astype(np.float64) for name in measures], axis=1)  # (rows, measures)
    groups: dict[tuple, list[int]] = {}
    for row in range(len(values)):
        groups.setdefault(tuple(columns[key][row].item() for key in KEYS), []).append(row)
    lines = []
    for key, rows in groups.items():
        rows = sorted(rows, key=lambda row: columns["image"][row])  # one draw for all components: the same images
        mean, low, high = bootstrap(values[rows], draws=draws, seed=seed)
        images = (~np.isnan(values[rows])).sum(0)
        lines += [(*key, measure, mean[i], low[i], high[i], images[i]) for i, measure in enumerate(measures)]
    names = (*KEYS, "measure", "mean", "low", "high", "images")
    return {name: np.array([line[i] for line in lines]) for i, name in enumerate(names)}
