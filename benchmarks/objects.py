"""ECSSD, photographs with hand-drawn masks: whole, and cropped so that the object is off the centre.

Even positions of the sorted names (250) are for choosing, odd ones (250) for reporting. Images are squashed to 224 x 224.
"""

from __future__ import annotations

import io
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitreous.lens.formulas.scores import coverage

SIZE, GRID = (224, 224), (14, 14)
SIDES, KEPT, TRIES, OFF, SEED = (0.5, 0.8), 0.7, 300, 0.2, 2026


@dataclass
class Objects:
    """images (n, 3, 224, 224), pixels -1 to 1; cover (n, 196), share of each patch that the mask covers."""

    images: torch.Tensor
    cover: torch.Tensor


def objects(data: Path) -> dict[str, Objects]:
    """{"tune", "tune off-centre", "held-out", "held-out off-centre"}."""
    found: dict[str, list] = {f"{half}{kind}": [] for half in ("tune", "held-out") for kind in ("", " off-centre")}
    with tarfile.open(data / "ecssd" / "ecssd_500.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    for i, name in enumerate(sorted(name for name in files if "/images/" in name)):
        image = Image.open(io.BytesIO(files[name])).convert("RGB")
        mask = Image.open(io.BytesIO(files[name.replace("images", "masks").replace(".jpg", ".png")]))
        mask = np.asarray(mask.convert("L")) > 127
        half = "held-out" if i % 2 else "tune"
        found[half].append(prepared(image, mask))
        box = off_centre(mask, np.random.default_rng([SEED, i]))
        if box is not None:
            top, left, height, width = box
            part = image.crop((left, top, left + width, top + height))
            found[f"{half} off-centre"].append(prepared(part, mask[top : top + height, left : left + width]))
    return {name: Objects(*(torch.stack(x) for x in zip(*pairs, strict=True))) for name, pairs in found.items()}


def prepared(image: Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = np.asarray(image.resize(SIZE, Image.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1, coverage(mask.copy(), GRID)


def off_centre(mask: np.ndarray, generator: np.random.Generator) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of a crop in which the object is off the centre; None if there is none.

    Of TRIES random crops with SIDES times the image's sides, each side alike, that keep KEPT of the object, the one with the
    object's centre of mass furthest from its own centre; it must be OFF of the crop's sides away.
    """
    h, w = mask.shape
    sums = [
        np.pad(np.cumsum(np.cumsum(m, 0), 1), ((1, 0), (1, 0))) for m in (mask * 1.0, *(mask * g for g in np.mgrid[:h, :w]))
    ]
    best, far = None, OFF
    for _ in range(TRIES):
        side = generator.uniform(*SIDES)
        height, width = round(side * h), round(side * w)
        top, left = generator.integers(0, h - height + 1), generator.integers(0, w - width + 1)
        area, down, across = (
            s[top + height, left + width] - s[top, left + width] - s[top + height, left] + s[top, left] for s in sums
        )
        if area < KEPT * mask.sum():
            continue
        offset = math.hypot((down / area - top + 0.5) / height - 0.5, (across / area - left + 0.5) / width - 0.5)
        if offset > far:
            best, far = (int(top), int(left), height, width), offset
    return best
