"""A reading: what `look` returns. Numbers and maps per layer, head and image; a table.

A folder.

    reading.json            model, weights, settings, versions, layers, what was refused or skipped,
                            and records of what its measures, sources, scores and maps
                            ("components") are: labels, units, bounds
    parts/00000.safetensors, ...
                            16 images each: their rows of the table, maps, pictures, masks; written
                            whole or not at all
    table.csv, table.json   the rows of all parts, tidy: layer, head, image, source, kind, one
                            column per measure
    scores.csv, summary.csv maps against masks, where there are masks: per image, and means with
                            95 % intervals
    curves.json             insertion and deletion, where they were asked for

Of the first images a part has what each patch looks at, too: "queries/LAYER" (`lens.query_rows`);
behind merged or dropped tokens "tokens/LAYER", and the first one "spectrum/SOURCE/LAYER" and
"exact/QUANTITY/LAYER", of what mixers tell of themselves (`hosts.mixer.Mixer.reading`). What probes
have drawn beside table and maps is "figure/NAME/LAYER" (`lens.probe.Figure`).

Where a map is of a changed image, "picture/NAME/IMAGE" is that image.

Parts are what an interrupted look goes on from; the other files follow from them. Numbers are -1
where a row is of all heads (`head`), of no single image (`image`) or of no single layer (`layer`),
and NaN where a measure does not apply.

This is format 3. Words stand in a part as positions in a list of words of that part. Maps are
float16, each times its own power of two ("NAME/LAYER/scale"), so that what is small beside a sink
keeps its digits; in formats 1 and 2, which are read as well, they had no scale.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL.Image import Image
from safetensors import safe_open

from vitreous.base.errors import DataError, SettingError, UnknownName
from vitreous.base.files import writable, write, write_text
from vitreous.lens import drawing
from vitreous.lens.query_rows import query
from vitreous.lens.stored_maps import joined_maps, scaled
from vitreous.lens.tables import Columns, as_csv, from_csv, in_order, joined, without_nan
from vitreous.report import format_1
from vitreous.report.unsigned import with_unknown_signs

FORMAT = 3
CHUNK = 16  # images in a part
# In a part as JSON, in the tensor of bytes "about": of metadata only one key has an order, the
# images.
ABOUT = ("skipped", "findings", "tables")
# what a part holds beside maps
OTHERS = ("rows", "scores", "picture", "mask", "queries", "tokens", "spectrum", "exact", "figure")


@dataclass
class Part:
    """Up to CHUNK images of a reading.

    tensors: by name as the file holds them. images: what is known of each image.

    findings: what earlier parts showed of the model, for a look that goes on after this one.
    tables: {"rows" or "scores": {"columns": names in order, "words": {column of text: the words
    that its numbers are positions of}}}.
    """

    tensors: dict[str, np.ndarray]
    images: list[dict[str, Any]]
    skipped: list[dict[str, str]] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)

    def columns(self, group: str) -> Columns:
        """The columns of a table that the part holds: "rows" (measures) or "scores"."""
        table = self.tables.get(group, {"columns": (), "words": {}})
        columns = {name: self.tensors[f"{group}/{name}"] for name in table["columns"]}
        return columns | {name: np.array(words, str)[columns[name]] for name, words in table["words"].items()}

    def maps(self) -> list[str]:
        """Names of the maps, "u1/6", by component and layer."""
        names = [key.split("/") for key in self.tensors]
        maps = [(name[0], int(name[1])) for name in names if len(name) == 2 and name[0] not in OTHERS]
        return [f"{component}/{layer}" for component, layer in sorted(maps)]

    def map(self, name: str) -> np.ndarray:
        """One map of all images, (B, [H,] *grid) float32."""
        values, scale = self.tensors[name].astype(np.float32), self.tensors.get(f"{name}/scale")
        return values if scale is None else scaled(values, scale)

    def put(self, group: str, columns: Columns) -> None:
        """Take in the columns of a table."""
        table = self.tables[group] = {"columns": list(columns), "words": {}}
        for name, values in columns.items():
            if values.dtype.kind == "U":
                words, values = np.unique(values, return_inverse=True)
                table["words"][name], values = words.tolist(), values.astype(np.int32)
            self.tensors[f"{group}/{name}"] = np.ascontiguousarray(values)


class Maps(Mapping):
    """Maps over the image by component and layer.

    `maps["u1", 6]` is (image, *grid), float32, on that layer's grid.

    `maps["attention", 6]` is the mean over the heads, `maps["attention", 6, 2]` head 2. Maps of the
    whole model, such as the foreground, have layer -1: `maps["foreground"]`. `confidence("u1", 6)`
    is the probability, image by image, that the sign is right (the bright side is the object);
    below 0.95 take the sign as unknown. Iterates over (component, layer). components: their
    records, which say whether maps are per head.
    """

    def __init__(self, parts: Sequence[Part], components: Sequence[Mapping[str, Any]] = ()):
        self.parts = parts
        self.per_head = {record["name"]: record["per_head"] for record in components}
        self.unsigned = {record["name"] for record in components if record.get("sign_known") is False}

    @cached_property
    def first(self) -> Part:
        """The first part that holds images; those of which none could be read have no maps."""
        return next((part for part in self.parts if part.images), Part({}, []))

    def __getitem__(self, key: str | tuple) -> np.ndarray:
        component, layer, *head = (key, -1) if isinstance(key, str) else key
        values = self.heads(component, layer)
        if not head:
            return values.mean(axis=1)
        heads = values.shape[1] if self.per_head.get(component) else 0
        if not -heads <= head[0] < heads:
            raise SettingError(f"Found head {head[0]} of {component!r}, layer {layer}. Expected one of {heads} heads.")
        return values[:, head[0]]

    def heads(self, component: str, layer: int) -> np.ndarray:
        """(image, head, *grid); one head where the component has none."""
        values = self._joined(f"{component}/{layer}").astype(np.float32)
        return values if self.per_head.get(component) else values[:, None]

    def confidence(self, component: str, layer: int) -> np.ndarray:
        """(image,), 0 to 1; 1 for components that have no sign to be wrong about."""
        name = f"{component}/{layer}/confidence"
        if f"{component}/{layer}" in self.first.tensors and name not in self.first.tensors:
            return np.full(len(self[component, layer]), component not in self.unsigned, np.float32)
        return self._joined(name)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for name in self.first.maps():
            component, layer = name.split("/")
            yield component, int(layer)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in set(self)

    def _joined(self, name: str) -> np.ndarray:
        if name not in self.first.tensors:
            names = [f"{component} {layer}" for component, layer in self]
            raise UnknownName(name.removesuffix("/confidence").replace("/", " "), "map", names)
        parts = [part for part in self.parts if part.images]
        maps = [{name: part.map(name)} if name in part.tensors else {} for part in parts]
        return joined_maps(maps, [len(part.images) for part in parts])[name]


class Reading:
    """What a model showed of some images. `facts` is the content of reading.json.

    parts: in memory, or read from the folder when they are asked for.
    """

    def __init__(self, facts: dict[str, Any], parts: Sequence[Part], curves: Sequence[dict[str, Any]] = ()):
        self.facts = facts
        self.parts = parts
        self.curves = list(curves)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One record per captured attention: name, kind, route, heads, grid, verification.

        Behind them those of modules with a mixing map, of kind "mixing".
        """
        return self.facts["layers"]

    @property
    def images(self) -> list[dict[str, Any]]:
        """One record per image: name, size, prediction."""
        return [image for part in self.parts for image in part.images]

    @property
    def maps(self) -> Maps:
        return Maps(self.parts, self.facts.get("components", ()))

    @property
    def measures(self) -> dict[str, dict[str, Any]]:
        """{column of the table: its record: label, unit, low, high, better, explains, short}."""
        return {record["name"]: record for record in self.facts.get("measures", ())}

    def table(self) -> Columns:
        """{column: (rows,)}: layer, head, image, source, kind, then one column per measure.

        image: -1 for all. NaN: not applicable.
        """
        table = joined([part.columns("rows") for part in self.parts])
        if not table:
            return table
        sources = {record["name"]: place for place, record in enumerate(self.facts["sources"])}
        source = np.array([sources.get(name, len(sources)) for name in table["source"].tolist()], int)
        return in_order(table, table["layer"], source, table["kind"] == "effective", table["image"], table["head"])

    def scores(self) -> Columns:
        """{column: (rows,)}: maps against masks: image, component, layer, head, measures.

        Empty without masks.
        """
        table = joined([part.columns("scores") for part in self.parts])
        return in_order(table, table["image"]) if table else table

    def query(self, image: int, layer: int, patch: tuple[int, int], head: int = -1) -> np.ndarray:
        """What a patch looks at: its attention to every place, (rows, columns) float32.

        patch: (row, column) on the grid of the queries; the result is on that of the keys. head: -1
        for the mean of all. Attention to tokens without a place (class token, registers) is left
        out, so the sum is at most 1. Each value is wrong by 1/510 of the largest of its head and
        row at most. All NaN where no query is, all 0 where its token was dropped before. Raises
        SettingError for what is not stored: `facts["queries"]` says which images and layers are.
        """
        return query(self.parts, self.facts.get("queries"), image, layer, patch, head)

    def show(
        self,
        component: str = "",
        image: int = 0,
        layer: int | None = None,
        head: int = -1,
        *,
        patch: tuple[int, int] | None = None,
        opacity: float = 0.6,
    ) -> Image:
        """A map over its picture, as a PIL image that notebooks show.

        component: default: foreground, else relevance, else attention. layer: default: the last.
        head: -1 for the mean of all. patch: (row, column), to see what this patch looks at instead,
        as of `query`. opacity: of the map, 0 to 1. Raises UnknownName, SettingError.
        """
        return drawing.show(self, component, image, layer, head, patch, opacity)

    def __repr__(self) -> str:
        return "\n  ".join([f"Reading of {self.facts.get('title')}", *drawing.lines(self)])

    def _repr_html_(self) -> str:
        return drawing.html(self)

    @property
    def spectra(self) -> dict[tuple[str, int], np.ndarray]:
        """{("learned" or "weight", layer): (H, K) float32}: the spectrum of each head.

        Learned ones may be negative, in any order; those of the weights fall.
        """
        tensors = next((part.tensors for part in self.parts if part.images), {})
        names = (name.split("/") for name in tensors if name.startswith("spectrum/"))
        return {(source, int(layer)): tensors[f"spectrum/{source}/{layer}"] for _, source, layer in names}

    @property
    def exact(self) -> dict[tuple[str, int], np.ndarray]:
        """{("kernel", layer): (C, ...) float32}: what mixers tell of themselves, see `Quantity`.

        Of more than 16 channels the first is the root mean square of all, the others are the
        largest; "channels" in the layer's record, under "exact", says which.
        """
        tensors = next((part.tensors for part in self.parts if part.images), {})
        names = (name.split("/") for name in tensors if name.startswith("exact/"))
        return {(quantity, int(layer)): tensors[f"exact/{quantity}/{layer}"] for _, quantity, layer in names}

    @property
    def figures(self) -> dict[tuple[str, int], np.ndarray]:
        """{("rings", layer): (image, C, ...) float32}: what probes have drawn, see `Figure`.

        Of the images that were measured, the first ones.
        """
        parts = [part.tensors for part in self.parts if part.images]
        names = dict.fromkeys(name for tensors in parts for name in tensors if name.startswith("figure/"))
        joined = {name: np.concatenate([tensors[name] for tensors in parts if name in tensors]) for name in names}
        return {(name.split("/")[1], int(name.split("/")[2])): values for name, values in joined.items()}

    def tokens(self, layer: int) -> np.ndarray:
        """(image, *grid) int32: the token of each patch, -1 where it was dropped before.

        Patches with one number share a token. Raises UnknownName where none was merged or dropped.
        """
        name, parts = f"tokens/{layer}", [part for part in self.parts if part.images]
        if not all(name in part.tensors for part in parts):
            known = [key.partition("/")[2] for key in parts[0].tensors if key.startswith("tokens/")]
            raise UnknownName(str(layer), "layer with merged or dropped tokens", known)
        return np.concatenate([part.tensors[name] for part in parts])

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame. Raises SettingError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise SettingError('Found no pandas. Expected it for a DataFrame. Install it: pip install "pandas".') from error
        return pandas.DataFrame(self.table())

    def save(self, folder: str | Path) -> Path:
        """Write the folder; it must be new or empty, or hold this very reading.

        A reading of which parts are there is completed.

        Each file appears whole or not at all. Raises SettingError for a folder with something else
        in it.
        """
        folder = Path(folder)
        writer = Writer(folder, self.facts["fingerprint"])
        for number, part in enumerate(self.parts):
            if number not in writer.done:
                writer.add(number, part)
        writer.finish(self)
        return folder


