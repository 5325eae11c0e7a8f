"""`vitreous predict`: the classes of images, with probabilities, as one CSV file.

Images in folders that are named after classes of the model are labelled: their accuracy is said.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from vitreous.base.environment import torch_device
from vitreous.base.errors import DataError, SettingError
from vitreous.base.files import check_new, writable, write
from vitreous.base.statistics import wilson
from vitreous.data.problems import cell, conversions, shown
from vitreous.data.sources.unlabelled import check_paths
from vitreous.data.views import Views
from vitreous.models.classes import multi_label, names_of, probabilities
from vitreous.models.load import logits_of, open_images, open_model, prepared


@dataclass(frozen=True)
class Prediction:
    """One image: its best classes and their probabilities, or why it cannot be read.

    notes: what was done to its file beside decoding, in words to count by.
    """

    name: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    reason: str = ""
    notes: tuple[str, ...] = ()


def predict(
    model: nn.Module, views: Views, *, top: int = 1, batch_size: int = 16, progress: Callable[[int, int], None] | None = None
) -> Iterator[Prediction]:
    """A prediction for every image, in order; the model stays where it is.

    Raises HostError for a model without classes.
    """
    names = names_of(model)
    check_range("top", top, len(names))
    check_range("batch-size", batch_size, 100_000)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    done = 0
    for batch in prepared(views, batch_size):
        readable = [image.pixels for image in batch if image.pixels is not None]
        answers = iter(())
        if readable:
            best = probabilities(model, logits_of(model, torch.stack(readable).to(device))).topk(top)
            answers = iter(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        for image in batch:
            indices, values = ((), ()) if image.pixels is None else next(answers)
            yield Prediction(image.name, tuple(names[i] for i in indices), tuple(values), image.reason, notes=image.notes)
        done += len(batch)
        if progress is not None:
            progress(done, len(views))


def run_predict(
    name: str,
    images: Sequence[str],
    out: str,
    *,
    opening: Callable[[str, Callable[[str], Any]], nn.Module] = lambda name, say: open_model(name, say=say),
    top: int = 1,
    batch_size: int = 16,
    device: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Predict and write the file; prints and returns counts by class and the skipped images.

    opening: makes the model of its name, and says what it assumed.
    """
    console, path = console or Console(), Path(out)
    check_new(path)
    check_range("top", top, 1_000_000)
    check_range("batch-size", batch_size, 100_000)
    place = torch_device(device)  # before the model is opened, which may take long
    remarks: list[str] = []
    check_paths(images)
    model = opening(name, remarks.append).to(place)
    views = open_images(model, images)
    classes = () if multi_label(model) else names_of(model)  # where an image may show several, no folder says all
    labels = labels_of([views.name(i) for i in range(len(views))], classes)
    result: dict[str, Any] = {"model": name, "predictions": str(path), "images": 0, "classes": Counter(), "skipped": []}
    notes: list[str] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress, writable(path):
        task = progress.add_task("images", total=len(views))
        step = lambda done, of: progress.update(task, completed=done, total=of)  # noqa: E731
        answers = predict(model, views, top=top, batch_size=batch_size, progress=step)
        write(path, lambda temporary: write_table(temporary, answers, top, result, notes, labels))
    result["inputs"] = views.config
    result["remarks"] = [*remarks, *views.images.remarks, *conversions(notes)]
    if multi_label(model):
        result["remarks"].append("Several classes may be right: each has a probability of its own. --top N shows more of them.")
    say(result, console)
    return result


