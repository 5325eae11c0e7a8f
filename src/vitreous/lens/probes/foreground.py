"""Where the subject of an image is, found without masks: one map for the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.base.errors import HostError
from vitreous.lens.foreground import BatchReferences, foreground_of
from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.probe import Component, Observer, Probe, Readout


class ForegroundObserver(Observer):
    def on_layer(self, features: LayerFeatures) -> None:
        self.batch.shared(BatchReferences).add(features)

    def finish(self) -> Readout:
        try:
            foreground = foreground_of(self.batch.shared(BatchReferences).result())
        except HostError as error:
            return Readout(notes=[f"No foreground map: {error}"])
        return Readout(maps={"foreground/-1": foreground.maps}, details={"foreground/-1": {"rule": foreground.rule}})


@dataclass(frozen=True, kw_only=True)
class Foreground(Probe):
    """The foreground map of `lens.foreground`, with the calibrated direction if there is one."""

    order: ClassVar[int] = 80
    observer: ClassVar[type[Observer]] = ForegroundObserver
    components: ClassVar[tuple[Component, ...]] = (
        Component("foreground", "Foreground", explains="Where the subject is, found without masks."),
    )
