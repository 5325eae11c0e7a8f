"""Classes of a model: their names, and whether an image may show several of them."""

from __future__ import annotations

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from vitreous.base.errors import HostError, SettingError, UnknownName

MULTI_LABEL = "multi_label_classification"  # the value of transformers' problem_type in config.json


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


def class_index(model: nn.Module, text: str) -> int:
    """The number of a class, given as such or by its name; one of several names, too.

    "tabby" is enough for ImageNet's "tabby, tabby cat". Raises UnknownName, and SettingError for a
    number that is none of a class.
    """
    names = class_names(model) or []
    exact = [i for i, name in enumerate(names) if name.lower() == text.lower()]
    parts = [i for i, name in enumerate(names) if text.lower() in name.lower().split(", ")]
    for found in (exact, parts):
        if len(found) == 1:
            return found[0]
    if not text.isdecimal():
        hint = f"Several have this name: {', '.join(map(str, parts))}; give a number." if parts else "Or give its number."
        raise UnknownName(text, "class", {part for name in names for part in (name, *name.split(", "))}, hint)
    count = len(names) or getattr(model, "num_classes", 0)
    if count and int(text) >= count:
        raise SettingError(f"Found class {text} of {count}. Expected 0 to {count - 1}. Choose one of them.")
    return int(text)


def multi_label(model: nn.Module) -> bool:
    """Whether an image may show several classes of the model, or none.

    Training, a model folder or transformers record it as `problem_type`; without a record exactly
    one class is right.
    """
    inner = getattr(model, "_orig_mod", model)  # inside torch.compile
    return MULTI_LABEL in (getattr(place, "problem_type", None) for place in (inner, getattr(inner, "config", None)))


def set_multi_label(model: nn.Module, several: bool) -> None:
    """Record that images may show several classes of this model, or that one is right."""
    model.problem_type = MULTI_LABEL if several else None


def activation(model: nn.Module, classes: int) -> str:
    """What makes probabilities of so many logits: "softmax", or "sigmoid" of each.

    A single logit is against nought.
    """
    return "sigmoid" if multi_label(model) or classes == 1 else "softmax"


def probabilities(model: nn.Module, logits: Tensor) -> Tensor:
    """Probability of each class from logits (..., classes)."""
    return logits.sigmoid() if activation(model, logits.shape[-1]) == "sigmoid" else logits.softmax(-1)
