"""Which parameters learn, in which groups, by which of timm's optimizers and schedules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vitreous.base.errors import SettingError, UnknownName
from vitreous.base.text_form import spread
from vitreous.grafting import new_parameters, no_weight_decay
from vitreous.tasks import Objective
from vitreous.train.settings import TrainSettings


def choose_trainable(
    model: nn.Module, train: str = "all", freeze: tuple[str, ...] = (), paths: Iterable[str] | None = None
) -> int:
    """Set `requires_grad` of every parameter as asked; returns how many numbers learn.

    train: all | new (what the grafts brought) | new+head (and the classifier). freeze: paths such
    as blocks.0-9. paths: what a task trains, in place of all. Raises UnknownName for a path that no
    parameter lies under, SettingError if nothing is left to train.
    """
    fixed = frozen(model, freeze)
    chosen = set(dict(model.named_parameters())) if paths is None else frozen(model, tuple(paths))
    if train != "all":
        chosen = set(new_parameters(model))
        if train == "new+head":
            head = {id(p) for p in classifier_parameters(model)}
            chosen |= {name for name, p in model.named_parameters() if id(p) in head}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen and name not in fixed)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not count:
        raise SettingError(
            f"Found --train {train}" + "".join(f" --freeze {path}" for path in freeze) + ", which leaves no parameter to "
            "learn. Expected at least one. Graft a mechanism that has parameters, or train more of the model."
        )
    return count


def frozen(model: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    """Names of the parameters at or under the paths; blocks.0-9 is a range with both its ends."""
    names = set()
    for pattern in patterns:
        paths = [""]
        for part in pattern.split("."):
            paths = [f"{path}.{item}".lstrip(".") for path in paths for item in spread(part, "--freeze")]
        for path in paths:
            under = {name for name, _ in model.named_parameters() if name == path or name.startswith(path + ".")}
            if not under:
                modules = {name for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
                raise UnknownName(path, "path to freeze", modules | set(dict(model.named_parameters())))
            names |= under
    return names


def classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of what timm calls the classifier: one module, or several (distilled DeiT)."""
    heads = model.get_classifier()
    return [p for head in (heads if isinstance(heads, (tuple, list)) else [heads]) for p in head.parameters()]


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """timm's groups of the parameters that learn, with and without weight decay.

    Without are biases, norms, and what the host and its grafts exempt. layer_decay: the learning
    rate of a layer is multiplied by it once for each layer between it and the head.
    """
    exempt = no_weight_decay(model)
    if layer_decay is None:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)


def make_optimizer(objective: Objective, settings: TrainSettings) -> torch.optim.Optimizer:
    """timm's optimizer of that name over `parameter_groups`.

    The objective's own parameters have the full learning rate, as the head has.
    """
    groups = parameter_groups(objective.model, settings.weight_decay, settings.layer_decay)
    own = nn.ModuleDict({name: child for name, child in objective.named_children() if name != "model"})
    if any(p.requires_grad for p in own.parameters()):
        groups += param_groups_weight_decay(own, settings.weight_decay)
    optimizer = create_optimizer_v2(groups, opt=settings.opt, lr=settings.lr, weight_decay=0.0)
    if getattr(optimizer, "is_second_order", False):
        raise SettingError(
            f"Found --opt {settings.opt}, which needs second derivatives. Expected an optimizer of gradients alone, since a "
            "step computes no others. Choose for example adamw."
        )
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int) -> Scheduler:
    """timm's schedule over epochs of `steps` updates; call `step_update(updates)` after each."""
    return create_scheduler_v2(
        optimizer,
        # timm's own "none" would leave out warm-up and layer decay
        "constant" if settings.sched == "none" else settings.sched,
        decay_epochs=max(1, settings.epochs // 3) if settings.sched == "step" else None,
        num_epochs=settings.epochs - settings.warmup_epochs,
        warmup_prefix=True,  # the schedule begins where the warm-up ends, without a jump
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )[0]
