"""`vitreous look`: from words on a command line to a reading and its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tyro import conf

from vitreous.commands import Command
from vitreous.commands._arguments import ImagePaths, ModelName


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and where its weights come from (for a name of timm's: its published ones, unless told otherwise)."""

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


@dataclass(frozen=True, kw_only=True)
class Looking:
    """What is looked at, and how closely."""

    masks: str | None = None
    """Folder of .png masks of the images' names, or a boxes.csv: maps are then scored against them."""
    direction: str | None = None
    """File of `vitreous calibrate` (default: foreground.safetensors in the model's folder, if it is there)."""
    curves: int | None = None
    """Insertion and deletion curves of the maps on so many images (default: 2, or 0 for models of more than ten million
    parameters, for which they take minutes)."""
    noise: float = 0.01
    """Deviation of the noise on pixels of [0, 1] under which attention is compared; 0: leave robustness out."""
    batch_size: int = 8
    """Images per forward pass."""
    memory: float = 1.0
    """GiB for working memory beside what the model itself needs."""
    seed: int = 0
    """Of the noise, the random baselines and the resampling."""
    limit: int | None = None
    """Look at no more than so many images, the first ones."""
    out: str | None = None
    """Folder of the reading: new, or one to go on with (default: the next free readings/NAME)."""


@dataclass(frozen=True, kw_only=True)
class Look(Command):
    """See what a vision transformer looks at: maps, indicators, one report.html.

    Maps and indicators are of every layer and head.

    examples:
      vitreous look vit_tiny_patch16_224 cat.jpg dog.jpg --out reading/
      vitreous look vit_tiny_patch16_224 photos/ --weights model.safetensors --masks masks/
      vitreous look runs/cutouts-plain photos/
    """

    usage: ClassVar[str] = "MODEL IMAGES..."
    together: ClassVar[bool] = True

    model: ModelName
    images: ImagePaths
    source: conf.OmitArgPrefixes[Model] = field(default_factory=Model)
    looking: conf.OmitArgPrefixes[Looking] = field(default_factory=Looking)

    def run(self) -> None:
        from vitreous.commands._looking import run_look

        run_look(self.model, self.images, self.source, self.looking)
