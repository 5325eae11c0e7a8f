"""The learned spectrum of an attention: a weight for each direction of each head.

It is what the module exposes (`layers.exposed.Exposed`), a number of shape (H, K). Else it is a
parameter of that shape for which the pass shows that queries or keys were multiplied by it: divided
by it, the rows of a head have one length, which they do not have as they are. A name tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitreous.layers.exposed import Exposed

SAME = 1e-2  # relative difference of lengths that rounding in half precision may make


@dataclass(frozen=True)
class LearnedSpectrum:
    """values (H, K) float64. parameter: its name in the module; "" where it was exposed."""

    values: Tensor
    parameter: str = ""


def exposed_numbers(model: nn.Module) -> list[str]:
    """Names of the modules whose output may be a spectrum."""
    return [name for name, module in model.named_modules() if isinstance(module, Exposed) and module.kind == "number"]


def learned_spectrum(module: nn.Module, q: Tensor, k: Tensor, exposed: Sequence[Tensor] = ()) -> LearnedSpectrum | None:
    """The spectrum between queries (B, W, H, N, K) and keys (B, W, H', M, K), or None.

    exposed: what children of the module exposed in this pass.
    """
    shape = (q.shape[2], q.shape[4])
    for values in exposed:
        if tuple(values.shape) == shape:
            return LearnedSpectrum(values.detach().double())
    for name, values in candidates(module, shape):
        if any(x.shape[2] == shape[0] and is_multiplied(x, values) for x in (q, k)):
            return LearnedSpectrum(values.double(), name)
    return None


def candidates(module: nn.Module, shape: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of shape (H, K) but for axes of size 1, such as (1, H, 1, K)."""
    for name, value in module.named_parameters():
        fits = value.ndim > 1 and [n for n in value.shape if n > 1] == [n for n in shape if n > 1]
        if fits and value.is_floating_point():
            yield name, value.detach().reshape(shape)


def is_multiplied(x: Tensor, values: Tensor) -> bool:
    """Whether rows of x (B, W, H, N, K) have one length per head without `values`, not with."""
    return without_spectrum(x, values) is not None and without_spectrum(x, torch.ones_like(values)) is None


def without_spectrum(x: Tensor, values: Tensor) -> Tensor | None:
    """Unit rows (B, W, H, N, K) before they were multiplied by (H, K).

    None if what is left is not of one length: a rotation after the spectrum, or a zero in it,
    leaves other lengths; then there is no way back.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)) / values.to(x.device, torch.float32)[:, None]
    norm = torch.linalg.vector_norm(x, dim=-1)
    low, high = norm.amin(dim=(0, 1, 3)), norm.amax(dim=(0, 1, 3))
    return x if bool((high - low <= SAME * high).all()) else None
