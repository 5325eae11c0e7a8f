"""Reading folders or run folders -> one HTML file that needs nothing else.

No network, no server, no second file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
from markupsafe import Markup

from vitreous.base.errors import DataError
from vitreous.base.files import write_text
from vitreous.base.metrics import metrics_of
from vitreous.report import packing
from vitreous.report.answers import answers
from vitreous.report.folders import ReportInput, open_folders, open_study
from vitreous.report.reading import RECORDS, ReadingFolder, page_content

IMAGES = 64  # on a page, at most
LIMIT = 15_000_000  # bytes of a page
SCRIPTS = (
    "base", "state", "color", "chart", "table", "training", "study", "mistakes", "queries", "tokens",
    "links", "viewer", "pane", "paint", "whole", "indicators", "sums", "matrices", "epochs", "findings", "spectra", "exact",
    "scores", "curves", "changes", "facts", "main",
)  # fmt: skip
UNREAD = (
    "base",
    "color",
    "chart",
    "table",
    "training",
    "study",
    "mistakes",
    "unread",
)  # of runs whose attention cannot be read
POINTS = 400  # of the loss by update of a run


def write(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of these folders to `out`, one self-contained HTML file; returns `out`.

    folders: one reading folder; several, which can be compared side by side; one run folder, whose
    epochs can be scrubbed; several run folders; or one of a finished study. The page shows the maps
    of the first 64 images of each reading, or of fewer where it would grow beyond 15 MB, and says
    so; its numbers are of
    all images. Equal folders give equal bytes.

    Raises DataError for a folder that is neither, is not complete or cannot be read; `out` is then
    as it was.
    """
    out, folders = Path(out), [Path(folder) for folder in folders]
    study = open_study(folders[0]) if len(folders) == 1 else None
    text = render(open_folders(study[1] if study else folders), study[0] if study else None)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def check_common(a: Path, b: Path) -> None:
    """Raise DataError where two readings (of runs, the last) have no image in common."""
    names = {}
    for source in open_folders([a, b]):
        images = ReadingFolder(source.readings[-1]).images if source.readings else []
        names[source.name] = [str(image.get("name")) for image in images]
    first, second = (set(images) for images in names.values()) if len(names) == 2 else (set(), set())
    if first and second and not first & second:
        shown = "; ".join(f"{name}: {len(images)}, the first {images[0]!r}" for name, images in names.items())
        raise DataError(
            f"Found no image that both have, by name ({shown}). Expected some of the same images, since readings are compared "
            "image by image. Look at both models with the same images."
        )


def render(sources: Sequence[ReportInput], study: dict[str, Any] | None = None) -> str:
    """The page as text: as many images as the limits allow. study: as `open_study` returns it."""
    readings = [[ReadingFolder(folder) for folder in source.readings] for source in sources]
    one = sum(reading.bytes_per_image() for group in readings for reading in group)
    images = max(1, min(IMAGES, LIMIT // max(one, 1)))
    while True:
        page = fill(payload(sources, readings, images) | {"study": study})
        if len(page) <= LIMIT or images == 1:  # the page is ASCII but for a few characters of its own
            return page
        images = max(1, min(images - 1, int(images * LIMIT / len(page))))


def payload(sources: Sequence[ReportInput], readings: Sequence[Sequence[ReadingFolder]], images: int) -> dict[str, Any]:
    """All that the script of the page reads."""
    pictures: dict[str, int] = {}
    shown = [
        {
            "name": source.name,
            "epochs": source.epochs,
            "leftOut": source.left_out,
            "run": source.run,
            "metrics": [{k: v for k, v in line.items() if k != "loss_by_update"} for line in source.metrics or []],
            "loss": loss_by_update(source.metrics or []),
            "scores": [asdict(metric) for metric in metrics_of(source.run or {})],
            "answers": answers(source.folder, pictures) if source.folder else {},
            "readings": [page_content(reading, images, pictures) for reading in group],
        }
        for source, group in zip(sources, readings, strict=True)
    ]
    return {"sources": shown, "pictures": list(pictures), "limit": images, "words": words(readings)}


def loss_by_update(lines: Sequence[dict[str, Any]]) -> list[list[float | int | None]]:
    """[update, loss] along a run, at most `POINTS`: means of neighbours where there are more."""
    points = [point for line in lines for point in line.get("loss_by_update") or []]
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [[group[-1][0], packing.number(mean(loss for _, loss in group))] for group in groups]


def words(readings: Sequence[Sequence[ReadingFolder]]) -> dict[str, list[dict[str, Any]]]:
    """The records of all readings by kind: names and meanings.

    Of measures, sources, scores, baselines and maps.
    """
    by_kind: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in (*RECORDS, "components")}
    for kind, records in by_kind.items():
        for record in (record for group in readings for reading in group for record in reading.facts[kind]):
            records.setdefault(record["name"], record)
    return {kind: list(records.values()) for kind, records in by_kind.items()}


def fill(data: dict[str, Any]) -> str:
    """The template with its style, script and data."""
    pictures = data.pop("pictures")
    data = packing.legible(data)
    read = bool(data["sources"][0]["readings"])
    return assemble(
        data | {"pictures": pictures},
        SCRIPTS if read else UNREAD,
        title=study_title(data["study"]) if data["study"] else together([source["name"] for source in data["sources"]]),
        kind="study" if data["study"] else "run" if data["sources"][0]["run"] else "reading",
        first=("maps", "maps") if read else ("main", "contents"),
        random=any(reading["random"] for source in data["sources"] for reading in source["readings"]),
    )


def assemble(data: Any, scripts: Sequence[str], *, title: str, kind: str, first: tuple[str, str], random: bool = False) -> str:
    """A page: the template with the style, these scripts and data that is legible.

    first: (id, words) of what the link for keyboards jumps to. random: say that the weights are
    random.
    """
    style = asset("report.css")
    script = '"use strict";\n(() => {\n' + "\n".join(asset(f"{name}.js") for name in scripts) + "})();\n"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(asset("report.html.j2")).render(
        title=title,
        kind=kind,
        first=first,
        random=random,
        style=Markup(style),
        script=Markup(script),
        style_hash=Markup(digest(style)),
        script_hash=Markup(digest(script)),
        data=Markup(packing.script_json(data)),
    )


def study_title(study: dict[str, Any]) -> str:
    arms = study["arms"]
    return f"{arms[1]} against {arms[0]}" if len(arms) == 2 else f"{len(arms) - 1} arms against {arms[0]}"


def together(names: Sequence[str]) -> str:
    """Names as a title."""
    if len(names) > 4:
        return f"{names[0]} and {len(names) - 1} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def asset(name: str) -> str:
    """A text file that comes with the package."""
    return (resources.files("vitreous.report") / "assets" / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """The name under which a content-security policy lets this very text through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
