"""Spiking neurons over a few time steps, with a gradient; no state is kept between calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLOPE = 4.0  # of the sigmoid whose derivative stands for that of the step


def step(x: Tensor, slope: float = SLOPE) -> Tensor:
    """1 where x >= 0, else 0, exactly; backwards the derivative of sigmoid(slope x)."""
    hard = (x >= 0).to(x.dtype)
    if not x.requires_grad:
        return hard
    soft = (slope * x).sigmoid()
    return hard + (soft - soft.detach())  # the bracket is 0


def lif(x: Tensor, threshold: float = 1.0, tau: float = 2.0) -> Tensor:
    """Leaky integrate-and-fire: input currents x (T, ...) -> spikes (T, ...), each 0 or 1.

        h[t] = v[t-1] + (x[t] - v[t-1]) / tau
        s[t] = step(h[t] - threshold)
        v[t] = h[t] (1 - s[t])

    The potential starts at 0 in each call. No gradient passes through the reset's s.
    """
    v, spikes = torch.zeros_like(x[0]), []
    for current in x.unbind(0):
        h = v + (current - v) / tau
        s = step(h - threshold)
        v = h * (1 - s.detach())
        spikes.append(s)
    return torch.stack(spikes)


class LIF(nn.Module):
    """`lif` as a module, so that a hook can read its spikes."""

    def __init__(self, threshold: float = 1.0, tau: float = 2.0):
        super().__init__()
        self.threshold, self.tau = threshold, tau

    def forward(self, x: Tensor) -> Tensor:
        return lif(x, self.threshold, self.tau)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, tau={self.tau}"
