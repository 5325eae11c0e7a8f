"""A reading folder boiled down to what a page shows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from vitreous.base.errors import DataError
from vitreous.report import format_1, packing
from vitreous.report.folders import parsed, read_csv, read_json
from vitreous.report.unsigned import with_unknown_signs

FORMAT = 3
ROW_KEYS = ("layer", "head", "image", "source", "kind")
RECORDS = ("measures", "sources", "scores", "baselines")  # what names in tables mean
QUERY_BYTES = 1_500_000  # of what patches look at, of each reading on a page; one image may have more than that
QUERY_STEPS = 63  # of a row on a page
FIELDS = ("title", "model", "settings", "versions", "seed", "layers", "components", "refused", "skipped", "notes")


class ReadingFolder:
    """One reading on disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts = read_json(folder / "reading.json")
        number = self.facts.get("format")
        if number not in range(1, FORMAT + 1):
            raise DataError(
                f"Found format {number!r} in {folder / 'reading.json'}. Expected 1 to {FORMAT}. "
                "Use the version of Vitreous that wrote it, or look again."
            )
        lists = ("layers", "components") if number == 1 else ("layers", "components", *RECORDS)
        if not all(isinstance(self.facts.get(name), list) for name in lists):
            raise self.incomplete(f"reading.json without its {', '.join(lists)}")
        if number == 1:
            self.facts = format_1.upgraded(self.facts)
        if number < 3:
            self.facts["components"] = with_unknown_signs(self.facts["components"])
        self.count = int(self.facts.get("images", 0))
        self.parts: list[Path] = []  # that hold images; those of which none could be read have none
        self.images: list[dict[str, Any]] = []  # of all parts, each with the part it lies in
        for part in sorted((folder / "parts").glob("*.safetensors")):
            with self.opened(part) as file:
                images = parsed((file.metadata() or {}).get("images", ""), part, "its list of images")
            self.images += [image | {"part": part} for image in images]
            self.parts += [part] if images else []
        if len(self.images) != self.count:
            raise self.incomplete(f"{len(self.images)} of {self.count} images")

    def incomplete(self, problem: str) -> DataError:
        return DataError(
            f"Found {problem} in {self.folder}. Expected a finished reading. Give the same `vitreous look` command again: it "
            "goes on where it stopped."
        )

    def opened(self, part: Path) -> Any:
        """The part, to read from. Raises DataError if it is damaged or half-written."""
        try:
            return safe_open(part, framework="numpy")
        except Exception as error:  # safetensors has an exception class of its own per version
            raise DataError(
                f"Cannot read {part} ({error}). Expected a whole safetensors file. Delete it and give the same `vitreous look` "
                "command again."
            ) from error

    def tensors(self, name: str, limit: int | None = None) -> np.ndarray | None:
        """One tensor over the first `limit` images, (n, ...); None where the reading has none.

        Of a map with a scale: times that, as float32. Parts of formats 1 and 2 have no scales.
        """
        arrays, left = [], self.count if limit is None else limit
        for part in self.parts:
            if left <= 0:
                break
            with self.opened(part) as file:
                names = set(file.keys())
                if name in names:
                    array = file.get_tensor(name)[:left]
                elif arrays and arrays[0].dtype.kind == "f":  # of images that were not measured
                    count = sum(image["part"] == part for image in self.images)
                    array = np.full((min(count, left), *arrays[0].shape[1:]), np.nan, np.float32)
                else:
                    return None
                if f"{name}/scale" in names:
                    scale = file.get_tensor(f"{name}/scale")[:left]
                    array = array.astype(np.float32) * scale.reshape(*scale.shape, *[1] * (array.ndim - scale.ndim))
                arrays.append(array)
            left -= len(arrays[-1])
        return np.concatenate(arrays) if arrays else None

    def first(self, name: str) -> np.ndarray | None:
        """One tensor of the first part; None where it has none."""
        for part in self.parts[:1]:
            with self.opened(part) as file:
                if name in set(file.keys()):
                    return file.get_tensor(name)
        return None

    def map_names(self) -> list[tuple[str, int]]:
        """(component, layer) of every map."""
        if not self.parts:
            return []
        components = {component["name"] for component in self.facts["components"]}
        with self.opened(self.parts[0]) as file:
            names = [name.rpartition("/") for name in file.keys()]  # noqa: SIM118 (not a dict)
        maps = [(name, int(layer)) for name, _, layer in names if name in components and layer.lstrip("-").isdecimal()]
        return sorted(maps, key=lambda item: (item[1], item[0]))

    def bytes_per_image(self) -> int:
        """Roughly what one image adds to a page."""
        total = 60_000  # picture, mask, numbers
        for component, layer in self.map_names():
            with self.opened(self.parts[0]) as file:
                shape = file.get_slice(f"{component}/{layer}").get_shape()
            total += int(np.prod(shape[1:])) + 8 * int(np.prod(shape[1:-2]))
        return total * 4 // 3


