"""`StepModule`, the forward pass of a step, and torch's DistributedDataParallel around it.

With --shard, processes are joined by `fully_shard` instead (`engine/sharding.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vitreous import grafting
from vitreous.base.errors import SettingError
from vitreous.hosts.stream_ends import collect_terms
from vitreous.tasks import Batch, Objective, Task
from vitreous.train.engine.session import Session
from vitreous.train.engine.state import random_states, set_random_states
from vitreous.train.settings import TrainSettings


class StepModule(nn.Module):
    """The forward pass of a step: a batch to its losses, with its last part to penalties too.

    Penalties of activations (`TokenState.terms`) are means over images, and so among the losses.
    Both in one forward pass, so that DistributedDataParallel sees every parameter that will get a
    gradient.
    """

    def __init__(self, objective: Objective, autocast: Callable[[], AbstractContextManager]):
        super().__init__()
        self.objective, self.autocast = objective, autocast

    def forward(self, batch: Batch, progress: float, last: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with self.autocast(), collect_terms(self.objective.model) as terms:
            losses = self.objective.losses(batch, progress)
        losses = losses | {name: losses.get(name, 0) + value for name, value in terms.items()}
        return losses, grafting.penalties(self.objective.model) if last else {}


def join_processes(session: Session, batch: Batch) -> nn.Module:
    """The `StepModule` of a session, its processes joined.

    batch: a drawn one, to see which parameters get a gradient.
    """
    alone = StepModule(session.objective, session.autocast)
    if session.team.size == 1 or session.settings.shard:
        return alone
    # also the moving average, of which DistributedDataParallel does not know
    for objective in (session.objective, session.ema.module) if session.ema else (session.objective,):
        session.team.same([*objective.parameters(), *objective.buffers()])
    device_ids = [session.device] if session.device.type == "cuda" else None
    # to look for unused parameters costs a walk through the graph in every step: only where needed
    return DistributedDataParallel(alone, device_ids=device_ids, find_unused_parameters=not all_reached(alone, batch))


def all_reached(module: StepModule, batch: Batch) -> bool:
    """Whether every parameter that learns gets a gradient in a step; draws nothing."""
    device = next(iter(batch.values())).device
    before = random_states(device)  # with them and buffers put back, several processes train as one does
    learning = [p for p in module.parameters() if p.requires_grad]
    with keeping_buffers(module):
        losses, penalties = module(batch, 0.0, True)
        gradients = torch.autograd.grad(sum([*losses.values(), *penalties.values()]), learning, allow_unused=True)
    set_random_states(before, device)
    return all(gradient is not None for gradient in gradients)


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Put the values of all buffers, such as running means, back afterwards."""
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in values:
            buffer.copy_(value)


@contextmanager
def joining(module: nn.Module, last: bool) -> Iterator[None]:
    """Let processes join their gradients in the last backward pass of a step only."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, StepModule) and isinstance(module.objective.model, FSDPModule):  # --shard
        module.objective.model.set_requires_gradient_sync(last)
    yield


def check_team(settings: TrainSettings, task: Task, size: int) -> None:
    """Raise SettingError for settings, or a task, that do not fit so many processes."""
    if settings.shard and size == 1:
        raise SettingError(
            "Found --shard in one process. Expected several, over which weights are spread. Start it with "
            "`torchrun --nproc-per-node 2 -m vitreous train ...`, or leave --shard out."
        )
    least = size * (2 if task.pairs_images else 1)
    if settings.batch_size < least:
        raise SettingError(
            f"Found --batch-size {settings.batch_size}, which counts the images of all {size} processes. Expected at least "
            f"{least}. Raise it, or start fewer processes."
        )
    if task.couples_images and (size > 1 or settings.accumulate > 1):
        parts = f"{size} processes" if size > 1 else f"--accumulate {settings.accumulate}"
        raise SettingError(
            f"Found {parts} with the task {task}, whose loss is of the batch as a whole. Expected the batch in one piece. "
            "Train in one process without --accumulate; --checkpointing saves memory too."
        )