def labels_of(files: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Class of each image: the first of its folders that is named after one, else ""."""
    known = set(classes)
    return [next((folder for folder in name.split("/")[:-1] if folder in known), "") for name in files]


def write_table(
    path: Path, answers: Iterator[Prediction], top: int, result: dict[str, Any], notes: list[str], labels: Sequence[str]
) -> None:
    """Write predictions as they come and count them in `result`.

    What was done to files beside decoding joins `notes`. labels: of each image, "" where there is
    none; with some, the file has a column and `result` the accuracy.

    Raises DataError if no image could be read.
    """
    right: Counter[str] = Counter()
    labelled: Counter[str] = Counter()
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        numbers = ["", *(f"_{i}" for i in range(2, top + 1))]
        writer.writerow(
            [
                "file",
                *(word + number for number in numbers for word in ("predicted", "probability")),
                "skipped",
                *(["label"] if any(labels) else []),
            ]
        )
        for answer, label in zip(answers, labels, strict=True):
            pairs = zip(answer.classes, answer.probabilities, strict=True)
            values = [text for name, value in pairs for text in (cell(name), f"{value:.7g}")] or [""] * (2 * top)
            writer.writerow([cell(answer.name), *values, cell(answer.reason), *([cell(label)] if any(labels) else [])])
            if answer.reason:
                result["skipped"].append({"file": answer.name, "reason": answer.reason})
            else:
                notes += answer.notes
                result["images"] += 1
                result["classes"][answer.classes[0]] += 1
                labelled[label] += 1
                right[label] += answer.classes[0] == label
    del labelled[""]
    if labelled:
        result["accuracy"] = accuracy(labelled, right)
    if not result["images"]:
        first = result["skipped"][0]
        raise DataError(
            f"Found no readable image among {len(result['skipped'])}; of {shown(first['file'])}: {shown(first['reason'])}. "
            "Expected at least one. Check the files."
        )


def accuracy(labelled: Counter[str], right: Counter[str]) -> dict[str, Any]:
    """Share of right ones among labelled images, its interval, and the worst class."""
    worst = min(labelled, key=lambda label: (right[label] / labelled[label], -labelled[label], label))
    count, correct = labelled.total(), right.total()
    return {
        "value": correct / count,
        "interval": list(wilson(correct, count)),
        "right": correct,
        "labelled": count,
        "worst": {"class": worst, "right": right[worst], "images": labelled[worst]},
    }


def accuracy_lines(result: dict[str, Any]) -> list[str]:
    """The accuracy for people; nothing where no image is labelled."""
    if "accuracy" not in result:
        return []
    found = result["accuracy"]
    low, high = (100 * end for end in found["interval"])
    worst, others = found["worst"], result["images"] - found["labelled"]
    lines = [
        f"Accuracy: {100 * found['value']:.2f} % ({low:.2f} to {high:.2f} %, the 95 % interval): {found['right']:,} right of "
        f"{found['labelled']:,} images in folders named after classes of the model."
    ]
    if found["right"] < found["labelled"]:
        lines.append(f"Worst class: {shown(worst['class'])}, {worst['right']:,} of {worst['images']:,} right.")
    return lines + ([f"{others:,} images lie in no such folder and do not count."] if others else [])


def say(result: dict[str, Any], console: Console) -> None:
    """Counts by class, what was skipped and why, and where the file is."""
    table = Table("class", "images")
    for name, count in result["classes"].most_common(10):
        table.add_row(shown(name).replace("[", r"\["), str(count))
    console.print(table)
    lines = [f"and {len(result['classes']) - 10} more classes"] if len(result["classes"]) > 10 else []
    skipped = result["skipped"]
    lines += [f"skipped: {shown(entry['file'])}: {shown(entry['reason'])}" for entry in skipped[:5]]
    if len(skipped) > 5:
        lines.append(f"skipped: {len(skipped) - 5} more, listed in the file")
    lines += [*result["remarks"], *accuracy_lines(result)]
    lines.append(f"Done: {result['predictions']} ({result['images']:,} images, {len(skipped):,} skipped)")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def check_range(name: str, value: int, most: int) -> None:
    """Raise SettingError unless the value is 1 to `most`."""
    if not 1 <= value <= most:
        raise SettingError(f"Found --{name} {value}. Expected 1 to {most:,}. Give such a number.")
