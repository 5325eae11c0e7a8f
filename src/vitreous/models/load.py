"""The model that is shipped, and the images that it is given, prepared as in training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from tyro import conf

from vitreous.base.errors import DataError, HostError, SettingError
from vitreous.data.decoding import Unreadable
from vitreous.data.sources.unlabelled import unlabelled
from vitreous.data.views import Views
from vitreous.models import model_folder
from vitreous.models.classes import class_names
from vitreous.models.create import create_model

THREADS = 4  # that decode and resize images while the model waits
CONFIG = (conf.FlagCreatePairsOff,)
RunName = Annotated[
    conf.Positional[str],
    conf.arg(metavar="RUN", help="A run folder, another with config.json and model.safetensors, or a name of timm's"),
]


@dataclass(frozen=True)
class Prepared:
    """One image: its name, and either its pixels (C, h, w) or the reason why it cannot be read."""

    name: str
    pixels: Tensor | None
    reason: str = ""


def open_model(name: str, weights: str | None = None, foreign: bool = False) -> nn.Module:
    """The model of a folder, or of timm's name with its published weights or those of a file; in eval mode, on the CPU."""
    if model_folder.is_folder(name):
        if weights is not None:
            raise SettingError(f"Found --weights for {name}, which has its own. Expected one source. Leave --weights out.")
        return model_folder.load(name, foreign=foreign)
    return create_model(name, pretrained=weights is None, weights=weights)


def names_of(model: nn.Module) -> list[str]:
    """The name of every class, in the order of the logits. Raises HostError for a model without classes.

    A class whose name is not known is "class 7"; a name that stands there twice gets its number, too.
    """
    count = getattr(model, "num_classes", 0)
    if not count:
        raise HostError(
            f"Found a {type(model).__name__} without a classifier. Expected a model of classes. Train one on your images "
            "first: vitreous train PHOTOS --model MODEL."
        )
    known = class_names(model) or []
    names = [known[i] if i < len(known) else f"class {i}" for i in range(count)]
    return names if len(set(names)) == count else [f"{name} ({i})" for i, name in enumerate(names)]


def open_images(model: nn.Module, images: Sequence[str | Path]) -> Views:
    """Files, folders and archives of images, to be prepared by the model's own config. Raises DataError for none."""
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
        image = views.images.image(i)
    except Unreadable as error:
        return Prepared(name, None, error.reason)
    except DataError as error:
        return Prepared(name, None, str(error))
    return Prepared(name, views.preprocess(image))


def check_new(path: Path) -> None:
    """Raise SettingError unless `path` is free, and in a folder that is there."""
    if path.exists() or path.is_symlink():
        raise SettingError(f"Found {path} already. Expected a new file. Choose another --out, or move that one away.")
    if not path.parent.is_dir():
        raise SettingError(f"Found no folder {path.parent}. Expected one for {path.name}. Make it, or choose another --out.")


@torch.no_grad()
def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """Logits (B, classes) in float32 on the CPU. Raises HostError if the model gives none, or no finite ones."""
    out = model(pixels)
    if not isinstance(out, Tensor) or out.ndim != 2:
        found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise HostError(f"Found an output of {found}. Expected logits (images, classes). Choose a model that classifies.")
    out = out.float().cpu()
    if not out.isfinite().all():
        raise HostError(
            "The model gives logits that are not finite numbers. Expected finite ones from whole weights. Train it again, or "
            "get the file of its weights again."
        )
    return out
