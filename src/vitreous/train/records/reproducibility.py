"""What a run depends on from outside, recorded at its start, and later changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitreous.base.environment import machine, versions
from vitreous.base.errors import SettingError
from vitreous.data import ArraySamples, Data, FileSamples, Samples
from vitreous.data.decoding import Source
from vitreous.train.engine.session import Session
from vitreous.train.settings import TrainSettings

COLUMNS = ["set", "name", "label", "content"]
# settings that do not change a step
FREE = ("out", "workers", "tracker", "save_every", "rollbacks", "rollback_lr", "seeds")
SHOWN = 6  # differences of a kind
Rows = list[tuple[str, str, str, str]]


def manifest(data: Data) -> Rows:
    """Every image that a run reads: set, name, label, and bytes; for a set in memory one sum."""
    return [row for name, images in {"train": data.train, **data.tests}.items() for row in rows_of(name, images)]


def rows_of(part: str, images: Samples) -> Rows:
    if isinstance(images, FileSamples):
        return [
            (part, name, images.target.record(i), size(source))
            for i, (name, source) in enumerate(zip(images.names, images.sources, strict=True))
        ]
    digest = hashlib.sha256()
    if isinstance(images, ArraySamples):
        digest.update(images.images.tobytes())
    digest.update(images.target.content())
    return [(part, f"{len(images)} images", "", f"sha256 {digest.hexdigest()}")]


def size(source: Source) -> str:
    """Of an image file, in words."""
    try:
        return f"{source.stat().st_size if isinstance(source, Path) else len(source)} bytes"
    except OSError:  # it vanished after the folder was listed, and will be lost with its batch
        return "unreadable"


def between(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Differences of two nested records, each in words: "lr: 0.1, now 0.2"."""
    differences = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = (plain(record.get(name)) for record in (before, now))
        if isinstance(old, dict) and isinstance(new, dict):
            differences += between(old, new, f"{prefix}{name}.")
        elif old != new:
            differences.append(f"{prefix}{name}: {old}, now {new}")
    return differences


def plain(value: Any) -> Any:
    """As JSON would have it, where a tuple is a list."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def since(
    record: dict[str, Any], state: dict[str, Any] | None, session: Session, metadata: dict[str, Any], rows: Rows
) -> list[str]:
    """What has changed since a run began, in words.

    record: its run.json. state: its last one, if any. metadata: `run_metadata` of now. rows: its
    manifest.
    """
    now = metadata | {"versions": versions()} | machine()
    before = {"processes": 1} | record | record["machine"]
    names = ["data", "model", "device", "task", "processes", "versions", "platform", "processor", "cuda"]
    if "task" in record:
        before["task"], now["task"] = ({"fixed": one["task"].get("fixed")} for one in (record, metadata))
    else:  # a run of an older version
        names.remove("task")
    differences = between_manifests(rows, manifest(session.data))
    differences += between({name: before.get(name) for name in names}, {name: now[name] for name in names})
    if state is not None:
        differences += between(bearing(state["settings"]), bearing(record["settings"]))
    return differences


def bearing(settings: dict[str, Any]) -> dict[str, Any]:
    """The recorded settings that bear on a step; one that is younger has its default."""
    defaults = asdict(TrainSettings(data=""))
    return {name: value for name, value in (defaults | settings).items() if name not in FREE}


def between_manifests(before: Rows, now: Rows) -> list[str]:
    """Differences of two manifests, in words, the first few of each kind by name."""
    old, new = ({row[:2]: row[2:] for row in rows} for rows in (before, now))
    kinds = {
        "gone": [key for key in old if key not in new],
        "new": [key for key in new if key not in old],
        "changed": [key for key in old if key in new and old[key] != new[key]],
    }
    differences = []
    for kind, keys in kinds.items():
        if keys:
            names = ", ".join(f"{part}: {name}" for part, name in keys[:SHOWN])
            differences.append(f"data, {len(keys)} {kind}: {names}" + (", ..." if len(keys) > SHOWN else ""))
    if not differences and before != now:
        differences.append("data: the same images in another order")
    return differences


def refuse(differences: list[str], allowed: bool, say: Callable[[str], Any]) -> None:
    """Raise SettingError with the differences; print them instead where they are allowed."""
    if not differences:
        return
    text = "; ".join(differences)
    if not allowed:
        raise SettingError(
            f"Found changes since the run began: {text}. Expected none, since the run would not end as it would have. Undo "
            "them, or allow them with --allow-changes."
        )
    say(f"Changed since the run began, as allowed; the run will not end exactly as it would have: {text}")
