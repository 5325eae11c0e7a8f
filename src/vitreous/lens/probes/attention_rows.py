"""Statistics of the rows of each attention map.

How many tokens a query attends to, how far away, and how alike heads are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.lens.formulas.row_statistics import RowStatistics
from vitreous.lens.probe import Measure, Observer, Probe, RowObserver


class RowsObserver(RowObserver):
    sums = RowStatistics


@dataclass(frozen=True, kw_only=True)
class AttentionRows(Probe):
    """Entropy, effective tokens, selectivity, distance, width, redundancy of each map.

    Head by head.

    Formulas: `formulas.row_statistics`. Windows and rows count evenly; rows that are masked out
    altogether do not count. Where the model changes the weights between softmax and values, those
    have rows of kind "effective".
    """

    order: ClassVar[int] = 10
    observer: ClassVar[type[Observer]] = RowsObserver
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("attention_entropy", "Attention entropy", "nats", 0, short="entropy",
                explains="0: each query looks at one token. Log of the number of tokens: it looks at all alike."),
        Measure("effective_tokens", "Effective tokens", "tokens", 1, short="tokens",
                explains="How many tokens a query attends to. 1: a single one."),
        Measure("selectivity", "Selectivity index", "", 0, 1,
                explains="High is diffuse, low is selective: the reverse of what the name suggests."),
        Measure("selectivity_paper", "Selectivity index, paper's form", "", 0, 1,
                explains="As published, of all heads together; not comparable between token counts."),
        Measure("mean_distance", "Attention distance", "pixels", 0, short="distance",
                explains="How far away the attended places are, on average. Low: a local head."),
        Measure("attention_width", "Attention width", "pixels", 0,
                explains="Width of the Gaussian that looks as far. Weight far away counts more."),
        Measure("head_redundancy", "Head redundancy", "", 0, 1, "lower", short="alike",
                explains="How alike the maps of the heads of a layer are. 1: all the same."),
    )  # fmt: skip
