"""Images as a model sees them, with the picture and mask of the same view.

They are resized, cropped and normalised by its pretrained_cfg.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitreous.base.errors import DataError, HostError, SettingError
from vitreous.data import Samples
from vitreous.data.decoding import Source
from vitreous.data.preprocess import Preprocess, picture
from vitreous.data.sources.unlabelled import unlabelled

QUALITY = 85  # of the JPEG pictures that a reading keeps
BEGINNING = 1 << 14  # bytes of a file that tell it from others of its name and size


@dataclass(frozen=True)
class View:
    """One image as the model sees it.

    pixels (C, h, w): what the model is given. picture (h, w, 3) uint8: the same for people. mask
    (h, w) bool: foreground, in the same view; None where it is not known. width, height: of the
    image as it was given.
    """

    name: str
    pixels: Tensor
    picture: np.ndarray
    mask: np.ndarray | None
    width: int
    height: int
    label: int = -1

    def jpeg(self) -> np.ndarray:
        """The picture as bytes of a JPEG file, (n,) uint8."""
        return jpeg(self.picture)

    def mask_png(self) -> np.ndarray:
        """The mask as bytes of a PNG file, (n,) uint8."""
        return encoded(Image.fromarray(self.mask).convert("1"), "PNG", optimize=True)


class Views(Sequence[View]):
    """Views of images, made one by one when asked for.

    `views[i]` raises DataError for an image that cannot be read.

    mean, std: by which pixels of [0, 1] were normalised; None where that is not known (tensors for
    a model without a pretrained_cfg). inputs: input_size, mean, std, ... in place of the model's
    own pretrained_cfg.
    """

    def __init__(self, model: nn.Module, images: Any, masks: Any = None, inputs: dict[str, Any] | None = None):
        own = Preprocess.of_model(model)
        self.preprocess = own if inputs is None else Preprocess.from_config({**(own.config() if own else {}), **inputs})
        self.tensors = images if isinstance(images, Tensor) else None
        if self.tensors is not None:
            check_images(self.tensors)
            self.tensor_masks = masks_of_tensors(masks, self.tensors)
            values = (
                self.tensors.detach().float().nan_to_num(0.0, 0.0, 0.0)
            )  # those that are not finite are told image by image
            self.mean, self.std = tensor_statistics(values, self.preprocess)
            self.own_remarks = normalisation_remarks(values, self.preprocess, self.mean)
            return
        if isinstance(images, Samples) and masks is not None:
            raise DataError("Found masks beside a set of images, which has its own. Expected one source. Leave masks out.")
        self.images = images if isinstance(images, Samples) else unlabelled(images, masks)
        if self.preprocess is None:
            raise SettingError(
                f"Found images and a {type(model).__name__} without a pretrained_cfg, which would say how to prepare them. "
                "Expected a timm model, or a tensor. Give a tensor (B, C, H, W) that you prepared, or say how with inputs."
            )
        channels = self.preprocess.input_size[0]
        if channels not in (1, 3):
            raise HostError(f"Found a model of {channels} channels. Expected 1 or 3 for images. Give a tensor (B, C, h, w).")
        self.mean, self.std = self.preprocess.mean, self.preprocess.std

    @property
    def config(self) -> dict[str, Any] | None:
        """How images are prepared, in timm's words; None where that is not known."""
        return None if self.preprocess is None else self.preprocess.config()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines about the files or pixels, for people."""
        return self.images.remarks if self.tensors is None else self.own_remarks

    def __len__(self) -> int:
        return len(self.images if self.tensors is None else self.tensors)

    def __getitem__(self, i: int) -> View:
        if self.tensors is not None:
            x, mask = self.tensors[i], None if self.tensor_masks is None else self.tensor_masks[i]
            return View(f"image {i}", x, picture(x, self.mean, self.std), mask, x.shape[-1], x.shape[-2])
        image, mask = self.images.image(i), self.images.mask(i)
        x = self.preprocess(image)
        mask = None if mask is None else self.preprocess.mask(mask)
        label = int(self.images.labels[i])
        return View(self.name(i), x, self.preprocess.picture(x), mask, image.width, image.height, label)

    def readable(self, i: int) -> bool:
        """Whether image i can be shown, found out by reading it."""
        try:
            self[i]
        except DataError:
            return False
        return True

    def name(self, i: int) -> str:
        names = getattr(self.images, "names", None) if self.tensors is None else None
        return names[i] if names else f"image {i}"

    def identity(self, count: int) -> list[Any]:
        """What tells the first `count` images, with their masks, from others: digests, of files
        from their first bytes.
        """
        if self.tensors is not None:
            values = self.tensors[:count].detach().cpu().contiguous()
            masks = () if self.tensor_masks is None else self.tensor_masks[:count].tobytes()
            return [list(values.shape), digest(values.flatten().view(torch.uint8).numpy().tobytes()), digest(bytes(masks))]
        sources, foregrounds = (getattr(self.images, name, None) for name in ("sources", "foregrounds"))
        if sources is None:
            return [[self.name(i), *of_pixels(self.images, i)] for i in range(count)]
        entries = [[self.name(i), of_file(sources[i])] for i in range(count)]
        for entry in entries:
            if mask := (foregrounds or {}).get(entry[0]):
                entry.append([mask[0], of_file(mask[1])] if isinstance(mask, tuple) else mask)
        return entries


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def of_file(source: Source) -> list[Any]:
    """Size and digest of the first bytes of a file; nothing of one that cannot be read."""
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:
                return [source.stat().st_size, digest(file.read(BEGINNING))]
        raw = source if isinstance(source, bytes) else source.read_bytes()
        return [len(raw), digest(raw[:BEGINNING])]
    except (OSError, ValueError):  # it is no longer there, or its row has no image
        return []


def of_pixels(images: Samples, i: int) -> list[str]:
    """Digests of an image and its mask; nothing of one that cannot be read."""
    try:
        image, mask = images.image(i), images.mask(i)
    except DataError:
        return []
    return [digest(image.tobytes()), "" if mask is None else digest(mask.tobytes())]


def tensor_statistics(images: Tensor, preprocess: Preprocess | None) -> tuple[tuple | None, tuple | None]:
    """mean and std by which tensors (B, C, h, w) were normalised.

    The model's, or (0, 1), or None where neither fits.

    They fit if they bring all values back to [0, 1].
    """
    channels = images.shape[1]
    candidates = [((0.0,) * channels, (1.0,) * channels)]
    if preprocess is not None and len(preprocess.mean) == channels:
        candidates.insert(0, (preprocess.mean, preprocess.std))
    for mean, std in candidates:
        pixels = images * images.new_tensor(std).view(-1, 1, 1) + images.new_tensor(mean).view(-1, 1, 1)
        if pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3:
            return mean, std
    return None, None


def normalisation_remarks(images: Tensor, preprocess: Preprocess | None, mean: tuple | None) -> tuple[str, ...]:
    """A line on tensors (B, C, h, w) that do not look normalised as the model takes them.

    mean: as of `tensor_statistics`.
    """
    if preprocess is None or len(preprocess.mean) != images.shape[1] or not any(preprocess.mean):
        return ()
    low, high = images.min().item(), images.max().item()
    if mean == preprocess.mean and not (low >= 0 and 0.5 < high <= 1 + 1e-3):
        return ()
    means, stds = (", ".join(f"{x:.3g}" for x in values) for values in (preprocess.mean, preprocess.std))
    return (
        f"Pixels lie between {low:.3g} and {high:.3g}, and do not look normalised as this model takes them: (pixel - mean) / "
        f"std, mean {means}, std {stds}, of pixels from 0 to 1. Maps of other pixels mislead.",
    )


def check_images(images: Tensor) -> None:
    """Raise DataError unless they are (B, C, h, w), at least one."""
    if images.ndim != 4 or not len(images):
        raise DataError(
            f"Found a tensor of shape {tuple(images.shape)}. Expected images (B, C, h, w), at least one. Of one: x[None]."
        )
    if not images.is_floating_point():
        raise DataError(
            f"Found a tensor of {images.dtype}. Expected pixels normalised for the model, of a floating type. Give paths or "
            "PIL images to have them prepared, or normalise the tensor."
        )


def masks_of_tensors(masks: Any, images: Tensor) -> np.ndarray | None:
    """Masks (B, h, w) for tensors of images; raises DataError for another shape."""
    if masks is None:
        return None
    array = np.asarray(masks)
    if array.shape != (len(images), *images.shape[-2:]):
        raise DataError(
            f"Found masks of shape {array.shape} for images of shape {tuple(images.shape)}. Expected "
            f"{(len(images), *images.shape[-2:])}. Bring the masks to the size of the tensors."
        )
    return array.astype(bool)


def jpeg(picture: np.ndarray) -> np.ndarray:
    """A picture (h, w, 3) uint8 as bytes of a JPEG file, (n,) uint8."""
    return encoded(Image.fromarray(picture), "JPEG", quality=QUALITY)


def encoded(image: Image.Image, kind: str, **options: Any) -> np.ndarray:
    """The bytes of an image file, (n,) uint8."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)
