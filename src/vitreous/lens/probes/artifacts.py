"""Artifact tokens: patches whose token has become outstandingly long, and holds no picture of its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vitreous.lens.formulas.maps import artifacts
from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.probe import BatchInfo, Component, Observer, Probe, Readout


@dataclass(frozen=True, kw_only=True)
class Artifacts(Probe):
    """Tokens of more than four times the median norm, of the residual stream behind a layer. Darcet et al. 2024."""

    order: ClassVar[int] = 110
    components: ClassVar[tuple[Component, ...]] = (
        Component(
            "artifacts", "Artifact tokens", low=0, high=1, better="lower", scored=False, curves=False,
            explains="Tokens of more than four times the median norm, which hold no picture of their place.",
        ),
    )  # fmt: skip

    def start(self, model: nn.Module, batch: BatchInfo) -> Observer:
        return ArtifactsObserver()


class ArtifactsObserver(Observer):
    def __init__(self):
        self.maps = {}

    def on_layer(self, features: LayerFeatures) -> None:
        if features.tokens is not None:
            self.maps[f"artifacts/{features.layer}"] = artifacts(features.tokens)[0].unflatten(-1, features.token_grid)

    def finish(self) -> Readout:
        return Readout(maps=self.maps)