def page_content(reading: ReadingFolder, shown: int, pictures: dict[str, int]) -> dict[str, Any]:
    """A reading as the page takes it.

    Metadata, mean measures, scores, curves, and the maps of the first `shown` images.

    pictures: {data address: number}, filled here; the same picture goes into a page once.
    """
    try:
        return _page_content(reading, min(shown, reading.count), pictures)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise reading.incomplete(f"something that does not fit format {FORMAT} ({type(error).__name__}: {error})") from error


def _page_content(reading: ReadingFolder, shown: int, pictures: dict[str, int]) -> dict[str, Any]:
    table, each = measures(reading, shown)
    return {key: reading.facts.get(key) for key in FIELDS} | {
        "random": bool(reading.facts.get("random_weights")),
        "count": reading.count,
        "shown": shown,
        "images": [_image(reading, image, pictures) for image in reading.images[:shown]],
        "maps": _maps(reading, shown),
        "queries": queries(reading, shown),
        "tokens": token_groups(reading, shown),
        "spectra": spectra(reading),
        "exact": exact(reading),
        "figures": figures(reading),
        "artifacts": artifact_shares(reading),
        "table": table,
        "each": each,
        "scores": image_scores(reading, shown),
        "summary": summary(reading),
        "curves": curves(reading),
    }


def _image(reading: ReadingFolder, image: dict[str, Any], pictures: dict[str, int]) -> dict[str, Any]:
    record = {key: image.get(key) for key in ("name", "width", "height", "predicted", "label")}
    record["probability"] = packing.number(image.get("probability"), 3)
    classes = image.get("classes") or {}  # that probes explained
    record["classes"] = {name: str(one.get("name") or one.get("class")) for name, one in classes.items()}
    with reading.opened(image["part"]) as file:
        names = set(file.keys())
        for kind in ("picture", "mask"):
            name = f"{kind}/{image['image']}"
            address = packing.picture(file.get_tensor(name).astype(np.uint8).tobytes()) if name in names else ""
            record[kind] = pictures.setdefault(address, len(pictures)) if address else None
        record["changed"] = {}  # pictures of changed images, by the component whose maps are of them
        for component in reading.facts["components"]:
            name = f"picture/{component['name']}/{image['image']}"
            if name in names:
                address = packing.picture(file.get_tensor(name).astype(np.uint8).tobytes())
                record["changed"][component["name"]] = pictures.setdefault(address, len(pictures))
        record["classes"] = {name: one.get("name") for name, one in (image.get("classes") or {}).items()}
    return record


def _maps(reading: ReadingFolder, shown: int) -> dict[str, Any]:
    records = {component["name"]: component for component in reading.facts["components"]}
    entries = {}
    for component, layer in reading.map_names():
        maps = reading.tensors(f"{component}/{layer}", shown)
        if maps is None or not len(maps):
            continue
        signed, heads = bool(records[component].get("signed")), maps.shape[1] if records[component]["per_head"] else 0
        depth = maps.shape[2 if heads else 1] if maps.ndim == (5 if heads else 4) else 0
        confidence = reading.tensors(f"{component}/{layer}/confidence", shown)
        if records[component].get("sign_known") is False:
            confidence = np.zeros(len(maps))
        entries[f"{component}/{layer}"] = {
            "heads": heads,
            "depth": depth,  # slices of a grid of three dimensions; 0: of two
            "height": maps.shape[-2],
            "width": maps.shape[-1],
            "signed": signed,
            "confidence": None if confidence is None else [packing.number(value, 3) for value in confidence.ravel()],
            "cells": packing.quantised(maps, signed),
        }
    return entries


