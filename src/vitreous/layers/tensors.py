"""The tensors of modules: lists, conversion, and digests that show any change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def tensors(value: Any) -> list[Tensor]:
    return [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else []


def parameters(value: Any) -> list[nn.Parameter]:
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, nn.Parameter) else []


def convert(module: nn.Module, like: Tensor | None, known: set[int]) -> None:
    """Move a module's own tensors to the device and floating dtype of `like`, in place.

    The `known` ones stay.
    """
    if like is None or like.is_meta:
        return
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(module, kind).items():
            if tensor is None or id(tensor) in known:
                continue
            dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
            if (tensor.device, tensor.dtype) == (like.device, dtype):
                continue  # an equal copy of a buffer would be another object
            target = tensor.data.to(like.device, dtype)
            if kind == "_parameters":
                tensor.data = target
            else:
                getattr(module, kind)[name] = target


def digests(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{name: digest} of every parameter and buffer."""
    return {name: digest(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def digest(tensor: Tensor) -> tuple[int, int]:
    """Two exact sums over the bits of a tensor; (0, 0) on meta.

    They are the same on every device and number of threads.
    """
    if tensor.is_meta:
        return 0, 0
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().flatten().view(width).long()
    # The plain sum misses a change of order; the one weighted by place may miss the same change
    # everywhere.
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return bits.sum().item(), (bits * places).sum().item()
