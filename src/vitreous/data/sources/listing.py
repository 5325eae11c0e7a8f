"""Image files with their classes: what is wrong with them, and Data of the readable ones.

Parts go by name or by content.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vitreous.base.errors import DataError
from vitreous.data.decoding import Source, decode, decode_with_notes
from vitreous.data.object_boxes import ObjectBoxes, foreground_mask
from vitreous.data.problems import Problem, conversions, name_list, order_remark, passed_over, shown
from vitreous.data.quarantine import Examined, Progress, Quarantined, examine, lines
from vitreous.data.samples import Data, Samples, pixel_statistics
from vitreous.data.targets import ClassIndex, ClassSet, Indices, NoTarget, Target

PARTS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
}  # fmt: skip
HELD_OUT = 0.2  # of each class, where there is no test part
SAMPLE = 64  # images read at opening, for their size and statistics


@dataclass
class Listing:
    """Images by name, as a folder, a table or a data set names them; nothing is read yet.

    classes: {image: class name}. parts: {image: "train", "test" or "val"}, None where all are to be
    split by content. set_classes: where an image may have several classes, their names, else empty.
    sets: then {image: 1, 0 or NaN for each of them}, and `classes` holds the names of those
    present, joined by +. passed_over: files by a suffix that is not read. own_order: classes as
    the data set itself numbers them, empty where it does not. labelled: False for images without
    classes, whose class names are "".
    """

    name: str
    files: dict[str, Source]
    classes: dict[str, str]
    parts: dict[str, str] | None = None
    foregrounds: dict[str, ObjectBoxes] = field(default_factory=dict)
    set_classes: tuple[str, ...] = ()
    sets: dict[str, tuple[float, ...]] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    own_order: tuple[str, ...] = ()
    labelled: bool = True

    def class_names(self, name: str) -> tuple[str, ...]:
        """The classes of an image: one, as many as are present, or none without labels."""
        if not self.set_classes:
            return (self.classes[name],) if self.labelled else ()
        return tuple(label for label, value in zip(self.set_classes, self.sets[name], strict=True) if value == 1)

    def target(self, names: Sequence[str], classes: Sequence[str]) -> Target:
        """The target of these images."""
        if not self.labelled:
            return NoTarget(len(names))
        if self.set_classes:
            return ClassSet([self.sets[name] for name in names])
        index = {label: k for k, label in enumerate(classes)}
        return ClassIndex([index[self.classes[name]] for name in names])

    def strata(self, names: Sequence[str]) -> dict[str, Any]:
        """What a split by content divides each image with: its class, of several the rarest."""
        if not self.set_classes:
            return self.classes
        return dict(zip(names, self.target(names, ()).strata().tolist(), strict=True)) if names else {}

    def part(self, name: str) -> str:
        return "" if self.parts is None else self.parts[name]

    def counts(self) -> Counter[tuple[str, str]]:
        """Images by (part, class)."""
        return Counter((self.part(name), label) for name, label in self.classes.items())


class FileSamples(Samples):
    """Images in files, in the memory of a read archive or in a table, decoded when asked for.

    names, sources: path and origin of each image. foregrounds: {name: its mask or boxes}; what has
    none has no mask.
    """

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Source],
        target: Target | Indices,
        channels: int = 3,
        foregrounds: dict[str, ObjectBoxes] | None = None,
    ):
        super().__init__(target, channels)
        self.names = list(names)
        self.sources = list(sources)
        self.foregrounds = foregrounds or {}

    def image(self, i: int) -> Image.Image:
        return decode(self.sources[i], self.names[i], self.channels)

    def image_with_notes(self, i: int) -> tuple[Image.Image, tuple[str, ...]]:
        return decode_with_notes(self.sources[i], self.names[i], self.channels)

    def mask(self, i: int) -> np.ndarray | None:
        foreground = self.foregrounds.get(self.names[i])
        if foreground is None:
            return None
        width, height = self.image(i).size
        return foreground_mask(foreground, self.names[i], width, height)[0]

    def subset(self, indices: Indices) -> FileSamples:
        names, sources = [self.names[i] for i in indices], [self.sources[i] for i in indices]
        part = FileSamples(names, sources, self.target.subset(indices), self.channels, self.foregrounds)
        part.transform = self.transform
        return part


def assemble(
    listing: Listing, *, image_size: int | None = None, strict: bool = False, progress: Progress | None = None
) -> Data:
    """Decode every file once, leave out unreadable ones, make train and test sets.

    strict: raise DataError for the first that cannot be read.

    Raises DataError for parts or classes that do not fit, and for a class of which nothing is left
    to train on.
    """
    check_parts(listing)
    seen = examine(listing.files, progress=progress)
    quarantined = [
        Quarantined(name, listing.classes[name], listing.part(name), one.reason) for name, one in seen.items() if one.reason
    ]
    if strict and quarantined:
        raise DataError(
            f"Found {len(quarantined)} of {len(seen)} images that cannot be read, the first {quarantined[0].file!r} "
            f"({quarantined[0].reason}). Expected none, since the run is strict. Replace or remove them; `vitreous data "
            "check` lists them all."
        )
    readable = [name for name, one in seen.items() if not one.reason]
    parts = listing.parts or by_content(listing, readable, seen)
    names = {part: [name for name in readable if parts[name] == part] for part in ("train", "test", "val")}
    if not names["test"]:
        names["test"] = names.pop("val")
    classes = class_names(listing, quarantined, names)
    sets = {
        part: FileSamples(
            some, [listing.files[n] for n in some], listing.target(some, classes), foregrounds=listing.foregrounds
        )
        for part, some in names.items()
        if some
    }
    train = sets.pop("train")
    own_size, mean, std = survey(train)
    return Data(
        name=listing.name,
        train=train,
        tests=sets,
        classes=classes,
        channels=train.channels,
        image_size=(image_size, image_size) if image_size else own_size,
        mean=mean,
        std=std,
        quarantined=tuple(quarantined),
        remarks=(
            *conversions(note for one in seen.values() for note in one.notes),
            *passed_over(listing.passed_over),
            *class_order(listing, classes),
            *doubts(listing, seen),
            *lines(quarantined, listing.counts()),
        ),
    )


def class_order(listing: Listing, classes: Sequence[str]) -> list[str]:
    """A line where others number the classes in another order: the data set itself, or timm."""
    own = [label for label in listing.own_order if label in classes]
    if own and own != list(classes):
        ours, theirs = (", ".join(shown(name) for name in names[:4]) for names in (classes, own))
        return [f"Class order: that of texts ({ours}, ...); the data set itself has {theirs}, .... Compare by name."]
    return order_remark(classes) if classes and not listing.set_classes else []


def doubts(listing: Listing, seen: Mapping[str, Examined]) -> list[str]:
    """One line that counts what `vitreous data check` would name in readable images; or none."""
    readable = [name for name, one in seen.items() if not one.reason]
    problems = [*copies(listing, seen), *class_problems(listing, readable), *size_problems(seen)]
    firsts = {problem.kind: problem for problem in reversed(problems) if problem.kind != "duplicate"}
    counts = Counter(problem.kind for problem in problems)
    each = [f"{kind} {counts[kind]} ({shown(one.file)}: {shown(one.what)})" for kind, one in sorted(firsts.items())]
    return [f"Doubtful: {'; '.join(each)}. `vitreous data check` names them all."] if each else []


def copies(listing: Listing, seen: Mapping[str, Examined]) -> Iterator[Problem]:
    """Images equal to an earlier one: within a part, across parts, across classes.

    Equal in their pixels where these were digested, else in the contents of their files.
    """
    first: dict[str, list[str]] = defaultdict(list)
    for name, one in seen.items():
        if one.reason:
            continue
        before = first[one.pixels or one.contents]
        same = f"the same {'pixels' if one.pixels else 'file'} as"
        if before:
            label, part = listing.classes[name], listing.part(name)
            other = next((b for b in before if listing.classes[b] != label), None)
            elsewhere = next((b for b in before if listing.part(b) != part), None)
            if other is not None:
                yield Problem("contradiction", name, f"{same} {other!r}, of the class {listing.classes[other]!r}")
            elif elsewhere is not None:
                yield Problem("leak", name, f"{same} {elsewhere!r}, in {listing.part(elsewhere)}")
            else:
                yield Problem("duplicate", name, f"{same} {before[0]!r}")
        before.append(name)


def class_problems(listing: Listing, readable: Iterable[str]) -> Iterator[Problem]:
    """Classes with at most one readable training image, and names that are alike.

    Alike: they differ in case, spaces or the form of a number alone.
    """
    trained = [name for name in readable if listing.part(name) in ("", "train")]
    count = Counter(label for name in trained for label in listing.class_names(name))
    alike: dict[str, set[str]] = defaultdict(set)
    in_train = {label for name in listing.classes if listing.part(name) in ("", "train") for label in listing.class_names(name)}
    for label in sorted(in_train | set(listing.set_classes)):
        if count[label] < 2:
            yield Problem("class", label, f"{'one image' if count[label] else 'no image'} to train on that can be read")
    for label in listing.set_classes or listing.classes.values():
        alike[plain_label(label)].add(label)
    for names in alike.values():
        if len(names) > 1:
            others = name_list(sorted(names)[1:])
            yield Problem("class", min(names), f"differs in case, spaces or the form of a number alone from {others}")


def plain_label(label: str) -> str:
    """A class name without what people write in several ways: case, spaces, 1 and 1.0."""
    text = " ".join(label.casefold().split())
    try:
        return f"{float(text):.12g}"
    except ValueError:
        return text


def size_problems(seen: Mapping[str, Examined]) -> Iterator[Problem]:
    return (Problem("size", name, "one pixel") for name, one in seen.items() if one.size == (1, 1))


def check_parts(listing: Listing) -> None:
    """Raise DataError unless train and test part have the same classes, at least two."""
    if listing.parts is not None:
        there = set(listing.parts.values())
        if "train" not in there or len(there) < 2:
            raise DataError(
                f"Found the parts {name_list(sorted(there))} in {listing.name!r}; expected train, and one of test or val (or "
                "valid, validation), or no parts at all, for a split by content. Add one, or leave the parts out."
            )
    if listing.set_classes or not listing.labelled:  # every part has the same columns, or no classes
        return
    classes: dict[str, set[str]] = {}
    for name, label in listing.classes.items():
        classes.setdefault(listing.part(name) or "train", set()).add(label)
    trained = sorted(classes["train"])
    if len(trained) < 2:
        raise DataError(
            f"Found one class, {trained[0]!r}, to train on in {listing.name!r}; expected a folder or label for each of "
            "at least two classes. Give the data that hold them."
        )
    alone = "val" if "test" not in classes else None  # a val part alone is the test
    for part, labels in classes.items():
        if strangers := labels - set(trained):
            raise DataError(
                f"Found {name_list(sorted(strangers))} in {'test' if part == alone else part} but not in train, which has "
                f"{name_list(trained)}; expected the same class names. Rename or remove them."
            )


def by_content(listing: Listing, names: Sequence[str], seen: dict[str, Examined]) -> dict[str, str]:
    """Hold out the images of each class whose contents have the lowest digests.

    It is a fifth of them, but never all.
    """
    digests: dict[Any, dict[str, list[str]]] = {}
    strata = listing.strata(names)
    for name in names:
        digests.setdefault(strata[name], {}).setdefault(seen[name].contents, []).append(name)
    parts = {}
    for same in digests.values():
        held_out = lowest(same, HELD_OUT)
        for digest, some in sorted(same.items()):
            parts |= dict.fromkeys(some, "test" if digest in held_out else "train")
    if parts and "test" not in parts.values():
        raise DataError("Found one image in each class; expected at least two, one to train on and one to test. Add more.")
    return parts


def lowest(digests: Iterable[str], share: float) -> set[str]:
    """The lowest of the distinct digests: this share of them, 0 to 1.

    At least one, but never all.
    """
    distinct = sorted(set(digests))
    return set(distinct[: min(max(round(share * len(distinct)), 1), len(distinct) - 1)])


def class_names(listing: Listing, quarantined: Sequence[Quarantined], names: dict[str, list[str]]) -> tuple[str, ...]:
    """Class names, sorted, or in the order of a table's columns.

    Raises DataError if no readable image of one is left to train on, or none to test.
    """
    trained = (name for name in listing.classes if listing.part(name) in ("", "train"))
    wanted = listing.set_classes or tuple(sorted({label for name in trained for label in listing.class_names(name)}))
    there = {label for name in names["train"] for label in listing.class_names(name)}
    if lacking := [label for label in wanted if label not in there]:
        bad = next((bad for bad in quarantined if lacking[0] in listing.class_names(bad.file)), None)
        why = f", such as {bad.file!r}: {bad.reason}" if bad else ""
        raise DataError(
            f"Found no image that can be read of {name_list(lacking)} to train on{why}. Expected at least one of each "
            "class. Replace the files, or take the class out."
        )
    if not names["test"]:
        raise DataError("Found no image that can be read to test on. Expected at least one. Replace the files.")
    return wanted


def survey(images: Samples) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    """(height, width) if all images of a sample agree, else 224 x 224.

    Mean and deviation of its pixels.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(int))
    pixels = [np.asarray(images.image(int(i))) for i in chosen]
    sizes = {array.shape[:2] for array in pixels}
    mean, std = pixel_statistics(np.concatenate([array.reshape(1, 1, -1, images.channels) for array in pixels], axis=2))
    return sizes.pop() if len(sizes) == 1 else (224, 224), mean, std
