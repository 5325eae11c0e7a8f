"""`look`: what a model attends to on some images, as numbers and maps, from any `torch.nn.Module`.

One traced pass tells where tokens are (once for each size of image). Then each batch is seen in one pass of clean and noisy
images, in which every attention is reduced at once: to numbers by `lens.measures`, to maps by `lens.sight` and `lens.gallery`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from vitreous.errors import DataError, SettingError
from vitreous.grafting import check, grafts
from vitreous.lens import faithfulness, scores
from vitreous.lens.call import Call
from vitreous.lens.direction import Direction
from vitreous.lens.gallery import Gallery, about, stacked
from vitreous.lens.measures import BLOCK, Measures, perturbed
from vitreous.lens.reading import CHUNK, FORMAT, Columns, Part, Reading, StoredParts, Writer, joined, read
from vitreous.lens.sight import Collector
from vitreous.lens.tap import Layouts, Refusal, trace, watch
from vitreous.lens.views import View, Views

FRACTIONS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the patches, in insertion and deletion
GIB = 2**30
PACKAGES = ("vitreous", "torch", "timm", "numpy")
WARNED = "Random weights: these maps say nothing about a trained model."


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
    scored: list[str] = field(default_factory=list)  # names of the components in the table of scores
    seen: int = 0  # images so far

    def layout(self, images: Tensor) -> Layouts:
        shape = tuple(images.shape[1:])
        if shape not in self.layouts:
            self.layouts[shape] = trace(self.model, images)
        return self.layouts[shape]


def look(
    model: nn.Module,
    images: Any,
    *,
    masks: Any = None,
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
) -> Reading:
    """A reading of any model: indicators, spectra and maps for every attention, head and image.

    images: a tensor (B, C, h, w), normalised as the model takes it; or paths, PIL images, folders, an ImageSet, which go
        through the model's pretrained_cfg.
    masks: a folder of .png masks or a boxes.csv; for tensors an array (B, h, w). With masks every map is scored against
        them, beside centre, random and area.
    direction: of `find_direction`, for signs and the foreground map.
    curves: insertion and deletion curves of the maps, and the check by shuffled weights, on so many images.
    noise: deviation on pixels of [0, 1] under which attention is compared; 0 leaves robustness out.
    memory: GiB of working memory beside the model's own.
    out: a folder, written as it goes; an interrupted look goes on there.
    console: shows progress. about: name and origin of the weights ("name", "weights", "mechanisms"), for the page.

    The model runs in eval mode without gradients; its mode, hooks and the random state are as before afterwards.
    Raises HostError for a model that shows no attention, DataError for no readable image, SettingError for settings.
    """
    check_ranges(noise=(noise, 0, 1), batch_size=(batch_size, 1, 10**6), memory=(memory, 0.001, 10**4), curves=(curves, 0, 10**6))
    views = Views(model, images, masks)
    count = len(views) if limit is None else min(limit, len(views))
    if count < 1:
        raise DataError("Found no images. Expected at least one. Give a tensor (B, C, h, w), paths, or a folder of images.")
    if direction is not None:
        direction.check(model)
    plan = Plan(model, views, direction, noise, seed, batch_size, memory, class_names(model))
    settings = {"noise": noise, "seed": seed, "curves": curves, "limit": limit, "direction": direction is not None}
    mark = fingerprint(model, views, count, settings)
    writer = None if out is None else Writer(Path(out), mark)
    if writer is not None and (writer.folder / "reading.json").is_file():
        return read(writer.folder)
    parts = all_parts(plan, count, writer, console)
    facts = facts_of(plan, parts, settings, about or {}) | {"fingerprint": mark}
    reading = Reading(facts, parts, all_curves(plan, parts, curves, console))
    if reading.scores():
        facts["summary"] = scores.summary(reading.scores(), seed=seed)
    if writer is None:
        return reading
    writer.finish(reading)
    return read(writer.folder)


def all_parts(plan: Plan, count: int, writer: Writer | None, console: Console | None) -> Sequence[Part]:
    """Look at images 0 to count - 1, CHUNK by CHUNK; parts that the writer has are not made again."""
    starts = list(range(0, count, CHUNK))
    if writer is not None and writer.done:
        look_at(plan, range(1))  # layers, components and rows are learned from the first image
        plan.seen = 0
    parts: list[Part] = []
    for number in shown(range(len(starts)), "images", console):
        if writer is not None and number in writer.done:
            plan.seen += len(StoredParts([writer.path(number)])[0].images)
            continue
        part = look_at(plan, range(starts[number], min(starts[number] + CHUNK, count)))
        plan.seen += len(part.images)
        if writer is None:
            parts.append(part)
        else:
            writer.add(number, part)
    found = parts if writer is None else StoredParts([writer.path(number) for number in range(len(starts))])
    if not plan.seen:
        skipped = [record for part in found for record in part.skipped]
        raise DataError(f"Found no readable image among {count}. {skipped[0]['reason']}")
    return found


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
        gallery, columns, output = see(plan, batch, first)
        tensors.append(gallery.tensors())
        rows.append(columns)
        part.images += [described(plan, view, first + i, said) for i, (view, said) in enumerate(zip(batch, output, strict=True))]
        if any(view.mask is not None for view in batch):
            scored.append(score(plan, gallery, batch, first))
    part.tensors = stacked(tensors)
    for i, view in enumerate(views):
        part.tensors[f"picture/{plan.seen + i}"] = view.jpeg()
        if view.mask is not None:
            part.tensors[f"mask/{plan.seen + i}"] = view.mask_png()
    if views:
        part.put("rows", joined(rows))
    if scored:
        part.put("scores", joined(scored))
    return part


def see(plan: Plan, views: Sequence[View], first: int) -> tuple[Gallery, Columns, list[tuple[str | None, float | None]]]:
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
    collector = Collector(layouts, count, rollout=True, on_tokens=measures.tokens, done=gallery.add)

    def take(call: Call) -> None:
        measures.see(call)
        collector.see(call)
        record(plan, call, collector.sights[-1].has_class)

    def leave(name: str, number: int, output: Any) -> None:
        measures.leave(name, number, output)
        collector.leave(name, number, output)

    seen = watch(plan.model, images, take, layouts=layouts, leave=leave)
    collector.finish()
    foreground = gallery.finish()
    plan.refused |= dict.fromkeys(seen.refused)
    plan.notes |= dict.fromkeys([*measures.notes, *gallery.notes])
    plan.rules |= gallery.rules | ({} if foreground is None else {"foreground/-1": foreground.rule})
    return gallery, measures.columns(), said(plan, seen.output, count)


def with_noise(plan: Plan, images: Tensor, first: int) -> Tensor:
    """The images with noise that hangs on the seed and an image's number alone."""
    found = []
    for number, image in enumerate(images, start=first):
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
        found.append(perturbed(image[None].float(), plan.noise, generator, plan.views.mean, plan.views.std))
    return torch.cat(found).to(images)


