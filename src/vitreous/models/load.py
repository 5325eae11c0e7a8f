"""A model by name or folder, images prepared for it, and its logits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from vitreous.base.errors import DataError, HostError, SettingError
from vitreous.data.decoding import Unreadable
from vitreous.data.sources.unlabelled import unlabelled
from vitreous.data.views import Views
from vitreous.models import model_folder
from vitreous.models.create import check_name, create_model

WeightsSource = Literal["run", "random", "file", "pretrained"]
THREADS = 4  # that decode and resize images while the model waits


@dataclass(frozen=True)
class Prepared:
    """One image: its name, and its pixels (C, h, w) or the reason why it cannot be read.

    notes: what was done to its file beside decoding, in words to count by.
    """

    name: str
    pixels: Tensor | None
    reason: str = ""
    notes: tuple[str, ...] = ()


def weights_source(name: str, weights: str | Path | None = None, random_weights: bool | None = None) -> WeightsSource:
    """Where `open_model` takes weights from; raises SettingError for two sources."""
    folder = model_folder.is_folder(name)
    flags = [flag for flag, value in (("--weights", weights), ("--random-weights", random_weights)) if value]
    if len(flags) > 1 or (flags and folder):
        own = ", a folder that has its own" if folder else ""
        raise SettingError(f"Found {' and '.join(flags)} for {name}{own}. Expected one source of weights. Leave one out.")
    return "run" if folder else "random" if random_weights else "file" if weights else "pretrained"


def open_model(
    name: str,
    weights: str | Path | None = None,
    foreign: bool = False,
    *,
    random_weights: bool | None = None,
    arguments: Mapping[str, Any] | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> nn.Module:
    """The model of a folder or of a timm name, in eval mode, on the CPU.

    weights: file to take them from, else those that timm publishes. random_weights: take random
    ones, always the same; None where a caller does not offer them, so that errors do not name
    them. foreign: import mechanisms of other packages that a folder names. arguments: the
    network's own, such as drop_path_rate. say: called with a line before weights are fetched.

    Raises SettingError for two sources of weights, UnknownName, DataError for weights that
    cannot be fetched or read.
    """
    source, arguments = weights_source(name, weights, random_weights), dict(arguments or {})
    if source == "run":
        return model_folder.load(name, foreign=foreign, **arguments)
    if source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return create_model(name, **arguments)
    if source == "file":
        return create_model(name, weights=weights, **arguments)
    check_name(name)
    if not timm.get_pretrained_cfg(name):
        raise no_weights(name, "timm publishes none", random_weights)
    say(f"Weights: those that timm publishes for {name}.")
    try:
        return create_model(name, pretrained=True, **arguments)
    except DataError as error:
        raise no_weights(name, str(error).partition(" Expected")[0].rstrip("."), random_weights) from error


def no_weights(name: str, reason: str, random_weights: bool | None) -> DataError:
    """The error for a model without published weights, or whose weights cannot be fetched."""
    offer = ", or look at random weights with --random-weights: its maps mean nothing, and every page says so"
    return DataError(
        f"Found no published weights of {name}: {reason}. Expected them from the network or timm's cache. Give a file with "
        f"--weights PATH{'' if random_weights is None else offer}."
    )


def open_images(model: nn.Module, images: Sequence[str | Path]) -> Views:
    """Views of files, folders and archives of images; raises DataError for none."""
    return Views(model, unlabelled(list(images)))


def prepared(views: Views, size: int) -> Iterator[list[Prepared]]:
    """Batches of at most `size` images in order, those that cannot be read among them."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for first in range(0, len(views), size):
            yield list(pool.map(lambda i: one(views, i), range(first, min(first + size, len(views)))))


def one(views: Views, i: int) -> Prepared:
    """An image as `Views` prepares it, but without its mask, which no prediction needs."""
    name = views.name(i)
    try:
        image, notes = views.images.image_with_notes(i)
    except Unreadable as error:
        return Prepared(name, None, error.reason)
    except DataError as error:
        return Prepared(name, None, str(error))
    return Prepared(name, views.preprocess(image), notes=notes)


@torch.no_grad()
def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """Logits (B, classes) in float32 on the CPU; raises HostError if not finite, or none."""
    out = model(pixels)
    if not isinstance(out, Tensor) or out.ndim != 2:
        form = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise HostError(f"Found an output of {form}. Expected logits (images, classes). Choose a model that classifies.")
    out = out.float().cpu()
    if not out.isfinite().all():
        raise HostError(
            "The model gives logits that are not finite numbers. Expected finite ones from whole weights. Train it again, or "
            "get the file of its weights again."
        )
    return out
