"""How far the tokens behind each layer are from all being the same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vitreous.lens.formulas import indicators
from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.probe import BatchInfo, Measure, Observer, Probe, Readout, Rows


@dataclass(frozen=True, kw_only=True)
class RankCollapse(Probe):
    """|X - 1 mean| / |X| of all tokens X of the residual stream behind a layer. Dong et al. 2021, arXiv 2103.03404."""

    order: ClassVar[int] = 40
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure(
            "rank_collapse", "Rank collapse", "", 0, 1, "higher",
            "How far tokens are from all being the same one. Low is collapsed.",
        ),
    )  # fmt: skip

    def start(self, model: nn.Module, batch: BatchInfo) -> Observer:
        return CollapseObserver(batch)


class CollapseObserver(Observer):
    def __init__(self, batch: BatchInfo):
        self.batch, self.rows = batch, []

    def on_layer(self, features: LayerFeatures) -> None:
        x = features.stream
        if x is not None:
            values = {"rank_collapse": indicators.rank_collapse(self.batch.clean(x))[:, None]}
            self.rows.append(Rows(features.layer, "attention", features.kind, values, self.batch.first, together=True))

    def finish(self) -> Readout:
        return Readout(self.rows)