def record(plan: Plan, call: Call, has_class: bool) -> None:
    """What the page says of a layer; the error is the largest of all batches."""
    known = plan.layers.get((call.name, call.number))
    if known is not None:
        known["error"] = max(known["error"], call.error)
        return
    layout = call.layout
    plan.layers[call.name, call.number] = {
        "layer": len(plan.layers),
        "name": call.name,
        "number": call.number,
        "kind": call.kind,
        "route": call.route,
        "verified": call.verified,
        "error": call.error,
        "heads": call.output.shape[2],
        "queries": call.output.shape[3],
        "keys": call.v.shape[3],
        "windows": call.output.shape[1],
        "prefix": 0 if layout is None else layout.prefix,
        "grid": None if layout is None or layout.key_grid is None else list(layout.key_grid),
        "has_class": has_class,
        "effective": call.mixed,
        "note": call.note or ("where its tokens are is not known" if layout is None else layout.note),
    }


# -- what the model says -----------------------------------------------------------------------------------------------


def class_names(model: nn.Module) -> list[str] | None:
    """Names of the classes: those that travel with the model, or ImageNet's; None where they are not known."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("label_names"):
        return [str(name) for name in config["label_names"]]
    subset = infer_imagenet_subset(model) if hasattr(model, "num_classes") else None
    if not subset:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]


def said(plan: Plan, output: Any, count: int) -> list[tuple[str | None, float | None]]:
    """(class, its probability) for each of the first `count` images; (None, None) where the output is not classes."""
    if not faithfulness.has_classes(plan.model, output):
        return [(None, None)] * count
    probability, best = faithfulness.answer(output)[:count].float().softmax(-1).max(-1)
    names = [plan.names[i] if plan.names and i < len(plan.names) else f"class {i}" for i in best.tolist()]
    return list(zip(names, probability.tolist(), strict=True))


def described(plan: Plan, view: View, number: int, answer: tuple[str | None, float | None]) -> dict[str, Any]:
    """What a reading knows of an image."""
    label = plan.names[view.label] if plan.names and 0 <= view.label < len(plan.names) else None
    return {
        "image": number,
        "name": view.name,
        "width": view.width,
        "height": view.height,
        "predicted": answer[0],
        "probability": answer[1],
        "label": label,
        "mask": view.mask is not None,
    }


# -- against masks -----------------------------------------------------------------------------------------------------


def score(plan: Plan, gallery: Gallery, views: Sequence[View], first: int) -> Columns:
    """The maps of a batch against its masks, beside maps that look at no image: rows of the table of scores."""
    have = [i for i, view in enumerate(views) if view.mask is not None]
    covers: dict[tuple[int, int], Tensor] = {}
    tables = []

    def add(component: str, layer: int, head: int, maps: Tensor, cover: Tensor) -> None:
        if component not in plan.scored:
            plan.scored.append(component)
        keys = {"image": [first + i for i in have], "component": plan.scored.index(component), "layer": layer, "head": head}
        columns = {name: np.broadcast_to(np.array(value, np.int64), len(have)) for name, value in keys.items()}
        tables.append(columns | {name: value.cpu().numpy() for name, value in scores.scores(maps, cover).items()})

    for name, maps in gallery.maps.items():
        component, layer = name.split("/")[0], int(name.split("/")[1])
        if component == "artifacts":
            continue
        grid = tuple(maps.shape[-2:])
        maps = maps[have].flatten(-2).cpu()
        if grid not in covers:
            covers[grid] = torch.stack([scores.coverage(views[i].mask, grid) for i in have])
            at = -1 if len(covers) == 1 else layer  # of the first grid, and of each layer on another one
            for baseline, values in scores.baselines(grid, [first + i for i in have], plan.seed).items():
                add(baseline, at, -1, values, covers[grid])
        if maps.ndim == 3:
            for head in range(maps.shape[1]):
                add(component, layer, head, maps[:, head], covers[grid])
            maps = maps.mean(1)
        add(component, layer, -1, maps, covers[grid])
    return joined(tables)


# -- how far the maps can be trusted -----------------------------------------------------------------------------------


def all_curves(plan: Plan, parts: Sequence[Part], count: int, console: Console | None) -> list[dict[str, Any]]:
    """Insertion and deletion curves of every map (heads averaged) on the first images, and what shuffled weights leave."""
    views = first_views(plan, parts, min(count, plan.seen))
    if not views:
        return []
    ours, _, _ = see(plan, views, 0)
    shuffled = Plan(faithfulness.randomised(plan.model, plan.seed), plan.views, None, 0.0, plan.seed, plan.batch_size, plan.memory, None)
    shuffled.layouts, shuffled.rows = plan.layouts, dict(plan.rows)
    theirs, _, _ = see(shuffled, views, 0)
    images, by_grid = torch.stack([view.pixels for view in views]), {}
    for name, maps in ours.maps.items():
        if not name.startswith("artifacts"):
            by_grid.setdefault(tuple(maps.shape[-2:]), []).append(name)
    found = []
    for grid in shown(list(by_grid), "insertion and deletion", console):
        names = by_grid[grid]
        maps = torch.stack([flat(ours.maps[name]) for name in names], dim=1)
        options = {"fractions": FRACTIONS, "seed": plan.seed, "batch_size": max(16, plan.batch_size)}
        random = faithfulness.curves(plan.model, images, faithfulness.random_maps(grid, range(len(images)), seed=plan.seed), grid, **options)
        curves = faithfulness.curves(plan.model, images, maps, grid, **options)
        for number, name in enumerate(names):
            component, layer = name.split("/")
            same = faithfulness.rank_correlation(maps[:, number], flat(theirs.maps[name])) if name in theirs.maps else torch.tensor([torch.nan])
            same = same.abs() if component[0] in "uk" else same  # either sign is the same vector
            entry = faithfulness.record(curves.of(number), random, seed=plan.seed)
            found.append({"component": component, "layer": int(layer), "randomised": same.nanmean().item(), **entry})
    return found


def first_views(plan: Plan, parts: Sequence[Part], count: int) -> list[View]:
    """The first `count` images that could be read, again."""
    names = {record["name"] for part in parts for record in part.skipped}
    readable = (i for i in range(len(plan.views)) if plan.views.name(i) not in names)
    return [plan.views[i] for _, i in zip(range(count), readable, strict=False)]


def flat(maps: Tensor) -> Tensor:
    """(B, rows, cols) or (B, H, rows, cols) -> (B, P), heads averaged, on the CPU."""
    maps = maps.flatten(-2).float().cpu()
    return maps.mean(1) if maps.ndim == 3 else maps


# -- facts -------------------------------------------------------------------------------------------------------------


def facts_of(plan: Plan, parts: Sequence[Part], settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The content of reading.json."""
    model = plan.model
    config = getattr(model, "pretrained_cfg", None) or {}
    weights = given.get("weights", "given")
    random = weights == "random"
    name = given.get("name") or config.get("architecture") or type(model).__name__
    return {
        "format": FORMAT,
        "kind": "reading",
        "title": name,
        "model": {
            "name": name,
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights": weights,
            "mechanisms": [str(found.mechanism) for found in grafts(model)],
        },
        "random_weights": random,
        "settings": settings,
        "versions": {package: version(package) for package in PACKAGES},
        "seed": plan.seed,
        "layers": list(plan.layers.values()),
        "components": components(plan, parts[0]),
        "scored": plan.scored,
        "images": plan.seen,
        "chunk": CHUNK,
        "parts": len(parts),
        "refused": [{"name": found.name, "reason": found.reason} for found in plan.refused],
        "skipped": [found for part in parts for found in part.skipped],
        "notes": ([WARNED] if random else []) + list(plan.notes),
    }


