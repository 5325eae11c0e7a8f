"""GGeM: pooling between mean and maximum, with a learned exponent per channel group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.mechanism import Mechanism

FLOOR = 1e-6  # what a feature is at least, before the power
LEAST = 0.01  # what an exponent is at least; at 0 the formula is the geometric mean, as a limit


@dataclass(frozen=True, kw_only=True)
class GGeM(Mechanism):
    """Group generalised mean: a power mean over patches, its exponent learned per group.

    The groups are of channels.

        y_c = (1/N sum_n max(x_nc, eps)^p_g)^(1/p_g)          c in group g of D/G neighbours, eps = 1e-6

    Paper: Ko, Kim, Heo, Yun, Chun, Gu, Kim 2022, arXiv 2212.04114. The start of p is that of the GeM literature.
    Differs: computed through logarithms, equal within rounding, so that no power overflows; p is held at 0.01 or more.
        The final norm stays where the host has it, before or behind the pool; the paper's place is not known to us.
    At start: changes the output. Class-token hosts pool patches from then on: their classifier has to be trained anew.
    Cost: a logarithm and an exponential per feature of the last layer; G parameters.
    Settings: groups (default: the number of heads). start: of every exponent; 1 = the mean of the clamped features, large =
        their maximum.
    Raises: HostError where the head has a pool with weights of its own, or is distilled; SettingError for groups that do
        not divide the width.
    """

    paper: ClassVar[str] = "Ko et al. 2022, arXiv 2212.04114"
    requires: ClassVar[tuple[str, ...]] = ("poolable",)
    no_decay: ClassVar[tuple[str, ...]] = ("exponent",)
    examples: ClassVar[tuple[str, ...]] = ("ggem:groups=8,start=1.0",)

    groups: int | None = None
    start: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        if self.groups is not None and self.groups < 1:
            raise SettingError(f"Found groups={self.groups}. Expected 1 or more. Give such a number.")
        if not LEAST <= self.start < float("inf"):
            raise SettingError(f"Found start={self.start}. Expected {LEAST} or more. Give such an exponent: 1 is the mean.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        slots.check_pool(model, "ggem")
        width, groups = slots.width(model), self.groups or slots.heads(model)
        if width % groups:
            near = [n for n in range(1, width + 1) if width % n == 0]
            raise SettingError(
                f"Found groups={groups} for features of width {width}. Expected a divisor of the width, so that all groups "
                f"are of one size. Give one of {', '.join(map(str, near))}."
            )
        pool = PowerMean(torch.full((groups,), self.start), slots.prefix_at_pool(model))
        return slots.pool_changes(model, pool)


class PowerMean(nn.Module):
    """The pool: tokens (B, prefix + N, D) -> (B, D), over the patches alone."""

    def __init__(self, start: Tensor, prefix: int):
        super().__init__()
        self.exponent, self.prefix = nn.Parameter(start), prefix

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.prefix :].unflatten(-1, (len(self.exponent), -1))  # (B, N, G, D/G)
        return power_mean(patches, self.exponent[:, None]).flatten(1).to(x.dtype)


def power_mean(x: Tensor, p: Tensor) -> Tensor:
    """(1/N sum_n max(x_n, eps)^p)^(1/p) over the second axis, float32 or wider.

    x (B, N, ...), p (...) -> (B, ...).

    With l = log max(x, eps) it is exp(m + log mean exp(p (l - m)) / p), m the largest l: no term
    exceeds 1.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        p = p.to(wide).clamp(min=LEAST)
        logs = x.to(wide).clamp(min=FLOOR).log()
        largest = logs.detach().amax(1)  # cancels in the formula, so it needs no gradient
        return (largest + (p * (logs - largest[:, None])).exp().mean(1).log() / p).exp()
