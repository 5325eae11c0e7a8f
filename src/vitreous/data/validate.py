"""What is wrong with the images of a folder or table.

Every file is decoded, every mask measured, every copy listed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vitreous.base.errors import DataError
from vitreous.data.object_boxes import ObjectBoxes, foreground_mask
from vitreous.data.problems import Problem, passed_over
from vitreous.data.quarantine import Progress, examine
from vitreous.data.sources.archives import is_archive
from vitreous.data.sources.folders import list_folder
from vitreous.data.sources.huggingface import list_saved
from vitreous.data.sources.listing import Listing, check_parts, class_order, class_problems, copies, size_problems
from vitreous.data.sources.official import LAYOUTS, list_official, official_kind
from vitreous.data.sources.table import list_table

# Suffixes of image formats that are not read.
UNREAD = {".heic", ".heif", ".hif", ".jxl", ".tga", ".psd", ".svg", ".ico", ".pcx", ".dds", ".exr", ".hdr", ".fits", ".dcm",
          ".qoi", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".avifs", ".jpf"}  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """What a check found.

    counts: images by part and class, part "" where all are split by content. sizes: (width, height)
    of the smallest, the middle and the largest readable image by number of pixels. suffixes: files
    by suffix. notes: images by conversion. remarks: lines on files that are passed over and on the
    order of classes.
    """

    name: str
    counts: dict[str, dict[str, int]]
    sizes: list[tuple[int, int]]
    suffixes: dict[str, int]
    notes: dict[str, int]
    remarks: list[str]
    masks: int
    problems: list[Problem]

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"images": sum(sum(classes.values()) for classes in self.counts.values())}


def check_data(spec: str, *, outside: bool = False, progress: Progress | None = None) -> Findings:
    """Check what `vitreous train` would read of a folder, tar, .csv table or NAME:PATH.

    Raises DataError where nothing can be checked: no such place, or no image in it.
    """
    problems: list[Problem] = []

    def note(kind: str, file: str, error: DataError) -> None:
        problems.append(Problem(kind, file, str(error)))

    listing = list_images(spec, outside, note)
    if not listing.files:
        raise DataError(f"Found no image with a class in {spec!r}. " + " ".join(problem.what for problem in problems[:1]))
    if all(problem.kind != "structure" for problem in problems):
        try:
            check_parts(listing)
        except DataError as error:
            note("structure", listing.name, error)
    seen = examine(listing.files, pixels=True, progress=progress)
    readable = [name for name, one in seen.items() if not one.reason]
    problems += [Problem("unreadable", name, one.reason) for name, one in seen.items() if one.reason]
    problems += [*copies(listing, seen), *class_problems(listing, readable), *size_problems(seen)]
    problems += [
        Problem("suffix", suffix, f"{count:,} files of an image format that is not read")
        for suffix, count in sorted(listing.passed_over.items())
        if suffix in UNREAD
    ]
    masks = [check_foreground(listing.foregrounds[n], n, seen[n].size) for n in readable if n in listing.foregrounds]
    problems += [result for result in masks if isinstance(result, Problem)]
    notes = Counter(note for one in seen.values() for note in one.notes)
    notes.update(result for result in masks if result and not isinstance(result, Problem))
    counts: dict[str, dict[str, int]] = {}
    for (part, label), count in sorted(listing.counts().items()):
        counts.setdefault(part, {})[label] = count
    sizes = sorted((seen[name].size for name in readable), key=lambda size: (size[0] * size[1], size))
    return Findings(
        name=listing.name,
        counts=counts,
        sizes=[sizes[0], sizes[len(sizes) // 2], sizes[-1]] if sizes else [],
        suffixes=dict(sorted(Counter(PurePosixPath(name).suffix.lower() for name in listing.files).items())),
        notes=dict(sorted(notes.items())),
        remarks=[*passed_over(listing.passed_over), *class_order(listing, sorted(set(listing.classes.values())))],
        masks=len(listing.foregrounds),
        problems=problems,
    )


def list_images(spec: str, outside: bool, note: Any) -> Listing:
    """The listing of what the text names.

    Raises DataError for what is no folder, archive or table.
    """
    if spec.startswith("hf:"):
        return list_saved(Path(spec[3:]).expanduser(), outside=outside, report=note)
    name, _, rest = spec.partition(":")
    if name in LAYOUTS and rest:
        return list_official(name, Path(rest).expanduser())
    path = Path(spec).expanduser()
    if official := official_kind(path):
        return list_official(official, path)
    if path.is_dir() or is_archive(path):
        return list_folder(path, note)
    if path.suffix.lower() == ".csv" and path.is_file():
        return list_table(path, outside=outside, report=note)
    raise DataError(
        f"Found no folder, tar archive or .csv table {spec!r}. Expected images to check. Check the path; sets of arrays "
        "such as cifar10 are checked when they are opened."
    )


def check_foreground(foreground: ObjectBoxes, name: str, size: tuple[int, int]) -> Problem | str:
    """How a mask was read; or what is wrong with it, or with the boxes of an image.

    Wrong: it cannot be read, has another size than its image, leaves it, or marks nothing.
    """
    kind, file = ("mask", foreground[0]) if isinstance(foreground, tuple) else ("box", name)
    try:
        mask, note = foreground_mask(foreground, name, *size)
    except DataError as error:
        return Problem(kind, file, str(error))
    return note if mask.any() else Problem(kind, file, "marks no pixel as foreground")