class Writer:
    """Writes a reading part by part.

    `done`: the numbers of the parts that are there, from an earlier, interrupted call.

    fingerprint: of model, images and settings; the folder goes on only with the same one. Nothing
    is written before the first part, so that a look that fails leaves nothing.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self.mark = folder / "parts" / "fingerprint"
        with writable(folder):
            if not self.mark.is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise SettingError(f"Found something in {folder}. Expected a new or empty folder. Choose another --out.")
            if self.mark.is_file() and self.mark.read_text() != fingerprint:
                raise SettingError(
                    f"Found another reading in {folder}: of another model, other images or settings. Expected a new folder, or "
                    "the same reading to go on with. Choose another --out, or delete the folder."
                )
        self.done = {int(path.stem) for path in self.mark.parent.glob("*.safetensors") if path.stem.isdigit()}

    def path(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.safetensors"

    def add(self, number: int, part: Part) -> None:
        """Write a part, whole or not at all."""
        tensors = {key: np.ascontiguousarray(part.tensors[key]) for key in sorted(part.tensors)}
        tensors["about"] = np.frombuffer(json.dumps({name: getattr(part, name) for name in ABOUT}).encode(), np.uint8)
        metadata = {"images": json.dumps(part.images)}
        with writable(self.folder):
            if not self.mark.is_file():
                self.mark.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.mark, self.fingerprint)
            write(self.path(number), lambda path: safetensors.numpy.save_file(tensors, path, metadata=metadata))
        self.done.add(number)

    def finish(self, reading: Reading) -> None:
        """Write what follows from the parts.

        Reading.json comes last, so that a folder with it is complete.
        """
        table, scores = reading.table(), reading.scores()
        self.table("table", table)
        self.text("table.json", json.dumps({"columns": without_nan({name: column.tolist() for name, column in table.items()})}))
        if scores:
            self.table("scores", scores)
            self.table("summary", reading.facts["summary"])
        if reading.curves:
            self.text("curves.json", json.dumps(without_nan(reading.curves), indent=1))
        facts = {key: value for key, value in reading.facts.items() if key != "summary"}
        self.text("reading.json", json.dumps(without_nan(facts), indent=2) + "\n")

    def table(self, name: str, columns: Mapping[str, Any]) -> None:
        self.text(f"{name}.csv", as_csv(columns))

    def text(self, name: str, content: str) -> None:
        with writable(self.folder):
            write_text(self.folder / name, content)


class StoredParts(Sequence):
    """The parts of a folder, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int | slice) -> Part | list[Part]:
        if isinstance(number, slice):
            return [read_part(path) for path in self.paths[number]]
        return read_part(self.paths[number])


