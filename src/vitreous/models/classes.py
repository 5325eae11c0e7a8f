"""Names of the classes of a model: as far as they are recorded, and one for every logit."""

from __future__ import annotations

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from vitreous.base.errors import HostError


def class_names(model: nn.Module) -> list[str] | None:
    """Names of the classes: recorded with the model, or ImageNet's; None if unknown."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("label_names"):
        return [str(name) for name in config["label_names"]]
    subset = infer_imagenet_subset(model) if hasattr(model, "num_classes") else None
    if not subset:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]


def names_of(model: nn.Module) -> list[str]:
    """The name of every class, in the order of the logits.

    A class whose name is unknown is "class 7"; a name that occurs twice gets its number, too.
    Raises HostError for a model without classes.
    """
    count = getattr(model, "num_classes", 0)
    if not count:
        raise HostError(
            f"Found a {type(model).__name__} without a classifier. Expected a model of classes. Train one on your images "
            "first: vitreous train PHOTOS --model MODEL."
        )
    recorded = class_names(model) or []
    names = [recorded[i] if i < len(recorded) else f"class {i}" for i in range(count)]
    return names if len(set(names)) == count else [f"{name} ({i})" for i, name in enumerate(names)]
