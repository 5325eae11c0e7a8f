"""Decode image files to pixels: sizes are capped, modes are converted by stated rules."""

from __future__ import annotations

import io
import stat
import struct
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, features

from vitreous.base.errors import DataError
from vitreous.data.problems import HEIF_EXTRA
from vitreous.data.timeouts import read_in_time

SUFFIXES = {  # by Pillow's name of the format
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
AVIF = "avif" in features.modules and features.check("avif")  # not in every build of Pillow
HEIF = find_spec("pillow_heif") is not None  # the extra vitreous[heic]
FORMATS = tuple(name for name in SUFFIXES if {"AVIF": AVIF, "HEIF": HEIF}.get(name, True))
PILLOWS = tuple(name for name in FORMATS if name != "HEIF")
FORMAT_OF = {suffix: name for name, suffixes in SUFFIXES.items() if name != "HEIF" or HEIF for suffix in suffixes}
ORIENTATION = 0x0112  # EXIF: 2 to 8 are turned or mirrored, 5 to 8 exchange the sides
PHOTOMETRIC, BITS, BANDS = 262, 258, 277  # tags of TIFF; photometric 0: white is zero
ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
DEPTHS = {8: "8 bits in 16, upper 8 empty", 12: "12 bits in 16, upper 8 of the 12 kept", 16: "16 bits, upper 8 kept"}
PIXELS = 64_000_000  # 64 megapixels, 192 MB as RGB: more than any camera photo, less than a decompression bomb
ASPECT = 200  # longest side over shortest: brought to 518 pixels, such an image has 54 megapixels
BYTES = 1 << 30  # of one file: more than 64 megapixels of any format read here
OPENING = threading.Lock()  # warnings are caught for the whole process, so that only one thread at a time may do it

# What Pillow raises on damaged files.
BROKEN = (OSError, EOFError, SyntaxError, ValueError, IndexError, RuntimeError, struct.error)


class Row(Protocol):
    """What hands out the bytes of an image kept in a table."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Cropped:
    """An image file whose last rows of pixels, such as a banner, are no part of the picture."""

    path: Path
    rows: int

    def read_bytes(self) -> bytes:
        return read_file(self.path)

    def __len__(self) -> int:
        return self.path.stat().st_size


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
    return path.suffix.lower() in FORMAT_OF and not path.name.startswith(".")


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
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a plain file")
    if status.st_size > BYTES:
        raise OSError(f"it has {status.st_size:,} bytes, the limit is {BYTES:,}")
    return path.read_bytes()


def decode(source: Source, name: str, channels: int) -> Image.Image:
    """The image as greyscale (channels 1, mode L) or RGB (channels 3), turned as EXIF says.

    First frame of an animation; alpha is dropped, as timm and torchvision do; CMYK and palettes
    by Pillow's conversion. 16-bit grey keeps its upper 8 bits; where no value of the file reaches
    4096, the upper 8 of 12 (scanners and cameras write 12 bits into 16), and where none reaches
    256, its 8 bits. White-is-zero is inverted. The contents decide what a file is, not its suffix.
    Raises Unreadable for one that is empty, cut short, no image, of more than 64 megapixels, or
    more than 200 times as long as wide.
    """
    try:
        with opened(contents(source, name)) as image:
            return cropped(converted(image, name, channels), source, name)
    except BROKEN as error:
        raise unreadable(name, error) from error


def decode_with_notes(source: Source, name: str, channels: int) -> tuple[Image.Image, tuple[str, ...]]:
    """As `decode`, with what `remarks` says of the file."""
    try:
        with opened(contents(source, name)) as image:
            notes = remarks(image, name)
            return cropped(converted(image, name, channels), source, name), notes
    except BROKEN as error:
        raise unreadable(name, error) from error


def converted(image: Image.Image, name: str, channels: int) -> Image.Image:
    """An opened image as `decode` gives it. Raises Unreadable naming it."""
    inverted = white_is_zero(image)
    deep = is_deep(image)
    try:
        image = ImageOps.exif_transpose(image)
        if deep:
            values = np.asarray(image)
            grey = (values >> (depth(values) - 8)).astype(np.uint8)
            image = Image.fromarray(255 - grey if inverted else grey)
        elif image.mode in ("I", "F"):
            raise ValueError("it has 32 bits per pixel")
        elif "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("L" if channels == 1 else "RGB")
    except BROKEN as error:
        raise unreadable(name, error) from error


def cropped(image: Image.Image, source: Source, name: str) -> Image.Image:
    """A converted image without the rows that its source leaves out."""
    rows = rows_left(image.height, source, name)
    return image if rows == image.height else image.crop((0, 0, image.width, rows))


def rows_left(height: int, source: Source, name: str) -> int:
    """How many rows of pixels of an image its source lets count. Raises Unreadable if none."""
    rows = height - (source.rows if isinstance(source, Cropped) else 0)
    if rows < 1:
        raise unreadable(name, ValueError(f"it has {height} rows of pixels, of which the last {source.rows} do not count"))
    return rows


def is_deep(image: Image.Image) -> bool:
    """Whether it holds greys of 16 bits, which Pillow gives a PGM file in a mode of 32."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))


def white_is_zero(image: Image.Image) -> bool:
    """Whether 0 is white in a 16-bit TIFF; of fewer bits, Pillow inverts it itself."""
    return image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0


def depth(values: np.ndarray) -> int:
    """Bits that the values of a 16-bit file use: the fewest of 8, 12, 16 that hold all."""
    return next(bits for bits in DEPTHS if bits == 16 or values.max() < 1 << bits)


def remarks(image: Image.Image, name: str) -> tuple[str, ...]:
    """What `decode` will do to an opened image beside decoding, in words to count by."""
    kind, coding = image.format or "", str(image.tile[:1])  # it goes with loading
    bands = getattr(image, "tag_v2", {}).get(BANDS, 1)
    taken = 3 if image.mode == "RGBX" else len(image.getbands())
    checks = {
        "animated, first frame taken": kind != "MPO" and getattr(image, "n_frames", 1) > 1,
        "CMYK, converted": image.mode == "CMYK",
        "palette, converted": image.mode in ("P", "PA"),
        "transparent, alpha dropped": image.mode in ALPHA or "transparency" in image.info,
        f"{bands} bands, the first {taken} taken": bands > taken,
        "white is zero, inverted": white_is_zero(image),
        "turned as EXIF says": image.getexif().get(ORIENTATION, 1) in range(2, 9),
        f"{kind} under another suffix": FORMAT_OF.get(PurePosixPath(name).suffix.lower()) != kind.replace("MPO", "JPEG"),
    }
    if is_deep(image):
        checks[DEPTHS[depth(np.asarray(image))]] = True
    elif ";16" in coding:  # of colours Pillow itself keeps the upper half
        checks[DEPTHS[16]] = True
        highest = max(high for _, high in np.atleast_2d(image.getextrema()))
        checks["nearly black: of 16 bits of colour the upper 4 are empty"] = highest < 16
    return tuple(note for note, true in checks.items() if true)


def opened(raw: bytes) -> Image.Image:
    """The image in these bytes, its header read and nothing decoded. Raises one of BROKEN."""
    if not raw:
        raise ValueError("the file is empty")
    formats = PILLOWS
    if HEIF and raw[4:8] == b"ftyp":
        teach_heif()
        formats = FORMATS
    with OPENING, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow only warns below twice its own limit
        try:
            image = Image.open(io.BytesIO(raw), formats=formats)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"it has more pixels than the limit of {min(PIXELS, Image.MAX_IMAGE_PIXELS):,}") from error
        except Image.UnidentifiedImageError as error:
            warnings.simplefilter("ignore")  # of tags that are cut short
            raise ValueError(unidentified(raw)) from error
    if image.width * image.height > PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, the limit is {PIXELS:,} in all")
    if max(image.size) > ASPECT * min(image.size):
        raise ValueError(f"it has {image.width} x {image.height} pixels, the limit is {ASPECT} times as long as wide")
    return image


