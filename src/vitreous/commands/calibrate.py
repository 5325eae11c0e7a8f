"""`vitreous calibrate`: a model's foreground direction from photographs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from tyro import conf

from vitreous.commands import Command
from vitreous.commands._arguments import ImagePaths, ModelName, ModelSource


@dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Find a model's foreground direction from photographs, without labels or masks.

    It is a small file that travels with the model. Fifty to five hundred photographs whose subject
    tends to be central. With a model folder the file goes into it, where `vitreous look` finds it;
    else give it to look with --direction.

    example:
      vitreous calibrate runs/cutouts-plain photos/
    """

    usage: ClassVar[str] = "MODEL PHOTOS..."

    model: ModelName
    photos: ImagePaths
    out: Annotated[str | None, conf.arg(help="File to write (default: foreground.safetensors in the model's folder)")] = None
    source: conf.OmitArgPrefixes[ModelSource] = field(default_factory=ModelSource)

    def run(self) -> None:
        from vitreous.commands._looking import calibrate

        calibrate(self.model, self.photos, self.out, self.source)