def components(plan: Plan, part: Part) -> list[dict[str, Any]]:
    """One record for each component that there are maps of."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in part.tensors.items():
        name, _, layer = key.partition("/")
        if not layer.lstrip("-").isdigit() or name in ("picture", "mask"):
            continue
        entry = found.setdefault(
            name, {"name": name, "per_head": value.ndim == 4, "signed": f"{key}/confidence" in part.tensors, "about": about(name)}
        )
        if key in plan.rules:
            entry["rule"] = plan.rules[key]
        if f"{name[0]}/{layer}" in plan.rows and entry["signed"]:
            entry.setdefault("rows", {})[layer] = plan.rows[f"{name[0]}/{layer}"]
    return list(found.values())


def fingerprint(model: nn.Module, views: Views, count: int, settings: dict[str, Any]) -> str:
    """A digest of weights, images and settings: an interrupted reading goes on only with the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps([settings, views.identity(count)], sort_keys=True).encode())
    return digest.hexdigest()


def check_ranges(**settings: tuple[float, float, float]) -> None:
    """Raise SettingError for the first (value, lowest, highest) that is out of range."""
    for name, (value, low, high) in settings.items():
        if not low <= value <= high:
            raise SettingError(f"Found {name}={value}. Expected {low} to {high:g}. Choose a value in between.")


def shown(items: Sequence[Any], what: str, console: Console | None) -> Iterator[Any]:
    """The items, with a progress bar if there is a terminal to show it on."""
    if console is None or not console.is_terminal or len(items) < 2:
        return iter(items)
    return iter(track(items, what, console=console, transient=True))
