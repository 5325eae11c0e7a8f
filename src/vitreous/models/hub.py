"""Folders of models by name: a path, `local-dir:PATH`, or `hf-hub:OWNER/NAME`, as in timm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from vitreous.base.errors import DataError, brief

HUB, LOCAL = ("hf-hub", "hf_hub"), "local-dir"  # what timm.create_model takes before a colon


def has_prefix(source: str) -> bool:
    """Whether it names a folder or a repository in timm's words."""
    kind, colon, name = source.partition(":")
    return bool(colon and name) and kind in (*HUB, LOCAL)


def local_folder(source: str | Path, files: Sequence[Sequence[str]]) -> Path:
    """The folder of a model; one of the hub is fetched, or found in its cache.

    files: alternatives of each file, best first; those that end in "" may be missing. Raises
    DataError for a repository that cannot be had.
    """
    kind, _, name = str(source).partition(":")
    if not has_prefix(str(source)):
        return Path(source)
    if kind == LOCAL:
        return Path(name)
    repository, _, revision = name.partition("@")
    paths = [fetch(repository, revision or None, names, str(source)) for names in files]
    return paths[0].parent


def fetch(repository: str, revision: str | None, names: Sequence[str], source: str) -> Path:
    """The first of these files that the repository has; an empty path where it may be missing."""
    reason: Exception = FileNotFoundError(" or ".join(names))
    for name in names:
        if not name:
            return Path()
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError as error:  # also of a file that is not in the cache, without a network
            reason = error
        except Exception as error:  # of the hub's and the network's many kinds
            reason = error
            break
    raise DataError(
        f"Found no {' or '.join(filter(None, names))} of {source}: {brief(reason)}. Expected a model of the hub, and a network "
        "or a copy in its cache. Check its name, or give a folder with its files."
    ) from reason
