"""A network by timm's name, new or with trained weights, for given classes and image size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from timm.models import get_model_input_config
from torch import Tensor, nn

from vitreous.base.errors import DataError, HostError, SettingError, UnknownName, VitreousError, brief
from vitreous.models.hub import cache_when_offline
from vitreous.models.weights import Say, fill, read_weights


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    classes: Sequence[str] = (),
    channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    table: str | None = None,
    partial: bool = False,
    say: Say = lambda text: None,
    **arguments: Any,
) -> nn.Module:
    """A network by timm's name, in eval mode: new, pretrained, or with the weights of a file.

    table, partial: of that file, see `read_weights` and `fill`. say: called with a line on what was
    taken of it.

    Raises UnknownName, DataError for weights that cannot be fetched, read or fitted, SettingError
    for a bad argument.
    """
    check_name(name)
    if channels is not None:
        arguments["in_chans"] = channels
    if weights is not None:
        tensors = read_weights(Path(weights), table, say)
        count = class_count(name, tensors)
        if arguments.setdefault("num_classes", count) != count:
            raise SettingError(
                f"Found num_classes={arguments['num_classes']} and {weights}, weights of {count} classes. Expected one number. "
                "Leave num_classes out."
            )
        model = build(name, **arguments)
        fill(model, tensors, str(weights), partial=partial, say=say)
        return adapt(model, classes, image_size)
    if pretrained:
        return adapt(build(name, pretrained=True, **arguments), classes, image_size)
    if classes:
        arguments["num_classes"] = len(classes)
    if image_size and fixed_size(name, arguments):
        arguments["img_size"] = image_size
    model = build(name, **arguments).eval()
    for key in ("tag", "license", "url", "hf_hub_id", "origin_url"):  # of weights that this model does not have
        model.pretrained_cfg.pop(key, None)
    return model


def adapt(model: nn.Module, classes: Sequence[str], image_size: tuple[int, int] | None) -> nn.Module:
    """Give a loaded model a new classifier and image size, where they differ."""
    if classes and not tells_apart(model, classes):
        model.reset_classifier(len(classes))
    present = get_model_input_config(model)
    if image_size and tuple(image_size) != present["input_size"][1:]:
        if hasattr(model, "set_input_size"):
            model.set_input_size(tuple(image_size))
        elif present["fixed_input_size"]:
            raise HostError(
                f"Found images of {image_size[0]} x {image_size[1]} pixels. Expected {present['input_size'][1:]}, since "
                f" {type(model).__name__} cannot change its size. Give that as --image-size."
            )
    return model.eval()


def tells_apart(model: nn.Module, classes: Sequence[str]) -> bool:
    """Whether the classifier of a loaded model is for these classes, by number and by name.

    A model that records no names is judged by the number alone.
    """
    names = model.pretrained_cfg.get("label_names")
    return model.num_classes == len(classes) and (not names or list(names) == list(classes))


# -- the parts ------------------------------------------------------------------------------------


def build(name: str, **arguments: Any) -> nn.Module:
    """`timm.create_model`, whose many kinds of complaint become ours."""
    try:
        with cache_when_offline() if arguments.get("pretrained") else nullcontext():
            return timm.create_model(name, **arguments)
    except TypeError as error:  # an argument that the network does not take
        raise SettingError(
            f"timm cannot build {name}: {error}. Expected arguments that it takes. Mend --model-kwargs."
        ) from error
    except VitreousError:
        raise
    except Exception as error:  # config.json may hold arguments that its author never tried
        if arguments.get("pretrained"):
            raise DataError(
                f"timm's weights of {name} cannot be had: {brief(error)}. Expected a network, or a copy "
                "in the cache. Give a file with --weights PATH, a folder with --model PATH, or train from scratch."
            ) from error
        chosen = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise DataError(
            f"timm cannot build {name}: {brief(error)}. Expected a model that timm can build. "
            f"Check {f'its arguments: {chosen}' if chosen else 'its name'}."
        ) from error


def check_name(name: str) -> None:
    """Raise UnknownName unless timm knows the architecture and the tag of its weights."""
    names = {*timm.list_models(), *timm.list_pretrained()}
    if name not in names:
        raise UnknownName(name, "model", names, hint="Any name of timm's will do, or the path of a folder with config.json.")


def own_size(name: str) -> tuple[int, int]:
    """(height, width) that timm's network of that name is made for. Raises UnknownName."""
    check_name(name)
    return timm.get_pretrained_cfg(name).input_size[1:]


def fixed_size(name: str, arguments: dict[str, Any]) -> bool:
    """True if the network must be told its image size."""
    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size and not arguments.get("dynamic_img_size"))


def class_count(name: str, tensors: dict[str, Tensor]) -> int:
    """The number of classes in a file of weights, 0 if it holds no classifier."""
    config = timm.get_pretrained_cfg(name)
    classifier = config.classifier if config else None
    name = f"{classifier if isinstance(classifier, str) else (classifier or ['head'])[0]}.weight"
    weight = tensors.get(name, next((tensor for key, tensor in tensors.items() if key.endswith(f".{name}")), None))
    return 0 if weight is None else len(weight)


def check_patches(model: nn.Module, size: tuple[int, int]) -> None:
    """Raise SettingError if the image size is no multiple of the model's patches."""
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    overlapping = patch and getattr(getattr(embed, "proj", None), "stride", patch) != patch  # padded, so any size will do
    if patch and not overlapping and any(side % part for side, part in zip(size, patch, strict=True)):
        raise SettingError(
            f"Found images of {size[1]} x {size[0]} pixels for patches of {patch[1]} x {patch[0]}. Expected a multiple. Give "
            f"--image-size {max(1, round(size[0] / patch[0])) * patch[0]}, or --model-kwargs patch_size=N."
        )
