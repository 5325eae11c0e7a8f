"""Folders of models by name: a path, `local-dir:PATH`, or `hf-hub:OWNER/NAME`, as in timm."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from vitreous.base.errors import DataError, brief

HUB, LOCAL = ("hf-hub", "hf_hub"), "local-dir"  # what timm.create_model takes before a colon
ANSWER = 2.0  # seconds in which the hub has to answer


@contextmanager
def cache_when_offline() -> Iterator[None]:
    """Where the hub does not answer, its cache alone is asked in the block.

    Its library would ask the network six times for every file, for a minute in all.
    """
    if constants.HF_HUB_OFFLINE or answers():
        yield
        return
    constants.HF_HUB_OFFLINE = True  # what the library reads at every request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def answers() -> bool:
    """Whether the hub answers in time, whatever it says."""
    heard: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=ANSWER)
            heard.append(True)
        except Exception:  # of the client's many kinds
            heard.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # to look up a name has no limit of its own
    thread.start()
    thread.join(ANSWER)
    return heard == [True]


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
    with cache_when_offline():
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