def queries(reading: ReadingFolder, shown: int) -> dict[str, Any]:
    """What patches look at: images and layers of which it is there, and rows by "layer/image".

    Rows: scales (H, queries) as float32 and bytes (H, queries, keys), compressed; of as many images
    as go into `QUERY_BYTES`, but one. of: how many images the reading has them of. Values are wrong
    by 1/126 of the largest of their row at most.
    """
    record = {"images": [], "reasons": {}, "bytes": 0, "budget": 0} | (reading.facts.get("queries") or {})
    content = {"images": [], "of": len(record["images"]), "layers": {}, "rows": {}}
    content |= {name: record[name] for name in ("reasons", "bytes", "budget")}
    left = QUERY_BYTES
    for number in (number for number in record["images"] if number < shown):
        rows, shapes = _query_rows(reading, number)
        left -= sum(map(len, rows.values()))
        if left < 0 and content["images"]:
            break
        content["images"].append(number)
        content["rows"] |= rows
        content["layers"] |= shapes
    return content


def _query_rows(reading: ReadingFolder, number: int) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """Compressed rows of an image, and the shape of each layer."""
    rows, shapes = {}, {}
    part = reading.images[number]["part"]
    place = number - next(i for i, image in enumerate(reading.images) if image["part"] == part)
    with reading.opened(part) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            kind, _, layer = name.partition("/")
            # a layer may have rows of fewer images than another
            if kind == "queries" and layer.isdecimal() and place < file.get_slice(name).get_shape()[0]:
                values, scale = file.get_slice(name)[place], file.get_slice(f"{name}/scale")[place]
                steps = np.rint(values * (QUERY_STEPS / 255)).astype(np.uint8)
                rows[f"{layer}/{number}"] = packing.deflated((scale * (255 / QUERY_STEPS)).astype("<f4"), steps)
                sides = ("heads", "height", "width", "key_height", "key_width")
                shapes[layer] = dict(zip(sides, values.shape, strict=True))
    return rows, shapes


def token_groups(reading: ReadingFolder, shown: int) -> dict[str, dict[str, Any]]:
    """{layer: height, width, cells: the token of each patch as uint16, 65535 for none}.

    Of layers behind merged or dropped tokens; "as" names an earlier one with the same.
    """
    entries: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    for layer in sorted(int(record["layer"]) for record in reading.facts["layers"]):
        tokens = reading.tensors(f"tokens/{layer}", shown)
        if tokens is None or tokens.ndim != 3:
            continue
        same = next((name for name, other in arrays.items() if np.array_equal(other, tokens)), None)
        content = {"as": same} if same else {"cells": packing.plain(tokens.astype("<u2"))}
        entries[str(layer)] = {"height": tokens.shape[1], "width": tokens.shape[2]} | content
        arrays |= {} if same else {str(layer): tokens}
    return entries


def spectra(reading: ReadingFolder) -> list[dict[str, Any]]:
    """Source and values (H, K) float32 of each layer: learned ones, else of the weights."""
    entries = {}
    for source in ("learned", "weight"):
        for layer in (int(record["layer"]) for record in reading.facts["layers"]):
            values = reading.first(f"spectrum/{source}/{layer}")
            if values is not None and layer not in entries:
                shape = {"heads": values.shape[0], "axes": values.shape[1]}
                entries[layer] = {"layer": layer, "source": source, "values": packing.plain(values.astype("<f4"))} | shape
    return [entries[layer] for layer in sorted(entries)]


def exact(reading: ReadingFolder) -> list[dict[str, Any]]:
    """What mixers tell of themselves: the record of each quantity and layer, and its values.

    Values: float32 of `shape`, (C,), (C, n) or (C, rows, columns).
    """
    entries = []
    for layer in reading.facts["layers"]:
        for quantity, record in (layer.get("exact") or {}).items():
            values = reading.first(f"exact/{quantity}/{layer['layer']}")
            if values is not None:
                content = {"quantity": quantity, "layer": layer["layer"], "name": layer["name"], "shape": list(values.shape)}
                entries.append(record | content | {"values": packing.plain(values.astype("<f4"))})
    return entries


def figures(reading: ReadingFolder) -> list[dict[str, Any]]:
    """What probes have drawn beside table and maps: a record and values by figure and layer.

    Values: means over images as float32 of `shape`, (C, n) or (C, rows, columns).
    """
    names = {layer["layer"]: layer["name"] for layer in reading.facts["layers"]}
    entries = []
    for record in reading.facts.get("figures", ()):
        for layer in (*names, -1):
            values = reading.tensors(f"figure/{record['name']}/{layer}")
            if values is None or not len(values):
                continue
            values = np.nanmean(values.astype(np.float64), axis=0)
            details = record["details"].get(str(layer), {})
            content = {"quantity": record["name"], "layer": layer, "name": names.get(layer, ""), "shape": list(values.shape)}
            content |= {"channels": list(range(len(values))), "count": len(values)}
            content |= {"names": details["names"].split("|")} if "names" in details else {}
            kept = {key: value for key, value in record.items() if key not in ("name", "details")}
            entries.append(kept | content | {"values": packing.plain(values.astype("<f4"))})
    return entries


