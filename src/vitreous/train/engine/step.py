"""One step: its batch is drawn, its losses computed, its gradients added up.

A batch is cut by images, over the processes (`loader.cut`) and then into `--accumulate` parts. Each
part's mean loss weighs as its images do in the whole batch, and penalties count once, so that the
step is that of the whole batch in one piece.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from vitreous.tasks import Batch, Dice, Losses
from vitreous.train.engine.distributed import joining, keeping_buffers
from vitreous.train.engine.loader import DRAW, cut
from vitreous.train.engine.session import Session
from vitreous.train.engine.sharding import whole
from vitreous.train.engine.state import ValueNotFinite, random_states, set_random_states


def step_losses(session: Session, batch: Batch, last: bool = True) -> Losses:
    """The losses of a drawn batch, or of a part; with the last part penalties as well.

    The only place where a run computes a loss: steps and the search for a value that is not finite
    come here.
    """
    return Losses(*session.step_module(batch, session.fraction_done, last))


def draw_batch(session: Session, images: Tensor, target: Tensor, count: int) -> Batch:
    """A batch as it is loaded, with everything random drawn, for this process.

    count: images of all processes, for which the draws are made; each process takes its rows.
    """
    here, team = len(images), session.team
    rows = np.arange(here)
    if team.size > 1:  # a stand-in, or what is left beside lost images, takes any rows
        rows = np.resize(cut(np.arange(count), team), here) if count >= team.size else np.zeros(here, np.int64)
    key = (DRAW, session.settings.seed, session.progress.updates)
    return session.objective.draw(images, target, Dice(key, max(count, here), rows, session.device))


def set_schedules(module: nn.Module, progress: float) -> None:
    """Call `schedule(progress)` of the modules that have one: 0 at the start, 1 at the end."""
    for part in module.modules():
        if hasattr(part, "schedule"):
            part.schedule(progress)


class Step:
    """One step of this process; an `Update` is handed its methods.

    images, target: this process's part of a batch as it is loaded. Afterwards `norms`, of
    gradients, and `count`, images of all processes, are recorded.
    """

    def __init__(self, session: Session, images: Tensor, target: Tensor):
        self.session, self.images = session, len(images)
        self.count = session.team.count(self.images)
        if not self.count:  # all images of the batch were lost: each process names those of its part
            with session.team.together():
                session.train.refuse_lost()
        if not self.images:
            images, target = stand_in(session)
        set_schedules(session.objective, session.fraction_done)
        self.batch = draw_batch(session, images, target, self.count)
        self.start = random_states(session.device) if session.update.passes > 1 else None
        self.buffers: list[Tensor] = []
        self.norms: dict[str, Tensor] = {}

    def gradients(self) -> Losses:
        """Clear gradients and compute those of the whole batch, with the same draws at every call.

        Buffers, such as running means, end as the first call leaves them. Raises ValueNotFinite.
        """
        session, buffers = self.session, list(self.session.objective.buffers())
        session.optimizer.zero_grad(set_to_none=True)
        if self.start is not None:
            set_random_states(self.start, session.device)
        losses = add_gradients(session, self.batch, self.images, self.count)
        if self.start is not None:  # `buffers` is empty in the first call
            for buffer, value in zip(buffers, self.buffers, strict=False):
                buffer.copy_(value)
            self.buffers = [buffer.clone() for buffer in buffers]
        total = self.norm()
        # one wait for the device: the sum is not finite if a loss or a gradient is not
        if not torch.isfinite(losses.total + total):
            raise ValueNotFinite(losses.by_name | {"gradient norm": total})
        gradients = {name: session.learning[name].grad for name in session.watched}
        norms = {name: whole(gradient.norm()) for name, gradient in gradients.items() if gradient is not None}
        self.norms = {"total": total} | norms
        return losses

    def norm(self, tensors: list[Tensor] | None = None) -> Tensor:
        """`gradient_norm` of this step."""
        return gradient_norm(self.session, tensors)

    def clip(self) -> None:
        """Bring the gradients to the norm of --clip-grad, if given."""
        if (most := self.session.settings.clip_grad) is not None:
            nn.utils.clip_grads_with_norm_(self.session.learning.values(), most, self.norms["total"])


def gradient_norm(session: Session, tensors: list[Tensor] | None = None) -> Tensor:
    """The norm over all processes of the gradients, or of tensors that are spread as they are."""
    if tensors is None:
        tensors = [p.grad for p in session.learning.values() if p.grad is not None]
    return whole(nn.utils.get_total_norm(tensors))


def add_gradients(session: Session, batch: Batch, images: int, count: int) -> Losses:
    """Add the gradients of a whole step to those of the parameters.

    Returns its losses, the same in all processes.

    batch: of this process. images: how many of its images count, 0 for a stand-in. count: those of
    all processes.
    """
    size, length = session.team.size, len(next(iter(batch.values())))
    if (parts := session.settings.accumulate) > 1:
        parts = min(parts, -session.team.most(-length))  # as many in each process, since they meet in each part
    cuts = [tensor.tensor_split(parts) for tensor in batch.values()]
    pieces = [dict(zip(batch, tensors, strict=True)) for tensors in zip(*cuts, strict=True)]
    means, losses = {}, Losses({}, {})
    for number, piece in enumerate(pieces, start=1):
        with joining(session.step_module, last := number == len(pieces)):
            losses = step_losses(session, piece, last)
            part = len(next(iter(piece.values()))) / count if images else 0
            shares = {name: value * part for name, value in losses.means.items()}
            # activations that are computed again would move running means a second time
            with keeping_buffers(session.objective) if session.settings.checkpointing else nullcontext():
                # processes average their gradients, but shares of the whole batch have to add up
                (size * sum(shares.values()) + sum(losses.penalties.values())).backward()
        for name, value in shares.items():
            means[name] = means.get(name, torch.zeros((), device=session.device)) + value.detach()
    penalties = {name: value.detach() for name, value in losses.penalties.items()}
    return Losses({name: session.team.total(value) for name, value in means.items()}, penalties)


def stand_in(session: Session) -> tuple[Tensor, Tensor]:
    """Two images of noise with a target, for a process that has no image of a batch.

    Their loss weighs nothing; without a backward pass, the others would wait for this process.
    """
    noise = torch.randn((2, *session.view_shape), generator=torch.Generator().manual_seed(session.settings.seed))
    return noise.to(session.device), session.data.train.target.take([0, 0]).to(session.device)
