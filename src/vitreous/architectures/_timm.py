"""What networks of papers tell timm: their configuration for ImageNet, how they are built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def config(paper: str, first_conv: str | None = None, **settings: Any) -> dict[str, Any]:
    """An entry of `default_cfgs`: ImageNet at 224 px, crop 0.9.

    paper: its id, such as arXiv:2103.15808.
    """
    conv = {} if first_conv is None else {"first_conv": first_conv}
    return {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "paper_ids": paper,
        **conv,
        **settings,
    }


def create(
    cls: type[M],
    name: str,
    pretrained: bool,
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    features: int | tuple[int, ...] | None,
    /,
    **arguments: Any,
) -> M:
    """A network by timm's builder, of which `features_only` gives these features by default.

    features: how many of the last, which, or None for all; `out_indices` among the arguments
    counts instead.
    """
    return build_model_with_cfg(
        cls,
        name,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": features, "feature_cls": "getter"},
        **arguments,
    )
