"""What of the attention of each layer and head speaks for a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vitreous.lens.class_gradients import class_gradients, rule
from vitreous.lens.layer_features import FeatureCollector
from vitreous.lens.probe import BatchInfo, Component, Probe, Readout
from vitreous.models.classes import class_index


@dataclass(frozen=True, kw_only=True)
class GradAttention(Probe):
    """(A * dS/dA)+ of each attention A, of the logit S of a class, head by head.

    Of the class token's row, without a class token the mean of all rows, as in `attention_maps`. It
    is one step of `relevance`, which needs no way through the layers: Swin and others that attend
    in windows have it too. target: name or number of a class; "": the predicted one.
    """

    order: ClassVar[int] = 78
    passes: ClassVar[bool] = True
    components: ClassVar[tuple[Component, ...]] = (
        Component("grad_attention", "Attention for a class", low=0, per_head=True,
                  explains="Attention times the gradient of a class's logit, where it speaks for the class, head by head. "
                           "The class is named with the map."),
    )  # fmt: skip

    target: str = ""

    def for_model(self, model: nn.Module) -> Probe:
        """With the number of the class in place of its name."""
        return type(self)(target=str(class_index(model, self.target))) if self.target else self

    def extra(self, model: nn.Module, batch: BatchInfo, targets: Sequence[int]) -> Readout:
        gradients = class_gradients(model, batch, self.target)
        collector = FeatureCollector(batch.layouts, batch.count, class_token=batch.class_token)
        readout = Readout(classes={"grad_attention": gradients.classes})
        for each in gradients.calls:
            collector.on_attention(each.call, each.where)
            features = collector.layers[-1]
            if features.attention is not None:
                name = f"grad_attention/{features.layer}"
                readout.maps[name] = features.attention.unflatten(-1, features.grid)
                readout.details[name] = {"rule": rule(model, self.target)}
        return readout
