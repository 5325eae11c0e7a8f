"""One pass of some probes, without a reading around it: of a model, or of attention that was made."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from vitreous.lens.batch_pass import BatchPass
from vitreous.lens.probe import BatchInfo, Readout, chosen, table
from vitreous.lens.tap import trace, watch

NUMBERS = ("attention_rows", "alignment", "robustness", "spectra")


def measured(*calls, model=None, probes=NUMBERS, noisy: bool = False, **settings) -> dict[str, np.ndarray]:
    """The table of one batch whose attentions are these calls, one layer each."""
    probes = chosen(probes)
    count = len(calls[0].v) // (2 if noisy else 1)
    layouts = SimpleNamespace(calls={(call.name, call.call_index): None for call in calls}, outputs={})
    batch = BatchInfo(torch.zeros(count, 3, 4, 4), count, layouts, noisy, **settings)
    batch_pass = BatchPass(model or nn.Identity(), probes, batch)
    for call in calls:
        batch_pass.on_attention(call)
    return table([row for readout in batch_pass.finish() for row in readout.rows], probes)


def seen(model, images, probes=None, noisy: bool = False, layouts=None, **settings) -> tuple[dict[str, np.ndarray], Readout]:
    """The table of one pass of a model, and the maps and notes of all its probes; the second half of noisy ones is noise."""
    probes = chosen(probes, model)
    layouts = trace(model, images) if layouts is None else layouts
    batch = BatchInfo(images, len(images) // (2 if noisy else 1), layouts, noisy, **settings)
    batch_pass, joint = BatchPass(model, probes, batch), Readout()
    watch(model, images, batch_pass.on_attention, layouts=layouts, on_output=batch_pass.on_output, outputs=batch_pass.outputs)
    for readout in batch_pass.finish():
        for name in ("rows", "notes"):
            getattr(joint, name).extend(getattr(readout, name))
        for name in ("maps", "confidence", "details"):
            getattr(joint, name).update(getattr(readout, name))
    return table(joint.rows, probes), joint
