"""`vitreous look`: from words on a command line to a reading and its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro import conf

from vitreous.commands import Command
from vitreous.commands._arguments import ImagePaths, ModelName, ModelSource


@dataclass(frozen=True, kw_only=True)
class Look(Command):
    """See what a vision transformer looks at: maps, indicators, one report.html.

    Maps and indicators are of every layer and head.

    examples:
      vitreous look vit_tiny_patch16_224 cat.jpg dog.jpg --out reading/
      vitreous look vit_tiny_patch16_224 photos/ --weights model.safetensors --masks masks/
      vitreous look runs/cutouts-plain photos/ --class dog
      vitreous look convnext_tiny photos/ --modules 'stages.*.blocks.*'
    """

    usage: ClassVar[str] = "MODEL IMAGES..."
    together: ClassVar[bool] = True

    model: ModelName
    images: ImagePaths
    masks: str | None = None
    """Folder of .png masks of the images' names, or a boxes.csv:
    maps are then scored against them."""
    direction: str | None = None
    """File of `vitreous calibrate`
    (default: foreground.safetensors in the model's folder, if it is there)."""
    class_maps: bool = False
    """Also maps of what speaks for a class, by attention and its gradients:
    a pass forward and back more, half as much time again."""
    for_class: Annotated[str | None, conf.arg(name="class", metavar="NAME|INDEX")] = None
    """The class that those maps are for, and asks for them
    (default: the class that the model predicts for each image)."""
    probes: tuple[str, ...] = ()
    """What is read, such as: all rollout:fusion=max (default: all;
    docs/how-to/add-a-probe.md)."""
    modules: tuple[str, ...] = ()
    """Mixing maps of these modules, such as 'stages.*.blocks.*' (* stands for a part without dots):
    which place moves which, of models without attention, too (default: of mixers of ours)."""
    curves: int = 0
    """Insertion and deletion curves of the maps on so many images, 0: none;
    16 or more give intervals."""
    curve_fill: Literal["mean", "blur", "black"] = "mean"
    """What a patch that is away shows: its image's mean colour, a blur, or black."""
    curve_fractions: tuple[float, ...] | None = None
    """Shares of the patches put in or taken away, from 0 to 1 (default: 0 0.1 0.25 0.5 1,
    and up to 17 more where a curve moves)."""
    noise: float = 0.01
    """Deviation of the noise on pixels of [0, 1] under which attention is compared;
    0: leave robustness out."""
    batch_size: int = 8
    """Images per forward pass."""
    memory: float = 1.0
    """GiB for working memory beside what the model itself needs."""
    query_budget: float = 6.0
    """Megabytes for what each patch looks at, of the first images that fit; 0: none."""
    seed: int = 0
    """Of the noise, the random baselines and the resampling."""
    limit: int | None = None
    """Look at no more than so many images, the first ones."""
    out: str | None = None
    """Folder of the reading: new, or one to go on with (default: the next free readings/NAME)."""
    source: conf.OmitArgPrefixes[ModelSource] = field(default_factory=ModelSource)

    def run(self) -> None:
        from vitreous.commands._looking import run_look

        options = {name: value for name, value in vars(self).items() if name not in ("model", "images", "source")}
        run_look(self.model, self.images, self.source, options)
