"""Records that describe a reading: model, layers, images, components, digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from vitreous.data.views import View, Views
from vitreous.grafting import grafts
from vitreous.hosts.mixer import mixers_in
from vitreous.lens.direction import Direction
from vitreous.lens.faithfulness import answer, has_classes
from vitreous.lens.layer_features import QUERIES
from vitreous.lens.non_finite import weights_note
from vitreous.lens.probe import Component, Probe
from vitreous.lens.reading import Part
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates
from vitreous.models.classes import probabilities

PACKAGES = ("vitreous", "torch", "timm", "numpy")
Prediction = tuple[str | None, float | None]  # a class and its probability; None, None without classes
WARNING = "Random weights: these maps say nothing about a trained model."


def of_model(model: nn.Module, about: Mapping[str, Any]) -> dict[str, Any]:
    """Title, model, versions. about: "name" and "weights", where the caller knows them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = about.get("name") or config.get("architecture") or type(model).__name__
    weights = about.get("weights", "given")
    return {
        "title": name,
        "model": {
            "name": name,
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights": weights,
            "mechanisms": [str(record.mechanism) for record in grafts(model)],
        },
        "random_weights": weights == "random",
        "versions": {package: version(package) for package in PACKAGES},
    }


def notes(model: nn.Module, given: Mapping[str, Any], probes: Sequence[Probe]) -> list[str]:
    """What is known before any image is seen: random weights, blocks without attention.

    probes: those of the look.
    """
    mixing = any(probe.name == "mixing" for probe in probes)
    lines = ([WARNING] if given.get("weights") == "random" else []) + weights_note(model)
    if mixers := [f"{name} ({type(module).__name__})" for name, module in mixers_in(model).items()]:
        instead = "there are mixing maps instead" if mixing else "nothing is read of it (probes: all mixing)"
        lines.append(
            f"No attention in {', '.join(mixers)}: tokens are mixed in another way there, and {instead}. Layers count the "
            f"attentions that are left{', then the mixing maps' * mixing}."
        )
    return lines


def of_layer(call: AttentionCall, where: TokenCoordinates) -> dict[str, Any]:
    """One captured attention: what it is, where its tokens are, and how its map was verified."""
    layout, note = call.layout, ""
    if where.chosen:
        note = layout.note
    elif where.merged and where.layout is not None:
        note = "tokens were merged or dropped before it: the places of a token share the attention to it"
    elif where.loose_queries:
        shown = min(QUERIES, where.loose_queries)
        note = (
            f"its queries have no place in the image: query1 to query{shown} are the maps of {shown} of {where.loose_queries}"
        )
    elif where.grid is None:
        note = "where its tokens are is not known" if layout is None else layout.note or "its tokens lie on no grid"
    return {
        "layer": where.layer,
        "name": call.name,
        "number": call.call_index,
        "kind": call.kind,
        "route": call.route,
        "verified": call.verified,
        "error": call.error,
        "heads": call.output.shape[2],
        "queries": call.output.shape[3],
        "keys": call.v.shape[3],
        "windows": call.output.shape[1],
        "prefix": where.prefix,
        "grid": None if where.grid is None else list(where.grid),
        "has_class": where.has_class,
        "effective": call.mixed,
        "note": "; ".join(filter(None, (call.note, note))),
    }


def of_image(
    view: View, number: int, names: Sequence[str] | None, prediction: Prediction, classes: Mapping[str, int]
) -> dict[str, Any]:
    """One image: its name, size, prediction, label, and whether it has a mask.

    classes: {component: the class that its maps are for}, of those that are for one.
    """
    explained = {name: {"class": index, "name": class_name(names, index)} for name, index in classes.items()}
    return {
        "image": number,
        "name": view.name,
        "width": view.width,
        "height": view.height,
        "predicted": prediction[0],
        "probability": prediction[1],
        "label": names[view.label] if names and 0 <= view.label < len(names) else None,
        "mask": view.mask is not None,
        **({"classes": explained} if explained else {}),
    }


def of_components(
    part: Part, components: Mapping[str, Component], details: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """The records of components that there are maps of. details: as of `Readout`.

    All but the rule are kept layer by layer.
    """
    present: dict[str, dict[str, Any]] = {}
    for key in part.maps():
        name, layer = key.split("/")
        record = present.setdefault(name, asdict(components[name]))
        for detail, text in details.get(key, {}).items():
            if detail == "rule":
                record["rule"] = text
            else:
                record.setdefault(detail, {})[layer] = text
    return [present[name] for name in components if name in present]


def predictions(model: nn.Module, output: Any, names: Sequence[str] | None, count: int) -> list[Prediction]:
    """(class, its probability) for each of the first `count` images.

    (None, None) where the output is not of classes, or not finite.
    """
    if not has_classes(model, output):
        return [(None, None)] * count
    probability, best = probabilities(model, answer(output)[:count].float()).max(-1)
    named = [class_name(names, i) for i in best.tolist()]
    pairs = zip(named, probability.tolist(), strict=True)
    return [(name, value) if value == value else (None, None) for name, value in pairs]


def class_name(names: Sequence[str] | None, index: int) -> str:
    """The name of a class, or "class 7" where there is none."""
    return names[index] if names and index < len(names) else f"class {index}"


def fingerprint(model: nn.Module, views: Views, count: int, settings: Mapping[str, Any]) -> str:
    """A digest of weights, images and settings.

    An interrupted reading goes on only with the same.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(arguments(model)).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            values = tensor.detach().cpu().contiguous().flatten()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    digest.update(json.dumps([settings, views.config, views.identity(count)], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def of_direction(direction: Direction | None) -> str | None:
    """What tells a direction from others."""
    if direction is None:
        return None
    vectors = [vector.detach().cpu().double().numpy().tobytes() for vector in direction.vectors]
    named = json.dumps([direction.features, direction.attention]).encode()
    return hashlib.blake2b(b"".join([named, *vectors]), digest_size=8).hexdigest()


def arguments(model: nn.Module) -> list[Any]:
    """What a model was built with beside its weights.

    Classes and plain attributes of its modules, and grafts.
    """
    content: list[Any] = [str(record.mechanism) for record in grafts(model)]
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        public = {key: value for key, value in plain.items() if not key.startswith("_") and key != "training"}
        content.append([name, type(module).__name__, public])
    return content
