"""Image files of every kind a folder may hold, made on the spot."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def pixels(value, size=(16, 12)):
    return np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(value, size=(16, 12), mode="RGB", kind="PNG", **options):
    """The bytes of a picture of noise drawn by `value`."""
    return encoded(Image.fromarray(pixels(value, size)).convert(mode), kind, **options)


def bomb(side=20_000):
    return encoded(Image.new("1", (side, side)))


def animated(value):
    frames = [Image.fromarray(pixels(value + k)).convert("P") for k in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def turned(value):
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(value, kind="JPEG", exif=exif)


def sixteen_bits(value):
    return encoded(Image.fromarray(pixels(value)[..., 0].astype(np.uint16) * 257))


def write(root, files):
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return root


def tree(parts=("train/cat", "train/dog", "val/cat", "val/dog"), images=4, start=0):
    """{name: bytes} of a few pictures for each folder, all different."""
    return {f"{part}/{k}.png": picture(start + 97 * p + k) for p, part in enumerate(parts) for k in range(images)}