@cache
def teach_heif() -> None:
    """Let Pillow read HEIC files; called for the first one, since loading takes time."""
    from pillow_heif import register_heif_opener

    register_heif_opener()


def unidentified(raw: bytes) -> str:
    """What a file is that Pillow does not open: an image of another kind, or none."""
    if raw[4:8] == b"ftyp":
        kind = raw[8:12].decode("ascii", "replace").strip()
        extra = "" if HEIF or not kind.startswith(("hei", "hev", "mif")) else f" ({HEIF_EXTRA})"
        return f"an image of the kind {kind}, which Pillow does not read here{extra}"
    if raw[:4] in (b"II*\0", b"MM\0*"):
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(raw[:8])
            file = io.BytesIO(raw)
            file.seek(tags.next)
            tags.load(file)
            count, bits = tags.get(BANDS, 1), max(tags.get(BITS, (1,)))
        except BROKEN:
            return "a damaged TIFF"
        if bits <= 8 and (count == 1 or (count in (3, 4) and tags.get(PHOTOMETRIC) == 2)):
            return "a damaged TIFF"
        return f"a TIFF of {count} bands of {bits} bits, which Pillow does not read"
    return "not an image"


def unreadable(name: str, error: Exception) -> Unreadable:
    """The error for a file that cannot be decoded."""
    reason = str(error) or type(error).__name__
    return Unreadable(
        reason,
        f"Found {name!r}, which cannot be read: {reason}. Expected a whole image file in one of the formats "
        f"{', '.join(FORMATS)}. Replace the file or take it out.",
    )
