"""What modules expose of themselves through `layers.exposed.Exposed`.

Learned masks, connections, chosen tokens, single numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous.layers.exposed import Exposed as Value
from vitreous.lens.probe import BatchInfo, Component, Measure, Observer, Probe, Readout, Rows, Source
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates


class ExposedObserver(Observer):
    def initialise(self) -> None:
        self.values = {name: module for name, module in self.model.named_modules() if isinstance(module, Value)}
        self.outputs: dict[str, Tensor] = {}
        self.calls: list[tuple[str, str, int, int, TokenCoordinates]] = []  # name, kind, heads, keys, where

    def on_output(self, name: str, call_index: int, output: Any) -> None:
        self.outputs.setdefault(name, output.detach().clone())

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        if self.values:
            self.calls.append((call.name, call.kind, call.output.shape[2], call.v.shape[3], where))

    def finish(self) -> Readout:
        count = self.batch.count
        if not self.calls:
            self.without_attention()
            return self.readout
        for name, x in self.outputs.items():
            _, kind, heads, keys, where = max(self.calls, key=lambda call: shared_path(call[0], name))  # the first of equals
            module = self.values[name]
            if module.kind != "number":
                values = per_token(module.kind, x, keys)
                if where.grid is not None and values.shape[-1] == keys:
                    picture = where.picture((values[:count] if len(values) > 1 else values.expand(count, -1))[:, None])
                    self.readout.maps[f"exposed_{module.name}/{where.layer}"] = picture.nan_to_num()
            elif self.batch.first == 0:
                by_head = x.ndim > 0 and len(x) == heads
                x = x.float().reshape(heads if by_head else 1, -1).mean(1)[None]
                row = Rows(where.layer, "exposed", kind, {f"exposed_{module.name}": x}, together=not by_head)
                self.readout.rows.append(row)
        return self.readout

    def without_attention(self) -> None:
        """Rows of the numbers of a model without attention; layers count what has the same name."""
        layers: dict[str, int] = {}
        for name, x in self.outputs.items():
            module = self.values[name]
            if module.kind == "number":
                layer = layers[module.name] = layers.get(module.name, -1) + 1
                values = {f"exposed_{module.name}": x.float().mean().reshape(1, 1)}
                if self.batch.first == 0:
                    self.readout.rows.append(Rows(layer, "exposed", "mixing", values, together=True))


@dataclass(frozen=True, kw_only=True)
class Exposed(Probe):
    """A measure for each exposed number; a map for each exposed mask, pairs or choice.

    Those of the model at hand.

    Numbers come with the first image, as means by head, or of all where they do not come by heads.
    Of pairs of tokens the map has the mean over queries and heads; of chosen tokens it has 1 where
    they are. What the model exposes belongs to the attention with the nearest name.
    """

    order: ClassVar[int] = 120
    observer: ClassVar[type[Observer]] = ExposedObserver
    sources: ClassVar[tuple[Source, ...]] = (Source("exposed", "Exposed by the model", "Values that its modules show."),)

    def for_model(self, model: nn.Module) -> Probe:
        values = {value.name: value for value in model.modules() if isinstance(value, Value)}
        numbers = [value for value in values.values() if value.kind == "number"]
        maps = [value for value in values.values() if value.kind != "number"]
        probe = replace(self)
        labels = {name: name.replace("_", " ").capitalize() for name in values}
        measures = tuple(Measure(f"exposed_{v.name}", labels[v.name], explains=v.explains) for v in numbers)
        components = tuple(
            Component(f"exposed_{v.name}", labels[v.name], scored=v.kind != "index", curves=False, explains=v.explains)
            for v in maps
        )
        object.__setattr__(probe, "measures", measures)  # frozen, and a class constant of all other probes
        object.__setattr__(probe, "components", components)
        return probe

    def reads_modules(self, model: nn.Module) -> bool:
        return any(isinstance(module, Value) for module in model.modules())

    def outputs(self, model: nn.Module, batch: BatchInfo) -> Iterable[str]:
        return (name for name, module in model.named_modules() if isinstance(module, Value))


def per_token(kind: str, x: Tensor, tokens: int) -> Tensor:
    """(B or 1, tokens) float32 of an exposed map (..., n), pairs (..., N, M) or index (B, k)."""
    if kind == "index":
        return torch.zeros(len(x), tokens, device=x.device).scatter_(1, x.long(), 1.0)
    x = x.float().mean(-2) if kind == "pairs" else x.float()
    x = x if x.ndim > 1 else x[None]
    return x.flatten(1, -2).mean(1) if x.ndim > 2 else x


def shared_path(a: str, b: str) -> int:
    """How many names two dotted paths have in common at their beginning."""
    pairs = list(zip(a.split("."), b.split("."), strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
