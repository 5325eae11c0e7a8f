"""Reading and run folders written by hand, with planted answers. Nothing here comes from the code that measures models."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image, ImageDraw

MEASURES = (
    "attention_entropy", "effective_tokens", "selectivity", "selectivity_paper", "mean_distance", "angular_alignment",
    "head_redundancy", "perturbation_robustness", "rank_collapse", "spectral_entropy", "effective_rank",
)  # fmt: skip
SCORES = ("energy_inside", "auroc", "average_precision", "pointing", "iou_otsu", "iou_best")


@dataclass
class Made:
    """What to plant. Defaults: the head that looks most at the object is layer 2 head 1, the artifacts are in layer 3."""

    title: str = "vit_made"
    images: int = 6
    layers: int = 4
    heads: int = 3
    grid: tuple[int, int] = (14, 14)
    looker: tuple[int, int] = (2, 1)
    share: float = 0.71  # energy inside of the looker
    artifacts: int = 3
    random: bool = False
    masks: bool = True
    seed: int = 0
    shift: dict = field(default_factory=dict)  # {(measure, layer, head): added}
    names: list[str] | None = None
    labels: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    size: int = 224
    extra: tuple[str, ...] = ("rollout", "u1", "u2", "u3", "k1", "artifacts")
    curves: bool = True
    unsure: tuple[int, ...] = (2,)  # images whose u1 has no sure sign
    chunk: int = 16
    queries: int = 0  # images with the attention of every patch; it is all on one place, see `looked_at`
    tokens: bool = False  # layers 2 and 3 are behind dropped and merged tokens, see `token_of`
    spectra: bool = False  # learned ones, see `sigma`

    def name(self, image: int) -> str:
        return self.names[image % len(self.names)] if self.names else f"photo-{image:02d}.jpg"


def value(measure: str, layer: int, head: int, image: int) -> float:
    """The number that stands in the made table: told apart by layer, head and image in its digits."""
    return round(MEASURES.index(measure) + 0.1 * layer + 0.01 * max(head, 0) + 0.0001 * image, 6)


def looked_at(patch: tuple[int, int], layer: int, head: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The one place that a patch looks at in a made reading."""
    return (patch[0] + layer + 1) % grid[0], (patch[1] + 2 * head + 1) % grid[1]


def token_of(row: int, column: int, width: int) -> int:
    """The token of a patch in a made reading: none in the first row, one for rows 4, 5 and columns 4, 5."""
    return -1 if row == 0 else 4 * width + 4 if row in (4, 5) and column in (4, 5) else row * width + column


def sigma(made: Made, layer: int, head: int) -> list[float]:
    """The learned spectrum of a made head, in no order."""
    values = [(1 + layer) * 0.8**k * (-1 if k % 3 == 2 else 1) + 0.01 * head + 0.1 * made.seed for k in range(8)]
    return values[4:] + values[:4]


def write_reading(folder: Path, made: Made | None = None) -> Path:
    """A reading folder of format 1."""
    made = made or Made()
    (folder / "parts").mkdir(parents=True)
    rng = np.random.default_rng(made.seed)
    scenes = [scene(made, image) for image in range(made.images)]
    for number, start in enumerate(range(0, made.images, made.chunk)):
        images = range(start, min(start + made.chunk, made.images))
        write_part(folder / "parts" / f"{number:05d}.safetensors", made, scenes, images, rng)
    table = rows(made)
    (folder / "table.json").write_text(json.dumps({"columns": table}))
    (folder / "table.csv").write_text(as_csv(list(table), zip(*table.values(), strict=True)))
    if made.masks:
        write_scores(folder, made)
    if made.curves:
        (folder / "curves.json").write_text(json.dumps(curves(made)))
    (folder / "reading.json").write_text(json.dumps(facts(made), indent=2))
    return folder


