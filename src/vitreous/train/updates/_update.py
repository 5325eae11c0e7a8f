"""`Update`: how a step is made from gradients.

An update is one file of this folder: there is no registry to edit. docs/how-to/add-an-update.md
makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vitreous.base.catalogue import Catalogue
from vitreous.base.text_form import Settings
from vitreous.tasks import Losses


class Norm(Protocol):
    """The norm over all processes of the gradients, or of tensors that are spread as they are."""

    def __call__(self, tensors: list[Tensor] | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Update(Settings):
    """Base of all updates: frozen, keyword-only dataclasses whose settings all have defaults.

    paper: authors, year, arXiv id. passes: how often `step` asks for gradients.
    """

    paper: ClassVar[str] = ""
    passes: ClassVar[int] = 1

    def step(
        self, optimizer: torch.optim.Optimizer, gradients: Callable[[], Losses], norm: Norm, clip: Callable[[], None]
    ) -> Losses:
        """Change the weights once; returns the losses to be recorded.

        gradients: clear gradients and compute those of the whole batch, in all parts and processes,
        at the present weights. Each call of one step sees the same images, mixing, dropout and drop
        path, and raises where a loss or gradient is not finite: put the weights back then. clip:
        bring the gradients to the norm of --clip-grad, if given.
        """
        raise TypeError(f"{type(self).__name__} does not say how it steps: define step(self, optimizer, ...).")


UPDATES = Catalogue("train/updates", Update, "update")
