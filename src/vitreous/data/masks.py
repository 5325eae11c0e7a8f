"""Foreground masks from picture files: two-valued pictures, maps of classes, cut-outs."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from vitreous.base.errors import DataError
from vitreous.data.decoding import ALPHA, BROKEN, Source, contents, opened, unreadable

VOID = 255  # index of pixels without a class, as in PASCAL VOC and Cityscapes
CLASSES = 100  # beside white, greys from here on may be shades as well as classes
LEVELS = 64  # distinct values of a picture, from which on it is taken to hold shades
VOTES = set(range(0, 256, 51))  # greys of the pixels that none, one, ... all of five annotators marked, as in CUB-200-2011
VOTE_NOTE = "masks of five votes, cut at half"
CLASS_NOTE = "masks of classes: each index above 0 is foreground"
VOID_NOTE = f"{CLASS_NOTE}, {VOID} is void and counts as background"
GREY_NOTE = "masks with greys between black and white, cut at half"
ALPHA_NOTE = "masks by alpha: what is opaque is foreground"


def decode_mask(source: Source, name: str) -> tuple[np.ndarray, str]:
    """The (height, width) bool foreground that a picture marks, and how it was read.

    Of two values the larger is foreground. Indices of a palette, and small numbers in a grey
    picture, are classes: those above 0 are foreground, 255 is void, which counts as background.
    Where alpha varies, what is opaque is foreground. A few greys between black and white are
    edges, and cut at half, as are the fifths of white that five annotators' votes make. The note
    is empty for two values.

    Raises Unreadable, or DataError for a picture that is not clearly one of these.
    """
    try:
        with opened(contents(source, name)) as image:
            picture = ImageOps.exif_transpose(image)
            picture.load()
            return foreground_of(picture)
    except Unclear as error:
        raise DataError(
            f"Found the mask {name!r}, of which {error}; expected two values, 0 and 255, or the indices of classes, with 0 for "
            "the background. Save it so."
        ) from error
    except BROKEN as error:
        raise unreadable(name, error) from error


class Unclear(Exception):
    """A picture that does not clearly say what its foreground is."""


def foreground_of(image: Image.Image) -> tuple[np.ndarray, str]:
    """The foreground of a loaded picture, and how it was read. Raises Unclear."""
    if image.mode in ALPHA or "transparency" in image.info:
        colours = np.asarray(image.convert("RGBA"))
        alpha = colours[..., 3]
        if alpha.min() < 255:
            opaque, _ = of_greys(alpha) if alpha.max() else (alpha > 0, "")
            if set(np.unique(colours[opaque][:, :3])) == {0, 255}:
                raise Unclear("alpha and the black and white of its opaque part say different things")
            return opaque, ALPHA_NOTE
    if image.mode in ("P", "PA"):
        return of_palette(image)
    if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image if image.mode != "LA" else image.getchannel("L"))
        return of_greys(values, 65535 if image.mode.startswith("I") and values.max() > 255 else 255)
    return of_colours(np.asarray(image.convert("RGB")))


def of_palette(image: Image.Image) -> tuple[np.ndarray, str]:
    indices = np.asarray(image.getchannel(0))
    used = np.unique(indices)
    palette = np.asarray(image.convert("RGB"))  # (H, W, 3), the colours of the indices
    if (palette == indices[..., None]).all():  # a palette of greys in their order adds nothing
        return of_greys(indices)
    if set(used) <= {0, VOID}:
        foreground, note = indices > 0, ""
    else:
        foreground, note = (indices > 0) & (indices != VOID), VOID_NOTE if VOID in used else CLASS_NOTE
    if len(used) == 2 and set(np.unique(palette)) == {0, 255} and palette[foreground].max(initial=0) == 0:
        raise Unclear("index 0 is white and the other is black, so that index and colour say different things")
    return foreground, note


def of_greys(values: np.ndarray, white: int = 255) -> tuple[np.ndarray, str]:
    levels, counts = np.unique(values, return_counts=True)
    if len(levels) == 1:
        return values > 0, ""
    if len(levels) == 2 and (levels[0] == 0 or levels[1] - levels[0] > white // 4):
        return values == levels[1], ""
    bright, between = counts[levels == white].sum(), counts[(levels > 0) & (levels < white)].sum()
    if bright > 2 * between:
        return values > white / 2, GREY_NOTE
    classes = levels[0] == 0 and len(levels) <= min(LEVELS, values.size // 8)
    if classes and (not bright or levels[-2] < CLASSES):
        return (values > 0) & (values != white), VOID_NOTE if bright else CLASS_NOTE
    if bright and set(levels.tolist()) <= VOTES:
        return values > white / 2, VOTE_NOTE
    raise Unclear(f"the {len(levels)} values from {levels[0]} to {levels[-1]} may be classes or shades")


def of_colours(pixels: np.ndarray) -> tuple[np.ndarray, str]:
    if (pixels == pixels[..., :1]).all():
        return of_greys(pixels[..., 0])
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    if len(colours) > 2 or (len(colours) == 2 and colours[0].any()):
        raise Unclear(f"there are {len(colours)} colours, of which it is not said what they stand for")
    return pixels.any(-1), ""
