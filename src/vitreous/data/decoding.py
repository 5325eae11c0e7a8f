"""From the bytes of an image file to pixels: capped before decoding, converted by stated rules, never by luck."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from vitreous.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PIXELS = 64_000_000  # 64 megapixels, 192 MB as RGB: more than any camera photo, less than a decompression bomb

# What Pillow raises on damaged files; DecompressionBombError is not an OSError.
BROKEN = (OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError)

Source = Path | bytes  # a file, or its contents where it was read out of an archive


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of a format read here; hidden files (".x") are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def contents(source: Source, name: str) -> bytes:
    """The bytes of a file or archive member called `name`."""
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise DataError(
            f"Found {name!r}, which cannot be read ({error.strerror}); expected a readable file. "
            "Check that it is still there, and its permissions."
        ) from error


def check_header(source: Source, name: str) -> None:
    """Raise DataError unless a file begins like an image of at most 64 megapixels; decodes nothing."""
    try:
        with _opened(source if isinstance(source, Path) else io.BytesIO(source)):
            pass
    except BROKEN as error:
        raise _unreadable(name, error) from error


def decode(source: Source, name: str, channels: int) -> Image.Image:
    """The image as greyscale (channels 1, mode L) or RGB (channels 3), turned as its EXIF orientation says.

    First frame of an animation; alpha is dropped, as timm and torchvision do; 16-bit grey keeps its upper 8 bits.
    Raises DataError naming the file.
    """
    raw = contents(source, name)
    try:
        with _opened(io.BytesIO(raw)) as image:
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
    """A (height, width) bool mask from a picture: true above 127, or above 0 where a file holds only 0 and 1."""
    values = np.asarray(decode(source, name, channels=1))
    return values > (127 if values.max() > 1 else 0)


def _opened(file: Path | io.BytesIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow only warns below twice its own limit
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from warning
    if image.width * image.height > PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, the limit is {PIXELS:,} in all")
    return image


def _unreadable(name: str, error: Exception) -> DataError:
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return DataError(
        f"Found {name!r}, which cannot be read: {reason}. Expected a whole image file in one of the formats "
        f"{', '.join(FORMATS)}. Replace the file or take it out."
    )
