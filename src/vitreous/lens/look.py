"""`look`: what a model attends to on some images, as numbers and maps.

It takes any `torch.nn.Module`.

One traced pass tells where tokens are (once for each size of image). Then each batch is seen in one
pass of clean and noisy images, in which the probes (`lens.probe`) reduce every attention at once to
rows of a table and to maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from vitreous.base.errors import DataError, HostError, SettingError, VitreousError
from vitreous.base.processes import ALONE, Team
from vitreous.data.preprocess import picture
from vitreous.data.views import View, Views, jpeg
from vitreous.grafting import check, grafts
from vitreous.lens import faithfulness, metadata
from vitreous.lens.batch_pass import BatchPass, extra_passes, perturbed
from vitreous.lens.direction import Direction
from vitreous.lens.evaluation import against_masks, against_model
from vitreous.lens.findings import Findings
from vitreous.lens.formulas import scores
from vitreous.lens.non_finite import all_finite, outputs_note
from vitreous.lens.probe import BatchInfo, Component, Probe, Readout, chosen, records, table
from vitreous.lens.reading import CHUNK, Part, Reading, StoredParts, Writer, read, read_part
from vitreous.lens.stored_maps import joined_maps, joined_others, packed
from vitreous.lens.tables import joined
from vitreous.lens.tap import watch
from vitreous.lens.tap.attention_op import NOT_FINITE
from vitreous.lens.token_coordinates import has_class_token
from vitreous.models.classes import class_names

GIB = 2**30
BLOCK = 1 << 20  # numbers in a block: 4 MiB each in the map's buffer and in ours
QUERY_BUDGET = 6.0  # megabytes
EMPTY_MASKS = "Some masks mark no pixel of the view: no map can be scored against them."


@dataclass(frozen=True)
class Plan:
    """What is done with every batch."""

    model: nn.Module
    views: Views
    probes: list[Probe]
    direction: Direction | None
    noise: float
    seed: int
    batch_size: int
    memory: float
    names: list[str] | None  # of the classes; None: the output is not taken for classes
    loss: Callable[[Any, Any], Tensor] | None = None
    curve_options: dict[str, Any] = field(default_factory=dict)  # fill, fractions, black
    query_budget: float = 0.0
    console: Console | None = None  # shows the work within a batch, where nothing else is shown

    @property
    def required(self) -> bool:
        """Whether the model has to have attention: no probe reads anything else of it."""
        return not any(probe.reads_modules(self.model) for probe in self.probes)


def look(
    model: nn.Module,
    images: Any,
    *,
    masks: Any = None,
    inputs: dict[str, Any] | None = None,
    direction: Direction | None = None,
    probes: Sequence[str | Probe] | None = None,
    curves: int = 0,
    curve_fill: str = "mean",
    curve_fractions: Sequence[float] | None = None,
    noise: float = 0.01,
    batch_size: int = 8,
    memory: float = 1.0,
    query_budget: float = QUERY_BUDGET,
    seed: int = 0,
    limit: int | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
    about: dict[str, Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    team: Team = ALONE,
) -> Reading:
    """A reading of any model: measures and maps for every attention, head and image.

    images: a tensor (B, C, h, w), normalised as the model takes it; or paths, PIL images, folders,
        Samples, which go through the model's pretrained_cfg.
    masks: a folder of .png masks or a boxes.csv; for tensors an array (B, h, w). With masks every
        map is scored against them, beside centre, random and area.
    inputs: how images are prepared, in the words of a pretrained_cfg, in place of the model's own.
    direction: of `find_direction`, for signs and the foreground map.
    probes: what to measure, as texts ("spectra:scores=false") or objects; "all", and None: every
        one without passes of its own, and "mixing" of mixers (of others: "mixing:modules=...").
    loss: of (output, labels), for probes that need one.
    curves: on so many images insertion and deletion curves of maps, and those of shuffled weights;
        intervals from 16 on. curve_fill: of `faithfulness.FILLS`. curve_fractions: as in `curves`.
    noise: deviation on pixels of [0, 1] under which attention is compared; 0 leaves robustness out.
    memory: GiB of working memory beside the model's own.
    query_budget: megabytes for what each patch looks at, of the first images that fit; 0: none.
    out: a folder, written as it goes; an interrupted look goes on there.
    team: processes that share the parts of `out`; the first joins them. All give equal arguments.
    console: shows progress.
    about: what is known of the model: "name", "weights" (pretrained, run, file, random), "classes".

    The model runs in eval mode without gradients; its mode, hooks and the random state are as
    before afterwards. Raises HostError for a model that shows no attention, DataError for no
    readable image, SettingError for settings.
    """
    check_settings(noise=noise, batch_size=batch_size, memory=memory, curves=curves, seed=seed, query_budget=query_budget)
    check_settings(limit=1 if limit is None else limit)
    model = unwrapped(model)
    views = Views(model, images, masks, inputs)
    count = image_count(views, limit)
    if direction is not None:
        direction.check(model)
    about, of_curves = about or {}, curve_options(curve_fill, curve_fractions, views)
    names = about.get("classes") or class_names(model)
    items = chosen(probes, model)
    plan = Plan(model, views, items, direction, noise, seed, batch_size, memory, names, loss, of_curves, query_budget)
    findings = Findings(notes=dict.fromkeys([*metadata.notes(model, about, items), *views.remarks]))
    settings = settings_of(plan, curves, limit, probes is not None)
    mark = metadata.fingerprint(model, views, count, settings)
    writer = None if out is None else Writer(Path(out), mark)
    if writer is not None and (writer.folder / "reading.json").is_file() and len(writer.done) * CHUNK >= count:
        return read(writer.folder)
    if writer is not None and team.size > 1:
        share_parts(plan, findings, count, writer, team)
        if not team.first:
            team.tell(None)  # waits until the first is done
            return read(writer.folder)
        writer = Writer(Path(out), mark)
    parts = all_parts(plan, findings, count, writer, console)
    curve_records = all_curves(plan, findings, parts, min(curves, findings.images))
    content = {"settings": settings, "seed": seed, "fingerprint": mark}
    content |= metadata.of_model(model, about) | findings.metadata(parts, plan.probes, query_budget)
    reading = with_summary(Reading(content, parts, curve_records), seed)
    if writer is None:
        return reading
    writer.finish(reading)
    team.tell(None)
    return read(writer.folder)


def image_count(views: Views, limit: int | None) -> int:
    """How many images are looked at. Raises DataError for none."""
    count = len(views) if limit is None else min(limit, len(views))
    if count < 1:
        raise DataError("Found no images. Expected at least one. Give a tensor (B, C, h, w), paths, or a folder of images.")
    return count


def with_summary(reading: Reading, seed: int) -> Reading:
    """The reading with means of its scores, where there are any."""
    if scored := reading.scores():
        reading.facts["summary"] = scores.summary(scored, seed=seed)
    return reading


def settings_of(plan: Plan, curves: int, limit: int | None, probes_given: bool) -> dict[str, Any]:
    """What a reading depends on beside model and images: a look goes on with the same alone."""
    settings = {"noise": plan.noise, "seed": plan.seed, "curves": curves, "limit": limit}
    settings |= {name: plan.curve_options[name] for name in ("fill", "fractions") if name in plan.curve_options}
    settings["direction"] = metadata.of_direction(plan.direction)
    settings |= {} if plan.query_budget == QUERY_BUDGET else {"query_budget": plan.query_budget}
    return settings | ({"probes": [probe.full_text() for probe in plan.probes]} if probes_given else {})


def curve_options(fill: str, fractions: Sequence[float] | None, views: Views) -> dict[str, Any]:
    """What differs from the usual in the curves; black as the model takes it."""
    faithfulness.check_settings(fill, fractions)
    options: dict[str, Any] = {} if fill == "mean" else {"fill": fill}
    options |= {} if fractions is None else {"fractions": [float(x) for x in fractions]}
    if fill == "black" and views.mean is not None:
        options["black"] = [-mean / std for mean, std in zip(views.mean, views.std, strict=True)]
    return options


def unwrapped(model: Any) -> nn.Module:
    """The module; of torch.compile the one inside, which runs at any batch size."""
    if isinstance(model, nn.Module):
        return getattr(model, "_orig_mod", model)
    raise HostError(
        f"Found a {type(model).__name__} as model. Expected a torch.nn.Module. Build it first: timm.create_model(name)."
    )


def check_settings(**settings: float) -> None:
    """Raise SettingError for a number that is out of its range."""
    ranges = {
        "noise": (0, 1),
        "batch_size": (1, 10**6),
        "memory": (0.001, 10**4),
        "query_budget": (0, 10**6),
        "curves": (0, 10**6),
        "seed": (0, 2**32),
        "limit": (1, 10**12),
    }
    for name, value in settings.items():
        low, high = ranges[name]
        if not low <= value <= high:
            raise SettingError(f"Found {name}={value}. Expected {low} to {high:g}. Choose a value in between.")


def share_parts(plan: Plan, findings: Findings, count: int, writer: Writer, team: Team) -> None:
    """Make the parts that are not there, each by one process of the team.

    Those without a readable image are left out.

    The first part with images comes first, since what it shows of the model holds for all others,
    as in one process.
    """
    own = Findings(notes=dict(findings.notes))
    ranges = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    readable = team.everyone([sum(plan.views.readable(i) for i in numbers) for numbers in ranges[team.rank :: team.size]])
    images = [readable[number % team.size][number // team.size] for number in range(len(ranges))]
    filled = [number for number, some in enumerate(images) if some]

    def make(number: int) -> None:
        if number not in writer.done:
            own.images = sum(images[:number])
            writer.add(number, look_at(plan, own, ranges[number]))

    for number in filled[:1] if team.first else ():
        make(number)
    team.tell(None)
    for number in filled[:1]:
        own.take_in(read_part(writer.path(number)).findings)
    for number in filled[1:][team.rank :: team.size]:
        make(number)
    team.everyone(None)


def all_parts(plan: Plan, findings: Findings, count: int, writer: Writer | None, console: Console | None) -> Sequence[Part]:
    """Look at images 0 to count - 1, CHUNK by CHUNK.

    Parts that the writer has are not made again.
    """
    starts = list(range(0, count, CHUNK))
    plan = replace(plan, console=console if len(starts) == 1 else None)  # else the parts are shown
    parts: dict[int, Part] = {}  # those in memory; with a writer, those that wait for an image that can be read
    for number in shown(range(len(starts)), "images", console):
        if writer is not None and number in writer.done:
            part = read_part(writer.path(number))
            findings.take_in(part.findings)
        else:
            part = parts[number] = look_at(plan, findings, range(starts[number], min(starts[number] + CHUNK, count)))
        findings.images += len(part.images)
        while writer is not None and findings.images and parts:
            waiting = min(parts)
            writer.add(waiting, parts[waiting])
            del parts[waiting]
    if not findings.images:
        raise DataError(f"Found no readable image among {count}. {parts[0].skipped[0]['reason']}")
    return list(parts.values()) if writer is None else StoredParts([writer.path(number) for number in range(len(starts))])


def look_at(plan: Plan, findings: Findings, numbers: range) -> Part:
    """One part: the images of these numbers, in batches."""
    views, skipped = [], []
    for i in numbers:
        try:
            views.append(finite(plan.views[i]))
        except DataError as error:
            skipped.append({"name": plan.views.name(i), "reason": str(error)})
    part, components = Part({}, [], skipped), records(plan.probes, "components")
    tensors, others, rows, scored, pictures = [], [], [], [], {}
    for start in range(0, len(views), plan.batch_size):
        batch = views[start : start + plan.batch_size]
        first = findings.images + start
        readout, predictions = look_at_batch(plan, findings, batch, first)
        tensors.append(stored(readout, components))
        others.append({name: value.cpu().numpy() for name, value in readout.others.items()})
        rows.append(table(readout.rows, plan.probes))
        for name, changed in readout.pictures.items():
            drawn = (jpeg(picture(x, plan.views.mean, plan.views.std)) for x in changed)
            pictures |= {f"picture/{name}/{number}": value for number, value in enumerate(drawn, start=first)}
        for i, view in enumerate(batch):
            classes = {name: numbers[i] for name, numbers in readout.classes.items()}
            part.images.append(metadata.of_image(view, first + i, plan.names, predictions[i], classes))
        if any(view.mask is not None for view in batch):
            scored.append(against_masks(readout.maps, components, batch, first, plan.seed))
        if any(view.mask is not None and not view.mask.any() for view in batch):
            findings.notes[EMPTY_MASKS] = None
    part.tensors = joined_maps(tensors, [len(views[i : i + plan.batch_size]) for i in range(0, len(views), plan.batch_size)])
    part.tensors |= joined_others(others) | pictures
    for i, view in enumerate(views):
        part.tensors[f"picture/{findings.images + i}"] = view.jpeg()
        if view.mask is not None:
            part.tensors[f"mask/{findings.images + i}"] = view.mask_png()
    if views:
        part.put("rows", joined(rows))
    if scored:
        part.put("scores", joined(scored))
    part.findings = findings.as_json()
    return part


def finite(view: View) -> View:
    """The same view. Raises DataError for pixels that are not finite."""
    if bool(view.pixels.isfinite().all()):
        return view
    raise DataError(f"Found pixels of {view.name} that are not finite. Expected numbers. Leave it out, or mend how it is made.")


def look_at_batch(
    plan: Plan, findings: Findings, views: Sequence[View], first: int
) -> tuple[Readout, list[metadata.Prediction]]:
    """One pass of a batch: the readout of all probes, and the predictions of the model."""
    images, count = torch.stack([view.pixels for view in views]), len(views)
    like = next((p for p in plan.model.parameters() if p.is_floating_point()), images)
    images = images.to(like.device)
    layouts = findings.layout(plan.model, images, plan.required)
    if grafts(plan.model) and not findings.layers and not findings.mixing:
        check(plan.model, images[:1].to(like.dtype))
    noisy = plan.noise > 0 and plan.views.mean is not None
    if plan.noise > 0 and not noisy:
        findings.notes["Robustness was left out: it is not known how the pixels were normalised."] = None
    if noisy:
        images = torch.cat([images, with_noise(plan, images, first)])
    block = max(1, min(BLOCK, int(plan.memory * GIB / 16)))  # four buffers of four bytes
    batch = BatchInfo(images, count, layouts, noisy, first, plan.seed, block, has_class_token(plan.model))
    batch.direction, batch.choices, batch.loss = plan.direction, findings.choices, plan.loss
    batch.shown = partial(shown, console=plan.console)
    batch.query_budget, batch.masks = plan.query_budget, [view.mask for view in views]
    batch.mean, batch.std = plan.views.mean, plan.views.std
    # most probes have nothing to say of a model without attention
    probes = [probe for probe in plan.probes if layouts.calls or probe.reads_modules(plan.model)]
    batch_pass = BatchPass(plan.model, probes, batch, findings.remember)
    callbacks = {"on_output": batch_pass.on_output, "outputs": batch_pass.outputs, "required": plan.required}
    seen = watch(plan.model, images, batch_pass.on_attention, layouts=layouts, **callbacks)
    readouts = batch_pass.finish() + extra_passes(plan.model, probes, batch, [view.label for view in views])
    readout = Readout([row for readout in readouts for row in readout.rows])
    for each in readouts:
        readout.maps |= each.maps
        readout.confidence |= each.confidence
        readout.others |= each.others
        readout.classes |= each.classes
        readout.pictures |= each.pictures
        findings.details |= each.details
        findings.notes |= dict.fromkeys(each.notes)
        findings.remember_modules(each.layers)
    if not findings.layers and not findings.mixing:
        reasons = "; ".join(note for each in readouts for note in each.notes) or "no modules were named"
        raise HostError(
            f"{type(plan.model).__name__} showed no attention and no mixing map ({reasons}). Expected modules that mix places. "
            "Name others: --modules 'stages.*.blocks.*'."
        )
    findings.refused |= dict.fromkeys(seen.refused)
    if not all_finite(seen.output) or any(refusal.reason == NOT_FINITE for refusal in seen.refused):
        findings.notes[outputs_note(plan.model, images)] = None
    return readout, metadata.predictions(plan.model, seen.output, plan.names, count)


def stored(readout: Readout, components: Mapping[str, Component]) -> dict[str, np.ndarray]:
    """Maps and confidences as a part holds them: float16 with scales, marks as uint8."""
    tensors = {f"{name}/confidence": value.detach().cpu().float().numpy() for name, value in readout.confidence.items()}
    for name, value in readout.maps.items():
        if value.dtype == torch.bool:
            tensors[name] = value.to("cpu", torch.uint8).numpy()
        else:
            lead = 1 + components[name.partition("/")[0]].per_head
            tensors[name], tensors[f"{name}/scale"] = packed(value.detach().cpu().float().numpy(), lead)
    return tensors


def with_noise(plan: Plan, images: Tensor, first: int) -> Tensor:
    """The images with noise, drawn by the seed and an image's number alone."""
    noisy = []
    for number, image in enumerate(images, start=first):
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
        noisy.append(perturbed(image[None].float(), plan.noise, generator, plan.views.mean, plan.views.std))
    return torch.cat(noisy).to(images)


