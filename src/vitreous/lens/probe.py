"""What is read from a pass: `Probe` and `Observer`, and the records of measures and maps.

A `Probe` says what it measures, its `Observer` follows one batch, a `Readout` holds the result.

A probe is one file of `lens/probes/`, or a class from elsewhere: see `docs/how-to/add-a-probe.md`.
`look` runs all of them in one pass. `Measure` (a number), `Component` (a map) and `Source` (what
rows are of) are the records by which a reading says what its columns and maps are; pages, tables
and alarms take labels, units and bounds from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from torch import Tensor, nn

from vitreous.base.catalogue import Catalogue
from vitreous.base.errors import SettingError
from vitreous.base.text_form import Settings
from vitreous.lens.direction import Direction
from vitreous.lens.formulas.row_statistics import RowBlock
from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.tap import Layouts
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates

T = TypeVar("T")


@dataclass(frozen=True)
class Measure:
    """A number that a probe gives: a column of the table.

    low, high: the least and the largest possible value; None: no bound. better: which way is
    desired, if either is. explains: one sentence for the page. short: heading in the table of the
    command line; "" leaves it out there. A name that ends with "_paper" is a form as published,
    which pages show only when asked.
    """

    name: str
    label: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    better: Literal["higher", "lower", "neither"] = "neither"
    explains: str = ""
    short: str = ""


@dataclass(frozen=True)
class Component(Measure):
    """A kind of map. Maps are called "NAME/LAYER", layer -1 for one of the whole model.

    signed: below zero is the other side; per_head: maps are (B, H, *grid), else (B, *grid). scored:
    compared with masks; curves: insertion and deletion are made in its order, where they are asked
    for.
    """

    signed: bool = False
    per_head: bool = False
    scored: bool = True
    curves: bool = True


@dataclass(frozen=True)
class Source:
    """What rows of the table are of.

    form: how a page draws them: "layers", each measure by layer among the indicators; "bars", in a
    part of their own, the kinds of a layer side by side, as parts of a sum; "matrix", in a part of
    their own, a table of layers and heads.
    """

    name: str
    label: str
    explains: str = ""
    form: Literal["layers", "bars", "matrix"] = "layers"


@dataclass(frozen=True)
class Figure:
    """Values that a page draws and neither table nor maps hold.

    They are `Readout.others["figure/NAME/LAYER"]`, of each image (n, C, K), a curve for each of C
    heads, or (n, C, rows, columns), a picture each; the page draws means over images. of: what C
    counts. axis: of curves. `Readout.details` under the same key may give "names" of the C, joined
    by "|". explains: as of a measure.
    """

    name: str
    label: str
    unit: str = ""
    of: str = "head"
    axis: str = ""
    explains: str = ""


ATTENTION = Source("attention", "Attention maps", "Measured on the maps that the images produced.")


@dataclass
class Rows:
    """Some rows of the table, of one layer.

    values: {measure: (images, heads)}, from image number `first` on.

    first: -1: of no single image. together: of all heads together, (images, 1). kind: that of the
    attention, or "effective". Rows of several probes with the same layer, source and kind become
    one.
    """

    layer: int
    source: str
    kind: str
    values: dict[str, Tensor]
    first: int = -1
    together: bool = False


@dataclass
class Readout:
    """What a probe read of one batch.

    maps: {"NAME/LAYER": (B, [H,] *grid)}. classes: {NAME: the class of each image that its maps are
    for}. confidence: {map: (B,)} that its sign is right. details:
    {map: {"rule": how it was made, ...}}, the same for all images. notes: what was left out, and
    why, in words. others: tensors that a part keeps as they are, by names that are not of maps,
    each (n, ...); those of the batches are joined. layers: records of modules that were measured
    and are no attention, as `layers` of a reading has them. pictures: {NAME: (B, C, h, w)} the
    images that a component's maps are of, as the model takes them, where those are not the images
    of the look.
    """

    rows: list[Rows] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)
    confidence: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, dict[str, str]] = field(default_factory=dict)
    classes: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class BatchInfo:
    """One batch: images (B, C, h, w) as the model takes them.

    With `noisy` as many noisy copies follow the `count` images.

    first: number of the first image. block: numbers that a buffer may hold. choices: what the first
    batch of a look decided for all others, such as {"u/6": "raw"}; text, kept with the reading.
    loss: of (output, targets), for probes that need one. query_budget: megabytes of the whole look.
    masks: of the images, (h, w) each, None where there is none. mean, std: by which pixels of
    [0, 1] were normalised; None where that is not known. shown: goes through long work with a
    progress bar, of (items, what they are).
    """

    images: Tensor
    count: int
    layouts: Layouts
    noisy: bool = False
    first: int = 0
    seed: int = 0
    block: int = 1 << 20
    class_token: bool = True
    direction: Direction | None = None
    choices: dict[str, str] = field(default_factory=dict)
    loss: Callable[[Any, Any], Tensor] | None = None
    query_budget: float = 0.0
    masks: Sequence[np.ndarray | None] = ()
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    objects: dict[Any, Any] = field(default_factory=dict)
    shown: Callable[[Sequence[Any], str], Iterable[Any]] = lambda items, what: items

    def clean(self, x: Tensor) -> Tensor:
        """The part of x (B, ...) that is of the images themselves, without their noisy copies."""
        return x[: len(x) // 2] if self.noisy else x

    def shared(self, kind: type[T]) -> T:
        """The one object `kind(batch)` of this batch.

        For what several probes need and should be computed once.
        """
        if kind not in self.objects:
            self.objects[kind] = kind(self)
        return self.objects[kind]


class Observer:
    """Follows one batch for a probe, and holds what that needs, nothing longer.

    Override what is wanted.

    `readout` is what it fills. Tensors of a call are valid during the callback alone.
    """

    def __init__(self, probe: Probe, model: nn.Module, batch: BatchInfo):
        self.probe, self.model, self.batch, self.readout = probe, model, batch, Readout()
        self.initialise()

    def initialise(self) -> None:
        """Set up what the batch needs, before the pass."""

    def on_rows(self, block: RowBlock) -> None:
        """Some rows of the map of the attention that `on_attention` gets next, in order.

        All probes share them.
        """

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        """One attention, of all images of the batch."""

    def on_output(self, name: str, call_index: int, output: Any) -> None:
        """The output of one of the modules that `Probe.outputs` names."""

    def on_layer(self, features: LayerFeatures) -> None:
        """One layer, as soon as it is complete; its tensors are released afterwards."""

    def finish(self) -> Readout:
        """What came of it, when the pass is over."""
        return self.readout


class RowObserver(Observer):
    """Sums over the rows of each map, and of the effective map where the model has one.

    sums: a class with `add(block)` and `values()`: {measure: value} per image and head (B, H), and
    {measure: value} of all heads together (B, 1), which effective maps leave out.
    """

    sums: ClassVar[type]

    def initialise(self) -> None:
        self.by_map: dict[bool, Any] = {}  # whether it is the effective map

    def on_rows(self, block: RowBlock) -> None:
        self.by_map.setdefault(block.effective, self.sums()).add(block)

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        for effective, sums in self.by_map.items():
            heads, together = sums.values()
            kind, first = "effective" if effective else call.kind, self.batch.first
            self.readout.rows.append(Rows(where.layer, "attention", kind, heads, first))
            if not effective:
                self.readout.rows.append(Rows(where.layer, "attention", kind, together, first, together=True))
        self.by_map = {}


@dataclass(frozen=True, kw_only=True)
class Probe(Settings):
    """Something to be read from a pass. Says what it measures.

    An `observer` follows each batch.

    paper: authors, year, arXiv id. order: where its measures and maps stand among those of others.
    passes: it needs passes of its own (`extra`); such probes run only where they are asked for by
    name, or where `by_default` says so.
    """

    paper: ClassVar[str] = ""
    measures: ClassVar[tuple[Measure, ...]] = ()
    components: ClassVar[tuple[Component, ...]] = ()
    sources: ClassVar[tuple[Source, ...]] = (ATTENTION,)
    figures: ClassVar[tuple[Figure, ...]] = ()
    observer: ClassVar[type[Observer]] = Observer
    order: ClassVar[int] = 100
    passes: ClassVar[bool] = False

    def for_model(self, model: nn.Module) -> Probe:
        """The probe as it is for this model, for those whose measures or maps depend on it."""
        return self

    def by_default(self, model: nn.Module | None) -> bool:
        """Whether it is among "all"; model: None, where it is not known."""
        return not self.passes

    def reads_modules(self, model: nn.Module) -> bool:
        """Whether it reads something of this model even if that has no attention."""
        return False

    def outputs(self, model: nn.Module, batch: BatchInfo) -> Iterable[str]:
        """Names of the modules whose output it wants to see."""
        return ()

    def start(self, model: nn.Module, batch: BatchInfo) -> Observer:
        """The observer of one batch."""
        return self.observer(self, model, batch)

    def extra(self, model: nn.Module, batch: BatchInfo, targets: Sequence[int]) -> Readout:
        """Passes of its own, after the common one, with `passes`.

        targets: the label of each image, -1: unknown.

        The model is in eval mode; gradients are off until the probe turns them on. Both, and the
        parameters' `grad`, are afterwards as before.
        """
        return Readout()


PROBES = Catalogue("lens/probes", Probe, "probe")


def chosen(probes: Sequence[str | Probe] | None, model: nn.Module | None = None) -> list[Probe]:
    """Probes from text forms or objects, in order.

    None, and the text "all": those of `lens/probes` without `passes`, and others that this model
    calls for (`Probe.by_default`).

    A dotted name imports a class of another package. model: which they are for.
    Raises UnknownName, and SettingError where two probes give the same measure or map.
    """
    items: list[Probe] = []
    ours: list[Probe] = []  # of "all": one that is given beside it takes its place
    for probe in ["all"] if probes is None else [probes] if isinstance(probes, str | Probe) else probes:
        if probe == "all":
            ours = [item for item in (PROBES.item(name)() for name in PROBES.files) if item.by_default(model)]
        else:
            items.append(PROBES.parse(probe, foreign=True) if isinstance(probe, str) else probe)
    items += [item for item in ours if not any(type(other) is type(item) for other in items)]
    items = items if model is None else [probe.for_model(model) for probe in items]
    names = [record.name for probe in items for record in (*probe.measures, *probe.components)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingError(f"Found {', '.join(twice)} in two probes. Expected each measure and map once. Leave one out.")
    return sorted(items, key=lambda probe: (probe.order, probe.name))


def records(probes: Sequence[Probe], kind: Literal["measures", "components", "sources", "figures"]) -> dict[str, Any]:
    """{name: record} of what these probes give, in order."""
    return {record.name: record for probe in probes for record in getattr(probe, kind)}


def table(rows: Sequence[Rows], probes: Sequence[Probe]) -> dict[str, np.ndarray]:
    """{column: (rows,)} of some rows, sorted.

    Columns: layer, head, image, source, kind, then each measure of these probes as float64.

    Sorted by layer, source, kind, image and head. NaN: not applicable.
    """
    names, sources = records(probes, "measures"), list(records(probes, "sources"))
    merged: dict[tuple, dict[str, np.ndarray]] = {}
    for part in rows:
        values = {name: value.detach().double().cpu().numpy() for name, value in part.values.items()}
        if not values.keys() <= names.keys() or part.source not in sources:
            wrong = sorted(values.keys() - names.keys()) or [part.source]
            raise SettingError(
                f"Found values of {', '.join(wrong)} in a readout. Expected measures and sources that its probe declares. "
                "Add them to `measures` or `sources` of the probe."
            )
        key = (part.layer, sources.index(part.source), part.kind == "effective", part.kind, part.first, part.together)
        merged.setdefault(key, {}).update(values)
    merged = dict(sorted(merged.items()))
    shapes = [next(iter(values.values())).shape for values in merged.values()]  # (images, heads)
    sizes = np.array([images * heads for images, heads in shapes], int)
    whole = (("layer", 0, int), ("source", 1, int), ("kind", 3, str))
    columns = {name: np.repeat(np.array([key[at] for key in merged], of), sizes) for name, at, of in whole}
    columns |= {name: np.full(sizes.sum(), -1) for name in ("head", "image")}
    columns |= {name: np.full(sizes.sum(), np.nan) for name in names}
    end = 0
    for ((*_, first, together), values), (images, heads) in zip(merged.items(), shapes, strict=True):
        start, end = end, end + images * heads
        if not together:
            columns["head"][start:end] = np.tile(np.arange(heads), images)
        if first >= 0:
            columns["image"][start:end] = np.repeat(np.arange(images) + first, heads)
        for name, value in values.items():
            columns[name][start:end] = value.ravel()
    order = np.lexsort([columns["head"], columns["image"], columns["kind"] == "effective", columns["source"], columns["layer"]])
    columns["source"] = np.array(sources, str)[columns["source"]]
    return {name: columns[name][order] for name in ("layer", "head", "image", "source", "kind", *names)}


def name_range(names: Sequence[str]) -> str:
    """The names of layers, for a note: the first, the last and how many."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
