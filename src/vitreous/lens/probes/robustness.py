"""How far attention moves when the image is made a little noisy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.lens.formulas.row_statistics import RowBlock, RowChange
from vitreous.lens.probe import Measure, Observer, Probe, RowObserver


class ChangeObserver(RowObserver):
    sums = RowChange

    def on_rows(self, block: RowBlock) -> None:
        if block.noisy is not None:
            super().on_rows(block)


@dataclass(frozen=True, kw_only=True)
class Robustness(Probe):
    """|A' - A| / |A| of the map A of an image and A' of its noisy copy.

    Nothing in batches without noisy copies.
    """

    order: ClassVar[int] = 30
    observer: ClassVar[type[Observer]] = ChangeObserver
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("perturbation_robustness", "Change under noise", "relative", 0, better="lower", short="noise",
                explains="How far the attention moves when the image is made noisy. Low is robust."),
        Measure("perturbation_robustness_paper", "Change under noise, paper's form", "", 0, better="lower",
                explains="As published, of all heads together; noise is on pixels of 0 to 1 (the same on normalised ones, "
                         "as in the authors' late-block protocol, is less by the std). Not comparable between token counts."),
    )  # fmt: skip
