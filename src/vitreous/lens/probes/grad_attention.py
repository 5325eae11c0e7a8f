"""What of the attention of each layer and head speaks for a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from vitreous.lens.class_gradients import ClassProbe, class_gradients, rule
from vitreous.lens.layer_features import FeatureCollector
from vitreous.lens.probe import BatchInfo, Component, Readout, name_range


@dataclass(frozen=True, kw_only=True)
class GradAttention(ClassProbe):
    """(A * dS/dA)+ of each attention A, of the logit S of a class, head by head.

    Of the class token's row; the mean of all rows where the logit is not read from one. It is one
    step of `relevance`, which needs no way through the layers: Swin and others that attend
    in windows have it too. target: name or number of a class; "": the predicted one.
    """

    order: ClassVar[int] = 78
    components: ClassVar[tuple[Component, ...]] = (
        Component("grad_attention", "Attention for a class", low=0, per_head=True,
                  explains="Attention times the gradient of a class's logit, where it speaks for the class, head by head. "
                           "The class is named with the map."),
    )  # fmt: skip

    def extra(self, model: nn.Module, batch: BatchInfo, targets: Sequence[int]) -> Readout:
        gradients = class_gradients(model, batch, self.target)
        collector = FeatureCollector(batch.layouts, batch.count, class_token=batch.class_token)
        readout, unread = Readout(classes={"grad_attention": gradients.classes}), []
        # a class token that the logit is not read from has a row of zeros at the end
        reads_class = bool(gradients.calls and gradients.calls[-1].reached[:, 0].any())
        for each in gradients.calls:
            if not each.reached.any():
                unread.append(each.call.name)
                continue
            collector.on_attention(each.call, replace(each.where, has_class=each.where.has_class and reads_class))
            features = collector.layers[-1]
            if features.attention is not None:
                name = f"grad_attention/{features.layer}"
                readout.maps[name] = features.attention.unflatten(-1, features.grid)
                readout.details[name] = {"rule": rule(model, self.target)}
        if unread:
            readout.notes.append(f"No attention for a class in {name_range(unread)}: its gradient is 0")
        return readout
