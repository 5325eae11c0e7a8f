"""`look`: what a model attends to on some images, as numbers and maps, from any `torch.nn.Module`.

One traced pass tells where tokens are (once for each size of image). Then each batch is seen in one pass of clean and noisy
images, in which every attention is reduced at once: to numbers by `lens.measures`, to maps by `lens.sight` and `lens.gallery`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from vitreous.base.errors import DataError, HostError, SettingError, VitreousError
from vitreous.base.processes import ALONE, Team
from vitreous.data.views import View, Views
from vitreous.grafting import check, grafts
from vitreous.lens import faithfulness, metadata
from vitreous.lens.direction import Direction
from vitreous.lens.evaluation import against_masks, against_model
from vitreous.lens.formulas import scores
from vitreous.lens.gallery import Gallery, stacked
from vitreous.lens.layer_features import Collector, Sight, has_class_token
from vitreous.lens.measures import BLOCK, Measures, perturbed
from vitreous.lens.reading import CHUNK, FORMAT, Columns, Part, Reading, StoredParts, Writer, joined, read, read_part
from vitreous.lens.tap import Layouts, Refusal, trace, watch
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.models.classes import class_names

GIB = 2**30


@dataclass
class Plan:
    """What is to be done with every batch, and what was found out on the way."""

    model: nn.Module
    views: Views
    direction: Direction | None
    noise: float
    seed: int
    batch_size: int
    memory: float
    names: list[str] | None  # of the classes; None: the output is not taken for classes
    layouts: dict[tuple[int, ...], Layouts] = field(default_factory=dict)  # by shape of an image
    rows: dict[str, str] = field(default_factory=dict)  # "raw" or "unit" by singular map
    layers: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)  # records, by call
    rules: dict[str, str] = field(default_factory=dict)
    refused: dict[Refusal, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    seen: int = 0  # images so far

    def fresh(self) -> Plan:
        """The same plan, of which nothing was found out yet."""
        found = {"layouts": {}, "rows": {}, "layers": {}, "rules": {}, "refused": {}, "seen": 0}
        return replace(self, notes=dict(self.notes), **found)

    def layout(self, images: Tensor) -> Layouts:
        shape = tuple(images.shape[1:])
        if shape not in self.layouts:
            self.layouts[shape] = trace(self.model, images)
        return self.layouts[shape]

    def remember(self, call: AttentionCall, sight: Sight) -> None:
        """Keep what the page says of a layer; its error is the largest of all batches."""
        record = self.layers.setdefault(sight.key, metadata.of_layer(call, sight))
        record["error"] = max(record["error"], call.error)
        if record["layer"] != sight.layer:
            raise HostError(
                f"Found {call.name} as attention {sight.layer} of a pass, and {record['layer']} of an earlier one. Expected "
                "the same attentions for all images. Look at fewer images, or leave out those that differ."
            )

    def learned(self) -> dict[str, Any]:
        """What was found out so far, as a part keeps it."""
        found = {"layers": list(self.layers.values()), "rows": self.rows, "rules": self.rules, "notes": list(self.notes)}
        return copy.deepcopy(found | {"refused": [[refusal.name, refusal.reason] for refusal in self.refused]})

    def learn(self, found: dict[str, Any]) -> None:
        """Take in what an earlier, interrupted look had found out."""
        for record in found.get("layers", ()):
            known = self.layers.setdefault((record["name"], record["number"]), record)
            known["error"] = max(known["error"], record["error"])
        self.rows |= found.get("rows", {})
        self.rules |= found.get("rules", {})
        self.notes |= dict.fromkeys(found.get("notes", ()))
        self.refused |= {Refusal(*refused): None for refused in found.get("refused", ())}

    def facts(self, parts: Sequence[Part]) -> dict[str, Any]:
        """What reading.json says beside the model and the settings."""
        first = next(part for part in parts if part.images)
        return {
            "format": FORMAT,
            "kind": "reading",
            "layers": list(self.layers.values()),
            "components": metadata.of_components(first, self.rules, self.rows),
            "images": self.seen,
            "chunk": CHUNK,
            "parts": len(parts),
            "refused": [{"name": found.name, "reason": found.reason} for found in self.refused],
            "skipped": [found for part in parts for found in part.skipped],
            "notes": list(self.notes),
        }


def look(
    model: nn.Module,
    images: Any,
    *,
    masks: Any = None,
    inputs: dict[str, Any] | None = None,
    direction: Direction | None = None,
    curves: int = 0,
    noise: float = 0.01,
    batch_size: int = 8,
    memory: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
    about: dict[str, Any] | None = None,
    team: Team = ALONE,
) -> Reading:
    """A reading of any model: indicators, spectra and maps for every attention, head and image.

    images: a tensor (B, C, h, w), normalised as the model takes it; or paths, PIL images, folders, an Samples, which go
        through the model's pretrained_cfg.
    masks: a folder of .png masks or a boxes.csv; for tensors an array (B, h, w). With masks every map is scored against
        them, beside centre, random and area.
    inputs: how images are prepared, in the words of a pretrained_cfg, in place of the model's own.
    direction: of `find_direction`, for signs and the foreground map.
    curves: insertion and deletion curves of the maps, and the check by shuffled weights, on so many images.
    noise: deviation on pixels of [0, 1] under which attention is compared; 0 leaves robustness out.
    memory: GiB of working memory beside the model's own.
    out: a folder, written as it goes; an interrupted look goes on there.
    team: processes that take turns with the parts of `out`; the first one joins them. All must ask alike.
    console: shows progress. about: what is known of the model: "name", "weights" (pretrained, run, file, random), "classes".

    The model runs in eval mode without gradients; its mode, hooks and the random state are as before afterwards.
    Raises HostError for a model that shows no attention, DataError for no readable image, SettingError for settings.
    """
    for name, value, low, high in (
        ("noise", noise, 0, 1),
        ("batch_size", batch_size, 1, 10**6),
        ("memory", memory, 0.001, 10**4),
        ("curves", curves, 0, 10**6),
        ("seed", seed, 0, 2**32),
        ("limit", 1 if limit is None else limit, 1, 10**12),
    ):
        if not low <= value <= high:
            raise SettingError(f"Found {name}={value}. Expected {low} to {high:g}. Choose a value in between.")
    model = getattr(model, "_orig_mod", model)  # of torch.compile, for which every batch size would be a new program
    views = Views(model, images, masks, inputs)
    count = len(views) if limit is None else min(limit, len(views))
    if count < 1:
        raise DataError("Found no images. Expected at least one. Give a tensor (B, C, h, w), paths, or a folder of images.")
    if direction is not None:
        direction.check(model)
    about = about or {}
    names = about.get("classes") or class_names(model)
    plan = Plan(model, views, direction, noise, seed, batch_size, memory, names)
    if about.get("weights") == "random":
        plan.notes[metadata.WARNING] = None
    settings = {"noise": noise, "seed": seed, "curves": curves, "limit": limit}
    settings["direction"] = metadata.of_direction(direction)
    mark = metadata.fingerprint(model, views, count, settings)
    writer = None if out is None else Writer(Path(out), mark)
    if writer is not None and (writer.folder / "reading.json").is_file() and len(writer.done) * CHUNK >= count:
        return read(writer.folder)
    if writer is not None and team.size > 1:
        share_parts(plan.fresh(), count, writer, team)
        if not team.first:
            team.tell(None)  # waits until the first is done
            return read(writer.folder)
        writer = Writer(Path(out), mark)
    parts = all_parts(plan, count, writer, console)
    found = all_curves(plan, parts, min(curves, plan.seen))
    known = metadata.of_model(model, about) | plan.facts(parts) | {"settings": settings, "seed": seed, "fingerprint": mark}
    reading = Reading(known, parts, found)
    if scored := reading.scores():
        known["summary"] = scores.summary(scored, seed=seed)
    if writer is None:
        return reading
    writer.finish(reading)
    team.tell(None)
    return read(writer.folder)


def share_parts(plan: Plan, count: int, writer: Writer, team: Team) -> None:
    """Make the parts that are not there, each by one process of the team; those without a readable image are left out.

    The first part with images comes first, since what is found out there holds for all others, as in one process.
    """
    ranges = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    readable = team.everyone([sum(plan.views.readable(i) for i in numbers) for numbers in ranges[team.rank :: team.size]])
    seen = [readable[number % team.size][number // team.size] for number in range(len(ranges))]
    filled = [number for number, found in enumerate(seen) if found]

    def make(number: int) -> None:
        if number not in writer.done:
            plan.seen = sum(seen[:number])
            writer.add(number, look_at(plan, ranges[number]))

    for number in filled[:1] if team.first else ():
        make(number)
    team.tell(None)
    for number in filled[:1]:
        plan.learn(read_part(writer.path(number)).learned)
    for number in filled[1:][team.rank :: team.size]:
        make(number)
    team.everyone(None)


def all_parts(plan: Plan, count: int, writer: Writer | None, console: Console | None) -> Sequence[Part]:
    """Look at images 0 to count - 1, CHUNK by CHUNK; parts that the writer has are not made again."""
    starts = list(range(0, count, CHUNK))
    parts: dict[int, Part] = {}  # those in memory; with a writer, those that wait for an image that can be read
    for number in shown(range(len(starts)), "images", console):
        if writer is not None and number in writer.done:
            part = read_part(writer.path(number))
            plan.learn(part.learned)
        else:
            part = parts[number] = look_at(plan, range(starts[number], min(starts[number] + CHUNK, count)))
        plan.seen += len(part.images)
        while writer is not None and plan.seen and parts:
            waiting = min(parts)
            writer.add(waiting, parts[waiting])
            del parts[waiting]
    if not plan.seen:
        raise DataError(f"Found no readable image among {count}. {parts[0].skipped[0]['reason']}")
    return list(parts.values()) if writer is None else StoredParts([writer.path(number) for number in range(len(starts))])


def look_at(plan: Plan, numbers: range) -> Part:
    """One part: the images of these numbers, in batches."""
    views, skipped = [], []
    for i in numbers:
        try:
            views.append(plan.views[i])
        except DataError as error:
            skipped.append({"name": plan.views.name(i), "reason": str(error)})
    part = Part({}, [], skipped)
    tensors, rows, scored = [], [], []
    for start in range(0, len(views), plan.batch_size):
        batch = views[start : start + plan.batch_size]
        first = plan.seen + start
        gallery, columns, said = see(plan, batch, first)
        tensors.append(gallery.tensors())
        rows.append(columns)
        part.images += [metadata.of_image(view, first + i, plan.names, said[i]) for i, view in enumerate(batch)]
        if any(view.mask is not None for view in batch):
            scored.append(against_masks(gallery.maps, batch, first, plan.seed))
    part.tensors = stacked(tensors)
    for i, view in enumerate(views):
        part.tensors[f"picture/{plan.seen + i}"] = view.jpeg()
        if view.mask is not None:
            part.tensors[f"mask/{plan.seen + i}"] = view.mask_png()
    if views:
        part.put("rows", joined(rows))
    if scored:
        part.put("scores", joined(scored))
    part.learned = plan.learned()
    return part


def see(plan: Plan, views: Sequence[View], first: int) -> tuple[Gallery, Columns, list[metadata.Said]]:
    """One pass of a batch: its maps, the rows of the table, and what the model says of each image."""
    images, count = torch.stack([view.pixels for view in views]), len(views)
    like = next((p for p in plan.model.parameters() if p.is_floating_point()), images)
    images = images.to(like.device)
    layouts = plan.layout(images)
    if grafts(plan.model) and not plan.layers:
        check(plan.model, images[:1].to(like.dtype))
    noisy = plan.noise > 0 and plan.views.mean is not None
    if plan.noise > 0 and not noisy:
        plan.notes["Robustness was left out: it is not known how the pixels were normalised."] = None
    if noisy:
        images = torch.cat([images, with_noise(plan, images, first)])
    block = max(1, min(BLOCK, int(plan.memory * GIB / 16)))  # four buffers of four bytes
    measures = Measures(plan.model, noisy=noisy, first=first, block=block)
    gallery = Gallery(len(layouts.calls), plan.direction, plan.rows)
    class_token = has_class_token(plan.model)
    collector = Collector(layouts, count, class_token=class_token, rollout=True, on_tokens=measures.tokens, done=gallery.add)

    def take(call: AttentionCall) -> None:
        measures.see(call)
        collector.see(call)
        plan.remember(call, collector.sights[-1])

    def leave(name: str, number: int, output: Any) -> None:
        measures.leave(name, number, output)
        collector.leave(name, number, output)

    seen = watch(plan.model, images, take, layouts=layouts, on_output=leave, outputs=measures.ends | collector.around.keys())
    collector.finish()
    foreground = gallery.finish()
    plan.refused |= dict.fromkeys(seen.refused)
    plan.notes |= dict.fromkeys([*measures.notes, *gallery.notes])
    plan.rules |= gallery.rules | ({} if foreground is None else {"foreground/-1": foreground.rule})
    return gallery, measures.columns(), metadata.predictions(plan.model, seen.output, plan.names, count)


def with_noise(plan: Plan, images: Tensor, first: int) -> Tensor:
    """The images with noise that hangs on the seed and an image's number alone."""
    found = []
    for number, image in enumerate(images, start=first):
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
        found.append(perturbed(image[None].float(), plan.noise, generator, plan.views.mean, plan.views.std))
    return torch.cat(found).to(images)


