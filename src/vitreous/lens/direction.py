"""A direction of a model's features that points at the subject, found without masks.

It is calibrated once, on photographs.

Letters: B batch, P patches in raster order on a grid (rows, cols), D width. Features of a layer:
"k" keys, "o" output of the attention, "x" tokens after the block, for patches alone. Z: their rows
brought to unit length and centred (`unit_rows`).

    w_f = mean over photographs of Z_f^T c / mean |Z_f|_F^2
    Zw  = sum_f Z_f w_f

c is a bump at the centre, where photographers put subjects; Zw is a number per patch, high on the
subject, wherever it is.

The bump enters through the calibration alone, never into the map of an image: a bump per image
would score as well on centred photographs, and below chance elsewhere. For the same reason,
agreement with the bump on further photographs is no way to choose features: early layers that know
the position agree best. `Scan` shows the model one corner of each photograph instead. There the
subject stands off the centre; the feature whose Zw follows it there finds subjects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vitreous.base.errors import DataError, HostError
from vitreous.base.files import write
from vitreous.data.views import Views
from vitreous.layers.geometry import centre_prior
from vitreous.layers.linear import Linear
from vitreous.layers.spectral import unit_rows
from vitreous.lens.formulas.maps import correlation, log_attention, standardised
from vitreous.lens.layer_features import FEATURES, LayerFeatures, layer_features
from vitreous.lens.tap import trace

FORMAT = 1
FILE = "foreground.safetensors"  # beside model.safetensors: the direction that travels with a model
SIGMA = 0.25  # of the bump, in sides of the image
SIDE = 0.6  # of a corner of a photograph, in sides of the photograph
BEST = 3  # features taken of each kind, with at least
NEAR = 0.5  # of the strength of the best, and none weaker; and
PAIR = 2  # layers of class attention: chosen on ECSSD images of even position, ViT-Tiny/16 (benchmarks/foreground)
WEAK = 0.2  # a scan whose best feature follows subjects less has found none: untrained ViTs reach 0.13, the real one 0.47
LEAST = 8  # photographs: each corner in each half
SAMPLE = 16  # values of each parameter that a direction remembers of its model
CHANGED = 0.05  # relative difference of these values beyond which a model is another one; bfloat16 makes 0.002

Feature = tuple[int, str]  # layer and kind


@dataclass(frozen=True)
class Direction:
    """Where a model's features point at the subject: one vector per feature.

    features: (layer, kind), a kind of `layer_features.FEATURES`; vectors: (D_f,) each; attention:
    layers whose class attention finds subjects, best first, () without a class token; photographs:
    how many; grid: of the features; strength: {"k6": 0.45}, how well each feature that was scanned
    follows the subject, -1 to 1, "a" for class attention; model: class, number of parameters,
    digest of their names and shapes; sample: a few values of each parameter.
    """

    features: tuple[Feature, ...]
    vectors: tuple[Tensor, ...]
    attention: tuple[int, ...]
    photographs: int
    grid: tuple[int, int]
    strength: dict[str, float] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    sample: Tensor = field(default_factory=lambda: torch.zeros(0))

    def along(self, rows: Sequence[Tensor]) -> Tensor:
        """Zw (B, P) of the unit, centred rows (B, P, D_f) of each feature, in order."""
        for feature, w, z in zip(self.features, self.vectors, rows, strict=True):
            if z.shape[-1] != len(w):
                raise HostError(
                    f"Found {FEATURES[feature[1]]} of layer {feature[0]} that are {z.shape[-1]} wide. Expected {len(w)}, as "
                    "in the model of this direction. Calibrate this model: vitreous calibrate MODEL PHOTOS."
                )
        return sum(z @ w.to(z) for z, w in zip(rows, self.vectors, strict=True))

    def check(self, model: nn.Module) -> None:
        """Raise HostError unless this is the model that was calibrated.

        It has the same shapes and, nearly, the same weights.
        """
        here, sample = identity(model), sample_of(model)
        if here["digest"] != self.model.get("digest"):
            reason = "whose parameters have other names or shapes"
        elif (change := difference(sample, self.sample)) > CHANGED:
            reason = f"whose weights are others, by {change:.0%}"
        else:
            return
        raise HostError(
            f"Found a {here['class']} with {here['parameters']:,} parameters, {reason}. Expected the "
            f"{self.model.get('class')} with {self.model.get('parameters', 0):,} parameters that this direction was calibrated "
            "on. Calibrate this model: vitreous calibrate MODEL PHOTOS."
        )

    def save(self, path: str | Path) -> None:
        """Write a small .safetensors file: the vectors, and everything else as metadata."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("vectors", "sample")}
        tensors = {f"vectors/{i}": w.detach().cpu().float().contiguous() for i, w in enumerate(self.vectors)}
        tensors["sample"] = self.sample.detach().cpu().float().contiguous()
        metadata = {"vitreous": json.dumps({"direction": FORMAT, **fields}, sort_keys=True)}
        write(Path(path), lambda part: safetensors.torch.save_file(tensors, part, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read what `save` wrote. Raises DataError for a file that is no direction."""
        advice = "Make one with: vitreous calibrate MODEL PHOTOS --out FILE."
        try:
            with safe_open(path, "pt") as file:
                fields = json.loads((file.metadata() or {}).get("vitreous", "{}"))
                if fields.pop("direction", None) != FORMAT:
                    raise ValueError("it holds something else")
                vectors = tuple(file.get_tensor(f"vectors/{i}") for i in range(len(fields["features"])))
                sample = file.get_tensor("sample")
            fields["features"] = tuple((int(layer), str(kind)) for layer, kind in fields["features"])
            fields["attention"], fields["grid"] = tuple(fields["attention"]), tuple(fields["grid"])
            return cls(vectors=vectors, sample=sample, **fields)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataError(
                f"Found {str(path)!r}, which cannot be read as a direction: {reason}. Expected a .safetensors file of "
                f"format {FORMAT}. {advice}"
            ) from error


# -- which model -----------------------------------------------------------------------------------


def identity(model: nn.Module) -> dict[str, Any]:
    """Class, number of parameters, and a digest of their names and shapes.

    The same in any precision and on any device.
    """
    shapes = [(name, *p.shape) for name, p in model.named_parameters()]
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "digest": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
    }


@torch.no_grad()
def sample_of(model: nn.Module) -> Tensor:
    """(n, SAMPLE) float32: values at even distances in each parameter.

    Of parameters of two or more dimensions.

    For the weight of a layer of ours that overrides it (an adapter), values of the effective
    weight. Parameters that a weight is made of stand for themselves.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    owners = {id(module.weight): module for module in layers if "weight" in module._parameters}
    rows = []
    for p in model.parameters():
        if p.ndim >= 2 and p.numel():
            values = owners[id(p)].effective_weight() if id(p) in owners else p
            where = torch.linspace(0, p.numel() - 1, SAMPLE, device=p.device).long()
            rows.append(values.detach().flatten()[where].float().cpu())
    return torch.stack(rows) if rows else torch.zeros(0, SAMPLE)


def difference(values: Tensor, expected: Tensor) -> float:
    """|values - expected| / |expected|, exceeded by one parameter in ten.

    Infinite for another number of parameters.

    Adapters change few parameters, so a median would not see them; a new head alone does not make
    another model.
    """
    if values.shape != expected.shape:
        return float("inf")
    if not len(values):
        return 0.0
    size = torch.linalg.vector_norm(expected, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return (torch.linalg.vector_norm(values - expected, dim=1) / size).quantile(0.9).item()


# -- the command -----------------------------------------------------------------------------------


def find_direction(
    model: nn.Module, photographs: Any, *, batch: int = 16, progress: Callable[[int, int], None] | None = None
) -> Direction:
    """Calibrate a model on photographs without masks or labels.

    Two forward passes of each: minutes for some hundreds.

    photographs: a tensor (n, C, h, w), normalised for the model, or what `look` takes: a folder,
    paths, images. A few hundred of various subjects that tend to be in the middle; ten already give
    a usable direction. progress(done, of): called after each batch of either pass. Raises HostError
    for a model without attention over places, DataError for photographs that are too few or cannot
    be read, and where no feature follows their subjects.
    """
    scan, layouts, count = Scan(), None, len(photographs) if isinstance(photographs, Tensor) else len(Views(model, photographs))
    for step, take in enumerate((scan.learn, scan.judge)):
        for first, images in batches(model, photographs, batch):
            layouts = trace(model, images) if layouts is None else layouts
            take(layer_features(model, images if take == scan.learn else corners(images, first), layouts))
            if progress is not None:
                progress(step * count + first + len(images), 2 * count)
    return scan.direction(model)


def batches(model: nn.Module, images: Any, size: int) -> Iterator[tuple[int, Tensor]]:
    """Batches in order: (number of the first image, images (B, C, h, w)).

    They are on the model's device and in its precision.
    """
    views = images if isinstance(images, Tensor) else Views(model, images)
    like = next(model.parameters(), torch.zeros(0))
    for first in range(0, len(views), size):
        if isinstance(images, Tensor):
            part = images[first : first + size]
        else:
            part = torch.stack([views[i].pixels for i in range(first, min(first + size, len(views)))])
        yield first, part.to(like.device, like.dtype)


# -- the scan --------------------------------------------------------------------------------------


def centre_bump(grid: tuple[int, int], at: tuple[float, float] = (0.5, 0.5), sigma: float = SIGMA) -> Tensor:
    """exp(-r^2 / 2 sigma^2) around `at` (y, x), (P,) float32, standardised.

    Lengths are in sides of the image.
    """
    return standardised(centre_prior(grid, sigma, at)).float()


def corners(images: Tensor, first: int) -> Tensor:
    """One corner of each of images (B, C, h, w), in turn, at the size of the whole.

    first: number of the first image.
    """
    h, w = images.shape[-2:]
    down, across = round(SIDE * h), round(SIDE * w)
    crops = []
    for i, image in enumerate(images, start=first):
        top, left = (h - down) * (i % 4 // 2), (w - across) * (i % 2)
        part = image[None, :, top : top + down, left : left + across]
        crops.append(interpolate(part.float(), (h, w), mode="bicubic", antialias=True, align_corners=False)[0])
    return torch.stack(crops).to(images)


def subject_in_corner(grid: tuple[int, int], image: int) -> Tensor:
    """(P,): where the bump of photograph number `image` is in its corner.

    Less what the corner's own bump explains.
    """
    at = tuple((0.5 - (1 - SIDE) * end) / SIDE for end in (image % 4 // 2, image % 2))
    bump, own = centre_bump(grid, at, SIGMA / SIDE), centre_bump(grid)
    return standardised(bump - (bump * own).mean() * own)


@dataclass
class Sums:
    """Sums of the scan for one feature.

    product: Z^T c of two halves of the photographs (2, D). energy: |Z|_F^2. matched: correlations
    in corners.
    """

    grid: tuple[int, int]
    product: Tensor
    energy: float = 0.0
    matched: float = 0.0

    def vector(self) -> Tensor:
        return (self.product.sum(0) / max(self.energy, torch.finfo(torch.float64).tiny)).float()


class Scan:
    """Calibrates every feature on photographs (`learn`), then judges it (`judge`).

    It is judged on one corner of each photograph, without masks.

    Of two halves of the photographs, each is judged with the vectors of the other. Batches may be
    of any size; both passes see the same photographs in the same order. Layers: as
    `lens.layer_features` gives them.
    """

    def __init__(self) -> None:
        self.features: dict[Feature, Sums] = {}
        self.attention: dict[int, float] = {}
        self.photographs = self.judged = 0

    def learn(self, layers: Iterable[LayerFeatures]) -> None:
        """Take in whole photographs."""
        count = 0
        for layer in layers:
            for kind, grid, z in rows_of(layer):
                product = (centre_bump(grid).to(z) @ z).cpu().double()  # (B, D)
                empty = Sums(grid, torch.zeros(2, z.shape[-1], dtype=torch.float64))
                sums = self.features.setdefault((layer.layer, kind), empty)
                sums.product.index_add_(0, halves(self.photographs, len(z)), product)
                sums.energy += z.square().sum((1, 2)).cpu().double().sum().item()
                count = len(z)
        self.photographs += count

    def judge(self, layers: Iterable[LayerFeatures]) -> None:
        """Take in the `corners` of the photographs."""
        count = 0
        for layer in layers:
            for kind, grid, z in rows_of(layer):
                count = len(z)
                sums, other = self.features[layer.layer, kind], 1 - halves(self.judged, count)
                along = torch.einsum("bpd,bd->bp", z, sums.product[other].to(z))
                sums.matched += correlation(along, self.targets(grid, count).to(z)).cpu().double().sum().item()
            if layer.has_class and layer.attention is not None and layer.grid is not None:
                a = log_attention(layer.attention)
                match = correlation(a, self.targets(layer.grid, len(a)).to(a)).cpu().double().sum().item()
                self.attention[layer.layer] = self.attention.get(layer.layer, 0.0) + match
        self.judged += count

    def targets(self, grid: tuple[int, int], count: int) -> Tensor:
        """(count, P): `subject_in_corner` of the photographs that are judged next."""
        return torch.stack([subject_in_corner(grid, self.judged + i) for i in range(count)])

    def direction(self, model: nn.Module) -> Direction:
        """The BEST features of keys and outputs on one grid, the best PAIR of class attention.

        Raises DataError for too few photographs, or where no feature follows the subject.
        """
        if self.photographs < LEAST:
            raise DataError(
                f"Found {self.photographs} photographs to calibrate on. Expected at least {LEAST}, better a few hundred, of "
                "various subjects. Add photographs; they need no masks or labels."
            )
        strength = {feature: sums.matched / self.judged for feature, sums in self.features.items()}
        best = max(strength, key=strength.get, default=None)
        if best is None or not strength[best] > WEAK:
            text = "no feature with known places" if best is None else f"no feature above {strength[best]:.2f}"
            raise DataError(
                f"Found {text} in how well it follows the subject of {self.photographs} photographs. Expected more than "
                f"{WEAK}; an ImageNet ViT reaches 0.47. Give trained weights, and photographs whose subjects tend to be in "
                "the middle, prepared as the model expects."
            )
        chosen = self.chosen(strength, self.features[best].grid)
        attention = {layer: total / self.judged for layer, total in self.attention.items()}
        low = max(NEAR * max(attention.values(), default=0.0), 0.0)
        pair = sorted((n for n in attention if attention[n] > low), key=lambda n: (-attention[n], n))[:PAIR]
        named = {f"{kind}{layer}": value for (layer, kind), value in strength.items()}
        named |= {f"a{layer}": value for layer, value in attention.items()}
        return Direction(
            features=chosen,
            vectors=tuple(self.features[feature].vector() for feature in chosen),
            attention=tuple(pair),
            photographs=self.photographs,
            grid=self.features[best].grid,
            strength={name: round(value, 4) for name, value in sorted(named.items())},
            model=identity(model),
            sample=sample_of(model),
        )

    def chosen(self, strength: dict[Feature, float], grid: tuple[int, int]) -> tuple[Feature, ...]:
        """The BEST keys and outputs on the grid that are NEAR the best.

        Tokens only where there are neither.
        """
        low = NEAR * max(strength.values())
        ranked = sorted(strength, key=lambda feature: (-strength[feature], feature))
        ranked = [feature for feature in ranked if strength[feature] >= low and self.features[feature].grid == grid]
        kinds = ("k", "o") if any(kind in ("k", "o") for _, kind in ranked) else ("x",)
        return tuple(sorted(f for name in kinds for f in [f for f in ranked if f[1] == name][:BEST]))


def halves(first: int, count: int) -> Tensor:
    """(count,) 0 or 1: the half of photographs number first, first + 1, ...

    By fours, so that each half has all corners.
    """
    return torch.arange(first, first + count) // 4 % 2


def rows_of(layer: LayerFeatures) -> list[tuple[str, tuple[int, int], Tensor]]:
    """(kind, grid, unit and centred rows (B, P, D)) of every feature that a layer has."""
    rows = []
    for kind in FEATURES:
        x, grid = layer.feature(kind), layer.grid if kind == "k" else layer.token_grid
        if x is not None and grid is not None:
            rows.append((kind, grid, unit_rows(x)))
    return rows
