"""Alarms on the attention of a model in training, by layer and against earlier epochs.

    rank collapse      a layer's tokens have become nearly the same one: `rank_collapse`,
                       |X - 1 mean| / |X|, is below 0.1, and below half of what it was. Dong,
                       Cordonnier, Loukas 2021, arXiv 2103.03404.
    entropy collapse   a layer attends to one or two tokens: mean entropy below 0.5 nats (1.6
                       tokens), and below half of what it was. It goes with unstable training: Zhai
                       et al. 2023, arXiv 2303.06296.
    entropy spike      a layer that had learned to select, by 0.1 nats or more, has gone back to
                       nine tenths of the way to uniform attention.

What it was is the median over earlier epochs, that before training included, those left out in
which the layer was in alarm. A level alone is no alarm: a spectrum scaled as SVDA's paper has it
attends almost evenly from the start, by design.

Measured on `cutouts`, depth 4, width 64: over 5 to 8 epochs of the plain network, SVDA (both
scales) and SVD-ViT's tokens no layer falls below 0.34 (rank) or 3.3 nats; at 15 to 500 times their
learning rate, layers fall to 0.3 nats and below, and at 500 times to a rank of 0.07 and below. An
alarm warns; it never stops a run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import exp, isfinite, log
from typing import Any

import numpy as np

from vitreous.lens.reading import Reading

FLAT_RANK = 0.1  # of `rank_collapse`
SHARP = 0.5  # nats
SELECTIVE = 0.1  # nats below uniform
FALLEN = 0.5  # of what it was
EVENED = 0.1  # of the distance to uniform
ADVICE = "Often the learning rate is too high: try a lower --lr, a longer --warmup-epochs or --clip-grad 1."

Indicators = dict[str, dict[str, float]]  # {indicator: {layer: value}}
Alarm = dict[str, Any]  # alarm, layer, value, before, text


def indicators(reading: Reading) -> Indicators:
    """Means over images and heads by layer, of finite values.

    Those of attention_entropy and below_uniform, in nats, and rank_collapse; empty for a measure
    that the reading does not have.
    """
    table = reading.table()
    by_layer: Indicators = {"attention_entropy": {}, "below_uniform": {}, "rank_collapse": {}}
    token = (table["source"] == "attention") & (table["kind"] == "token")
    for record in reading.layers:
        here, layer = token & (table["layer"] == record["layer"]), str(record["layer"])
        for name in ("attention_entropy", "rank_collapse"):
            value = finite_mean(table[name][here]) if name in reading.measures else None
            if value is not None:
                by_layer[name][layer] = value
        if layer in by_layer["attention_entropy"]:
            by_layer["below_uniform"][layer] = log(record["keys"]) - by_layer["attention_entropy"][layer]
    return by_layer


def finite_mean(values: np.ndarray) -> float | None:
    """The mean of what is finite; None if nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def alarms(history: Sequence[Indicators]) -> list[Alarm]:
    """Alarms of the last epoch that the one before it did not have. history: oldest first."""
    new = []
    for kind, (indicator, is_alarming) in ALARM_KINDS.items():
        for layer in history[-1][indicator]:
            calm: list[float] = []  # values without alarm, by whose median others are judged
            before, rings, rang = 0.0, False, False
            for epoch in history:
                value = epoch[indicator].get(layer)
                if value is None or not isfinite(value):
                    continue
                before = statistics.median(calm) if calm else value
                rang, rings = rings, bool(calm) and is_alarming(value, before)
                if not rings:
                    calm.append(value)
            if rings and not rang:
                value = history[-1][indicator][layer]
                change = SENTENCES[kind].format(value=value, before=before, tokens=exp(value))
                text = f"{kind} in layer {layer}: {change}"
                new.append({"alarm": kind, "layer": int(layer), "value": value, "before": before, "text": text})
    return new


ALARM_KINDS = {  # {kind: (indicator, whether a value is alarming after those before)}
    "rank collapse": ("rank_collapse", lambda value, before: value < FLAT_RANK and value < FALLEN * before),
    "entropy collapse": ("attention_entropy", lambda value, before: value < SHARP and value < FALLEN * before),
    "entropy spike": ("below_uniform", lambda value, before: before >= SELECTIVE and value < EVENED * before),
}
SENTENCES = {
    "rank collapse": "its tokens differ by {value:.3f} of their length, before {before:.3f}",
    "entropy collapse": "attention of {value:.2f} nats ({tokens:.1f} tokens), before {before:.2f} nats",
    "entropy spike": "attention {value:.3f} nats from uniform, before {before:.3f}",
}


def sentence(epoch: int, entries: Sequence[Alarm]) -> str:
    """The alarms of an epoch for people."""
    return f"Alarm after epoch {epoch}: {'; '.join(one['text'] for one in entries)}. {ADVICE}"