def all_curves(plan: Plan, parts: Sequence[Part], count: int) -> list[dict[str, Any]]:
    """Insertion and deletion curves of the maps of the first `count` images, and what shuffled weights leave of them."""
    if not count:
        return []
    skipped = {record["name"] for part in parts for record in part.skipped}
    readable = (i for i in range(len(plan.views)) if plan.views.name(i) not in skipped)
    views = [plan.views[i] for _, i in zip(range(count), readable, strict=False)]
    shuffled = faithfulness.randomised(plan.model, plan.seed)
    fresh = {"layouts": {}, "layers": {}, "rules": {}, "refused": {}, "notes": {}}
    blind = replace(plan, model=shuffled, direction=None, noise=0.0, **fresh)
    ours = maps_of(replace(plan, noise=0.0), views)
    try:
        theirs = maps_of(blind, views)
    except VitreousError as error:
        plan.notes[f"The model with shuffled weights could not be seen, and no map is compared with its own: {error}"] = None
        theirs = {}
    return against_model(plan.model, views, ours, theirs, plan.seed, max(16, plan.batch_size))


def maps_of(plan: Plan, views: Sequence[View]) -> dict[str, Tensor]:
    """All maps of some images, in memory."""
    starts = range(0, len(views), plan.batch_size)
    galleries = [see(plan, views[start : start + plan.batch_size], start)[0] for start in starts]
    return {name: torch.cat([gallery.maps[name] for gallery in galleries]) for name in galleries[0].maps}


def shown(items: Sequence[Any], what: str, console: Console | None) -> Iterator[Any]:
    """The items, with a progress bar if there is a terminal to show it on."""
    if console is None or not console.is_terminal or len(items) < 2:
        return iter(items)
    return iter(track(items, what, console=console, transient=True))