def artifact_shares(reading: ReadingFolder) -> list[list[float]]:
    """[layer, share of patches in percent] for every layer with an artifact map.

    The share is over all images.
    """
    shares = []
    for component, layer in reading.map_names():
        if component == "artifacts":
            marks = reading.tensors(f"{component}/{layer}")
            shares.append([layer, packing.number(100 * float(np.mean(marks > 0)))])
    return shares


def measures(reading: ReadingFolder, shown: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The table as means over images, and the values of the shown images.

    Both have "columns", the names of the measures. The first has "rows": source, kind, layer, head,
    then [mean, standard deviation over images, images] or None per measure. The second has "values"
    under "source/kind/layer/head/image".
    """
    path = reading.folder / "table.json"
    columns = read_json(path).get("columns", {})
    if not set(ROW_KEYS) <= set(columns) or len({len(column) for column in columns.values()}) > 1:
        raise reading.incomplete(f"a table.json without {', '.join(ROW_KEYS)}, or with columns of unlike length,")
    names = [name for name in columns if name not in ROW_KEYS]
    shape = len(names), len(columns["image"])  # of a reading of maps alone there are none
    values = np.array([[np.nan if v is None else v for v in columns[name]] for name in names], float).reshape(shape)
    groups: dict[tuple, list[int]] = {}
    for row, key in enumerate(zip(*(columns[key] for key in ("source", "kind", "layer", "head")), strict=True)):
        groups.setdefault(key, []).append(row)
    image = np.array(columns["image"], int)
    rows, each = [], {}
    for key in sorted(groups):
        places = np.array(groups[key])
        rows.append([*key, *(_mean(values[i, places], image[places]) for i in range(len(names)))])
        for row in places[(image[places] >= 0) & (image[places] < shown)]:
            numbers = [packing.number(value, 4) for value in values[:, row]]
            if any(value is not None for value in numbers):
                each["/".join(str(k) for k in (*key, image[row]))] = numbers
    return {"columns": names, "rows": rows}, {"columns": names, "values": each}


def _mean(values: np.ndarray, image: np.ndarray) -> list[float | None] | None:
    """[mean, standard deviation, count] over images.

    Of what is not of one image (-1), the value alone.
    """
    single = np.isfinite(values) & (image >= 0)
    if single.any():
        single_values = values[single]
        spread = float(single_values.std(ddof=1)) if len(single_values) > 1 else None
        return [packing.number(single_values.mean(), 7), packing.number(spread, 3), len(single_values)]
    whole = values[np.isfinite(values)]
    return [packing.number(whole[0], 7), None, 0] if len(whole) else None


def image_scores(reading: ReadingFolder, shown: int) -> dict[str, Any] | None:
    """Scores of the shown images against masks.

    {"columns", "values": {"component/layer/head/image": [...]}}.
    """
    lines = read_csv(reading.folder / "scores.csv")
    if not lines:
        return None
    columns = [name for name in lines[0] if name not in ("image", "component", "layer", "head")]
    values = {}
    for line in lines:
        image = whole(line["image"])
        if 0 <= image < shown:
            key = f"{line['component']}/{whole(line['layer'])}/{whole(line['head'])}/{image}"
            values[key] = [packing.number(real(line[name]), 3) for name in columns]
    return {"columns": columns, "values": values}


def summary(reading: ReadingFolder) -> list[list[Any]]:
    """[component, layer, head, measure, mean, low, high, images] of summary.csv."""
    rows = []
    for line in read_csv(reading.folder / "summary.csv"):
        place = [line["component"], whole(line["layer"]), whole(line["head"]), line["measure"]]
        numbers = [packing.number(real(line[name]), 4) for name in ("mean", "low", "high")]
        rows.append([*place, *numbers, whole(line["images"])])
    return rows


def curves(reading: ReadingFolder) -> list[dict[str, Any]]:
    """curves.json with few digits."""
    path = reading.folder / "curves.json"
    records = read_json(path, list) if path.is_file() else []

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(item) for item in value]
        return packing.number(value, 4) if isinstance(value, float) else value

    return [{key: short(value) for key, value in curve.items()} for curve in records]


def whole(text: str) -> int:
    """A number of a layer, head or image; empty means -1, all of them."""
    return int(float(text)) if text else -1


def real(text: str) -> float | None:
    return float(text) if text else None
