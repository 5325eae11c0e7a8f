"""Folders and archives of images, one folder per class.

Train and test parts, and masks or boxes, may stand beside them.
"""

from __future__ import annotations

from pathlib import Path

from vitreous.base.errors import DataError
from vitreous.data.decoding import Source, contents, is_image
from vitreous.data.object_boxes import match_masks, part_masks, read_boxes
from vitreous.data.problems import Report, name_list, raised
from vitreous.data.quarantine import Progress
from vitreous.data.samples import Data
from vitreous.data.sources.archives import list_files
from vitreous.data.sources.listing import PARTS, Listing, assemble


def image_folder(path: Path, *, image_size: int | None = None, strict: bool = False, progress: Progress | None = None) -> Data:
    """Read a folder or tar archive with train and test parts, one folder per class.

    Parts are `train/<class>/...` and `test | val | valid | validation | dev/<class>/...`.

    Classes are the folder names in train, sorted; tests are matched by name and may lack some.
    Where there is but a val part, it is the test. A tree of `<class>/...` alone is split by the
    contents of its files: the same images give the same split, whatever their names, and copies of
    an image in one class stay on one side. Masks stand in a folder `masks` (same relative name,
    .png) at the top or beside the class folders; boxes in `boxes.csv` at the top. Images that
    cannot be read are left out and listed in `quarantined`; strict: raise DataError instead.
    """
    return assemble(list_folder(path), image_size=image_size, strict=strict, progress=progress)


def list_unlabelled(path: Path) -> Listing:
    """All images of a folder or tar archive, without classes.

    Parts go by folders `train` and `test` (or `val`, ...) at the top, where these hold all images.
    """
    all_files, others = list_files(path)
    files, masks = part_masks(_strip_top(all_files))
    files = {name: source for name, source in files.items() if is_image(name)}
    parts = {name: _part_of(name) for name in files}
    return Listing(
        name=path.name.split(".")[0] if path.is_file() else path.resolve().name,
        files=files,
        classes=dict.fromkeys(files, ""),
        parts=parts if "train" in parts.values() and None not in parts.values() and len(set(parts.values())) > 1 else None,
        foregrounds=match_masks(masks, files),
        passed_over=others,
        labelled=False,
    )


def list_folder(path: Path, report: Report = raised) -> Listing:
    """The images of a folder or tar archive by class and part, nothing decoded.

    `report` is told of what does not fit.
    """
    all_files, others = list_files(path, report=report)
    files, masks = part_masks(_strip_top(all_files))
    tables = {name: files.pop(name) for name in list(files) if not is_image(name)}
    foregrounds = match_masks(masks, files, report)
    if "boxes.csv" in tables:
        foregrounds |= read_boxes(contents(tables["boxes.csv"], "boxes.csv"), files, report)
    parts = _parts(path, files, report)
    classes = {}
    for name in files:
        if name in parts:
            label = _class_of(name, 0 if parts[name] is None else 1, report)
            if label is not None:
                classes[name] = label
    return Listing(
        name=path.name.split(".")[0] if path.is_file() else path.resolve().name,
        files={name: files[name] for name in classes},
        classes=classes,
        parts=None if None in parts.values() else {name: parts[name] for name in classes},
        foregrounds=foregrounds,
        passed_over=others,
    )


def _strip_top(files: dict[str, Source]) -> dict[str, Source]:
    """Drop folders that hold everything, such as the name an archive was packed under."""
    while len({name.split("/")[0] for name in files}) == 1:
        below = {name.partition("/")[2]: source for name, source in files.items()}
        if "" in below or _part_of(next(iter(files))) or not any("/" in name for name in below):
            break
        files = below
    return files


def _part_of(name: str) -> str | None:
    """The part, "train", "test" or "val", that the first folder of a name means; else None."""
    return PARTS.get(name.split("/")[0].lower())


def _parts(path: Path, files: dict[str, Source], report: Report) -> dict[str, str | None]:
    """The part of each image, None for all of a tree of classes alone.

    An image whose part is not clear is left out.
    """
    folders: dict[str | None, set[str]] = {}
    for name in files:
        folders.setdefault(_part_of(name), set()).add(name.split("/")[0])
    if set(folders) == {None}:
        return dict.fromkeys(files)
    if None in folders or "train" not in folders or len(folders) < 2 or any(len(found) > 1 for found in folders.values()):
        names = sorted(folder for found in folders.values() for folder in found)
        report(
            "structure",
            ", ".join(names[:10]),
            DataError(
                f"Found {name_list(names)} at the top of {str(path)!r}; expected one train folder and one of test or val "
                "(or valid, validation, dev), nothing else, or class folders only. Rename the folders or move them away."
            ),
        )
    return {name: part for name in files if (part := _part_of(name)) is not None}


def _class_of(name: str, depth: int, report: Report) -> str | None:
    """The folder at this depth of a name; None, reported, where there is none."""
    parts = name.split("/")
    if len(parts) >= depth + 2:
        return parts[depth]
    report(
        "structure",
        name,
        DataError(
            f"Found the image {name!r} outside any class folder; expected every image in a folder that is "
            "named after its class. Move it there, or away."
        ),
    )
    return None