def facts(made: Made) -> dict:
    layers = [
        {
            "layer": layer, "name": f"blocks.{layer}.attn", "number": 0, "kind": "token", "route": "fused",
            "verified": "output recomputed", "error": 7e-8, "heads": made.heads, "queries": made.grid[0] * made.grid[1] + 1,
            "keys": made.grid[0] * made.grid[1] + 1, "windows": 1, "prefix": 1, "grid": list(made.grid), "has_class": True,
            "effective": False, "note": "",
        }
        for layer in range(made.layers)
    ]  # fmt: skip
    about = {
        "attention": "What the class token looks at, per head.",
        "rollout": "Attention multiplied through the layers up to this one.",
        "artifacts": "Tokens whose norm is far above the others'.",
        "foreground": "Training-free foreground score.",
    }
    components = [
        {
            "name": name, "per_head": name == "attention", "signed": name in ("u1", "u2", "u3", "k1", "foreground"),
            "about": about.get(name, f"Singular vector {name[1:]} of the {'keys' if name[0] == 'k' else 'block output'}."),
            "rule": "fixed direction" if name[0] in "uk" else "",
        }
        for name in ("attention", *made.extra, "foreground")
    ]  # fmt: skip
    return {
        "format": 1, "kind": "reading", "title": made.title, "fingerprint": "made", "parts": -(-made.images // made.chunk),
        "model": {"name": made.title, "class": "VisionTransformer", "parameters": 5717416,
                  "weights": "random" if made.random else "pretrained", "mechanisms": ["svda:scale=paper"]},
        "random_weights": made.random,
        "settings": {"rank": 3, "noise": 0.1}, "versions": {"torch": "2.15.0", "vitreous": "0.1.0"},
        "seed": made.seed, "layers": layers, "components": components, "images": made.images, "chunk": made.chunk,
        "queries": {"images": list(range(made.queries)), "bytes": 460_000 * bool(made.queries), "budget": 6,
                    "reasons": {"1": "it attends in windows"}},
        "refused": [{"name": "head.pool", "reason": "a softmax over classes, not over places"}],
        "skipped": [{"name": "broken.jpg", "reason": "not an image that can be read: truncated"}], "notes": made.notes,
    }  # fmt: skip


def scene(made: Made, image: int) -> dict:
    """A picture with one disc, its mask, and the disc on the grid."""
    rng = np.random.default_rng([made.seed, image])
    x, y, r = (rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.16, 0.26))
    side = made.size
    ground = rng.normal(0, 1, (7, 7, 3))
    low, high = ground.min(), ground.max()
    pixels = Image.fromarray(((ground - low) / (high - low) * 110 + 60).astype(np.uint8)).resize((side, side), Image.BICUBIC)
    box = [side * (x - r), side * (y - r), side * (x + r), side * (y + r)]
    draw = ImageDraw.Draw(pixels)
    draw.ellipse(box, fill=tuple(int(v) for v in rng.integers(150, 256, 3)))
    draw.ellipse([box[0] + side * r * 0.5, box[1] + side * r * 0.4, box[0] + side * r, box[1] + side * r], fill=(250, 246, 230))
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    rows_, columns = np.mgrid[: made.grid[0], : made.grid[1]]
    distance = np.hypot((rows_ + 0.5) / made.grid[0] - y, (columns + 0.5) / made.grid[1] - x)
    return {"picture": encoded(pixels, "JPEG"), "mask": encoded(mask, "PNG"), "disc": 1 / (1 + np.exp((distance - r) * 40))}


def encoded(image: Image.Image, kind: str) -> np.ndarray:
    data = io.BytesIO()
    image.save(data, kind)
    return np.frombuffer(data.getvalue(), np.uint8)


def write_part(path: Path, made: Made, scenes: list[dict], images: range, rng: np.random.Generator) -> None:
    n, (h, w) = len(images), made.grid
    discs = np.stack([scenes[image]["disc"] for image in images])
    tensors: dict[str, np.ndarray] = {}
    for layer in range(made.layers):
        maps = rng.gamma(1.2, 1, (n, made.heads, h, w)) * 0.4 + 0.15
        for head in range(made.heads):
            maps[:, head] += discs * 0.6 * ((layer + head) % 3)
        if layer == made.looker[0]:
            maps[:, made.looker[1]] = discs + 0.05
        marks = np.zeros((n, h, w), np.uint8)
        if layer == made.artifacts:
            for image in range(n):
                marks[image].flat[rng.choice(h * w, 7, replace=False)] = 1
            maps += marks[:, None] * 6
        maps /= maps.sum(axis=(-2, -1), keepdims=True)
        tensors[f"attention/{layer}"] = maps.astype(np.float16)
        for name in made.extra:
            drawn = discs - 0.35 + rng.normal(0, 0.08 * (1 + int(name[1]) if name[1:].isdigit() else 1), (n, h, w))
            tensors[f"{name}/{layer}"] = marks if name == "artifacts" else drawn.astype(np.float16)
            if name[0] in "uk" and name[1:].isdigit():
                sure = [0.71 if image in made.unsure else 0.99 for image in images]
                tensors[f"{name}/{layer}/confidence"] = np.array(sure, np.float32)
    count = max(0, min(made.queries - images.start, n))
    for layer in range(made.layers) if count else ():
        rows = np.zeros((count, made.heads, h, w, h, w), np.uint8)
        for head, row, column in np.ndindex(made.heads, h, w):
            rows[:, head, row, column, *looked_at((row, column), layer, head, (h, w))] = 255
        if layer != 1:
            tensors[f"queries/{layer}"] = rows
            tensors[f"queries/{layer}/scale"] = np.full(rows.shape[:4], (0.9 - 0.1 * layer) / 255, np.float32)
    for layer in range(made.layers):
        if made.spectra and images.start == 0:
            values = [sigma(made, layer, head) for head in range(made.heads)]
            tensors[f"spectrum/learned/{layer}"] = np.array(values, np.float32)
        if made.tokens and layer > 1:
            tokens = [[token_of(row, column, w) for column in range(w)] for row in range(h)]
            tensors[f"tokens/{layer}"] = np.array([tokens] * n, np.int32)
    tensors["foreground/-1"] = (discs * 3 - 1).astype(np.float16)
    said = []
    for image in images:
        tensors[f"picture/{image}"] = scenes[image]["picture"]
        if made.masks:
            tensors[f"mask/{image}"] = scenes[image]["mask"]
        label = made.labels[image % len(made.labels)] if made.labels else "disc"
        said.append(
            {"image": image, "name": made.name(image), "width": 400, "height": 300, "predicted": label, "probability": 0.8,
             "label": label, "mask": made.masks}
        )  # fmt: skip
    safetensors.numpy.save_file(tensors, path, metadata={"images": json.dumps(said), "skipped": "[]"})


