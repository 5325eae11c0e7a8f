"""What is wrong with the images of a folder or table.

Every file is decoded, every mask measured, every copy listed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitreous.base.errors import DataError
from vitreous.data.object_boxes import ObjectBoxes, foreground_mask
from vitreous.data.problems import listed
from vitreous.data.quarantine import Examined, Progress, examine
from vitreous.data.sources.archives import is_archive
from vitreous.data.sources.folders import list_folder
from vitreous.data.sources.huggingface import list_saved
from vitreous.data.sources.listing import Listing, check_parts
from vitreous.data.sources.table import list_table


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its kind, where it is, and a sentence about it.

    It is in a file, folder, class or line.

    kind: unreadable, duplicate, leak (a copy in another part), contradiction (a copy in another
    class), class, mask, box, empty (a folder without an image), folder (one that cannot be read),
    table or structure.
    """

    kind: str
    file: str
    what: str


@dataclass(frozen=True)
class Findings:
    """What a check found.

    counts: images by part and class, part "" where all are split by content. sizes: (width, height)
    of the smallest, the middle and the largest readable image by number of pixels. notes: images by
    conversion.
    """

    name: str
    counts: dict[str, dict[str, int]]
    sizes: list[tuple[int, int]]
    notes: dict[str, int]
    masks: int
    problems: list[Problem]

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"images": sum(sum(classes.values()) for classes in self.counts.values())}


def check_data(spec: str, *, outside: bool = False, progress: Progress | None = None) -> Findings:
    """Check what `vitreous train` would read of a folder, tar archive, .csv table or hf:PATH.

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
    problems += copies(listing, seen)
    problems += classes(listing, readable)
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
        notes=dict(sorted(notes.items())),
        masks=len(listing.foregrounds),
        problems=problems,
    )


def list_images(spec: str, outside: bool, note: Any) -> Listing:
    """The listing of what the text names.

    Raises DataError for what is no folder, archive or table.
    """
    if spec.startswith("hf:"):
        return list_saved(Path(spec[3:]).expanduser(), outside=outside, report=note)
    path = Path(spec).expanduser()
    if path.is_dir() or is_archive(path):
        return list_folder(path, note)
    if path.suffix.lower() == ".csv" and path.is_file():
        return list_table(path, outside=outside, report=note)
    raise DataError(
        f"Found no folder, tar archive or .csv table {spec!r}. Expected images to check. Check the path; named sets such as "
        "cifar10 are checked when they are opened."
    )


def copies(listing: Listing, seen: dict[str, Examined]) -> Iterator[Problem]:
    """Images whose pixels are those of an earlier one, whatever their files.

    Within a part, across parts, across classes.
    """
    first: dict[str, list[str]] = defaultdict(list)
    for name, one in seen.items():
        if one.reason:
            continue
        before = first[one.pixels]
        if before:
            label, part = listing.classes[name], listing.part(name)
            other = next((b for b in before if listing.classes[b] != label), None)
            elsewhere = next((b for b in before if listing.part(b) != part), None)
            if other is not None:
                what = f"the same pixels as {other!r}, of the class {listing.classes[other]!r}"
                yield Problem("contradiction", name, what)
            elif elsewhere is not None:
                yield Problem("leak", name, f"the same pixels as {elsewhere!r}, in {listing.part(elsewhere)}")
            else:
                yield Problem("duplicate", name, f"the same pixels as {before[0]!r}")
        before.append(name)


def classes(listing: Listing, readable: list[str]) -> Iterator[Problem]:
    """Classes with at most one readable training image, and names that are alike.

    Alike: they differ in case or spaces alone.
    """
    trained = [name for name in readable if listing.part(name) in ("", "train")]
    count = Counter(label for name in trained for label in listing.class_names(name))
    alike: dict[str, set[str]] = defaultdict(set)
    in_train = {label for name in listing.classes if listing.part(name) in ("", "train") for label in listing.class_names(name)}
    for label in sorted(in_train | set(listing.set_classes)):
        if count[label] < 2:
            yield Problem("class", label, f"{'one image' if count[label] else 'no image'} to train on that can be read")
    for label in listing.set_classes or listing.classes.values():
        alike[" ".join(label.casefold().split())].add(label)
    for names in alike.values():
        if len(names) > 1:
            yield Problem("class", min(names), f"differs in case or spaces alone from {listed(sorted(names)[1:])}")


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
