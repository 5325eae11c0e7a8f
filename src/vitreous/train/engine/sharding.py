"""A model spread over processes by FSDP2 (`fully_shard`), and whole tensors out of it."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from vitreous.base.errors import SettingError
from vitreous.base.processes import Lost, naming_the_lost
from vitreous.grafting import penalties
from vitreous.tasks import Objective
from vitreous.train.engine.session import Session


def shard(model: nn.Module, device: torch.device, size: int) -> None:
    """Spread the parameters over so many processes, block by block.

    A block is whole only while it is computed. Raises SettingError where grafts have penalties,
    which read whole weights outside of the forward pass.
    """
    if names := sorted(penalties(model)):
        raise SettingError(
            f"Found --shard and grafts with penalties ({', '.join(names)}). Expected none, since penalties read whole weights, "
            "of which each process holds a part. Leave --shard out, or set the weights of the penalties to 0."
        )
    mesh = init_device_mesh(device.type, (size,))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    # by default the outermost module stays whole until the backward pass, which tests do not have
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def check_sharding(objective: Objective, task: str) -> None:
    """Raise SettingError where a task learns parameters beside the model (not spread)."""
    if names := [name for name, p in objective.named_parameters() if p.requires_grad and not name.startswith("model.")]:
        raise SettingError(
            f"Found --shard with the task {task}, which learns {names[0]} beside the model. Expected a task that learns the "
            "model alone. Leave --shard out."
        )


def check_optimizer(name: str, device: torch.device, size: int) -> None:
    """Raise SettingError unless the optimizer steps alike with spread and whole weights.

    Collective. Whether it does shows in a step only, so four are tried on a small layer, with a
    restart before the last.
    """
    mesh, draw = init_device_mesh(device.type, (size,)), torch.Generator().manual_seed(0)
    first, *gradients = ([torch.randn(shape, generator=draw).to(device) for shape in ((144, 136), (144,))] for _ in range(4))

    def optimizer_of(values: list[Tensor]) -> torch.optim.Optimizer:
        return create_optimizer_v2([nn.Parameter(value) for value in values], opt=name, lr=0.01, weight_decay=0.0)

    def step(optimizer: torch.optim.Optimizer, values: list[Tensor]) -> None:
        for parameter, value in zip(parameters(optimizer), values, strict=True):
            parameter.grad = spread(value, parameter)
        optimizer.step()

    def cut(values: list[Tensor]) -> list[Tensor]:
        return [distribute_tensor(value, mesh, [Shard(0)]) for value in values]

    plain = optimizer_of([value.clone() for value in first])
    for some in gradients:
        step(plain, some)

    def difference() -> str:
        """In what steps with spread weights differ from those with whole ones; "" in nothing."""
        before = optimizer_of(cut(first))
        for some in gradients[:-1]:
            step(before, some)
        resumed = optimizer_of(cut([whole(p.detach()) for p in parameters(before)]))
        resumed.load_state_dict(gathered(before.state_dict()))
        spread_state(resumed)
        step(resumed, gradients[-1])
        pairs = zip(parameters(plain), parameters(resumed), strict=True)
        worst = max((one - whole(other)).abs().max().item() for one, other in pairs)
        return "" if worst < 1e-5 else f"its step with spread weights is another one, by {worst:.1g}"

    try:
        with naming_the_lost():
            wrong = difference()
    except Lost:
        raise
    except Exception as error:  # of some hundred optimizers, each fails in a way of its own
        wrong = f"it cannot work with spread weights: {str(error).partition(chr(10))[0][:100] or type(error).__name__}"
    if wrong:
        raise SettingError(
            f"Found --shard with --opt {name}; {wrong}. Expected an optimizer that treats each weight by itself, such as "
            "adamw, sgd or lion. Choose one of these, or leave --shard out."
        )


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All that an optimizer steps, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def whole(tensor: Tensor) -> Tensor:
    """Collective: all of a tensor that may be spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gathered(value: Any) -> Any:
    """Collective: nested dicts, lists and tuples with spread tensors whole, on the CPU."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    return type(value)(gathered(item) for item in value) if isinstance(value, (list, tuple)) else value


def spread_state(optimizer: torch.optim.Optimizer) -> None:
    """Cut the loaded, whole state of an optimizer as its parameters are cut."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            # averages have the parameter's shape; a count of steps stays whole
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = spread(value, parameter)


@torch.no_grad()
def put_together(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers of a spread model into a whole one that was made as it was."""
    for place, tensor in zip([*target.parameters(), *target.buffers()], [*source.parameters(), *source.buffers()], strict=True):
        place.copy_(whole(tensor))


def collect_weights(session: Session) -> None:
    """Collective: brings `session.tested` up to date where the weights are spread."""
    if session.whole is not None:
        put_together(session.averaged, session.whole)
