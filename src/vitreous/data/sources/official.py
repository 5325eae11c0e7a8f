"""Published fine-grained sets as their archives unpack, with their parts, masks and boxes.

CUB-200-2011, FGVC-Aircraft, Stanford Cars, Food-101. Each is read from the folder that its archive
unpacks to, or from the folder around that. What its lists name and is not there, or cannot be read,
is quarantined as with any folder.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitreous.base.errors import DataError, VitreousError
from vitreous.data.decoding import BROKEN, Cropped, contents, opened, read_file
from vitreous.data.object_boxes import LooseBoxes
from vitreous.data.sources.listing import Listing
from vitreous.data.sources.table import inside

BANNER = 20  # rows of pixels at the bottom of each aircraft, with the photographer's name
CARS_TEST = "cars_test_annos_withlabels.mat"


@dataclass(frozen=True)
class Votes:
    """A mask file whose greys are votes, a fifth of white each: what three of five marked.

    So also where no pixel has all five votes, and greys could be taken for classes.
    """

    path: Path

    def read_bytes(self) -> bytes:
        try:
            with opened(read_file(self.path)) as image:
                votes = np.asarray(image.convert("L"))
        except BROKEN as error:
            raise OSError(f"it cannot be decoded ({error})") from error
        file = io.BytesIO()
        Image.fromarray(np.where(votes > 127, 255, 0).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Layout:
    """Where a set's archive unpacks to, which file (any of them) shows it, and how to list it."""

    folder: str
    signs: tuple[str, ...]
    read: Callable[[Path], Listing]


def list_official(name: str, path: Path) -> Listing:
    """The images of one of LAYOUTS below a folder, nothing decoded.

    Raises DataError that names the file which was expected, or the line that does not fit.
    """
    layout = LAYOUTS[name]
    top = top_of(layout, path)
    if top is None:
        raise DataError(
            f"Found no {' or '.join(layout.signs)} in {str(path)!r} or its {layout.folder}; expected the layout of {name} as "
            "its archive unpacks. Unpack it, since it is not fetched for you, and give that folder."
        )
    listing = layout.read(top)
    listing.name = name
    return listing


def official_kind(path: Path) -> str | None:
    """The name in LAYOUTS of the set that a folder holds, else None."""
    return next((name for name, layout in LAYOUTS.items() if top_of(layout, path)), None)


def top_of(layout: Layout, path: Path) -> Path | None:
    """The folder of the set, at a path or right below it; None where neither has its lists."""
    return next((top for top in (path, path / layout.folder) if any((top / sign).is_file() for sign in layout.signs)), None)


def cub(top: Path) -> Listing:
    """CUB-200-2011: images.txt, image_class_labels.txt, classes.txt, train_test_split.txt.

    Masks are segmentations/*.png in that folder or beside it, of which pixels count that three of
    five annotators marked; images without one have the box of bounding_boxes.txt.
    """
    names = dict(rows(top / "images.txt", 2))
    classes = dict(rows(top / "classes.txt", 2))
    labels = dict(rows(top / "image_class_labels.txt", 2))
    training = dict(rows(top / "train_test_split.txt", 2))
    boxes = {key: sides for key, *sides in rows(top / "bounding_boxes.txt", 5)}
    masks = next((folder for folder in (top / "segmentations", top.parent / "segmentations") if folder.is_dir()), None)
    listing = Listing("", {}, {}, {}, own_order=tuple(classes.values()))
    for key, name in names.items():
        label = looked_up(classes, looked_up(labels, key, "image_class_labels.txt"), "classes.txt")
        part = {"1": "train", "0": "test"}.get(looked_up(training, key, "train_test_split.txt"))
        if part is None:
            raise DataError(
                f"Found {training[key]!r} for image {key} in train_test_split.txt; expected 1 or 0. Unpack it again."
            )
        add(listing, name, top / "images", label, part)
        mask = f"{name.rpartition('.')[0]}.png"
        if masks is not None and (masks / mask).is_file():
            listing.foregrounds[name] = (f"segmentations/{mask}", Votes(masks / mask))
        else:
            x, y, width, height = numbers(looked_up(boxes, key, "bounding_boxes.txt"), "bounding_boxes.txt")
            ends = (math.ceil(x + width) - 1, math.ceil(y + height) - 1)
            listing.foregrounds[name] = LooseBoxes([(math.floor(x), math.floor(y), *ends)])
    return listing


def aircraft(top: Path) -> Listing:
    """FGVC-Aircraft by variant: data/images_variant_{train,val,test}.txt, images_box.txt.

    Train and val part train together, as in published accuracies (`--hold-out` sets some aside).
    The banner of 20 rows at the bottom of each image is cut off.
    """
    data = top / "data"
    variants = tuple(variant for (variant,) in rows(data / "variants.txt", 1))
    boxes = {key: sides for key, *sides in rows(data / "images_box.txt", 5)}
    listing = Listing("", {}, {}, {}, own_order=variants)
    for part in ("train", "val", "test"):
        file = f"images_variant_{part}.txt"
        for key, variant in rows(data / file, 2):
            if variant not in variants:
                raise DataError(f"Found the variant {variant!r} in {file}; expected one of variants.txt. Unpack it again.")
            name = f"{key}.jpg"
            add(listing, name, data / "images", variant, "test" if part == "test" else "train")
            listing.files[name] = Cropped(listing.files[name], BANNER)
            listing.foregrounds[name] = from_one(numbers(looked_up(boxes, key, "images_box.txt"), "images_box.txt"))
    return listing


