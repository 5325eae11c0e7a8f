"""The class names that belong to a model."""

from __future__ import annotations

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn


def class_names(model: nn.Module) -> list[str] | None:
    """Names of the classes: those that travel with the model, or ImageNet's; None where they are not known."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("label_names"):
        return [str(name) for name in config["label_names"]]
    subset = infer_imagenet_subset(model) if hasattr(model, "num_classes") else None
    if not subset:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]
