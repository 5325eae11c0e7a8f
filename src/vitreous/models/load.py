"""A model by name or folder, images prepared for it, and its logits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from vitreous.base.errors import DataError, HostError, SettingError
from vitreous.data.decoding import Unreadable
from vitreous.data.preprocess import Preprocess
from vitreous.data.sources.unlabelled import unlabelled
from vitreous.data.views import Views
from vitreous.models import model_folder
from vitreous.models.create import check_name, create_model
from vitreous.models.weights import Say, check_file_options

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
    weights_table: str | None = None,
    partial_weights: bool = False,
    arguments: Mapping[str, Any] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    image_size: int | None = None,
    interpolation: str | None = None,
    say: Say = lambda text: None,
) -> nn.Module:
    """The model of a folder or of a timm name, in eval mode, on the CPU.

    weights: file to take them from, else those that timm publishes. random_weights: take random
    ones, always the same; None where a caller does not offer them, so that errors do not name
    them. foreign: import mechanisms of other packages that a folder names. weights_table,
    partial_weights: see `read_weights` and `fill`. arguments: the network's own, such as
    drop_path_rate. mean, std, image_size, interpolation: how images are prepared, in place of what
    the model records. say: called with a line before weights are fetched, and on what was taken
    or assumed.

    Raises SettingError for two sources of weights, UnknownName, DataError for weights that
    cannot be fetched or read.
    """
    source = weights_source(name, weights, random_weights)
    check_file_options(weights, weights_table, partial_weights)
    size = image_size and (image_size, image_size)
    options = {"image_size": size, **(arguments or {})}
    if source == "run":
        model = model_folder.load(name, foreign=foreign, **options)
    elif source == "pretrained":
        model = open_published(name, random_weights, say, **options)
    else:
        file = {"weights": weights, "table": weights_table, "partial": partial_weights, "say": say}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model(name, **(file if source == "file" else {}), **options)
    given = {"mean": mean, "std": std, "interpolation": interpolation}
    prepare_images(model, given, f"as {name} has them" if source == "file" else "", size, say)
    return model


def prepare_images(model: nn.Module, given: Mapping[str, Any], assumed: str, size: tuple[int, int] | None, say: Say) -> None:
    """Record with a model how its images are prepared.

    It is said where something was given or assumed.

    assumed: from where what is not given comes, for weights that do not say it. size: (height,
    width) asked for, which networks that take any size were not built for.
    """
    own = Preprocess.of_model(model)
    if own is None:
        return
    if size and own.input_size[1:] != size:
        model.pretrained_cfg["input_size"] = (own.input_size[0], *size)
        own = Preprocess.of_model(model)
    inputs = own.changed(**given)
    model.pretrained_cfg.update({name: getattr(inputs, name) for name, value in given.items() if value})
    flags = {f"--{name}": value for name, value in given.items()} | {"--image-size": size}
    used = [flag for flag, value in flags.items() if value]
    if used or assumed:
        sources = [f"{', '.join(used)} as given"] * bool(used) + [assumed and f"{'the rest ' * bool(used)}{assumed}"]
        rest = [flag for flag, value in flags.items() if not value]
        offer = f"; {', '.join(rest)} give others" * bool(assumed and rest)
        say(f"Images: {inputs} ({'; '.join(filter(None, sources))}{offer}).")


def open_published(name: str, random_weights: bool | None, say: Say, **arguments: Any) -> nn.Module:
    """A network with the weights that timm publishes for it; raises DataError for none."""
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
