"""What the page says about measures: label, unit, and how to read a value. A measure that is not here shows its own name."""

from __future__ import annotations

MEASURES: dict[str, tuple[str, str, str]] = {
    "attention_entropy": (
        "Attention entropy", "nats", "0: each query looks at one token. Log of the number of tokens: it looks at all alike.",
    ),
    "effective_tokens": ("Effective tokens", "tokens", "How many tokens a query attends to. 1: a single one."),
    "selectivity": ("Selectivity index", "0 to 1", "High is diffuse, low is selective: the reverse of what the name suggests."),
    "mean_distance": ("Attention distance", "pixels", "How far away the attended places are, on average. Low: a local head."),
    "angular_alignment": ("Alignment", "cosine", "Of a token's own query and key. 1: tokens seek what they are themselves."),
    "attention_width": ("Attention width", "pixels", "Width of the Gaussian that looks as far. Weight far away counts more."),
    "head_redundancy": ("Head redundancy", "0 to 1", "How alike the maps of the heads of a layer are. 1: all the same."),
    "perturbation_robustness": (
        "Change under noise", "relative", "How far the attention moves when the image is made noisy. Low is robust.",
    ),
    "rank_collapse": ("Rank collapse", "0 to 1", "How far tokens are from all being the same one. Low is collapsed."),
    "spectral_entropy": ("Spectral entropy", "nats", "0: one axis carries all. Log of the number of axes: all carry the same."),
    "effective_rank": ("Effective rank", "axes", "How many axes share the energy. 1: a single one."),
    "effective_rank_l1": ("Effective rank (magnitudes)", "axes", "Roy and Vetterli's: axes that share the magnitude."),
    "spectral_sparsity": ("Spectral sparsity", "0 to 1", "Share of axes that are as good as nothing."),
    "artifact_share": ("Artifact tokens", "% of patches", "Patches of outstanding norm: they hold nothing local."),
}  # fmt: skip

SCORES: dict[str, tuple[str, str, str]] = {
    "energy_inside": (
        "Energy inside",
        "0 to 1",
        "Share of the map's mass that lies on the object. By chance: the object's area.",
    ),
    "auroc": ("AUROC", "0 to 1", "Chance that a patch of the object scores above one of the background. By chance: 0.5."),
    "average_precision": ("Average precision", "0 to 1", "Precision over all thresholds. By chance: the object's area."),
    "pointing": ("Pointing game", "0 to 1", "How often the highest patch lies on the object. By chance: the object's area."),
    "iou_otsu": ("IoU at Otsu's threshold", "0 to 1", "Overlap with the mask when the map is cut without looking at the mask."),
    "iou_best": ("IoU at the best threshold", "0 to 1", "Overlap at the threshold that suits the mask best: an upper bound."),
}

SOURCES = {
    "attention": ("Attention maps", "Measured on the maps that the images produced."),
    "score": ("Spectrum of the scores", "Singular values of Q Kᵀ on these images."),
    "weight": ("Spectrum of the weights", "Singular values of W_Qᵀ W_K. The same for every image."),
    "learned": ("Learned spectrum", "The values sigma that a spectral attention learned. The same for every image."),
}

BASELINES = {"centre": "Centre prior", "random": "Random map", "area": "Object's area"}

COMPONENTS = {
    "attention": "Attention",
    "rollout": "Rollout",
    "foreground": "Foreground",
    "artifacts": "Artifact tokens",
}


def words() -> dict:
    """All of it, for the page."""
    return {
        "measures": {name: list(text) for name, text in MEASURES.items()},
        "scores": {name: list(text) for name, text in SCORES.items()},
        "sources": {name: list(text) for name, text in SOURCES.items()},
        "baselines": BASELINES,
        "components": COMPONENTS,
    }
