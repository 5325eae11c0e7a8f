"""How far attention moves when the image is made a little noisy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vitreous.lens.formulas.row_statistics import RowBlock, RowChange
from vitreous.lens.probe import BatchInfo, Measure, Observer, Probe, Readout, Rows
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates


@dataclass(frozen=True, kw_only=True)
class Robustness(Probe):
    """|A' - A| / |A| of the map A of an image and A' of its noisy copy; nothing in batches without noisy copies."""

    order: ClassVar[int] = 30
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure(
            "perturbation_robustness", "Change under noise", "relative", 0, None, "lower",
            "How far the attention moves when the image is made noisy. Low is robust.", "noise",
        ),
        Measure(
            "perturbation_robustness_paper", "Change under noise, paper's form", "", 0, None, "lower",
            "As published, of all heads together; not comparable between token counts.",
        ),
    )  # fmt: skip

    def start(self, model: nn.Module, batch: BatchInfo) -> Observer:
        return ChangeObserver(batch)


class ChangeObserver(Observer):
    def __init__(self, batch: BatchInfo):
        self.first, self.rows = batch.first, []
        self.changes: dict[bool, RowChange] = {}  # of the map, and of the effective one

    def on_rows(self, block: RowBlock) -> None:
        if block.noisy is not None:
            self.changes.setdefault(block.effective, RowChange()).add(block)

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        for effective, change in self.changes.items():
            heads, together = change.values()
            kind = "effective" if effective else call.kind
            self.rows.append(Rows(where.layer, "attention", kind, {"perturbation_robustness": heads}, self.first))
            if not effective:
                values = {"perturbation_robustness_paper": together}
                self.rows.append(Rows(where.layer, "attention", kind, values, self.first, together=True))
        self.changes = {}

    def finish(self) -> Readout:
        return Readout(self.rows)
