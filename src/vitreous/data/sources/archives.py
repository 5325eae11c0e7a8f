"""The files of a folder or a tar archive, by name.

Archives are read in memory and never extracted.
"""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

from vitreous.base.errors import DataError
from vitreous.data.decoding import FORMAT_OF, Source, is_image
from vitreous.data.problems import Report, passed_over, raised

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz")
MEMORY = 8 << 30  # bytes of images that an archive may hold once unpacked


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(TAR_SUFFIXES)


def list_files(path: Path, *, empty: bool = False, report: Report = raised) -> tuple[dict[str, Source], Counter[str]]:
    """Images and tables (.csv) below a folder or in a tar archive, and what is passed over.

    Returns {relative name: source}, sorted by name, and the number of other files by suffix.

    Hidden files are left out. empty: folders without an image are no mistake; else, and of folders
    that cannot be read, `report` is told. Raises DataError where there is no image.
    """
    files, others = _archived(path) if path.is_file() else _walked(path, empty, report)
    if not any(is_image(name) for name in files):
        raise DataError(
            f"Found no image in {str(path)!r}; expected a folder of images. Check the path, and that the files have the suffix "
            f"of an image ({', '.join(FORMAT_OF)}). {' '.join(passed_over(others))}".rstrip()
        )
    return {name: files[name] for name in sorted(files)}, others


def _wanted(name: str, others: Counter[str]) -> bool:
    """Whether a file is an image or a table; any other that is not hidden is counted."""
    if is_image(name) or name.lower().endswith(".csv"):
        return True
    path = PurePosixPath(name)
    others[path.suffix.lower()] += not path.name.startswith(".")
    return False


def _walked(root: Path, empty_too: bool, report: Report) -> tuple[dict[str, Path], Counter[str]]:
    """Files below a folder, links followed.

    A folder met again on its own path (a loop of links) is not entered.
    """
    files, others, empty = {}, Counter(), []
    above: dict[str, frozenset[str]] = {}  # the true places of a folder and of those that it was reached through

    def stop(error: OSError):
        problem = DataError(
            f"Found the folder {error.filename!r}, which cannot be read ({error.strerror}); expected a "
            "readable one. Change its permissions or take it out."
        )
        problem.__cause__ = error
        report("folder", str(Path(error.filename).relative_to(root)), problem)

    for folder, below, names in os.walk(root, onerror=stop, followlinks=True):
        place, way = os.path.realpath(folder), above.get(os.path.dirname(folder), frozenset())
        if place in way:
            below.clear()
            continue
        above[folder] = way | {place}
        below[:] = sorted(name for name in below if not name.startswith("."))
        wanted = [name for name in names if _wanted(name, others)]
        if not below and not any(is_image(name) for name in wanted):
            empty.append(folder)
        files |= {Path(folder, name).relative_to(root).as_posix(): Path(folder, name) for name in wanted}
    for folder in empty if files and not empty_too else ():
        problem = DataError(
            f"Found the folder {folder!r} without an image; expected images in every folder. Fill it or take it out."
        )
        report("empty", Path(folder).relative_to(root).as_posix(), problem)
    return files, +others


def _archived(path: Path) -> tuple[dict[str, bytes], Counter[str]]:
    """Files of a tar archive in one pass.

    Names that lead out of it, links, devices and excess are refused.
    """
    files, others, size = {}, Counter(), 0
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isdir():
                    continue
                _check_member(path, member)
                if not _wanted(member.name, others):
                    continue
                size += member.size
                if size > MEMORY:
                    raise DataError(
                        f"Found more than {MEMORY >> 30} GiB of files in {str(path)!r}; expected an archive "
                        "that fits into memory. Unpack it and give the folder."
                    )
                files[PurePosixPath(member.name).as_posix()] = archive.extractfile(member).read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise DataError(
            f"Found {str(path)!r}, which cannot be read ({error}); expected a whole tar archive. "
            "It may be cut short: fetch it again."
        ) from error
    return files, +others


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    parts = PurePosixPath(member.name).parts
    unsafe = member.name.startswith("/") or ".." in parts or any(c in member.name for c in "\\\0") or ":" in parts[0]
    if unsafe or not member.isfile():
        what = "a name that leads out of the archive" if unsafe else "a link or a device"
        raise DataError(
            f"Found {member.name!r} in {str(path)!r}, {what}; expected files with relative names only. "
            "Do not use this archive unless you know where it comes from; pack the images again."
        )
