"""A mechanism: a frozen dataclass of settings that says what it changes in a model.

It stands for one published idea.

The catalogue is the folder listing of `mechanisms/`: a file's stem is the mechanism's name, and
exactly one `Mechanism` is in it. Settings hold text and numbers only, so that they can be written
down, compared and read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from vitreous.base.catalogue import Catalogue
from vitreous.base.text_form import Settings


@dataclass(frozen=True, kw_only=True)
class Mechanism(Settings):
    """Base of all mechanisms.

    Subclasses are frozen, keyword-only dataclasses whose settings all have defaults.

    paper: authors, year, arXiv id. requires: what a host must offer, else it is refused (words of
    `hosts.host.CAPABILITIES`). keeps_weights: a plain checkpoint of the host still loads.
    exact_at_init: the grafted model equals the host before training. static_shapes: token counts do
    not depend on the data. onnx: the grafted model exports. any_size: images of other sizes than at
    graft run wherever the host takes them; else MaskError names them. no_decay: names of parameters
    that weight decay must leave alone. examples: further settings, in text form, that the laws are
    tested with. Where a setting decides, requires and exact_at_init are properties.
    """

    paper: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    keeps_weights: ClassVar[bool] = True
    exact_at_init: ClassVar[bool] = False
    static_shapes: ClassVar[bool] = True
    onnx: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ()

    def changes(self, model: nn.Module) -> dict[str, Any]:
        """{dotted path: new value}: what this mechanism puts where. Pure: the model is read, never
        written.

        Raises HostError if the model is no host for it, SettingError if a setting does not fit the
        model.
        """
        raise TypeError(f"{type(self).__name__} does not say what it changes: define changes(self, model).")

    def renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of the authors' own code under our names and in our shapes. Pure.

        Names that are not the authors' stay as they are.
        """
        return tensors

    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """Fit what this mechanism put into the model to images (B, C, H, W).

        Most have nothing to fit.
        """


MECHANISMS = Catalogue("mechanisms", Mechanism, "mechanism", nested=True)
parse = MECHANISMS.parse
mechanism_class = MECHANISMS.item
class_by_name = MECHANISMS.by_class_name


def catalogue() -> dict[str, Path]:
    """{name: file} of every mechanism, sorted by name."""
    return MECHANISMS.files