def rows(made: Made) -> dict[str, list]:
    """The tidy table: attention rows per image, weight rows once, rank collapse per layer."""
    columns: dict[str, list] = {name: [] for name in ("layer", "head", "image", "source", "kind", *MEASURES)}

    def add(layer: int, head: int, image: int, source: str, names: tuple[str, ...]) -> None:
        for key, cell in zip(("layer", "head", "image", "source", "kind"), (layer, head, image, source, "token"), strict=True):
            columns[key].append(cell)
        for name in MEASURES:
            number = value(name, layer, head, image) + made.shift.get((name, layer, head), 0)
            columns[name].append(number if name in names else None)

    for layer in range(made.layers):
        for image in range(made.images):
            for head in range(made.heads):
                add(layer, head, image, "attention", MEASURES[:8])
            add(layer, -1, image, "attention", ("rank_collapse",))
        for head in range(made.heads):
            add(layer, head, -1, "weight", MEASURES[9:])
    return columns


def write_scores(folder: Path, made: Made) -> None:
    """scores.csv and summary.csv: the looker leads by far; the centre prior has 0.41."""
    what = [("attention", layer, head) for layer in range(made.layers) for head in range(made.heads)]
    what += [("u1", layer, "") for layer in range(made.layers)] + [("foreground", "", "")]
    what += [(name, "", "") for name in ("centre", "random", "area")]
    level = {"foreground": 0.66, "centre": 0.41, "random": 0.2, "area": 0.19}
    lines, means = [], []
    for component, layer, head in what:
        for number, measure in enumerate(SCORES):
            score = level.get(component, 0.3 + 0.01 * (layer or 0) + 0.005 * (head or 0) if layer != "" else 0.3)
            if component == "attention" and (layer, head) == made.looker:
                score = made.share
            middle = score + 0.02 * number
            found = [round(middle + by, 4) for by in (0, -0.03, 0.05)]
            means.append([component, layer, head, measure, *found, made.images])
        for image in range(made.images):
            found = [round(score + 0.001 * image + 0.02 * i, 4) for i in range(len(SCORES))]
            lines.append([image, component, layer, head, *found])
    (folder / "scores.csv").write_text(as_csv(["image", "component", "layer", "head", *SCORES], lines))
    head = ["component", "layer", "head", "measure", "mean", "low", "high", "images"]
    (folder / "summary.csv").write_text(as_csv(head, means))


def curves(made: Made) -> list[dict]:
    at = np.linspace(0, 1, 11)
    return [
        {
            "component": component, "layer": layer, "fractions": at.tolist(), "insertion": (at**0.4).tolist(),
            "deletion": ((1 - at) ** 3).tolist(), "random_insertion": at.tolist(), "random_deletion": (1 - at).tolist(),
            "insertion_area": 0.71, "deletion_area": 0.25, "difference": [0.21, 0.17, 0.25], "randomised": 0.08,
        }
        for component, layer in (("foreground", -1), ("rollout", made.layers - 1))
    ]  # fmt: skip


def as_csv(head: list[str], lines) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return text.getvalue()


def write_run(
    folder: Path, epochs: int = 4, name: str = "plain", best: int = 2, alarms: dict[int, list] | None = None, **planted
) -> Path:
    """A run folder: effective tokens of layer 1 head 0 are lowest after epoch `best`. alarms: by epoch."""
    folder.mkdir(parents=True)
    model = {"architecture": "scratch_vit", "mechanisms": []}
    run = {"format": 1, "command": f"vitreous train cutouts --out {name}", "started": "2026-01-01T00:00:00+00:00", "seed": 0,
           "device": "cpu", "model": model, "data": {"name": "cutouts"}, "settings": {"epochs": epochs}, "versions": {},
           "machine": {"cores": 2}, "remarks": []}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    lines = []
    for epoch in range(epochs + 1):
        shift = {("effective_tokens", 1, 0): -0.5 if epoch == best else 0.1 * abs(epoch - best)}
        settings = {"images": 4, "layers": 3, "heads": 2, "looker": (2, 1), "artifacts": 1, "size": 64, "grid": (8, 8)}
        made = Made(title=f"{name}, epoch {epoch}", shift=shift, curves=False, **settings | planted)
        write_reading(folder / "readings" / f"epoch-{epoch:03d}", made)
        if epoch:
            lines.append(
                {"epoch": epoch, "losses": {"total": 2 / epoch}, "lr": 1e-3, "seconds": 2.0, "images_per_second": 900,
                 "tests": {"test": {"accuracy": 0.5 + 0.08 * epoch}, "swapped": {"accuracy": 0.4 + 0.05 * epoch}},
                 "alarms": (alarms or {}).get(epoch, [])}
            )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
