"""A model spread over processes by FSDP2 (`fully_shard`): cut apart, put together again for what needs all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vitreous.errors import SettingError
from vitreous.train.objectives import penalties


def shard(model: nn.Module, device: torch.device, size: int) -> None:
    """Spread the parameters over so many processes, block by block; each puts a block together while it computes it.

    Raises SettingError where grafts have penalties, which read whole weights outside of the forward pass.
    """
    if names := sorted(penalties(model)):
        raise SettingError(
            f"Found --shard and grafts with penalties ({', '.join(names)}). Expected none, since penalties read whole weights, "
            "of which each process holds a part. Leave --shard out, or set the weights of the penalties to 0."
        )
    mesh = init_device_mesh(device.type, (size,))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else a pass without a backward leaves it whole


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gathered(value: Any) -> Any:
    """A structure of dicts, lists, tuples and tensors with every spread tensor whole, on the CPU."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    return type(value)(gathered(item) for item in value) if isinstance(value, (list, tuple)) else value


def spread_state(optimizer: torch.optim.Optimizer) -> None:
    """Cut what an optimizer keeps for each parameter as the parameter is, after it was loaded whole."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kept[name] = spread(value, parameter)


@torch.no_grad()
def put_together(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers of a spread model into a whole one that was made as it was."""
    for place, tensor in zip(
        [*target.parameters(), *target.buffers()], [*source.parameters(), *source.buffers()], strict=True
    ):
        place.copy_(whole(tensor))
