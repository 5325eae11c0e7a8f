"""Arguments that several commands share, as they are shown in their help."""

from __future__ import annotations

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
