"""The plain update: one gradient, clipped, and a step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vitreous.tasks import Losses
from vitreous.train.updates._update import Norm, Update


@dataclass(frozen=True, kw_only=True)
class Plain(Update):
    """One gradient and a step of the optimizer."""

    def step(
        self, optimizer: torch.optim.Optimizer, gradients: Callable[[], Losses], norm: Norm, clip: Callable[[], None]
    ) -> Losses:
        losses = gradients()
        clip()
        optimizer.step()
        return losses
