"""`vitreous predict`: from words on a command line to the classes of images."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from rich.console import Console
from tyro import conf

from vitreous.commands import Command
from vitreous.commands._arguments import ImagePaths, ModelOptions, TrainedModel


@dataclass(frozen=True, kw_only=True)
class Predict(Command):
    """The classes of images by a trained model, with probabilities, as a CSV file.

    Spreadsheets open it. Images are prepared exactly as in training. One that cannot be read has
    its line in the file, too, with the reason. Of images in folders that are named after classes of
    the model the accuracy is said.

    examples:
      vitreous predict runs/photos new-photos/
      vitreous predict runs/photos cat.jpg dog.jpg --top 3 --out animals.csv
      vitreous predict runs/photos new-photos.tar --json
    """

    usage: ClassVar[str] = "RUN IMAGES..."

    model: TrainedModel
    images: ImagePaths
    out: str = "predictions.csv"
    """File to write; it must be new, and appears whole or not at all."""
    top: int = 1
    """So many classes per image, the most probable first."""
    batch_size: int = 16
    """Images per forward pass."""
    source: conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    device: str = "auto"
    """auto (a GPU if there is one) | cpu | cuda | cuda:1 ..."""
    json: bool = False
    """Say what was done as one JSON object, for programs."""

    def run(self) -> None:
        from vitreous.deploy.predict import run_predict

        options = {name: getattr(self, name) for name in ("out", "top", "batch_size", "device")}
        result = run_predict(self.model, self.images, opening=self.source.open, console=Console(quiet=self.json), **options)
        if self.json:
            print(json.dumps(result | {"classes": dict(result["classes"].most_common())}, indent=2))
