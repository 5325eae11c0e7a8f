"""Does the model depend on what a map marks? Insertion, deletion, randomised weights.

Patches are taken away from an image in the order of its map, the highest first (*deletion*), or put
back into an emptied image in that order (*insertion*), and the model's answer to the whole image is
followed: the probability of the class that it predicts, or, where it has no classes, the cosine of
its output to that for the whole image. A faithful map lets deletion fall early and insertion rise
early. Both areas depend on model and images, hence mean something only beside those of random
orders on the same images. Where subjects stand in the middle, the centre prior beats random orders
as well, and it knows nothing of the model: compare with its curves too. Source: Petsiuk, Das,
Saenko 2018, arXiv 1806.07421.

A patch that is away shows the mean colour of its image. That holds nothing of what was where, in a
photograph as in a made scene, and needs no width to be chosen, while a blur shows an object larger
than itself still. It is an image that the model was not trained on, however: fill="blur" tells
whether a result depends on that; fill="black" is that of many published tables.

Differs from the paper: steps are patches, not pixels; equal values of a map come in random order,
so that a map without an opinion is at chance; deletion and insertion use the same fill. Where no
fractions are given, each curve gets its points where it moves: the widest of its steps are halved.

Randomised weights: a map that stays as it is when the weights are shuffled does not show what the
model has learned. Source: Adebayo et al. 2018, arXiv 1810.03292.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.base.errors import DataError, SettingError
from vitreous.base.statistics import bootstrap
from vitreous.lens.formulas.maps import gaussian
from vitreous.lens.formulas.scores import ranks
from vitreous.lens.preserve_state import preserve_state
from vitreous.models.classes import multi_label, probabilities

FRACTIONS = (0.0, 0.1, 0.25, 0.5, 1.0)  # where every curve is taken, before those of its own
MOST = 20  # inner points of a curve
TOLERANCE = 0.01  # of the area of a curve that rises or falls throughout: points enough
DRAWN = 101  # points of a curve in a record
FILLS = ("mean", "blur", "black")
ENOUGH = 16  # images from which an interval over them is given
BLUR = 0.1  # standard deviation of the blur, in sides of the image
PROBABILITY, COSINE = "probability of the predicted class", "cosine to the output for the whole image"


@dataclass(frozen=True)
class Curves:
    """What a model says while patches come and go; the last axis runs over fractions.

    fractions: (F,) share of the patches put in or taken away. insertion, deletion: (..., F), the
    leading axes those of the maps, the first over images; NaN for a map that is not all finite.
    followed: PROBABILITY or COSINE. fill: FILLS. passes: (...) of the model, for both curves.
    """

    fractions: Tensor
    insertion: Tensor
    deletion: Tensor
    followed: str
    fill: str
    passes: Tensor

    @property
    def insertion_area(self) -> Tensor:
        """Area under the insertion curve (...), high is good."""
        return torch.trapezoid(self.insertion, self.fractions, dim=-1)

    @property
    def deletion_area(self) -> Tensor:
        """Area under the deletion curve (...), low is good."""
        return torch.trapezoid(self.deletion, self.fractions, dim=-1)

    def of(self, number: int) -> Curves:
        """Those of one of several maps: of maps (B, M, P) that with this number, (B, F)."""
        return replace(self, **{name: getattr(self, name)[:, number] for name in ("insertion", "deletion", "passes")})

    @staticmethod
    def joined(parts: Sequence[Curves]) -> Curves:
        """Those of all images, from batches that were made alike."""
        names = ("insertion", "deletion", "passes")
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def curves(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    grid: tuple[int, int],
    *,
    fractions: Sequence[float] | None = None,
    fill: str = "mean",
    classes: bool | None = None,
    batch_size: int = 32,
    numbers: Iterable[int] | None = None,
    seed: int = 0,
    black: Sequence[float] | None = None,
) -> Curves:
    """Insertion and deletion curves of maps on a grid, for images (B, C, h, w).

    maps: (B, P) or (B, M, P). grid: (rows, cols).

    images: as the model takes them. fractions: from 0 to 1, rising; brought to whole patches. None:
    each curve has those of FRACTIONS and then, one by one up to MOST, the middle of the gap in
    which its area is least certain, until that is within TOLERANCE; it is given at every number of
    patches, by straight lines between its points.
    classes: whether the outputs are logits; None: they are if the output has `logits`, or is a (B,
    classes) tensor or a tuple that begins with one, and the model's `num_classes`, if any, is not
    0. numbers: of the images, by which, with `seed`, equal values are put in order; 0 to B - 1.
    black: the value of black in each channel, as the model takes it, for that fill.
    batch_size: images in one pass; a map costs two passes per image and inner fraction (`passes`).

    The model runs in eval mode without gradients; its mode and the random state are as before
    afterwards. Raises DataError for maps that do not fit the images or the grid, SettingError for
    fractions or a fill unknown.
    """
    numbers = _checked(images, maps, grid, fractions, fill, numbers)
    several, patches = maps.reshape(len(maps), -1, maps.shape[-1]), maps.shape[-1]
    turns = order(several, numbers, seed)  # (B, M, P)
    like = next(model.parameters(), images)
    images = images.to(like.device, like.dtype)
    empty = filled(images, fill, black)
    with preserve_state(model):
        judge = Judge(model, images, batch_size, classes)

        def measured(image: Tensor, number: Tensor, away: Tensor, count: Tensor) -> Tensor:
            """What is said with the first `count` patches put in, or taken away: all (n,)."""
            values = []
            for i, m, a, c in zip(*(index.split(batch_size) for index in (image, number, away, count)), strict=True):
                shown = (turns[i, m] < c[:, None]) ^ a.bool()[:, None]  # (n, P)
                mask, at = pixels(shown, grid, images.shape[-2:]).to(images.device), i.to(images.device)
                values.append(judge(torch.where(mask, images[at], empty[at]), i))
            return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)

        ends = torch.stack([judge.whole(empty), judge.clean], dim=-1)  # (B, 2)
        ends = torch.stack([ends, ends.flip(-1)], dim=1)[:, None].expand(-1, several.shape[1], -1, -1)  # 2 curves, 2 ends
        if fractions is None:
            counts, values, passes = adaptive(measured, ends, patches)
        else:
            counts = torch.tensor([round(fraction * patches) for fraction in fractions])
            values, passes = regular(measured, ends, counts[1:-1]), torch.tensor(2 * (len(counts) - 2))

    finite = several.isfinite().all(-1, keepdim=True).cpu()
    insertion, deletion = (torch.where(finite, value, torch.nan).reshape(*maps.shape[:-1], -1) for value in values.unbind(2))
    passes = passes.expand(several.shape[:2]).reshape(maps.shape[:-1])
    return Curves(counts.double() / patches, insertion, deletion, judge.followed, fill, passes)


Measured = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def regular(measured: Measured, ends: Tensor, inner: Tensor) -> Tensor:
    """Curves (B, M, 2, F + 2) at F inner counts of patches; ends: (B, M, 2, 2)."""
    index = torch.cartesian_prod(*(torch.arange(size) for size in ends.shape[:3]), inner).T
    values = measured(*index).view(*ends.shape[:3], len(inner))
    return torch.cat([ends[..., :1], values, ends[..., 1:]], dim=-1)


def adaptive(measured: Measured, ends: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (P + 1), curves there (B, M, 2, P + 1), passes for both curves of a map (B, M).

    Of a curve that only rises or only falls between two points, the area is known but for half of
    rise times width. The gap in which that is largest is halved, and the point joins the curve.
    """
    inner = torch.tensor(sorted({round(fraction * patches) for fraction in FRACTIONS} - {0, patches}), dtype=torch.int64)
    values = regular(measured, ends, inner)
    first = torch.cat([torch.tensor([0]), inner, torch.tensor([patches])])
    counts, passes = first.expand(values.shape).clone(), torch.full(ends.shape[:3], len(inner))
    for _ in range(MOST - len(inner)):
        width = counts.diff(dim=-1)
        doubt = (values.diff(dim=-1).abs() * width / (2 * patches)).where(width > 1, 0.0)
        # equal to rounding is equal, so that batches of another size choose the same
        most, gap = (1e6 * doubt).round().max(-1)
        wanted = (doubt.sum(-1) > TOLERANCE) & (most > 0)
        if not wanted.any():
            break
        at = wanted.nonzero().T
        new, value = torch.full(ends.shape[:3], patches), ends[..., 1].clone()  # a curve that has enough repeats its end
        new[*at] = (counts.gather(-1, gap[..., None])[..., 0] + width.gather(-1, gap[..., None])[..., 0] // 2)[*at]
        value[*at] = measured(*at, new[*at])
        counts, place = torch.cat([counts, new[..., None]], dim=-1).sort(dim=-1, stable=True)
        values = torch.cat([values, value[..., None]], dim=-1).gather(-1, place)
        passes += wanted
    every = np.arange(patches + 1)
    lines = [np.interp(every, *points) for points in zip(counts.flatten(0, 2), values.flatten(0, 2), strict=True)]
    return torch.from_numpy(every), torch.from_numpy(np.stack(lines)).view(*ends.shape[:3], -1), passes.sum(-1)


def random_maps(grid: tuple[int, int], numbers: Iterable[int], orders: int = 2, seed: int = 0) -> Tensor:
    """Maps (B, orders, P) of random values for the images of these numbers.

    They are drawn by seed and number alone.
    """
    patches = grid[0] * grid[1]
    values = [[_stream(seed, 1, turn, number).random(patches) for turn in range(orders)] for number in numbers]
    return torch.from_numpy(np.array(values, np.float64).reshape(-1, orders, patches))


def compare(ours: Curves, base: Curves, draws: int = 2000, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """How much better than other orders, in area, with 95 % intervals.

    Returns {name: (mean over images, low, high)}.

    ours: (B, F). base: (B, M, F) of the same images, the mean over M counts: of `random_maps`, or
    of the centre prior. "insertion": ours minus theirs. "deletion": theirs minus ours.
    "difference": their sum. All are 0 where ours is as good, and at most 1, 1 and 2; an interval
    that holds 0 shows nothing.
    """
    insertion = ours.insertion_area - base.insertion_area.mean(-1)
    deletion = base.deletion_area.mean(-1) - ours.deletion_area
    differences = {"insertion": insertion, "deletion": deletion, "difference": insertion + deletion}
    return {name: bootstrap(value, draws=draws, seed=seed) for name, value in differences.items()}


def record(curves: Curves, random: Curves, centre: Curves | None = None, *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """All that is to be shown of one map: means over images as numbers and lists for JSON.

    curves: (B, F). random: (B, orders, F). centre: (B, F), those of the centre prior, of the same
    images.
    """
    points = len(curves.fractions)
    drawn = torch.linspace(0, points - 1, min(points, DRAWN)).round().long()
    lists = {
        "fractions": curves.fractions,
        "insertion": curves.insertion.nanmean(0),
        "deletion": curves.deletion.nanmean(0),
        "random_insertion": random.insertion.flatten(0, 1).nanmean(0),
        "random_deletion": random.deletion.flatten(0, 1).nanmean(0),
    }
    differences = compare(curves, random, draws, seed)
    if centre is not None:
        base = replace(centre, insertion=centre.insertion[:, None], deletion=centre.deletion[:, None])
        differences["centre"] = compare(curves, base, draws, seed)["difference"]
    images = int(curves.insertion_area.isfinite().sum())
    return {
        "followed": curves.followed,
        "fill": curves.fill,
        "images": images,
        "passes": curves.passes.double().mean().item(),
        **{name: value[drawn].tolist() for name, value in lists.items()},
        "insertion_area": curves.insertion_area.nanmean().item(),
        "deletion_area": curves.deletion_area.nanmean().item(),
        "insertion_difference": with_interval(differences["insertion"], images),
        "deletion_difference": with_interval(differences["deletion"], images),
        "difference": with_interval(differences["difference"], images),
        **({"difference_to_centre": with_interval(differences["centre"], images)} if centre is not None else {}),
    }


def with_interval(difference: tuple[float, float, float], images: int) -> list[float | None]:
    """[mean, low, high]; of fewer than ENOUGH images no interval, which would be chance."""
    mean, low, high = difference
    return [mean, low, high] if images >= ENOUGH else [mean, None, None]


# -- images with some of their patches -------------------------------------------------------------


def order(maps: Tensor, numbers: Sequence[int], seed: int = 0) -> Tensor:
    """The turn of each patch, 0 for the highest value of its map, equal ones in random order.

    (B, M, P) -> (B, M, P).
    """
    patches = maps.shape[-1]
    mixed = torch.from_numpy(np.array([_stream(seed, 2, 0, number).permutation(patches) for number in numbers]))
    mixed = mixed[:, None].expand(maps.shape)
    shuffled = maps.detach().cpu().double().gather(-1, mixed)
    sequence = mixed.gather(-1, shuffled.argsort(dim=-1, descending=True, stable=True))  # patches, highest first
    return torch.empty_like(sequence).scatter_(-1, sequence, torch.arange(patches).expand(maps.shape))


def pixels(shown: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Which pixels belong to patches that are shown, whole pixels.

    (n, P) bool -> (n, 1, height, width).
    """
    (rows, cols), (height, width) = grid, size
    row, col = torch.arange(height) * rows // height, torch.arange(width) * cols // width
    return shown.view(-1, 1, rows, cols)[:, :, row][..., col]


def filled(images: Tensor, fill: str, black: Sequence[float] | None = None) -> Tensor:
    """The images (B, C, h, w) with every patch away.

    They show their mean colour, a blur of a tenth of each side, or black (C values).
    """
    if fill == "black":
        if black is None or len(black) != images.shape[1]:
            raise SettingError(
                "Found fill='black' where it is not known how pixels were normalised. Expected the value of black in each of "
                f"{images.shape[1]} channels. Look with a model that has a pretrained_cfg, or give black."
            )
        return images.new_tensor(black).view(-1, 1, 1).expand_as(images)
    if fill == "mean":
        return images.mean((-2, -1), keepdim=True).expand_as(images)
    down, across = (gaussian(side, BLUR * side).to(images) for side in images.shape[-2:])
    return down @ images @ across.mT


def _stream(seed: int, use: int, turn: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, use], counter=[0, 0, turn, number]))


# -- what a model says -----------------------------------------------------------------------------


class Judge:
    """How much a model still says of changed images what it said of the whole ones.

    `followed` tells in what measure.

    clean: (B,) what it says of the whole ones.
    """

    def __init__(self, model: nn.Module, images: Tensor, batch_size: int, classes: bool | None):
        self.model, self.batch_size = model, batch_size
        outputs = [model(part) for part in images.split(batch_size)]
        self.classes = has_classes(model, outputs[0]) if classes is None else classes
        self.followed = PROBABILITY if self.classes else COSINE
        answers = torch.cat([self.read(output) for output in outputs])
        self.target = answers.argmax(-1) if self.classes else answers
        self.clean = self.score(answers, self.target)

    def __call__(self, images: Tensor, owner: Tensor) -> Tensor:
        """(n,) float64: probability or cosine of images (n, C, h, w).

        They are made of those whose numbers are in `owner` (n).
        """
        return self.score(self.read(self.model(images)), self.target[owner])

    def whole(self, images: Tensor) -> Tensor:
        """The same of one image for each of the whole ones (B,)."""
        numbers = torch.arange(len(images)).split(self.batch_size)
        return torch.cat([self(images[part.to(images.device)], part) for part in numbers])

    def score(self, answers: Tensor, target: Tensor) -> Tensor:
        if self.classes:
            return probabilities(self.model, answers).gather(-1, target[:, None])[:, 0]
        return F.cosine_similarity(answers, target, dim=-1)

    def read(self, output: Any) -> Tensor:
        """The output as (n, classes) logits or (n, width) features, float64, on the CPU."""
        value = answer(output).flatten(1).cpu().double()
        against_nought = self.classes and value.shape[-1] == 1 and not multi_label(self.model)
        return F.pad(value, (1, 0)) if against_nought else value


def answer(output: Any) -> Tensor:
    """The tensor that a model answers with.

    Its logits, else a tensor itself, else the first one in a tuple or record.

    Raises DataError if there is none.
    """
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in (_logits(output), output, *values):
        if isinstance(value, Tensor):
            return value
    raise DataError(
        f"Found an output of type {type(output).__name__}; expected a tensor, something with logits, or a tuple with a "
        "tensor. Wrap the model in a module that returns its logits."
    )


def has_classes(model: nn.Module, output: Any) -> bool:
    """Whether an output is logits of classes, as `curves` decides.

    A record without logits holds features.
    """
    if isinstance(output, (Tensor, tuple, list)):
        return answer(output).ndim == 2 and getattr(model, "num_classes", None) != 0
    return isinstance(_logits(output), Tensor)


def _logits(output: Any) -> Any:
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def _checked(
    images: Tensor,
    maps: Tensor,
    grid: tuple[int, int],
    fractions: Sequence[float] | None,
    fill: str,
    numbers: Iterable[int] | None,
) -> list[int]:
    """The numbers of the images. Raises as `curves` does."""
    numbers = list(range(len(images)) if numbers is None else numbers)
    fits = images.ndim == 4 and len(images) > 0 and maps.ndim in (2, 3) and maps.shape[-1] == grid[0] * grid[1] > 0
    if not fits or not len(images) == len(maps) == len(numbers):
        raise DataError(
            f"Found images {tuple(images.shape)}, {len(numbers)} numbers, maps {tuple(maps.shape)} and a grid of {grid[0]} x "
            f"{grid[1]}; expected (B, C, h, w), B, and (B, P) or (B, M, P) with P the patches of the grid. Bring them together."
        )
    check_settings(fill, fractions)
    return numbers


def check_settings(fill: str, fractions: Sequence[float] | None) -> None:
    """Raise SettingError for a fill that is none, or fractions that do not rise from 0 to 1."""
    fractions = FRACTIONS if fractions is None else fractions
    if len(fractions) < 2 or fractions[0] != 0 or fractions[-1] != 1 or list(fractions) != sorted(set(fractions)):
        raise SettingError(f"Found fractions {tuple(fractions)}; expected them to rise from 0 to 1. Begin with 0, end with 1.")
    if fill not in FILLS:
        raise SettingError(f"Found fill={fill!r}; expected one of {', '.join(FILLS)}. Choose one of them.")


# -- randomised weights ----------------------------------------------------------------------------


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model with the entries of each parameter shuffled among themselves.

    They are drawn by `seed`.

    Every tensor keeps its distribution; what was learned is gone. Buffers stay. The model itself is
    not touched.
    """
    shuffled, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            entries = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[entries].view_as(parameter))
    return shuffled


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of maps (..., P) patch by patch, -1 to 1: (...) float64.

    Ties share their mean rank.

    Of a map with its counterpart from randomised weights: near 1, the map does not come from what
    was learned. NaN where a map is the same everywhere, or not all finite.
    """
    centred = [ranks(maps) - (maps.shape[-1] + 1) / 2 for maps in (first, second)]
    product = (centred[0] * centred[1]).sum(-1)
    correlation = product / (centred[0].square().sum(-1) * centred[1].square().sum(-1)).sqrt()
    return torch.where(first.isfinite().all(-1) & second.isfinite().all(-1), correlation, torch.nan)
