"""How far the tokens behind each layer are from all being the same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.lens.formulas import indicators
from vitreous.lens.layer_features import LayerFeatures
from vitreous.lens.probe import Measure, Observer, Probe, Rows


class CollapseObserver(Observer):
    def on_layer(self, features: LayerFeatures) -> None:
        if features.stream is not None:
            values = {"rank_collapse": indicators.rank_collapse(self.batch.clean(features.stream))[:, None]}
            rows = Rows(features.layer, "attention", features.kind, values, self.batch.first, together=True)
            self.readout.rows.append(rows)


@dataclass(frozen=True, kw_only=True)
class RankCollapse(Probe):
    """|X - 1 mean| / |X| of all tokens X of the residual stream behind a layer.

    Dong et al. 2021, arXiv 2103.03404.
    """

    order: ClassVar[int] = 40
    observer: ClassVar[type[Observer]] = CollapseObserver
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("rank_collapse", "Rank collapse", "", 0, 1, "higher",
                explains="How far tokens are from all being the same one. Low is collapsed."),
    )  # fmt: skip
