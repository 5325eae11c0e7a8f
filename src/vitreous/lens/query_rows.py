"""What each patch looks at, as a reading holds it: attention rows of all queries.

A part has, of its first images, "queries/LAYER" (n, H, *grid of queries, *grid of keys) in bytes
and "queries/LAYER/scale" (n, H, *grid of queries); a row is its bytes times its scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Protocol

import numpy as np

from vitreous.base.errors import SettingError


class Part(Protocol):
    """What is needed of `reading.Part`."""

    tensors: dict[str, np.ndarray]
    images: list[dict[str, Any]]


def with_rows(part: Part) -> int:
    """How many images of a part, the first ones, have rows."""
    return max((len(value) for name, value in part.tensors.items() if name.startswith("queries/")), default=0)


def of_queries(parts: Sequence[Part], details: Mapping[str, Mapping[str, str]], budget: float) -> dict[str, Any]:
    """Record of a reading: images that have rows, what one takes, why a layer has none.

    bytes: of one image. budget: megabytes. reasons: {layer: why}.
    """
    filled = takewhile(with_rows, (part for part in parts if part.images))
    of_layers = {name.split("/")[1]: why["reason"] for name, why in details.items() if name.startswith("queries/")}
    return {
        "images": [image["image"] for part in filled for image in part.images[: with_rows(part)]],
        "bytes": sum(int(details.get(name, {}).get("bytes", 0)) for name in ("queries", "mixing")),
        "budget": budget,
        "reasons": of_layers,
    }


def queries_note(record: Mapping[str, Any] | None, what: str = "What each patch looks at") -> list[str]:
    """What a record comes to, in a sentence; nothing where it was not asked for."""
    if not record or not record["budget"] or not record["bytes"]:
        return []
    size, budget, count = record["bytes"] / 1e6, record["budget"], len(record["images"])
    if not count:
        return [f"{what} is not stored: one image takes {size:.3g} of {budget:g} MB (query_budget)."]
    images = f"{count} image{'s' * (count > 1)}"
    return [f"{what} is stored for {images}, {size:.3g} MB each, of {budget:g} MB (query_budget)."]


def query(
    parts: Sequence[Part], record: Mapping[str, Any] | None, image: int, layer: int, patch: tuple[int, int], head: int
) -> np.ndarray:
    """One row as a picture (rows, columns) float32: see `Reading.query`."""
    images, reasons = (record or {}).get("images", ()), (record or {}).get("reasons", {})
    if image not in images:
        raise SettingError(
            f"Found no attention of single patches for image {image}. Expected one of {list(images)}. Look again with a larger "
            "query_budget."
        )
    for part in parts:
        numbers = [one["image"] for one in part.images]
        if image in numbers:
            break
    place = numbers.index(image)
    if len(part.tensors.get(f"queries/{layer}", ())) <= place:
        raise SettingError(
            f"Found no attention of single patches in layer {layer}: {reasons.get(str(layer), 'there is no such layer')}. "
            "Expected another layer. Take one of reading.layers."
        )
    rows, scale = (part.tensors[name][place] for name in (f"queries/{layer}", f"queries/{layer}/scale"))
    heads, *grid = scale.shape
    if not (-1 <= head < heads and all(0 <= at < size for at, size in zip(patch, grid, strict=True))):
        raise SettingError(
            f"Found patch {tuple(patch)}, head {head}. Expected a patch of a grid of {grid[0]} x {grid[1]} and one of {heads} "
            "heads, -1 for their mean. Count from 0."
        )
    values = rows[:, patch[0], patch[1]] * scale[:, patch[0], patch[1], None, None]
    return values.mean(0) if head < 0 else values[head]
