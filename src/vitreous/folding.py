"""`fold`: grafts of linear layers, written into the weights of the host."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vitreous.base.errors import GraftError
from vitreous.grafting import Removal, get, to_leave, ungraft
from vitreous.hosts.attention import Attention
from vitreous.layers.linear import Linear, folds


def fold(model: nn.Module, all: bool = False) -> Removal:
    """Write what the last graft computes into the host's weights, in place.

    all=True: every graft. It is taken out, and in eval mode the host alone computes the same, but
    for rounding. For grafts of linear layers whose output is W x + b, such as lora;
    `effective_weight` becomes the weight, a new parameter. Returns what `ungraft` does: the new
    weights are among `changed`. Raises GraftError for a graft of another kind, and as `ungraft`;
    the model is then as before.
    """
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for record in to_leave(model, all):
        for change in record.changes:
            if isinstance(change.new, Linear) and folds(change.new):
                found[change.path] = change.new.effective_weight().detach(), change.new.effective_bias()
            elif type(change.new) is not Attention:  # which as it is equals the host's
                raise GraftError(
                    f"{record.mechanism} has a {type(change.new).__name__} at {change.path}, which no weight of the host can "
                    "stand for. Expected grafts of linear layers that compute W x + b, such as lora. Take it out "
                    "(vitreous.ungraft), or leave the model unfolded."
                )
    removal = ungraft(model, all)
    changed = set()
    for path, values in found.items():
        layer = get(model, path)
        for name, value in zip(("weight", "bias"), values, strict=True):
            old = getattr(layer, name)
            if (old is None) != (value is None) or not (value is None or torch.equal(old, value)):
                learns = layer.weight.requires_grad
                setattr(layer, name, None if value is None else nn.Parameter(value.detach().clone(), learns))
                changed.add(f"{path}.{name}")
    return replace(removal, changed=tuple(sorted({*removal.changed, *changed})))
