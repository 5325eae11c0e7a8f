"""The base of mechanisms that merge or drop tokens: counts, and budgets of multiply-adds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import nn

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.token_counts import Count, block_costs, multiply_adds, patch_count, whole
from vitreous.mechanism import Mechanism

STEPS = 2**20  # between the weakest and the strongest: how finely a budget is solved


@dataclass(frozen=True, kw_only=True)
class Reducer(Mechanism):
    """Base of mechanisms that merge or drop tokens, as strongly as one setting says.

    macs: share of the host's multiply-adds in the blocks that shall be needed, above 0 up to 1;
        None: the strength is what its setting says. Multiply-adds are those of the host's linear
        layers and of the two products of attention (`hosts.token_counts`), for images of the
        model's own size, one token for each patch, and without what the reducer itself computes or
        another one leaves out.
        The strength is the least whose share is not above the budget.
    solves: name of the setting that `macs` decides; with `macs` it has to be left at its default.

    A subclass defines `strengths` and `counts`, and takes its strength from `strength(model)`.
    Raises SettingError for a share that is none, or beside an explicit strength.
    """

    solves: ClassVar[str] = ""

    macs: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.macs is None:
            return
        if not 0 < self.macs <= 1:
            raise SettingError(
                f"Found macs={self.macs}. Expected a share of the host's multiply-adds, above 0, up to 1. Give for example "
                "macs=0.6."
            )
        value, default = getattr(self, self.solves), next(f.default for f in fields(self) if f.name == self.solves)
        if value != default:
            raise SettingError(
                f"Found macs={self.macs} and {self.solves}={value}. Expected one of the two, since macs decides {self.solves}. "
                f"Leave {self.solves} or macs out."
            )

    def strengths(self, model: nn.Module) -> tuple[float, float]:
        """The strength at which every token stays, and the one that leaves the fewest."""
        raise TypeError(f"{type(self).__name__} does not say its range: define strengths(self, model).")

    def counts(self, model: nn.Module, strength: float) -> tuple[Count, ...]:
        """The tokens of each block at a strength; a greater one never leaves more tokens.

        Prefix tokens are included, tokens that other grafts insert are not. Any number in the range
        may be asked for, so a whole number is given as `between_schedules` does.
        """
        raise TypeError(f"{type(self).__name__} does not say its tokens: define counts(self, model, strength).")

    def strength(self, model: nn.Module) -> float:
        """The value of the setting `solves`, or the one that `macs` asks for in this model.

        Raises SettingError for a share that no strength reaches, HostError where blocks have no
        formula.
        """
        if self.macs is None:
            return getattr(self, self.solves)
        costs, (weakest, strongest) = block_costs(model), self.strengths(model)
        host = multiply_adds(costs, whole(model))

        def at(step: int) -> float:
            return weakest + (strongest - weakest) * step / STEPS

        def fits(step: int) -> bool:
            return multiply_adds(costs, self.counts(model, at(step))) <= self.macs * host

        step = bisect_left(range(STEPS + 1), True, key=fits)
        if step > STEPS:
            least = multiply_adds(costs, self.counts(model, strongest)) / host
            if least >= 1:
                raise SettingError(
                    f"Found macs={self.macs}, but {self.name} with these settings leaves no fewer tokens than the host in this "
                    "model. Expected settings that leave fewer. Change them, or take smaller patches or larger images."
                )
            raise SettingError(
                f"Found macs={self.macs}. Expected a share from {math.ceil(least * 1000) / 1000}, the least that {self.name} "
                "reaches in this model, to 1. Give such a share, or let it work in more or earlier layers."
            )
        return at(step)

    def token_counts(self, model: nn.Module) -> tuple[Count, ...]:
        """The tokens of each block, for images of the model's own size."""
        return self.counts(model, self.strength(model))

    def share(self, model: nn.Module) -> float:
        """The share of the host's multiply-adds in the blocks that is needed with this reducer."""
        costs = block_costs(model)
        return multiply_adds(costs, self.token_counts(model)) / multiply_adds(costs, whole(model))


def staying(patches: int, keep: float) -> int:
    """ceil(keep * patches).

    0.55 of 100 are 55, although the product of the two is a little more in floating point.
    """
    return math.ceil(keep * patches - 1e-9)


def counts_between(model: nn.Module, behind: Callable[[int, int], int]) -> tuple[Count, ...]:
    """The tokens of each block where steps stand between attention and MLP.

    behind: (block, patches before its step) -> patches behind it.
    """
    prefix, patches, counts = slots.prefix(model), patch_count(model), []
    for block in range(slots.depth(model)):
        left = behind(block, patches)
        counts.append(Count(prefix + patches, prefix + left))
        patches = left
    return tuple(counts)


def between_schedules(schedule: Callable[[int], Sequence[int]], strength: float) -> list[int]:
    """A schedule of whole numbers, one for each block, at a strength that need not be whole.

    The first blocks go by the next whole strength and the others by the last one, so that a budget
    is met more closely than one whole strength for all blocks could.
    """
    less, more = schedule(math.floor(strength)), schedule(math.ceil(strength))
    turn = round((strength - math.floor(strength)) * len(less))
    return [*more[:turn], *less[turn:]]
