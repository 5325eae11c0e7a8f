"""Hold out some training images, to choose by them and not by the test images."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from vitreous.base.errors import DataError
from vitreous.data.decoding import contents
from vitreous.data.quarantine import Progress
from vitreous.data.samples import Data, Samples
from vitreous.data.sources.listing import FileSamples, lowest

HELD_OUT = "held-out"  # the set's name among the tests


def hold_out(data: Data, share: float, progress: Progress | None = None) -> Data:
    """The same data with a share of each class's training images as the first of the tests,
    "held-out".

    share: 0 to 1. Of other targets than one class, a share of each of their strata. Those with the
    lowest digests of their contents are held out: the same images give the same split, whatever
    their names and order, and copies of an image in one class stay on one side. A class of one
    distinct image keeps it. progress: called with (images read, images in all).

    Raises DataError if nothing can be set aside.
    """
    digests = digests_of(data.train, progress)
    chosen = np.zeros(len(data.train), bool)
    strata = data.train.target.strata()
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        there = [digests[i] for i in members]
        low = lowest(there, share)
        chosen[members] = [digest in low for digest in there]
    if not chosen.any():
        raise DataError(
            "Found no class with two different images to train on. Expected at least one, to hold images out. Leave out "
            "--hold-out, or add images."
        )
    tests = {HELD_OUT: data.train.subset(np.flatnonzero(chosen)), **data.tests}
    return replace(data, train=data.train.subset(np.flatnonzero(~chosen)), tests=tests)


def digests_of(images: Samples, progress: Progress | None = None) -> list[str]:
    """SHA-256 of each image: of its file where it has one, else of its pixels."""
    if isinstance(images, FileSamples):
        raw = (contents(source, name) for source, name in zip(images.sources, images.names, strict=True))
    else:
        raw = (np.asarray(images.image(i)).tobytes() for i in range(len(images)))
    digests: list[str] = []
    for content in raw:
        digests.append(hashlib.sha256(content).hexdigest())
        if progress is not None:
            progress(len(digests), len(images))
    return digests
