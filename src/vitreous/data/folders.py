"""Folders and archives of images, one folder per class: train and test parts, masks or boxes beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitreous.data.archives import list_files
from vitreous.data.decoding import Source, check_header, contents, decode, is_image
from vitreous.data.foregrounds import Foreground, foreground_mask, match_masks, part_masks, read_boxes
from vitreous.data.sets import Data, ImageSet, pixel_statistics
from vitreous.errors import DataError

TRAIN = ("train", "training")
TESTS = {"test": "test", "testing": "test", "val": "val", "valid": "val", "validation": "val"}
HELD_OUT = 0.2  # of each class, where a tree has no test part of its own
SAMPLE = 64  # images read at opening, for their size and statistics


class FileSet(ImageSet):
    """Images in files or in the memory of a read archive, decoded when asked for.

    names, sources: path and origin of each image. foregrounds: {name: its mask or boxes}; what has none
    has no mask.
    """

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Source],
        labels: Sequence[int] | np.ndarray,
        channels: int = 3,
        foregrounds: dict[str, Foreground] | None = None,
    ):
        super().__init__(labels, channels)
        self.names = list(names)
        self.sources = list(sources)
        self.foregrounds = foregrounds or {}

    def image(self, i: int) -> Image.Image:
        return decode(self.sources[i], self.names[i], self.channels)

    def mask(self, i: int) -> np.ndarray | None:
        foreground = self.foregrounds.get(self.names[i])
        if foreground is None:
            return None
        width, height = self.image(i).size
        return foreground_mask(foreground, self.names[i], width, height)

    def subset(self, indices: Sequence[int] | np.ndarray) -> FileSet:
        names, sources = [self.names[i] for i in indices], [self.sources[i] for i in indices]
        part = FileSet(names, sources, self.labels[indices], self.channels, self.foregrounds)
        part.transform = self.transform
        return part


def image_folder(path: Path, *, image_size: int | None = None) -> Data:
    """Read a folder or tar archive of `train/<class>/...` and `test | val | valid | validation/<class>/...`.

    Classes are the folder names in train, sorted; tests are matched by name and may lack some. Where there is but a
    val part, it is the test. A tree of `<class>/...` alone is split by the contents of its files: the same images
    give the same split, whatever their names, and copies of an image in one class stay on one side. Masks stand in a
    folder `masks` (same relative name, .png) at the top or beside the class folders; boxes in `boxes.csv` at the top.
    """
    files, masks = part_masks(_strip_top(list_files(path)))
    tables = {name: files.pop(name) for name in list(files) if not is_image(name)}
    for name, source in files.items():
        check_header(source, name)
    foregrounds = match_masks(masks, files)
    if "boxes.csv" in tables:
        foregrounds |= read_boxes(contents(tables["boxes.csv"], "boxes.csv"), files)
    parts = _split(path, files)
    classes = _class_names(path, parts)
    sets = {part: _file_set(files, names, classes, foregrounds) for part, names in parts.items()}
    train = sets.pop("train")
    own_size, mean, std = _survey(train)
    return Data(
        name=path.name.split(".")[0] if path.is_file() else path.resolve().name,
        train=train,
        tests=sets,
        classes=classes,
        channels=train.channels,
        image_size=(image_size, image_size) if image_size else own_size,
        mean=mean,
        std=std,
    )


def _strip_top(files: dict[str, Source]) -> dict[str, Source]:
    """Drop folders that everything stands in, such as the name that an archive was packed under."""
    while len({name.split("/")[0] for name in files}) == 1:
        below = {name.partition("/")[2]: source for name, source in files.items()}
        if "" in below or _part_of(next(iter(files))) or not any("/" in name for name in below):
            break
        files = below
    return files


def _part_of(name: str) -> str | None:
    """The part, "train", "test" or "val", that the first folder of a name means; else None."""
    first = name.split("/")[0].lower()
    return "train" if first in TRAIN else TESTS.get(first)


def _split(path: Path, files: dict[str, Source]) -> dict[str, list[str]]:
    """Image names of "train", of "test" and, where a tree has both, of "val"."""
    parts: dict[str, dict[str, list[str]]] = {}
    for name in files:
        parts.setdefault(_part_of(name), {}).setdefault(name.split("/")[0], []).append(name)
    if set(parts) == {None}:
        return _split_by_content(files)
    folders = sorted(folder for found in parts.values() for folder in found)
    if None in parts or "train" not in parts or len(parts) < 2 or any(len(found) > 1 for found in parts.values()):
        raise DataError(
            f"Found {_listed(folders)} at the top of {str(path)!r}; expected one train folder and one of test or val "
            "(or valid, validation), nothing else, or class folders only. Rename the folders or move them away."
        )
    if "test" not in parts:
        parts["test"] = parts.pop("val")
    return {part: next(iter(found.values())) for part, found in parts.items()}


def _split_by_content(files: dict[str, Source]) -> dict[str, list[str]]:
    """Hold out the images of each class whose contents have the lowest digests: a fifth, but never all."""
    digests: dict[str, dict[str, list[str]]] = {}
    for name, source in files.items():
        digest = hashlib.blake2b(contents(source, name), digest_size=16).hexdigest()
        digests.setdefault(_class_of(name, 0), {}).setdefault(digest, []).append(name)
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for found in digests.values():
        held_out = min(max(round(HELD_OUT * len(found)), 1), len(found) - 1)
        for rank, digest in enumerate(sorted(found)):
            parts["test" if rank < held_out else "train"].extend(found[digest])
    if not parts["test"]:
        raise DataError("Found one image in each class; expected at least two, one to train on and one to test. Add more.")
    return {part: sorted(names) for part, names in parts.items()}


def _class_of(name: str, depth: int) -> str:
    parts = name.split("/")
    if len(parts) < depth + 2:
        raise DataError(
            f"Found the image {name!r} outside any class folder; expected every image in a folder that is "
            "named after its class. Move it there, or away."
        )
    return parts[depth]


def _class_names(path: Path, parts: dict[str, list[str]]) -> tuple[str, ...]:
    """Class names from train; a test may lack some but has none of its own."""
    found = {part: {_class_of(name, _depth(name)) for name in names} for part, names in parts.items()}
    classes = sorted(found["train"])
    if len(classes) < 2:
        raise DataError(
            f"Found one class, {classes[0]!r}, to train on in {str(path)!r}; expected a folder for each of "
            "at least two classes. Give the folder that holds them."
        )
    for part, names in found.items():
        if strangers := names - set(classes):
            raise DataError(
                f"Found {_listed(sorted(strangers))} in {part} but not in train, which has "
                f"{_listed(classes)}; expected the same class names. Rename or remove them."
            )
    return tuple(classes)


def _depth(name: str) -> int:
    """Folders above the class folder."""
    return 0 if _part_of(name) is None else 1


def _file_set(files, names: list[str], classes: tuple[str, ...], foregrounds) -> FileSet:
    label = {name: k for k, name in enumerate(classes)}
    labels = [label[_class_of(name, _depth(name))] for name in names]
    return FileSet(names, [files[name] for name in names], labels, foregrounds=foregrounds)


def _survey(images: ImageSet) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    """(height, width) if all images of a sample agree, else 224 x 224; mean and deviation of its pixels."""
    chosen = np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(int))
    pixels = [np.asarray(images.image(int(i))) for i in chosen]
    sizes = {array.shape[:2] for array in pixels}
    mean, std = pixel_statistics(np.concatenate([array.reshape(1, 1, -1, images.channels) for array in pixels], axis=2))
    return sizes.pop() if len(sizes) == 1 else (224, 224), mean, std


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