def all_curves(plan: Plan, findings: Findings, parts: Sequence[Part], count: int) -> list[dict[str, Any]]:
    """Insertion and deletion curves of the maps of the first `count` images.

    And what shuffled weights leave of the maps.
    """
    probes = [probe for probe in plan.probes if any(component.curves for component in probe.components)]
    if not count or not probes or not findings.layers:
        return []
    skipped = {record["name"] for part in parts for record in part.skipped}
    readable = (i for i in range(len(plan.views)) if plan.views.name(i) not in skipped)
    views = [plan.views[i] for _, i in zip(range(count), readable, strict=False)]
    plan = replace(plan, probes=probes, noise=0.0)
    shuffled = replace(plan, model=faithfulness.randomised(plan.model, plan.seed), direction=None)
    ours = maps_of(plan, findings, views)
    try:
        theirs = maps_of(shuffled, Findings(choices=findings.choices), views)
    except VitreousError as error:
        findings.notes[f"The model with shuffled weights could not be seen, and no map is compared with its own: {error}"] = (
            None
        )
        theirs = {}
    components = records(probes, "components")
    return against_model(plan.model, views, ours, theirs, components, plan.seed, max(16, plan.batch_size), plan.curve_options)


def maps_of(plan: Plan, findings: Findings, views: Sequence[View]) -> dict[str, Tensor]:
    """All maps of some images, in memory."""
    starts = range(0, len(views), plan.batch_size)
    maps = [look_at_batch(plan, findings, views[start : start + plan.batch_size], start)[0].maps for start in starts]
    return {name: torch.cat([batch[name] for batch in maps]) for name in maps[0]}


def shown(items: Sequence[Any], what: str, console: Console | None = None) -> Iterator[Any]:
    """The items, with a progress bar if there is a terminal to show it on."""
    if console is None or not console.is_terminal or len(items) < 2:
        return iter(items)
    return iter(track(items, what, console=console, transient=True))
