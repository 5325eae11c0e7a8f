"""A map of a reading over its picture, and what a reading holds in words and HTML.

Colours are those of the pages: from dark violet to pale yellow; blue, white and orange for signed
maps; teal, white and violet where the sign is not known.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from html import escape
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from vitreous.base.errors import SettingError

PLAIN = "16112b 3f1654 741268 ab1164 d8334e f26835 f79f4c f2d192 faf8d1"
SIGNED = "0f64bf 4386d8 7da8e1 b6cce9 f5f5f5 e5c1b1 d89373 c86432 a4450c"
UNSIGNED = "20857b 38a397 7cbab2 b6d4cf f2f2f2 d1c7de b6a3ce 9d80bf 865eb1"
SURE = 0.95  # confidence from which a sign is taken as known
FIRST = ("foreground", "relevance", "attention", "mixing_middle")  # the map that is shown first is the first of these
LARGE = 256  # pixels to which the longer side of a small picture is brought, or nearly
THUMBS, SIDE = 4, 168  # pictures of a notebook's summary, and pixels of the longer side of each


class Reading(Protocol):
    """What is needed of `reading.Reading`."""

    facts: dict[str, Any]
    parts: Any
    layers: list[dict[str, Any]]
    images: list[dict[str, Any]]
    maps: Any
    measures: dict[str, dict[str, Any]]

    def query(self, image: int, layer: int, patch: tuple[int, int], head: int = -1) -> np.ndarray: ...


def colours(values: np.ndarray, scale: str, signed: bool) -> np.ndarray:
    """Values (rows, columns) as colours (rows, columns, 3) uint8.

    The least and the largest value have the colours at the ends; signed: zero that in the middle. A
    value that is not finite is grey.
    """
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    share = np.nan_to_num((values - low) / (high - low) if high > low else values * 0 + 0.5 * signed)
    stops = np.array([list(bytes.fromhex(stop)) for stop in scale.split()])
    cells = np.stack([np.interp(share, np.linspace(0, 1, len(stops)), stops[:, c]) for c in range(3)], axis=-1)
    return np.where(np.isfinite(values)[..., None], cells.round(), 128).astype(np.uint8)


def picture(reading: Reading, image: int, component: str = "") -> Image.Image:
    """What the model saw of an image, enlarged if small. Raises SettingError for none.

    component: whose maps may be of a changed image.
    """
    for part in reading.parts:
        for record in part.images:
            if record["image"] == image:
                data = part.tensors.get(f"picture/{component}/{image}", part.tensors[f"picture/{image}"])
                stored = Image.open(io.BytesIO(data.tobytes())).convert("RGB")
                times = max(1, LARGE // max(stored.size))
                return stored.resize([times * side for side in stored.size], Image.Resampling.NEAREST)
    raise SettingError(f"Found image {image} of {len(reading.images)}. Expected one of them. Count from 0.")


def default_map(reading: Reading, component: str = "", layer: int | None = None) -> tuple[str, int]:
    """The component and layer that are meant: the best that there is, of the last layer."""
    maps = list(reading.maps)
    names = [name for name, _ in maps]
    component = component or next((name for name in (*FIRST, *names) if name in names), "")
    if layer is None or (component, -1) in maps:
        layer = max((at for name, at in maps if name == component), default=-1)
    return component, layer


def show(
    reading: Reading,
    component: str,
    image: int,
    layer: int | None = None,
    head: int = -1,
    patch: tuple[int, int] | None = None,
    opacity: float = 0.6,
) -> Image.Image:
    """See `Reading.show`."""
    if not 0 <= opacity <= 1:
        raise SettingError(f"Found opacity={opacity}. Expected 0 (the picture) to 1 (the map). Choose a value in between.")
    if patch is None:
        component, layer = default_map(reading, component, layer)
    ground, scale, signed = picture(reading, image, component if patch is None else ""), PLAIN, False
    if patch is not None:
        layer = max(record["layer"] for record in reading.layers) if layer is None else layer
        values = reading.query(image, layer, patch, head)
    else:
        per_head = reading.maps.per_head.get(component) and head >= 0
        values = reading.maps[(component, layer, head) if per_head else (component, layer)][image]
        signed = any(record["signed"] for record in reading.facts["components"] if record["name"] == component)
        if signed:
            scale = SIGNED if reading.maps.confidence(component, layer)[image] >= SURE else UNSIGNED
    if values.ndim != 2:
        raise SettingError(
            f"Found {component} on a grid of {values.ndim} dimensions. Expected two for a picture. Slice reading.maps."
        )
    cells = Image.fromarray(colours(values, scale, signed)).resize(ground.size, Image.Resampling.NEAREST)
    shown = Image.blend(ground, cells, opacity)
    if patch is not None:
        grid = reading.maps.first.tensors[f"queries/{layer}/scale"].shape[2:]
        down, across = (side / n for side, n in zip(ground.size[::-1], grid, strict=True))
        box = [patch[1] * across, patch[0] * down, (patch[1] + 1) * across - 1, (patch[0] + 1) * down - 1]
        ImageDraw.Draw(shown).rectangle(box, outline="white", width=2)
    return shown


def lines(reading: Reading) -> list[str]:
    """What a reading holds: images, layers, heads, maps, measures, and what was not verified."""
    facts, layers = reading.facts, [record for record in reading.layers if record["kind"] != "mixing"]
    mixing = [record for record in reading.layers if record["kind"] == "mixing"]
    heads = sorted({record["heads"] for record in layers})
    grids = dict.fromkeys("x".join(map(str, record["grid"])) for record in layers if record["grid"])
    counts = Counter(name for name, _ in reading.maps)
    maps = ", ".join(name if (name, -1) in reading.maps else f"{name} ({count})" for name, count in counts.items())
    text = [
        f"{len(reading.images)} images, {len(layers)} attentions"
        + (f" of {' or '.join(map(str, heads))} heads" if heads else "")
        + (f" on grids of {', '.join(grids)}" if grids else "")
        + (f", {len(mixing)} modules with mixing maps" if mixing else ""),
        f"maps, with how many layers: {maps or 'none'}",
        f"measures: {', '.join(name for name in reading.measures if not name.endswith('_paper')) or 'none'}",
    ]
    text += ["weights: random"] if facts.get("random_weights") else []
    for word, kind in (("refused", "not verified, and left out"), ("skipped", "images that could not be read")):
        if records := facts.get(word):
            text.append(f"{kind}: " + "; ".join(f"{record['name']}: {record['reason']}" for record in records[:3]))
            text[-1] += f"; {len(records) - 3} more" if len(records) > 3 else ""
    return text + [f"note: {note}" for note in facts.get("notes", ())]


def html(reading: Reading) -> str:
    """A reading in a notebook: the first pictures under its best map, and what it holds."""
    component, layer = default_map(reading)
    label = next((record["label"] for record in reading.facts["components"] if record["name"] == component), "")
    flat = bool(component) and reading.maps.first.map(f"{component}/{layer}").ndim < 5
    figures = [figure(reading, record) for record in reading.images[:THUMBS]] if flat else []
    caption = f"{label}{f', layer {layer}' if layer >= 0 else ''}" if figures else ""
    body = "".join(f"<li>{escape(line)}</li>" for line in lines(reading))
    row = f'<div style="display:flex;gap:8px;flex-wrap:wrap">{"".join(figures)}</div><p>{escape(caption)}</p>'
    return f"<h4>{escape(str(reading.facts.get('title')))}</h4>{row if figures else ''}<ul>{body}</ul>"


def figure(reading: Reading, record: dict[str, Any]) -> str:
    """One picture under its map, with its name and prediction."""
    shown = show(reading, "", record["image"])
    shown.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    shown.save(data, "PNG")
    words = escape(": ".join(str(word) for word in (record["name"], record["predicted"]) if word))
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<figure style="margin:0"><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
