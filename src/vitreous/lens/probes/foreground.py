"""Where the subject of an image is, found without masks: one map for the whole model.

Which side of it the subject is on tells a calibrated direction; without one the map has no sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.base.errors import HostError
from vitreous.lens.foreground import BatchReferences, foreground_of
from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.probe import Component, Observer, Probe, Readout
from vitreous.report.unsigned import UNSIGNED_EXPLAINS, UNSIGNED_LABEL

UNSIGNED = "foreground_unsigned"


class ForegroundObserver(Observer):
    def on_layer(self, features: LayerFeatures) -> None:
        self.batch.shared(BatchReferences).add(features)

    def finish(self) -> Readout:
        try:
            foreground = foreground_of(self.batch.shared(BatchReferences).result())
        except HostError as error:
            return Readout(notes=[f"No foreground map: {error}"])
        if foreground.sign_known:
            return Readout(maps={"foreground/-1": foreground.maps}, details={"foreground/-1": {"rule": foreground.rule}})
        name, unknown = f"{UNSIGNED}/-1", foreground.maps.new_zeros(len(foreground.maps))
        return Readout(maps={name: foreground.maps}, confidence={name: unknown})


@dataclass(frozen=True, kw_only=True)
class Foreground(Probe):
    """The foreground map of `lens.foreground`; without a direction, as one without a sign."""

    order: ClassVar[int] = 80
    observer: ClassVar[type[Observer]] = ForegroundObserver
    components: ClassVar[tuple[Component, ...]] = (
        Component("foreground", "Foreground", explains="Where the subject is, found without masks."),
        Component(UNSIGNED, UNSIGNED_LABEL, signed=True, scored=False, curves=False, explains=UNSIGNED_EXPLAINS),
    )  # fmt: skip
