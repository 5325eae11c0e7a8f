"""Mixing maps: which place moves which, of modules that mix places without attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vitreous.base.errors import HostError, SettingError, VitreousError, brief
from vitreous.hosts.mixer import Mixer, mixers_in
from vitreous.lens.formulas import mixing
from vitreous.lens.formulas.scores import coverage
from vitreous.lens.layer_features import first_tensor
from vitreous.lens.module_calls import Call, PlacedCall, named_modules, placed, record, refusal
from vitreous.lens.probe import BatchInfo, Component, Measure, Probe, Readout, Rows, Source
from vitreous.lens.stored_maps import packed_rows
from vitreous.lens.tap.capture_pass import prepare_images

KEY = "mixing"
SAME = 1e-3  # relative difference of two passes that rounding may make
AFFINE = 1e-4  # of affine modules
GRADIENT = 0.02  # of gradients from true small changes
CHANNELS = 15  # of an exact reading that are stored beside their root mean square
ROUTES = {
    "unit vectors": "unit vectors at each place, exactly",
    "random signs": "random signs at each place, since channels are mixed as well",
    "removal": "each token in turn replaced by the image's mean token",
    "influence": "gradients, with random signs at each place",
}


@dataclass(frozen=True)
class Measured:
    """The mixing map (M, N) of one call of a module and one image, and how it was made."""

    placed: PlacedCall
    matrix: Tensor
    route: str
    error: float
    notes: tuple[str, ...] = ()
    firing: Tensor | None = None  # (M,) share of ones in the output at each place, where all is 0 or 1


class Measurement:
    """The mixing maps of a batch."""

    def __init__(self, probe: Mixing, model: nn.Module, batch: BatchInfo):
        self.probe, self.model, self.batch, self.readout = probe, model, batch, Readout()
        self.count = max(0, min(batch.count, probe.images - batch.first))
        self.by_layer: dict[int, list[Measured]] = {}
        self.bytes = 0

    @torch.no_grad()
    def run(self) -> Readout:
        """The readout of the images of this batch that are among the first ones of the look."""
        names = self.probe.names(self.model)
        images = prepare_images(dict(self.model.named_modules()), self.batch.images)
        for i in range(self.count):
            calls = record(self.model, images[i : i + 1], names)
            for call in calls:
                self.attempt(call)
            for name in set(names) - {call.name for call in calls}:
                self.note(name, "it was not called in this pass")
        for layer, measured in sorted(self.by_layer.items()):
            call = measured[0].placed.call
            if not any(mixing.reach(each.matrix) for each in measured):
                moves = "moves each place by itself alone" if measured[0].matrix.any() else "does not move (silent or zero)"
                self.note(call.name, str(refusal(call, moves, "a module that mixes places in these images")))
            elif len(measured) == self.count:  # else it failed for some image, and a note says why
                self.add(layer, measured)
        self.limit_rows()
        return self.readout

    def note(self, name: str, reason: str) -> None:
        self.readout.notes.append(f"No mixing map of {name}: {reason}")

    def attempt(self, call: Call) -> None:
        """Measure a call; what cannot be measured gives a note."""
        try:
            measured = self.measured(call)
        except VitreousError as error:
            self.note(call.name, str(error))
        except Exception as error:  # a module may fail on what it never gets in the model
            self.note(call.name, f"it could not be run by itself ({brief(error)})")
        else:
            self.by_layer.setdefault(self.layer(call), []).append(measured)

    def layer(self, call: Call) -> int:
        """The number of a call: behind those of the attentions, the same in all batches."""
        choices = self.batch.choices
        start = int(choices.setdefault(KEY, str(len(self.batch.layouts.calls))))
        others = sum(key.startswith(f"{KEY} ") for key in choices)
        return int(choices.setdefault(f"{KEY} {call.name} {call.number}", str(start + others)))

    def measured(self, call: Call) -> Measured:
        """The map of a call. Raises HostError where there is none."""
        each = placed(call, self.batch.layouts, self.batch.images.shape[-2:])
        x, outputs = each.x, len(each.outputs.cells)
        if max(x.shape[1], outputs) > self.probe.places:
            raise HostError(
                f"Found {max(x.shape[1], outputs)} places. Expected {self.probe.places} at most, since each is a pass of the "
                "module. Raise mixing:places, or look at smaller images."
            )
        error, chunk, notes = self.checked(each)
        matrix, route = self.matrix(each, chunk, notes)
        y = each.f(x.clone())[0].float()
        binary = bool(((y == 0) | (y == 1)).all()) and bool(y.any())
        return Measured(each, matrix, route, error, tuple(notes), y.mean(-1) if binary else None)

    def checked(self, each: PlacedCall) -> tuple[float, int, list[str]]:
        """Whether f is what the model ran: its error, copies that go into one pass, notes."""
        f, x, call = each.f, each.x, each.call
        tolerance = SAME if x.dtype in (torch.float32, torch.float64) else 30 * SAME
        alone = f(x.clone()).float()
        error = mixing.relative(alone, f(x.clone()).float())
        own = first_tensor(call.output)
        if own.numel() == alone.numel() and not isinstance(call.module, Mixer):
            error = max(error, abs(float(own.float().norm() - alone.norm()) / float(alone.norm().clamp(min=1e-30))))
        if error > tolerance or not math.isfinite(error):
            raise refusal(call, f"gives another output when it is run by itself (by {error:.1g})", "the same")
        chunk = max(2, 4 * self.batch.block // x.numel())
        together = f(torch.cat([x, x.flip(1), 2 * x, x])).float()
        if max(mixing.relative(alone, together[i][None]) for i in (0, 3)) <= tolerance:
            return error, chunk, []
        return error, 1, ["an image depends on its batch mates: copies were run one by one"]

    def matrix(self, each: PlacedCall, chunk: int, notes: list[str]) -> tuple[Tensor, str]:
        """The map, and how it was made: a key of `ROUTES`."""
        f, x, probe = each.f, each.x, self.probe
        affine, linear = mixing.affine_error(f, x) if chunk > 1 else (math.inf, math.inf)
        if getattr(each.call.module, "linear", False) is True and linear > AFFINE:
            notes.append(f"it says that it is linear, and is not (off by {linear:.1g})")
        if affine <= AFFINE:
            matrix, difference = mixing.unit_response(f, x, 2, probe.seed, chunk=chunk)
            # where nearly all of the output passes by (a residual), what is mixed could still bend
            if affine <= 100 * AFFINE * mixing.reach(matrix):
                if difference <= SAME:
                    return matrix, "unit vectors"
                return mixing.unit_response(f, x, probe.draws, probe.seed, chunk=chunk)[0], "random signs"
        if probe.by == "removal":
            patches = each.inputs.patches
            return mixing.response(f, x, fill=x[0, patches].mean(0), chunk=chunk), "removal"
        if (off := mixing.gradient_error(f, x, probe.seed)) > GRADIENT:
            name = f"{each.call.name} ({type(each.call.module).__name__})"
            raise HostError(
                f"Found that gradients of {name} are not those of what it computes ({off:.0%} off): it is binary or spiking, "
                "or has jumps. Expected by=removal for it. Leave out by=influence."
            )
        return mixing.influence(f, x, probe.draws, probe.seed, chunk=chunk)[0], "influence"

    # -- what is kept of the maps -----------------------------------------------------------------

    def add(self, layer: int, measured: Sequence[Measured]) -> None:
        """Rows, maps, the record and the exact reading of a layer."""
        first, readout = measured[0], self.readout
        outputs, inputs = first.placed.outputs, first.placed.inputs
        share = mixing.shares(torch.stack([each.matrix for each in measured]).float().cpu())
        patches = outputs.patches
        own = share[:, patches]  # rows of places alone
        square = len(outputs.cells) == len(inputs.cells)
        points = outputs.points[patches], inputs.points
        values = mixing.measures(own, points, self.cover(inputs.grid, inputs.cells))
        if square and patches.any():
            diagonal = torch.diagonal(share, dim1=-2, dim2=-1)[:, patches]
            live = own.sum(-1) > 0
            values["mixing_self"] = (diagonal * live).sum(-1) / live.sum(-1)
        if all(each.firing is not None for each in measured):
            firing = torch.stack([each.firing for each in measured]).cpu()
            values["firing_rate"] = firing[:, patches].mean(1)
        table = {name: value[:, None] for name, value in values.items()}
        readout.rows.append(Rows(layer, KEY, KEY, table, self.batch.first, together=True))
        live = (own.sum(-1, keepdim=True) > 0).sum(1).clamp(min=1)
        pictures = {"mixing": levelled(inputs.picture(own.sum(1) / live))}
        rows = self.rows_on_grid(own, outputs.cells[patches], math.prod(outputs.grid), inputs)
        middle = outputs.grid[0] // 2 * outputs.grid[1] + outputs.grid[1] // 2
        pictures["mixing_middle"] = rows[:, middle]
        for name, picture in pictures.items():
            whole = picture.new_full((self.batch.count, *picture.shape[1:]), torch.nan)
            whole[: self.count] = picture
            readout.maps[f"{name}/{layer}"] = whole
            readout.details[f"{name}/{layer}"] = {"made": ROUTES[first.route]}
        self.keep_rows(layer, rows.unflatten(1, outputs.grid)[:, None])
        readout.layers.append(self.record(layer, measured))

    def cover(self, grid: tuple[int, int], cells: Tensor) -> Tensor | None:
        """Share of each token's place that the mask covers, (B, N); NaN for none."""
        masks = list(self.batch.masks)[: self.count]
        if all(mask is None for mask in masks):
            return None
        blank = torch.full((math.prod(grid),), torch.nan)
        each = torch.stack([blank if mask is None else coverage(mask, grid).float() for mask in masks])
        return torch.where(cells >= 0, each[:, cells.clamp(min=0)], torch.nan)

    def rows_on_grid(self, own: Tensor, cells: Tensor, places: int, inputs: Any) -> Tensor:
        """Rows (B, P, N) of outputs as (B, places, *grid of inputs): means by place."""
        pictures = inputs.picture(own)
        rows = pictures.new_zeros(len(own), places, *inputs.grid).index_add(1, cells, pictures)
        return rows / torch.bincount(cells, minlength=places).clamp(min=1)[:, None, None]

    def keep_rows(self, layer: int, rows: Tensor) -> None:
        """What moves each place, as bytes: (B, 1, *grid, *grid of inputs)."""
        name = f"queries/{layer}"
        self.bytes += rows[0].numel() + 4 * math.prod(rows.shape[1:4])
        for key, value in zip((name, f"{name}/scale"), packed_rows(rows.numpy()), strict=True):
            self.readout.others[key] = torch.from_numpy(value)

    def limit_rows(self) -> None:
        """Keep rows of as many images as the budget for what each patch looks at holds."""
        if not self.bytes:
            return
        fitting = int(self.batch.query_budget * 1e6 // self.bytes) - self.batch.first
        others = self.readout.others
        rows = {key: value[: max(0, fitting)] for key, value in others.items() if key.startswith("queries/")}
        self.readout.others = {key: value for key, value in (others | rows).items() if len(value)}
        self.readout.details[KEY] = {"bytes": str(self.bytes)}

    def record(self, layer: int, measured: Sequence[Measured]) -> dict[str, Any]:
        """The record of a layer, in the words of those of attentions."""
        first = measured[0]
        call, outputs = first.placed.call, first.placed.outputs
        notes = dict.fromkeys(note for each in measured for note in each.notes)
        content = {"layer": layer, "name": call.name, "number": call.number, "kind": KEY, "route": first.route}
        content |= {"verified": "run again by itself", "error": max(each.error for each in measured), "heads": 1, "windows": 1}
        content |= {"queries": first.matrix.shape[0], "keys": first.matrix.shape[1], "grid": list(outputs.grid)}
        content |= {"prefix": int((~outputs.patches).sum()), "has_class": False, "effective": False}
        content["module"] = type(call.module).__name__
        content["exact"] = self.exact(layer, call) if self.batch.first == 0 else {}
        content["note"] = "; ".join([f"mixing map by {ROUTES[first.route]}", *notes])
        return content

    def exact(self, layer: int, call: Call) -> dict[str, Any]:
        """Keep what a mixer tells of itself; {quantity: its record}."""
        records: dict[str, Any] = {}
        if not isinstance(call.module, Mixer):
            return records
        for name, value in call.module.reading().items():
            quantity = call.module.quantities.get(name)
            if quantity is None or value.ndim not in (1, 2, 3) or not value.numel():
                names = ", ".join(call.module.quantities)
                self.readout.notes.append(
                    f"Found {name} {tuple(value.shape)} in the reading of {call.name}. Expected one of {names} with one to "
                    "three axes. Add it to `quantities` of the mixer."
                )
                continue
            values, channels = strongest(value.detach().float().cpu())
            self.readout.others[f"exact/{name}/{layer}"] = values
            records[name] = asdict(quantity) | {"channels": channels, "count": len(value)}
        return records


def levelled(pictures: Tensor) -> Tensor:
    """Pictures (B, rows, columns), even where they differ by rounding alone.

    Of a circular filter all places move others alike, and a page would draw what rounding left.
    """
    low, high = pictures.amin((1, 2), keepdim=True), pictures.amax((1, 2), keepdim=True)
    return torch.where(high - low <= SAME * high, pictures.mean((1, 2), keepdim=True), pictures)


def strongest(values: Tensor) -> tuple[Tensor, list[int]]:
    """Of many channels (C, ...) their root mean square, -1, and the largest; which they are."""
    if values.ndim == 1 or len(values) <= CHANNELS + 1:
        return values, list(range(len(values)))
    order = values.flatten(1).norm(dim=1).argsort(descending=True, stable=True)[:CHANNELS]
    mean = values.square().mean(0, keepdim=True).sqrt()
    return torch.cat([mean, values[order]]), [-1, *order.tolist()]


@dataclass(frozen=True, kw_only=True)
class Mixing(Probe):
    """How far each place of a module's output moves when a place of its input does.

    Of the model's mixers, by default, and of modules that are named, of any model: a row of the map
    is divided by its sum, and measured as rows of attention are; it is something else than
    attention.

    Affine modules (a mixer that is linear, a depthwise convolution) are measured exactly, by unit
    vectors at each place, which is checked. Of others each token in turn is replaced by the image's
    mean token (by=removal), or its gradient is taken (by=influence), but not where gradients are
    not those of what the module computes, as in binary and spiking ones. Prefix tokens move places
    as well, and have no rows.

    Costs one pass of each module for every place, of each of the first `images` images; with
    influence `draws` times that, forward and back. Settings: modules: patterns such as
    blocks.*.attn, joined by +. places: a module with more has no map. draws: of random signs.
    Raises UnknownName for a pattern that fits no module, SettingError.
    """

    order: ClassVar[int] = 125
    passes: ClassVar[bool] = True
    sources: ClassVar[tuple[Source, ...]] = (
        Source("mixing", "Mixing maps", "Measured by moving one place of a module's input after another."),
    )
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("mixing_entropy", "Mixing entropy", "nats", 0,
                explains="0: each place is moved by one place. Log of their number: by all alike."),
        Measure("mixing_places", "Mixing places", "places", 1, short="mixed",
                explains="How many places move a place. 1: a single one."),
        Measure("mixing_distance", "Mixing distance", "pixels", 0, short="from",
                explains="How far away the places are that move a place, on average."),
        Measure("mixing_width", "Mixing width", "pixels", 0,
                explains="Width of the Gaussian that reaches as far. Movers far away count more."),
        Measure("mixing_self", "Share of itself", "", 0, 1, short="itself",
                explains="How much of what moves a place is the place itself. High behind a residual connection."),
        Measure("mixing_foreground", "Mixing from the object", "", 0, 1,
                explains="Share of what moves places that lies on the object. By chance: the object's area."),
        Measure("firing_rate", "Firing rate", "", 0, 1,
                explains="Share of a spiking module's outputs that are 1, over places, channels and steps."),
    )  # fmt: skip
    components: ClassVar[tuple[Component, ...]] = (
        Component("mixing", "Mixing", low=0, high=1, curves=False, scored=False,
                  explains="How much each place moves others, on average; no attention. Click a patch to see what moves it."),
        Component("mixing_middle", "Mixing, middle patch", low=0, high=1, curves=False, scored=False,
                  explains="What moves the patch in the middle of the image; no attention."),
    )  # fmt: skip

    modules: tuple[str, ...] | None = None
    images: int = 2
    by: Literal["removal", "influence"] = "removal"
    places: int = 1024
    draws: int = 16
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("images", "places", "draws"):
            if getattr(self, name) < 1:
                raise SettingError(f"Found {name}={getattr(self, name)}. Expected 1 or more. Give such a number.")

    def names(self, model: nn.Module) -> list[str]:
        """The modules of a model that are measured."""
        chosen = {*mixers_in(model), *named_modules(model, self.modules or ())}
        return [name for name, _ in model.named_modules() if name in chosen]

    def for_model(self, model: nn.Module) -> Mixing:
        self.names(model)  # raises UnknownName
        return self

    def by_default(self, model: nn.Module | None) -> bool:
        return model is not None and self.reads_modules(model)

    def reads_modules(self, model: nn.Module) -> bool:
        return bool(self.modules) or bool(mixers_in(model))

    def extra(self, model: nn.Module, batch: BatchInfo, targets: Sequence[int]) -> Readout:
        measurement = Measurement(self, model, batch)
        return measurement.run() if measurement.count else measurement.readout
