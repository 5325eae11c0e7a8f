"""From the bytes of an image file to pixels.

Sizes are capped before decoding, and modes are converted by stated rules.
"""

from __future__ import annotations

import io
import stat
import struct
import threading
import warnings
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from vitreous.base.errors import DataError
from vitreous.data.timeouts import read_in_time

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PIXELS = 64_000_000  # 64 megapixels, 192 MB as RGB: more than any camera photo, less than a decompression bomb
ASPECT = 200  # longest side over shortest: brought to 518 pixels, such an image has 54 megapixels
BYTES = 1 << 30  # of one file: more than 64 megapixels of any format read here
OPENING = threading.Lock()  # warnings are caught for the whole process, so that only one thread at a time may do it

BROKEN = (OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error)  # what Pillow raises on damaged files


class Row(Protocol):
    """What hands out the bytes of an image kept in a table."""

    def read_bytes(self) -> bytes: ...


Source = Path | bytes | Row  # a file, its contents where it was read out of an archive, or a row of a table


class Unreadable(DataError):
    """An image, or its mask, that cannot be read; `reason` says why in a few words."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:  # it may come from a worker process
        return Unreadable, (self.reason, str(self))


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of a format read here; hidden files (".x") are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def contents(source: Source, name: str) -> bytes:
    """The bytes of a file or archive member called `name`.

    Raises Unreadable if it cannot be read or its drive does not answer within a minute, DriveGone
    at the third of those.
    """
    if isinstance(source, bytes):
        return source
    try:
        return read_in_time(lambda: read_file(source) if isinstance(source, Path) else source.read_bytes(), name)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise Unreadable(
            reason,
            f"Found {name!r}, which cannot be read ({reason}); expected a readable file. "
            "Check that it is still there, and its permissions.",
        ) from error


def read_file(path: Path) -> bytes:
    """The bytes of a plain file.

    Raises OSError for what is none, which could have no end, and for one beyond all bounds.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("not a plain file")
    if found.st_size > BYTES:
        raise OSError(f"it has {found.st_size:,} bytes, the limit is {BYTES:,}")
    return path.read_bytes()


def decode(source: Source, name: str, channels: int) -> Image.Image:
    """The image as greyscale (channels 1, mode L) or RGB (channels 3), turned as its EXIF
    orientation says.

    First frame of an animation; alpha is dropped, as timm and torchvision do; 16-bit grey keeps its
    upper 8 bits; CMYK and palettes by Pillow's conversion. The contents decide what a file is, not
    its suffix. Raises Unreadable for one that is empty, cut short, no image, of more than 64
    megapixels, or more than 200 times as long as wide.
    """
    raw = contents(source, name)
    try:
        with opened(raw) as image:
            return converted(image, name, channels)
    except BROKEN as error:
        raise _unreadable(name, error) from error


def converted(image: Image.Image, name: str, channels: int) -> Image.Image:
    """An opened image as `decode` gives it. Raises DataError naming it."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("it has 32 bits per pixel")
        elif "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("L" if channels == 1 else "RGB")
    except BROKEN as error:
        raise _unreadable(name, error) from error


def decode_mask(source: Source, name: str) -> np.ndarray:
    """A (height, width) bool mask from a picture: true above 127.

    True above 0 where a file holds only 0 and 1.
    """
    values = np.asarray(decode(source, name, channels=1))
    return values > (127 if values.max() > 1 else 0)


def opened(raw: bytes) -> Image.Image:
    """The image in these bytes, its header read and nothing decoded. Raises one of BROKEN."""
    if not raw:
        raise ValueError("the file is empty")
    with OPENING, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow only warns below twice its own limit
        try:
            image = Image.open(io.BytesIO(raw), formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"it has more pixels than the limit of {min(PIXELS, Image.MAX_IMAGE_PIXELS):,}") from error
    if image.width * image.height > PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, the limit is {PIXELS:,} in all")
    if max(image.size) > ASPECT * min(image.size):
        raise ValueError(f"it has {image.width} x {image.height} pixels, the limit is {ASPECT} times as long as wide")
    return image


def _unreadable(name: str, error: Exception) -> Unreadable:
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
    return Unreadable(
        reason,
        f"Found {name!r}, which cannot be read: {reason}. Expected a whole image file in one of the formats "
        f"{', '.join(FORMATS)}. Replace the file or take it out.",
    )
