"""`open_data`: a text that names a data set, or the path of one, to Data.

`OpenOnce` for several runs.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from pathlib import Path

from vitreous.base.errors import DataError, SettingError, UnknownName
from vitreous.data.quarantine import Progress
from vitreous.data.samples import Data
from vitreous.data.sources.archives import is_archive
from vitreous.data.sources.cutouts import cutouts
from vitreous.data.sources.folders import image_folder, list_unlabelled
from vitreous.data.sources.huggingface import list_saved
from vitreous.data.sources.listing import assemble
from vitreous.data.sources.named import (
    cifar,
    cifar_kind,
    cifar_npz,
    fashion_mnist,
    has_idx,
    idx_folder,
)
from vitreous.data.sources.official import LAYOUTS, list_official, official_kind
from vitreous.data.sources.table import list_table

NAMES = ("cutouts", "fashion-mnist", "cifar10", "cifar100", *LAYOUTS, "hf")


def open_data(
    spec: str,
    *,
    image_size: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    download: bool = False,
    strict: bool = False,
    outside: bool = False,
    labels: bool = True,
    progress: Progress | None = None,
) -> Data:
    """Open the data that `spec` names.

    spec: "cutouts" or "cutouts:size=64,classes=4,train=2000,test=500,correlation=0.8" (made
    scenes); "fashion-mnist:PATH", "cifar10:PATH", "cifar100:PATH"; "cub-200-2011:PATH",
    "fgvc-aircraft:PATH", "stanford-cars:PATH", "food-101:PATH" (`sources.official`); or PATH
    alone, recognised by what is there: these or idx files, CIFAR files, an .npz, a folder or tar of
    class folders, a .csv table (columns file, label, or label:NAME for each of several classes; see
    `sources.table.list_table`); or "hf:PATH", a data set that Hugging Face's `datasets` saved to
    disk.

    image_size: pixels a side; made scenes have it, a transform brings others to it. seed draws the
    made scenes and the part that `limit` leaves of the training set, balanced over the classes;
    tests stay whole. download: fetch a named set to PATH if it is not there.

    Images that cannot be read are left out and listed in `Data.quarantined`; strict: raise
    DataError instead. outside: let a table name files outside its folder. labels: False: a folder
    or tar whose images are not in class folders is read without labels, and a remark says why.
    progress: told (files decoded, files in all) by folders and tables.

    Raises UnknownName, SettingError, or DataError for what cannot be read.
    """
    if image_size is not None and image_size < 1:
        raise SettingError(
            f"Found image_size={image_size}; expected a positive number of pixels. Leave it out for the own size."
        )
    name, _, rest = str(spec).partition(":")
    if name == "cutouts":
        data = cutouts(**_options(rest, {"size": image_size} if image_size else {}), seed=seed)
    elif name == "hf" and rest:
        listing = list_saved(Path(rest).expanduser(), outside=outside)
        data = assemble(listing, image_size=image_size, strict=strict, progress=progress)
    elif name in LAYOUTS and rest:
        listing = list_official(name, Path(rest).expanduser())
        data = assemble(listing, image_size=image_size, strict=strict, progress=progress)
    elif name in NAMES:
        data = _named(name, rest, image_size, download)
    elif spec and Path(spec).expanduser().exists():
        data = _recognised(Path(spec).expanduser(), image_size, strict, outside, labels, progress)
    elif os.sep in str(spec) or "/" in str(spec) or Path(spec).suffix:
        raise DataError(
            f"Found nothing at {str(spec)!r}; expected a folder, a tar archive, a .csv table or an .npz file of images. "
            "Check the path."
        )
    else:
        raise UnknownName(name, "data set", NAMES, "Or give the path of a folder of images.")
    if image_size:
        data = replace(data, image_size=(image_size, image_size))
    return data if limit is None else data.limited(limit, seed)


class OpenOnce:
    """`open_data` for the runs of one command: what it opened last is not opened again.

    Each seed limits it anew.

    So the files of a folder are decoded, to see whether they can be read, once and not by every
    run.
    """

    def __init__(self):
        self.asked: tuple | None = None
        self.data: Data | None = None

    def __call__(
        self, spec: str, *, seed: int = 0, limit: int | None = None, progress: Progress | None = None, **options
    ) -> Data:
        asked = (str(spec), seed if str(spec).partition(":")[0] == "cutouts" else None, options)  # made by the seed
        if asked != self.asked:
            self.data = open_data(spec, seed=seed, progress=progress, **options)
            self.asked = asked
        return self.data if limit is None else self.data.limited(limit, seed)


def _options(text: str, fixed: dict) -> dict:
    """Text such as "size=64,correlation=0.8" as keyword arguments of `cutouts`, of the type of
    their defaults.
    """
    defaults = {name: p.default for name, p in inspect.signature(cutouts).parameters.items() if name != "seed"}
    options = dict(fixed)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in defaults:
            raise UnknownName(name, "option of cutouts", defaults, "The seed is a setting of its own." * (name == "seed"))
        try:
            options[name] = type(defaults[name])(value)
        except ValueError as error:
            raise SettingError(f"Found {part!r}; expected {name}= and a number such as {defaults[name]}. Mend it.") from error
        if name in fixed and options[name] != fixed[name]:
            raise SettingError(f"Found {part!r} and image_size={fixed[name]}; expected one size. Leave one of them out.")
    return options


def _named(name: str, rest: str, image_size: int | None, download: bool) -> Data:
    path = Path(rest).expanduser()
    if not rest:
        raise DataError(
            f"Found {name!r} without a path; expected where its files are, or shall go with download=True. Write {name}:FOLDER."
        )
    if not path.exists() and not download:
        raise DataError(f"Found nothing at {rest!r}; expected the files of {name}. Check the path, or ask for download=True.")
    if name == "fashion-mnist":
        return fashion_mnist(path, download=download)
    return cifar(name, path, image_size=image_size, download=download)


def _recognised(
    path: Path, image_size: int | None, strict: bool, outside: bool, labels: bool, progress: Progress | None
) -> Data:
    if path.is_dir():
        if has_idx(path):
            return idx_folder(path)
        if name := cifar_kind(path):
            return cifar(name, path)
        if name := official_kind(path):
            return assemble(list_official(name, path), image_size=image_size, strict=strict, progress=progress)
    if path.is_dir() or is_archive(path):
        return _folder(path, labels, image_size=image_size, strict=strict, progress=progress)
    if path.suffix.lower() == ".csv":
        listing = list_table(path, outside=outside)
        return assemble(listing, image_size=image_size, strict=strict, progress=progress)
    if path.suffix == ".npz":
        return cifar_npz(path.stem, path)
    raise DataError(
        f"Found the file {str(path)!r}; expected a folder, a tar archive (.tar, .tar.gz, .tar.xz, .tar.bz2), "
        "a .csv table or an .npz file. Unpack it and give the folder."
    )


def _folder(path: Path, labels: bool, **options) -> Data:
    """A folder or tar by classes, or without labels where these are not needed and not there."""
    try:
        return image_folder(path, **options)
    except DataError as error:
        if labels:
            raise
        data = assemble(list_unlabelled(path), **options)
        reason = str(error).split("; expected")[0].split(". Expected")[0]
        return replace(data, remarks=(f"Labels: none are read ({reason[:1].lower()}{reason[1:]}).", *data.remarks))
