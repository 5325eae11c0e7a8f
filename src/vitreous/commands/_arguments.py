"""Arguments that several commands share, as they are shown in their help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from tyro import conf

from vitreous.train.options import Interpolation

if TYPE_CHECKING:
    from torch.nn import Module

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
class ModelOptions:
    """Which weights a model has and how images are prepared for it."""

    weights: str | None = None
    """Take the weights in this .safetensors file (or .pth, read without running code)."""
    weights_table: str | None = None
    """The key of the table to read in it, such as teacher
    (default: averaged weights if there are some, as in timm)."""
    partial_weights: bool = False
    """Load what fits of the weights, and list what does not."""
    model_kwargs: tuple[str, ...] = ()
    """The network's own arguments: name=value ..., such as img_size=384."""
    mean: tuple[float, ...] = ()
    """Of each channel, subtracted from pixels of 0 to 1 (default: the model's)."""
    std: tuple[float, ...] = ()
    """Of each channel, by which pixels are divided (default: the model's)."""
    image_size: int | None = None
    """Pixels a side (default: the model's)."""
    interpolation: Interpolation | None = None
    """How images are resized (default: the model's)."""
    foreign: bool = False
    """Import mechanisms of other packages that a folder names. This runs their code."""

    def open(self, name: str, say: Callable[[str], Any]) -> Module:
        """The model in eval mode, on the CPU.

        say: called with a line on what was assumed or left out. Raises VitreousError.
        """
        from vitreous.models.load import open_model
        from vitreous.train.settings import key_values

        options = {option.name: getattr(self, option.name) for option in fields(self)}
        options.pop("device", None)
        return open_model(name, arguments=key_values(options.pop("model_kwargs")), say=say, **options)


@dataclass(frozen=True, kw_only=True)
class ModelSource(ModelOptions):
    """Which weights a model has and how images are prepared for it."""

    random_weights: bool = False
    """Take random weights, to see how it works; every page says so."""
    device: str = "auto"
    """auto (a GPU if there is one) | cpu | cuda | cuda:1 ..."""
