"""Where the subject of an image is, found without masks: one map for the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vitreous.base.errors import HostError
from vitreous.lens.foreground import BatchReferences, foreground_of
from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.probe import BatchInfo, Component, Observer, Probe, Readout


@dataclass(frozen=True, kw_only=True)
class Foreground(Probe):
    """The foreground map of `lens.foreground`, with the calibrated direction if there is one."""

    order: ClassVar[int] = 80
    components: ClassVar[tuple[Component, ...]] = (
        Component("foreground", "Foreground", explains="Where the subject is, found without masks."),
    )

    def start(self, model: nn.Module, batch: BatchInfo) -> Observer:
        return ForegroundObserver(batch)


class ForegroundObserver(Observer):
    def __init__(self, batch: BatchInfo):
        self.references = batch.shared(BatchReferences)

    def on_layer(self, features: LayerFeatures) -> None:
        self.references.add(features)

    def finish(self) -> Readout:
        try:
            foreground = foreground_of(self.references.result())
        except HostError as error:
            return Readout(notes=[f"No foreground map: {error}"])
        return Readout(maps={"foreground/-1": foreground.maps}, details={"foreground/-1": {"rule": foreground.rule}})
