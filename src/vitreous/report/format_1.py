"""Readings of format 1, which held words as positions in fixed lists and did not say what its columns are.

Nothing here changes any more: it is what format 1 meant. `upgraded` and `tables` make of it what format 2 holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PAPER = "As published; not comparable between token counts."
MEASURES = {  # name: label, unit, low, high, better, what it says
    "attention_entropy": (
        "Attention entropy", "nats", 0, None, "neither",
        "0: each query looks at one token. Log of the number of tokens: it looks at all alike.",
    ),
    "effective_tokens": (
        "Effective tokens", "tokens", 1, None, "neither", "How many tokens a query attends to. 1: a single one.",
    ),
    "selectivity": (
        "Selectivity index", "", 0, 1, "neither",
        "High is diffuse, low is selective: the reverse of what the name suggests.",
    ),
    "selectivity_paper": ("Selectivity index, paper's form", "", 0, 1, "neither", PAPER),
    "mean_distance": (
        "Attention distance", "pixels", 0, None, "neither",
        "How far away the attended places are, on average. Low: a local head.",
    ),
    "attention_width": (
        "Attention width", "pixels", 0, None, "neither",
        "Width of the Gaussian that looks as far. Weight far away counts more.",
    ),
    "angular_alignment": (
        "Alignment", "cosine", -1, 1, "neither",
        "Of a token's own query and key. 1: tokens seek what they are themselves.",
    ),
    "angular_alignment_paper": ("Alignment, paper's form", "cosine", -1, 1, "neither", PAPER),
    "head_redundancy": (
        "Head redundancy", "", 0, 1, "lower", "How alike the maps of the heads of a layer are. 1: all the same.",
    ),
    "perturbation_robustness": (
        "Change under noise", "relative", 0, None, "lower",
        "How far the attention moves when the image is made noisy. Low is robust.",
    ),
    "perturbation_robustness_paper": ("Change under noise, paper's form", "", 0, None, "lower", PAPER),
    "rank_collapse": (
        "Rank collapse", "", 0, 1, "higher", "How far tokens are from all being the same one. Low is collapsed.",
    ),
    "spectral_entropy": (
        "Spectral entropy", "nats", 0, None, "neither",
        "0: one axis carries all. Log of the number of axes: all carry the same.",
    ),
    "spectral_entropy_paper": ("Spectral entropy, paper's form", "nats", 0, None, "neither", PAPER),
    "effective_rank": (
        "Effective rank", "axes", 1, None, "neither", "How many axes share the energy. 1: a single one.",
    ),
    "effective_rank_paper": ("Effective rank, paper's form", "axes", 1, None, "neither", PAPER),
    "effective_rank_l1": (
        "Effective rank (magnitudes)", "axes", 1, None, "neither",
        "Roy and Vetterli's: axes that share the magnitude.",
    ),
    "spectral_sparsity": (
        "Spectral sparsity", "", 0, 1, "neither", "Share of axes that are as good as nothing.",
    ),
    "spectral_sparsity_paper": ("Spectral sparsity, paper's form", "", 0, 1, "neither", PAPER),
}  # fmt: skip
SHORT = {"attention_entropy": "entropy", "effective_tokens": "tokens", "mean_distance": "distance"}
SHORT |= {"head_redundancy": "alike", "perturbation_robustness": "noise"}
SCORES = {
    "energy_inside": ("Energy inside", "Share of the map's mass that lies on the object. By chance: the object's area."),
    "auroc": ("AUROC", "Chance that a patch of the object scores above one of the background. By chance: 0.5."),
    "average_precision": ("Average precision", "Precision over all thresholds. By chance: the object's area."),
    "pointing": ("Pointing game", "How often the highest patch lies on the object. By chance: the object's area."),
    "iou_otsu": ("IoU at Otsu's threshold", "Overlap with the mask when the map is cut without looking at the mask."),
    "iou_best": ("IoU at the best threshold", "Overlap at the threshold that suits the mask best: an upper bound."),
}
SOURCES = {
    "attention": ("Attention maps", "Measured on the maps that the images produced."),
    "learned": ("Learned spectrum", "The values sigma that a spectral attention learned. The same for every image."),
    "weight": ("Spectrum of the weights", "Singular values of W_Qᵀ W_K. The same for every image."),
    "score": ("Spectrum of the scores", "Singular values of Q Kᵀ on these images."),
}
BASELINES = {"centre": "Centre prior", "random": "Random map", "area": "Object's area"}
COMPONENTS = {"attention": "Attention", "rollout": "Rollout", "foreground": "Foreground", "u1": "u1", "u2": "u2", "u3": "u3"}
COMPONENTS |= {"k1": "k1", "artifacts": "Artifact tokens"}
KEYS = {"rows": ("layer", "head", "image", "source", "kind"), "scores": ("image", "component", "layer", "head")}
WORDS = {  # columns that were stored as positions in these
    "source": list(SOURCES),
    "kind": ["token", "channel", "pooling", "effective"],
    "component": ["attention", "rollout", "u1", "u2", "u3", "k1", "foreground", "centre", "random", "area"],
}


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a reading.json of format 1 as one of format 2."""
    fields = ("label", "unit", "low", "high", "better", "explains")
    records = {name: dict(zip(fields, values, strict=True)) for name, values in MEASURES.items()}
    components = {record["name"]: record for record in content["components"]}
    names = sorted(components, key=lambda name: list(COMPONENTS).index(name) if name in COMPONENTS else len(COMPONENTS))
    return content | {
        "format": 2,
        "measures": [{"name": name, **record, "short": SHORT.get(name, "")} for name, record in records.items()],
        "sources": [{"name": name, "label": label, "explains": text} for name, (label, text) in SOURCES.items()],
        "scores": [
            {"name": name, "label": label, "unit": "", "low": 0, "high": 1, "better": "higher", "explains": text}
            for name, (label, text) in SCORES.items()
        ],
        "baselines": [{"name": name, "label": label} for name, label in BASELINES.items()],
        "components": [
            {**components[name], "label": COMPONENTS.get(name, name), "explains": components[name].get("about", "")}
            for name in names
        ],
    }


def tables(keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a part of format 2 says of its tables, from the names of the tensors of a part of format 1."""
    known = {"rows": (*KEYS["rows"], *MEASURES), "scores": (*KEYS["scores"], *SCORES)}
    found: dict[str, dict[str, Any]] = {}
    for group, order in known.items():
        names = [name for key in keys for first, _, name in [key.partition("/")] if first == group]
        names = sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))
        if names:
            found[group] = {"columns": names, "words": {name: WORDS[name] for name in names if name in WORDS}}
    return found


def findings(learned: dict[str, Any]) -> dict[str, Any]:
    """What a part of format 1 had learned of the model, as a part of format 2 keeps it."""
    rows = learned.get("rows", {})
    details = {name: {"rule": rule} for name, rule in learned.get("rules", {}).items()}
    for name, detail in details.items():
        letter, layer = name[0], name.rpartition("/")[2]
        detail |= {"rows": rows[f"{letter}/{layer}"]} if f"{letter}/{layer}" in rows else {}
    kept = {name: learned[name] for name in ("layers", "notes", "refused") if name in learned}
    return kept | {"choices": rows, "details": details}
