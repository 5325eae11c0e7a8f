"""Sharpness-aware minimisation: the step uses the gradient at the worst weights nearby."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vitreous.base.errors import SettingError
from vitreous.tasks import Losses
from vitreous.train.updates._update import Norm, Update

TINY = 1e-12  # keeps the step finite where the gradient is 0


@dataclass(frozen=True, kw_only=True)
class SAM(Update):
    """Sharpness-aware minimisation (SAM): a step by the gradient at the worst weights nearby.

    A first gradient g moves the weights w by e; the gradient there is what the optimizer steps
    with, from w. Losses are recorded at w, gradient norms at w + e.

        e = rho g / |g|, or if adaptive, e = rho w^2 g / | |w| g |

    Differs: with several processes |g| is of the gradient of the whole batch, as one process would
    have it; the authors perturb each part by its own. Twice the time of a plain step.

    rho: radius, 0.05 to 0.2 for ViTs; 0 is the plain update. adaptive: measure the radius relative
    to each weight.
    """

    paper = "Foret et al. 2021, arXiv 2010.01412; adaptive: Kwon et al. 2021, arXiv 2102.11600"
    passes = 2
    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.rho < float("inf"):
            raise SettingError(f"Found rho={self.rho}. Expected a radius of 0 or more. Give for example rho=0.05.")

    def step(
        self, optimizer: torch.optim.Optimizer, gradients: Callable[[], Losses], norm: Norm, clip: Callable[[], None]
    ) -> Losses:
        losses = gradients()
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            start = [w.clone() for w in weights]
            scale = self.rho / (norm([w.abs() * w.grad for w in weights] if self.adaptive else None) + TINY)
            for w in weights:
                w.add_(w.square() * w.grad * scale if self.adaptive else w.grad * scale)
        try:
            gradients()
        finally:
            with torch.no_grad():
                for w, value in zip(weights, start, strict=True):
                    w.copy_(value)  # the very bits
        clip()
        optimizer.step()
        return losses
