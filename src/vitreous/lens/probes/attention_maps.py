"""What the class token looks at, head by head; without a class token, what is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.probe import Component, Observer, Probe


class MapsObserver(Observer):
    def on_layer(self, features: LayerFeatures) -> None:
        if features.attention is not None:
            self.readout.maps[f"attention/{features.layer}"] = features.attention.unflatten(-1, features.grid)


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Probe):
    """The attention of each layer on the grid of its keys."""

    order: ClassVar[int] = 60
    observer: ClassVar[type[Observer]] = MapsObserver
    components: ClassVar[tuple[Component, ...]] = (
        Component("attention", "Attention", low=0, high=1, per_head=True,
                  explains="What the class token looks at, head by head; without a class token, what is looked at on average."),
    )  # fmt: skip