def read(folder: str | Path) -> Reading:
    """The reading in a folder that `Reading.save` or `vitreous look` wrote.

    Raises DataError if it is not whole.
    """
    folder = Path(folder)
    path = folder / "reading.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] not in range(1, FORMAT + 1):
            raise DataError(
                f"Found {path} in format {facts['format']}. Expected 1 to {FORMAT}. Read it with the version that wrote it."
            )
        old = facts["format"] < 3
        facts = (format_1.upgraded(facts) if facts["format"] == 1 else facts) | {"format": FORMAT}
        facts["components"] = with_unknown_signs(facts["components"]) if old else facts["components"]
        for name in ("layers", "measures", "sources", "components"):
            iter(facts[name])
        paths = [folder / "parts" / f"{number:05d}.safetensors" for number in range(facts["parts"])]
        curves, summary = folder / "curves.json", folder / "summary.csv"
        curve_records = json.loads(curves.read_text(encoding="utf-8")) if curves.exists() else []
        if summary.exists():
            facts["summary"] = from_csv(summary.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"Found no complete reading in {folder} ({type(error).__name__}: {error}). Expected a folder that `vitreous look` "
            "finished. Check the path, or let `vitreous look` go on with it."
        ) from error
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"Found no {missing[0]}. Expected {len(paths)} parts. Look again with the same --out.")
    return Reading(facts, StoredParts(paths), curve_records)


def read_part(path: Path) -> Part:
    """A part of a reading. Raises DataError for a file that is damaged."""
    try:
        with safe_open(path, "numpy") as file:
            images = json.loads((file.metadata() or {})["images"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if "said" in tensors:
            about = json.loads(tensors.pop("said").tobytes())
            about = {"skipped": about["skipped"], "findings": format_1.findings(about["learned"])}
            return Part(tensors, images, **about, tables=format_1.tables(tensors))
        return Part(tensors, images, **json.loads(tensors.pop("about").tobytes()))
    except Exception as error:  # what a damaged file can raise is not foreseeable
        raise DataError(
            f"Found {path}, which cannot be read ({type(error).__name__}: {error}). Expected a part of a reading. Delete it "
            "and look again with the same --out."
        ) from error
