"""The gradients of one step, whatever it is spread over: parts of a batch one after another, and processes side by side.

A batch is cut by images, over the processes (`cut`) and then into `--accumulate` parts. Each part's mean loss weighs as its
images do in the whole batch, and penalties count once, so that the step is that of the whole batch in one piece.
Processes are joined by torch's DistributedDataParallel, or by `fully_shard` (`train.sharding`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vitreous import grafting
from vitreous.base.errors import SettingError
from vitreous.train import objectives
from vitreous.train.engine.session import Session
from vitreous.train.engine.state import random_states, set_random_states
from vitreous.train.settings import TrainSettings


class StepModule(nn.Module):
    """What is run in a step: images to logits, and with the last part of a batch the penalties.

    Both in one forward pass, so that DistributedDataParallel knows every parameter that will get a gradient.
    """

    def __init__(self, session: Session):
        super().__init__()
        self.model, self.autocast = session.model, session.autocast

    def forward(self, images: Tensor, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast():
            logits = self.model(images)
        return logits.float(), grafting.penalties(self.model) if last else {}


def join_processes(session: Session, sample: Tensor) -> nn.Module:
    """The `StepModule` of a session, its processes joined.

    sample: some images (B, C, H, W), to see which parameters get a gradient.
    """
    alone = StepModule(session)
    if session.team.size == 1 or session.settings.shard:
        return alone
    session.team.same([*session.model.parameters(), *session.model.buffers()])
    if session.ema is not None:
        session.team.same([*session.ema.module.parameters(), *session.ema.module.buffers()])
    device_ids = [session.device] if session.device.type == "cuda" else None
    return DistributedDataParallel(alone, device_ids=device_ids, find_unused_parameters=not all_reached(alone, sample))


def all_reached(module: StepModule, sample: Tensor) -> bool:
    """Whether every parameter that learns gets a gradient in a step. Random states are put back."""
    before = random_states(sample.device)
    logits, terms = module(sample, True)
    learning = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(logits.sum() + sum(terms.values()), learning, allow_unused=True)
    set_random_states(before, sample.device)
    return all(gradient is not None for gradient in found)


def step_gradients(session: Session, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], int]:
    """Add the gradients of a step to those of the parameters, from this process's part of a batch as it is loaded.

    Returns the losses of the whole batch by name, scalars, "classification" first; and the number of its images.
    """
    here, size = len(images), session.team.size
    count = session.team.count(here)
    if not count:
        with session.team.together():
            session.train.refuse_lost()
    if not here:
        images, labels = stand_in(session)
    images, labels = objectives.mixed(session, images, labels)
    if (parts := session.settings.accumulate) > 1:
        parts = min(parts, -session.team.most(-len(images)))  # as many in each process: with --shard they meet in every one
    pieces = list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))
    mean, terms = torch.zeros((), device=session.device), {}
    for number, (x, y) in enumerate(pieces, start=1):
        with joining(session.step_module, last := number == len(pieces)):
            logits, terms = session.step_module(x, last)
            share = session.loss(logits, y) * (len(x) / count if here else 0)
            (size * share + sum(terms.values())).backward()  # divided by `size` where processes join
        mean = mean + share.detach()
    return {"classification": session.team.total(mean)} | {name: value.detach() for name, value in terms.items()}, count


@contextmanager
def joining(module: nn.Module, last: bool) -> Iterator[None]:
    """Let processes join their gradients in the last backward pass of a step only."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, StepModule) and isinstance(module.model, FSDPModule):
        module.model.set_requires_gradient_sync(last)
    yield


def stand_in(session: Session) -> tuple[Tensor, Tensor]:
    """Two images of noise and labels, which take part and count nothing, where a batch has fewer images than processes."""
    noise = torch.randn((2, *session.inputs.input_size), generator=torch.Generator().manual_seed(session.settings.seed))
    return noise.to(session.device), torch.zeros(2, dtype=torch.int64, device=session.device)


def check_team(settings: TrainSettings, size: int) -> None:
    """Raise SettingError for settings that do not fit so many processes."""
    if settings.shard and size == 1:
        raise SettingError(
            "Found --shard in one process. Expected several, over which weights are spread. Start it with "
            "`torchrun --nproc-per-node 2 -m vitreous train ...`, or leave --shard out."
        )
    least = size * (2 if settings.mixed else 1)
    if settings.batch_size < least:
        raise SettingError(
            f"Found --batch-size {settings.batch_size}, which counts the images of all {size} processes. Expected at least "
            f"{least}. Raise it, or start fewer processes."
        )
