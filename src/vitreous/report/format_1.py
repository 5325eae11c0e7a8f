"""Readings of format 1, which held words as positions in fixed lists.

It did not say what its columns are.

What format 1 meant stands in assets/format-1.json and does not change any more; `upgraded`,
`tables` and `findings` make of a reading what format 2 holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

RECORDS = ("measures", "sources", "scores", "baselines")
TABLE_KEYS = {"rows": ("layer", "head", "image", "source", "kind"), "scores": ("image", "component", "layer", "head")}


@cache
def meaning() -> dict[str, Any]:
    """Records and words by kind; words stood as positions in their list."""
    return json.loads((resources.files("vitreous.report") / "assets" / "format-1.json").read_text(encoding="utf-8"))


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a reading.json of format 1 as one of format 2."""
    labels = meaning()["components"]
    order = [*labels, *(record["name"] for record in content["components"])]
    components = [
        {**record, "label": labels.get(record["name"], record["name"]), "explains": record.get("about", "")}
        for record in sorted(content["components"], key=lambda record: order.index(record["name"]))
    ]
    return content | {name: meaning()[name] for name in RECORDS} | {"format": 2, "components": components}


def tables(keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The tables of a part, as format 2 has them, from the tensor names of format 1."""
    names = {kind: [record["name"] for record in meaning()[kind]] for kind in ("measures", "scores", "sources")}
    order = {"rows": (*TABLE_KEYS["rows"], *names["measures"]), "scores": (*TABLE_KEYS["scores"], *names["scores"])}
    words = {"source": names["sources"], "kind": meaning()["kinds"], "component": meaning()["scored"]}
    columns = {group: [name for name in order[group] if f"{group}/{name}" in keys] for group in order}
    return {
        group: {"columns": there, "words": {name: words[name] for name in there if name in words}}
        for group, there in columns.items()
        if there
    }


def findings(learned: dict[str, Any]) -> dict[str, Any]:
    """What a part of format 1 had learned of the model, as a part of format 2 keeps it."""
    rows, details = learned.get("rows", {}), {}
    for name, rule in learned.get("rules", {}).items():
        of_rows = rows.get(f"{name[0]}/{name.rpartition('/')[2]}")
        details[name] = {"rule": rule} | ({} if of_rows is None else {"rows": of_rows})
    return {name: learned[name] for name in ("layers", "notes", "refused")} | {"choices": rows, "details": details}
