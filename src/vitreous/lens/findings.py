"""What the batches of a look show of the model: layouts, layers, choices, refusals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from vitreous.base.errors import HostError, VitreousError
from vitreous.lens import metadata
from vitreous.lens.evaluation import BASELINES, SCORES
from vitreous.lens.probe import Probe, records
from vitreous.lens.query_rows import of_queries
from vitreous.lens.reading import CHUNK, FORMAT, Part
from vitreous.lens.tap import Layouts, Refusal, trace
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates


@dataclass
class Findings:
    """What earlier batches of a look showed of the model.

    It holds for all batches, and each part keeps it for a look that goes on there.
    """

    layouts: dict[tuple[int, ...], Layouts] = field(default_factory=dict)  # by shape of an image
    choices: dict[str, str] = field(default_factory=dict)  # of the first batch, for all others: `BatchInfo.choices`
    details: dict[str, dict[str, str]] = field(default_factory=dict)  # of maps
    layers: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)  # records, by call
    mixing: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)  # those of modules with a mixing map
    refused: dict[Refusal, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    images: int = 0  # seen so far

    def layout(self, model: nn.Module, images: Tensor, required: bool = True) -> Layouts:
        shape = tuple(images.shape[1:])
        if shape not in self.layouts:
            self.layouts[shape] = traced(model, images, required)
        return self.layouts[shape]

    def remember(self, call: AttentionCall, where: TokenCoordinates) -> None:
        """Keep what the page says of a layer; its error is the largest of all batches."""
        record = self.layers.setdefault((call.name, call.call_index), metadata.of_layer(call, where))
        record["error"] = max(record["error"], call.error)
        if record["layer"] != where.layer:
            raise HostError(
                f"Found {call.name} as attention {where.layer} of a pass, and {record['layer']} of an earlier one. Expected "
                "the same attentions for all images. Look at fewer images, or leave out those that differ."
            )

    def remember_modules(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep what the page says of modules with a mixing map; errors as of layers."""
        for record in records:
            own = self.mixing.setdefault((record["name"], record["number"]), record)
            own["error"] = max(own["error"], record["error"])

    def as_json(self) -> dict[str, Any]:
        """What a part keeps."""
        content = {"layers": list(self.layers.values()), "choices": self.choices, "details": self.details}
        content |= {"mixing": list(self.mixing.values())}
        content |= {"notes": list(self.notes), "refused": [[refusal.name, refusal.reason] for refusal in self.refused]}
        return copy.deepcopy(content)

    def take_in(self, content: dict[str, Any]) -> None:
        """What an earlier part kept."""
        for record in content.get("layers", ()):
            own = self.layers.setdefault((record["name"], record["number"]), record)
            own["error"] = max(own["error"], record["error"])
        self.remember_modules(content.get("mixing", ()))
        self.choices |= content.get("choices", {})
        self.details |= content.get("details", {})
        self.notes |= dict.fromkeys(content.get("notes", ()))
        self.refused |= {Refusal(*refused): None for refused in content.get("refused", ())}

    def metadata(self, parts: Sequence[Part], probes: Sequence[Probe], query_budget: float) -> dict[str, Any]:
        """What reading.json says beside the model and the settings."""
        first = next(part for part in parts if part.images)
        return {
            "format": FORMAT,
            "kind": "reading",
            "layers": [*self.layers.values(), *self.mixing.values()],
            "probes": [str(probe) for probe in probes],
            "measures": [asdict(record) for record in records(probes, "measures").values()],
            "sources": [asdict(record) for record in records(probes, "sources").values()],
            "figures": [
                asdict(record) | {"details": self.of_figure(record.name)} for record in records(probes, "figures").values()
            ],
            "components": metadata.of_components(first, records(probes, "components"), self.details),
            "scores": [asdict(record) for record in SCORES],
            "baselines": [asdict(record) for record in BASELINES],
            "queries": of_queries(parts, self.details, query_budget),
            "images": self.images,
            "chunk": CHUNK,
            "parts": len(parts),
            "refused": [{"name": refusal.name, "reason": refusal.reason} for refusal in self.refused],
            "skipped": [record for part in parts for record in part.skipped],
            "notes": list(self.notes),
        }

    def of_figure(self, name: str) -> dict[str, dict[str, str]]:
        """{layer: details} of a figure."""
        start = f"figure/{name}/"
        return {key.removeprefix(start): value for key, value in self.details.items() if key.startswith(start)}


def traced(model: nn.Module, images: Tensor, required: bool = True) -> Layouts:
    """`trace`, with an error of the model's own in words: it may take more than images."""
    try:
        return trace(model, images, required)
    except VitreousError:
        raise
    except Exception as error:
        raise HostError(
            f"Found that {type(model).__name__} fails on images {tuple(images[:1].shape)} ({type(error).__name__}: {error}). "
            "Expected a model that takes a batch of images and nothing else. Give the part that sees the images (such as "
            "model.vision_model), or images of the size that it takes."
        ) from error
