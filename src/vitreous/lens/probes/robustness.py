"""How far attention moves when the image is made a little noisy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vitreous.lens.formulas.row_statistics import RowBlock, RowChange
from vitreous.lens.probe import Measure, Observer, Probe, Rows
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates


class ChangeObserver(Observer):
    def __init__(self, *given: Any):
        super().__init__(*given)
        self.changes: dict[bool, RowChange] = {}  # of the map, and of the effective one

    def on_rows(self, block: RowBlock) -> None:
        if block.noisy is not None:
            self.changes.setdefault(block.effective, RowChange()).add(block)

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        rows, first = self.readout.rows, self.batch.first
        for effective, change in self.changes.items():
            heads, together = ({name: value} for name, value in zip(NAMES, change.values(), strict=True))
            rows.append(Rows(where.layer, "attention", "effective" if effective else call.kind, heads, first))
            if not effective:
                rows.append(Rows(where.layer, "attention", call.kind, together, first, together=True))
        self.changes = {}


NAMES = ("perturbation_robustness", "perturbation_robustness_paper")


@dataclass(frozen=True, kw_only=True)
class Robustness(Probe):
    """|A' - A| / |A| of the map A of an image and A' of its noisy copy.

    Nothing in batches without noisy copies.
    """

    order: ClassVar[int] = 30
    observer: ClassVar[type[Observer]] = ChangeObserver
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure(NAMES[0], "Change under noise", "relative", 0, better="lower", short="noise",
                explains="How far the attention moves when the image is made noisy. Low is robust."),
        Measure(NAMES[1], "Change under noise, paper's form", "", 0, better="lower",
                explains="As published, of all heads together; not comparable between token counts."),
    )  # fmt: skip