def cars(top: Path) -> Listing:
    """Stanford Cars: devkit/ with cars_train/ and cars_test/, or cars_annos.mat with car_ims/.

    The labels of the first layout's test part are in cars_test_annos_withlabels.mat, which was
    published apart; it may stand in either folder. Needs scipy, as in vitreous[cars].
    """
    listing = Listing("", {}, {}, {})
    if (top / "cars_annos.mat").is_file():
        file = top / "cars_annos.mat"
        listing.own_order = classes = strings(matlab(file, "class_names"))
        for entry in fields(file, "relative_im_path", "test"):
            add_car(listing, top, str(entry["relative_im_path"]), entry, classes, "test" if entry["test"] else "train")
        return listing
    kit = top / "devkit"
    listing.own_order = classes = strings(matlab(kit / "cars_meta.mat", "class_names"))
    test = next((folder / CARS_TEST for folder in (top, kit) if (folder / CARS_TEST).is_file()), top / CARS_TEST)
    for part, file in (("train", kit / "cars_train_annos.mat"), ("test", test)):
        for entry in fields(file, "fname"):
            add_car(listing, top, f"cars_{part}/{entry['fname']}", entry, classes, part)
    return listing


def food(top: Path) -> Listing:
    """Food-101: meta/train.txt and meta/test.txt, with lines such as apple_pie/1005649.

    Some published images are cut short; they are quarantined.
    """
    listing = Listing("", {}, {}, {})
    for part in ("train", "test"):
        for (line,) in rows(top / "meta" / f"{part}.txt", 1):
            label, slash, _ = line.partition("/")
            if not slash:
                raise DataError(f"Found {line!r} in meta/{part}.txt; expected a class and a number, as in apple_pie/1005649. "
                                "Unpack it again.")  # fmt: skip
            add(listing, f"{line}.jpg", top / "images", label, part)
    return listing


LAYOUTS = {
    "cub-200-2011": Layout("CUB_200_2011", ("image_class_labels.txt",), cub),
    "fgvc-aircraft": Layout("fgvc-aircraft-2013b", ("data/images_variant_train.txt",), aircraft),
    "stanford-cars": Layout("stanford_cars", ("cars_annos.mat", "devkit/cars_meta.mat"), cars),
    "food-101": Layout("food-101", ("meta/train.txt",), food),
}


def add(listing: Listing, name: str, folder: Path, label: str, part: str) -> None:
    """Add an image, by its path in a folder. Raises DataError for one twice, or outside."""
    if name in listing.files:
        raise DataError(f"Found {name!r} twice in the lists of images; expected each once. Unpack the archive again.")
    try:
        listing.files[name] = inside(name, folder, False)
    except ValueError as error:
        raise DataError(f"Found among the images {error}") from error
    listing.classes[name], listing.parts[name] = label, part


def add_car(listing: Listing, top: Path, name: str, entry: Any, classes: tuple[str, ...], part: str) -> None:
    number = int(entry["class"])  # from 1
    if not 1 <= number <= len(classes):
        raise DataError(f"Found the class {number} of {name!r}; expected 1 to {len(classes)}. Use the files of one archive.")
    add(listing, name, top, classes[number - 1], part)
    listing.foregrounds[name] = from_one([float(entry[f"bbox_{side}"]) for side in ("x1", "y1", "x2", "y2")])


def from_one(box: list[float]) -> LooseBoxes:
    """A box whose pixels are counted from 1, both ends included."""
    return LooseBoxes([tuple(max(round(side) - 1, 0) for side in box)])


def rows(path: Path, cells: int) -> Iterator[list[str]]:
    """The lines of a list as so many cells, parted by spaces, which the last cell may hold."""
    for number, line in enumerate(contents_of(path).decode("utf-8-sig", "surrogateescape").splitlines(), start=1):
        if not line.strip():
            continue
        row = line.strip().split(maxsplit=cells - 1)
        if len(row) != cells:
            raise DataError(
                f"Found {line.strip()!r} in line {number} of {str(path)!r}; expected {cells} cells, parted by spaces. Unpack "
                "the archive again."
            )
        yield row


def contents_of(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(
            f"Found no {path.name} in {str(path.parent)!r}; expected it, as the archive has it. Unpack the whole archive there."
        )
    return contents(path, str(path))


def looked_up(values: dict[str, Any], key: str, file: str) -> Any:
    if key not in values:
        raise DataError(
            f"Found no line {key!r} in {file}; expected one for each that the lists name. Unpack the archive again."
        )
    return values[key]


def numbers(cells: list[str], file: str) -> list[float]:
    try:
        return [float(cell) for cell in cells]
    except ValueError as error:
        raise DataError(f"Found the box {cells} in {file}; expected four numbers. Unpack the archive again.") from error


def matlab(path: Path, name: str) -> np.ndarray:
    """A variable of a MATLAB file, which can hold no code."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise VitreousError(
            'Found no package scipy; expected it, to read the lists of Stanford Cars. pip install "vitreous[cars]".'
        ) from error
    contents_of(path)
    try:
        return np.atleast_1d(loadmat(path, squeeze_me=True)[name])
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise DataError(
            f"Found {str(path)!r}, in which {name} cannot be read ({error}); expected a MATLAB file as the archive has it. "
            "Unpack it again."
        ) from error


def fields(path: Path, *more: str) -> np.ndarray:
    """The records of a file of car annotations. Raises DataError if a field is missing."""
    records = matlab(path, "annotations")
    wanted = {"class", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", *more}
    if missing := wanted - set(records.dtype.names or ()):
        raise DataError(
            f"Found no {', '.join(sorted(missing))} in the annotations of {str(path)!r}; expected them. Without classes it is "
            f"the list of the challenge: use {CARS_TEST}."
        )
    return records


def strings(values: np.ndarray) -> tuple[str, ...]:
    return tuple(str(value) for value in values)
