"""Arguments that several commands share, as they are shown in their help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro import conf

ModelName = Annotated[
    conf.Positional[str],
    conf.arg(metavar="MODEL", help="A name of timm's, a run folder, or another folder with config.json and model.safetensors"),
]
TrainedModel = Annotated[
    conf.Positional[str],
    conf.arg(metavar="RUN", help="A run folder, another with config.json and model.safetensors, or a name of timm's"),
]
ImagePaths = Annotated[
    conf.Positional[tuple[str, ...]],
    conf.arg(metavar="IMAGES", help="Images, or folders or tar archives of images"),
]
RunFolder = Annotated[conf.Positional[str], conf.arg(metavar="RUN", help="The run folder.")]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which weights a model has; for a name of timm's those that timm publishes."""

    weights: str | None = None
    """Take the weights in this .safetensors file (or .pth, read without running code)."""
    random_weights: bool = False
    """Take random weights, to see how it works; every page says so."""
    model_kwargs: tuple[str, ...] = ()
    """The network's own arguments: name=value ..., such as img_size=384."""
    foreign: bool = False
    """Import mechanisms of other packages that a folder names. This runs their code."""
    device: str = "auto"
    """auto (a GPU if there is one) | cpu | cuda | cuda:1 ..."""
