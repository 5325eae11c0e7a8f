"""Images to look at, without labels: files, folders, archives and PIL images.

They keep their order; masks or boxes may stand beside them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitreous.base.errors import DataError
from vitreous.data.decoding import Source, contents, converted, is_image
from vitreous.data.object_boxes import ObjectBoxes, match_masks, part_masks, read_boxes
from vitreous.data.problems import passed_over
from vitreous.data.samples import Samples
from vitreous.data.sources.archives import is_archive, list_files
from vitreous.data.sources.listing import FileSamples
from vitreous.data.targets import Indices, NoTarget

TWICE = re.compile(r" \(\d+\)$")  # the number behind a name that was taken: cat.jpg (2)


class PictureSamples(Samples):
    """PIL images in memory, as files of them would be read.

    Each has a name and, where known, a (height, width) mask.
    """

    def __init__(self, images: Sequence[Image.Image], names: Sequence[str] = (), masks: Sequence[np.ndarray | None] = ()):
        super().__init__(NoTarget(len(images)), 3)
        self.names = list(names) or [f"image {i}" for i in range(len(images))]
        self.images = list(images)
        self.masks = list(masks) or [None] * len(images)

    def image(self, i: int) -> Image.Image:
        return converted(self.images[i], self.names[i], self.channels)

    def mask(self, i: int) -> np.ndarray | None:
        return self.masks[i]

    def subset(self, indices: Indices) -> PictureSamples:
        picked = [[values[i] for i in indices] for values in (self.images, self.names, self.masks)]
        part = PictureSamples(*picked)
        part.transform = self.transform
        return part


def unlabelled(
    given: str | Path | Image.Image | Iterable[str | Path | Image.Image], masks: str | Path | None = None
) -> Samples:
    """Images by path or as PIL images (all the one or all the other).

    A folder or tar archive gives all of its images, sorted.

    masks: a folder of .png masks by the images' relative names, or a boxes.csv (columns file, x0,
    y0, x1, y1); by default a folder `masks` or a boxes.csv inside a folder of images counts. Files
    are decoded when asked for, so that one that is broken stops no other. Raises DataError for
    paths that are not there, and for no images.
    """
    alone = isinstance(given, str | Path | Image.Image) or not isinstance(given, Iterable)
    items = [given] if alone else list(given)
    strangers = [item for item in items if not isinstance(item, str | Path | Image.Image)]
    if strangers:
        raise DataError(
            f"Found a {type(strangers[0]).__name__} among the images. Expected paths, or PIL images. Of arrays make PIL "
            "images, or one normalised tensor (B, C, h, w)."
        )
    pictures = [item for item in items if isinstance(item, Image.Image)]
    if pictures:
        if len(pictures) < len(items):
            raise DataError("Found PIL images and paths together. Expected one kind. Open the files, or give paths alone.")
        if masks is not None:
            raise DataError("Found masks for PIL images. Expected them for files. Give paths, or tensors and an array.")
        return PictureSamples(pictures)
    files: dict[str, Source] = {}
    foregrounds: dict[str, ObjectBoxes] = {}
    others: Counter[str] = Counter()
    for item in items:
        here, masks_here = _files(Path(item).expanduser(), others)
        for name, source in here.items():
            free = _free(name, files)
            files[free] = source
            if name in masks_here:
                foregrounds[free] = masks_here[name]
    if not files:
        raise DataError("Found no images. Expected at least one. Give paths of images, or of folders that hold some.")
    if masks is not None:
        foregrounds |= _beside(Path(masks).expanduser(), files)
    samples = FileSamples(list(files), list(files.values()), NoTarget(len(files)), foregrounds=foregrounds)
    samples.remarks = tuple(passed_over(others))
    return samples


def check_paths(paths: Iterable[str | Path]) -> None:
    """Raise DataError for the first path that is not there, before anything is opened."""
    for path in (Path(given).expanduser() for given in paths):
        if not path.exists():
            raise nothing_at(path)


def nothing_at(path: Path) -> DataError:
    return DataError(f"Found nothing at {str(path)!r}. Expected an image, a folder or a tar archive. Check the path.")


def _files(path: Path, others: Counter[str]) -> tuple[dict[str, Source], dict[str, ObjectBoxes]]:
    """Images of a file, folder or archive by name, and the masks or boxes that come with them.

    Files that are passed over are counted in `others`.
    """
    if path.is_dir() or is_archive(path):
        all_files, others_here = list_files(path, empty=True)
        others.update(others_here)
        files, masks = part_masks(all_files)
        tables = {name: files.pop(name) for name in list(files) if not is_image(name)}
        foregrounds = match_masks(masks, files)
        if "boxes.csv" in tables:
            foregrounds |= read_boxes(contents(tables["boxes.csv"], "boxes.csv"), files)
        return files, foregrounds
    if not path.is_file():
        raise nothing_at(path)
    return {path.name: path}, {}


def _free(name: str, taken: dict[str, Source]) -> str:
    """The name, numbered where another image has it already: cat.jpg, cat.jpg (2)."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def _beside(path: Path, files: dict[str, Source]) -> dict[str, ObjectBoxes]:
    """Masks in a folder, or boxes in a table, for the images of these names.

    Raises DataError if none fits.
    """
    if path.is_dir():
        there = {name: source for name, source in list_files(path, empty=True)[0].items() if is_image(name)}
        masks = {name.rpartition(".")[0]: (name, source) for name, source in there.items()}
        stems = {name: TWICE.sub("", name).rpartition(".")[0] for name in files}
        found: dict[str, ObjectBoxes] = {name: masks[stem] for name, stem in stems.items() if stem in masks}
    elif path.suffix.lower() == ".csv" and path.is_file():
        found = dict(_boxes(path, files))
    else:
        raise DataError(f"Found no folder or .csv file {str(path)!r}. Expected masks, or a table of boxes. Check --masks.")
    if not found:
        raise DataError(
            f"Found no mask in {str(path)!r} for any of {len(files)} images, such as {next(iter(files))!r}. Expected a .png of "
            "the same name, apart from the suffix. Rename them, or leave --masks out."
        )
    return found


def _boxes(path: Path, files: dict[str, Source]) -> dict[str, ObjectBoxes]:
    """Boxes in a table that names files beside it, or images as they are called here; those of
    others are passed over.
    """
    top = path.resolve().parent
    called = {name: name for name in files}
    for name, source in files.items():
        if isinstance(source, Path) and source.resolve().is_relative_to(top):
            called[source.resolve().relative_to(top).as_posix()] = name
    boxes = read_boxes(contents(path, path.name), called, others=True)
    return {called[row]: found for row, found in boxes.items()}
