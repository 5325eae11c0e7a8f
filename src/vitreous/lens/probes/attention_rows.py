"""What the rows of each attention map say: how many tokens a query attends to, how far away, and how alike heads are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vitreous.lens.formulas.row_statistics import RowBlock, RowStatistics
from vitreous.lens.probe import BatchInfo, Measure, Observer, Probe, Readout, Rows
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates


@dataclass(frozen=True, kw_only=True)
class AttentionRows(Probe):
    """Entropy, effective tokens, selectivity, distance, width and redundancy of each map, head by head.

    Formulas: `lens.formulas.indicators`. Windows and rows count evenly; rows that are masked out altogether do not count.
    Where the model changes the weights between softmax and values, those have rows of kind "effective".
    """

    order: ClassVar[int] = 10
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure(
            "attention_entropy", "Attention entropy", "nats", 0, None, "neither",
            "0: each query looks at one token. Log of the number of tokens: it looks at all alike.", "entropy",
        ),
        Measure(
            "effective_tokens", "Effective tokens", "tokens", 1, None, "neither",
            "How many tokens a query attends to. 1: a single one.", "tokens",
        ),
        Measure(
            "selectivity", "Selectivity index", "", 0, 1, "neither",
            "High is diffuse, low is selective: the reverse of what the name suggests.",
        ),
        Measure(
            "selectivity_paper", "Selectivity index, paper's form", "", 0, 1, "neither",
            "As published, of all heads together; not comparable between token counts.",
        ),
        Measure(
            "mean_distance", "Attention distance", "pixels", 0, None, "neither",
            "How far away the attended places are, on average. Low: a local head.", "distance",
        ),
        Measure(
            "attention_width", "Attention width", "pixels", 0, None, "neither",
            "Width of the Gaussian that looks as far. Weight far away counts more.",
        ),
        Measure(
            "head_redundancy", "Head redundancy", "", 0, 1, "lower",
            "How alike the maps of the heads of a layer are. 1: all the same.", "alike",
        ),
    )  # fmt: skip

    def start(self, model: nn.Module, batch: BatchInfo) -> Observer:
        return RowsObserver(batch)


class RowsObserver(Observer):
    def __init__(self, batch: BatchInfo):
        self.first, self.rows = batch.first, []
        self.statistics: dict[bool, RowStatistics] = {}  # of the map, and of the effective one

    def on_rows(self, block: RowBlock) -> None:
        self.statistics.setdefault(block.effective, RowStatistics()).add(block)

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        for effective, statistics in self.statistics.items():
            heads, together = statistics.values()
            kind = "effective" if effective else call.kind
            self.rows.append(Rows(where.layer, "attention", kind, heads, self.first))
            if not effective:
                self.rows.append(Rows(where.layer, "attention", kind, together, self.first, together=True))
        self.statistics = {}

    def finish(self) -> Readout:
        return Readout(self.rows)
