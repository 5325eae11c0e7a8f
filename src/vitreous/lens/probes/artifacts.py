"""Artifact tokens: patches whose token is outstandingly long.

Such a token holds no picture of its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.lens.formulas.maps import artifacts
from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.probe import Component, Observer, Probe


class ArtifactsObserver(Observer):
    def on_layer(self, features: LayerFeatures) -> None:
        if features.tokens is not None:
            marks, _ = artifacts(features.tokens)
            self.readout.maps[f"artifacts/{features.layer}"] = marks.unflatten(-1, features.token_grid)


@dataclass(frozen=True, kw_only=True)
class Artifacts(Probe):
    """Tokens of more than four times the median norm, of the residual stream behind a layer.

    Darcet et al. 2024.
    """

    order: ClassVar[int] = 110
    observer: ClassVar[type[Observer]] = ArtifactsObserver
    components: ClassVar[tuple[Component, ...]] = (
        Component("artifacts", "Artifact tokens", low=0, high=1, better="lower", scored=False, curves=False,
                  explains="Tokens of more than four times the median norm, which hold no picture of their place."),
    )  # fmt: skip
