"""A step that is not finite: its batch and state in a file, and the module it begins in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitreous.base.errors import DataError
from vitreous.tasks import Batch, Losses, Objective
from vitreous.train.engine.distributed import StepModule
from vitreous.train.engine.loader import rejoined
from vitreous.train.engine.session import Session, own_name
from vitreous.train.engine.sharding import put_together
from vitreous.train.engine.state import capture, random_states, read_state, restore, set_random_states, write_state, writing
from vitreous.train.engine.step import draw_batch, gradient_norm, set_schedules, step_losses

NAME = "not-finite.safetensors"
Loaded = tuple[Tensor, Tensor]  # images and target of a batch, before anything is drawn


def dump(session: Session, batch: Loaded, rng: dict[str, Any], folder: Path) -> None:
    """Write the batch of all processes, before mixing, and the state before the step.

    rng: random states before the step.
    """
    state, parts = capture(session, rng), session.team.gather(tuple(tensor.cpu() for tensor in batch))
    if session.team.first:
        with writing(folder):
            write_state(folder / NAME, {"state": state, "batch": tuple(map(rejoined, zip(*parts, strict=True)))})


def load(session: Session, folder: Path) -> Loaded:
    """Put the session into the state that `dump` wrote; returns the batch.

    Raises DataError if there is none.
    """
    if not (folder / NAME).is_file():
        raise DataError(
            f"Found no {NAME} in {folder}. Expected the record of a step that was not finite, which a run leaves when it "
            "stops at one. There is nothing to replay."
        )
    record = read_state(folder / NAME)
    restore(session, record["state"])
    images, target = record["batch"]
    return images.to(session.device), target.to(session.device)


def diagnose(session: Session, batch: Loaded, rng: dict[str, Any] | None = None, count: int | None = None) -> str | None:
    """Run the step again, without taking it; returns where the first non-finite value arises.

    That is in words, or None if all is finite. count: images of all processes, if there are others.
    The random states are put back afterwards.
    """
    images, target = batch
    present = random_states(session.device)
    try:
        set_random_states(rng or present, session.device)
        if images.is_floating_point() and not torch.isfinite(images).all():
            bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
            return f"the images themselves, numbers {', '.join(map(str, bad[:8]))} of the batch"
        for name, p in session.parameters.items():
            if not torch.isfinite(p).all():
                return f"the weights themselves, {name}"
        # without DistributedDataParallel, which would wait for processes that do not run this step
        alone = replace(session, step_module=StepModule(session.objective, session.autocast))
        set_schedules(alone.objective, alone.fraction_done)
        return first_in_step(alone, draw_batch(alone, images, target, count or len(images)))
    finally:
        session.objective.zero_grad(set_to_none=True)
        set_random_states(present, session.device)


def find_origin(session: Session, batch: Loaded, rng: dict[str, Any]) -> str | None:
    """`diagnose` by each process with its part of the batch; the first that is not None."""
    alone, count = session, session.team.count(len(batch[0]))
    # spread weights are exchanged in every block, where one process that stops would block all
    if session.whole is not None:
        put_together(session.objective, session.whole)
        alone = replace(session, objective=session.whole)
    origins = session.team.everyone(diagnose(alone, batch, rng, count) if len(batch[0]) else None)
    return next(filter(None, origins), None)


class Origin(Exception):
    """Where the first non-finite value arises, in words; ends the step in which it shows."""


class NoStep(torch.optim.SGD):
    """An optimizer that leaves the weights alone."""

    def step(self, closure: Callable | None = None) -> None:
        return None


def first_in_step(session: Session, batch: Batch) -> str | None:
    """The first module whose output is not finite in a step, else the loss, else a gradient.

    In words; None if all is finite. The update runs as in training, all its passes included.
    """
    objective, start = session.objective.train(), random_states(session.device)

    def examined_gradients() -> Losses:
        objective.zero_grad(set_to_none=True)
        set_random_states(start, session.device)
        with watched(objective) as (outputs, gradients):
            # outputs are asked before the loss: that is the order in which they were computed
            losses = step_losses(session, batch)
            if outputs:
                raise Origin(f"the output of {outputs[0]}")
            for name, value in losses.by_name.items():
                if not torch.isfinite(value):
                    raise Origin(f"the loss {name}" + by_penalties(session, name))
            losses.total.backward()
        if gradients:
            raise Origin(f"the gradient that comes out of {gradients[0]}")
        norms = {name: p.grad.norm() for name, p in session.learning.items() if p.grad is not None}
        for name, norm in norms.items():
            if not finite(norm):
                raise Origin(f"the gradient of {name}")
        if not finite(nn.utils.get_total_norm(list(norms.values()))):
            raise Origin(f"the norm of all gradients, the largest of {max(norms, key=norms.get)}")
        return losses

    try:
        optimizer = NoStep(session.learning.values(), lr=0.0)
        session.update.step(optimizer, examined_gradients, partial(gradient_norm, session), clip=lambda: None)
    except Origin as origin:
        return str(origin)
    return None


def by_penalties(session: Session, name: str) -> str:
    """The modules whose own penalty of that name is not finite, in words."""
    paths = [
        path
        for path, module in session.model.named_modules()
        if hasattr(module, "penalties") and name in (own := module.penalties()) and not torch.isfinite(own[name])
    ]
    return f", a penalty of {described(session.objective, f'model.{paths[0]}'.rstrip('.'))}" if paths else ""


@contextmanager
def watched(objective: Objective) -> Iterator[tuple[list[str], list[str]]]:
    """Two lists that fill up in order: modules with non-finite outputs, and with gradients.

    A module is named for its gradient if that of its output is finite and that of its input is not.
    """
    outputs, gradients, arrived = [], [], {}

    def before(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> tuple:
            return tuple(spied(value, lambda g: leaves(name, g)) for value in inputs)

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
            if not all(finite(value) for value in tensors_in(output)):
                outputs.append(described(objective, name))
            if isinstance(output, Tensor):  # an alias can take its place; in a record it cannot
                return spied(output, lambda g: arrives(name, g))
            for value in tensors_in(output):
                if value.requires_grad:
                    value.register_hook(lambda g: arrives(name, g))
            return None

        return hook

    def arrives(name: str, gradient: Tensor) -> None:
        arrived[name] = arrived.get(name, True) and finite(gradient)

    def leaves(name: str, gradient: Tensor) -> None:
        if not finite(gradient) and arrived.get(name, True):
            gradients.append(described(objective, name))

    handles = []
    for name, module in objective.named_modules():
        if name.split(".")[0] in objective.fixed:  # a frozen teacher, say, has no gradient
            continue
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield outputs, gradients
    finally:
        for handle in handles:
            handle.remove()


def spied(value: Any, hook: Callable[[Tensor], None]) -> Any:
    """An alias of a tensor, so that `hook` sees only the gradient that passes here.

    The tensor's own gradient is the sum over all its uses. What needs no gradient stays as it is.
    """
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    alias = value.view_as(value)
    alias.register_hook(hook)
    return alias


def tensors_in(output: Any) -> list[Tensor]:
    """The floating-point tensors of a module's output, in fields of records and in lists too."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [tensor for item in output.values() for tensor in tensors_in(item)]
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensors_in(item)]
    if is_dataclass(output):
        return [tensor for item in fields(output) for tensor in tensors_in(getattr(output, item.name))]
    return []


def finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite."""
    return bool(torch.isfinite(tensor).all())


def described(objective: Objective, name: str) -> str:
    """A module of an objective for people, such as "blocks.1.mlp (Mlp)"."""
    shown = "the model" if name == "model" else own_name(name)
    return f"{shown} ({type(objective.get_submodule(name)).__name__})"
