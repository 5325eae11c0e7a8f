"""Spectral gating: a learned filter of each channel in the place of attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.hosts.mixer import Mixer
from vitreous.layers.fourier import gate, kernel_of, radial_mean, resized
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class SpectralGate(Mechanism):
    """In the first blocks each channel of the picture is filtered by frequency; no attention.

        y = irfft2(W * rfft2(x))        x (H, W, D), W (H, W // 2 + 1, D) complex, learned

    Paper: Patro, Namboodiri, Agneeswaran 2023, arXiv 2304.06446 (SpectFormer), eq. of the spectral
        gating network; the operator is GFNet's.
    Differs: the block keeps the host's two residuals, as the paper's hierarchical form has them.
        Class and register tokens get nothing from it. On another grid the kernel in patches stays,
        where released code interpolates the spectrum.
    At start: changes the output; W ~ 0.02 N(0, 1), so the residual passes nearly alone.
    Cost: O(N log N) in place of O(N^2); 2 H (W // 2 + 1) D parameters per block.
    Settings: layers (0-based; default the first third, the paper's 4 of 12). seed: of W.
    Raises: HostError if the head reads class tokens that no block with attention is left for, or
        where the patch embedding is not timm's; GraftError where another graft holds the attention.
    """

    paper: ClassVar[str] = "Patro, Namboodiri, Agneeswaran 2023, arXiv 2304.06446"
    requires: ClassVar[tuple[str, ...]] = ("stream", "grid", "halves")
    keeps_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ("spectral_gate:layers=1+2,seed=1",)

    layers: tuple[int, ...] | None = None
    seed: int = 0

    def changes(self, model: nn.Module) -> dict[str, Any]:
        first = range(max(1, slots.depth(model) // 3))
        layers = slots.layer_indices(model, first if self.layers is None else self.layers)
        generator = torch.Generator().manual_seed(self.seed)

        def initialise(new: Gate, layer: int) -> None:
            new.initialise(model.patch_embed.grid_size, slots.width(model), generator)

        return slots.put_mixers(model, layers, Gate, initialise, self.name)

    def renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {re.sub(r"^(blocks\.\d+)\.filter\.", r"\1.attn.", name): value for name, value in tensors.items()}


class Gate(Mixer):
    """The gate of one block; complex_weight (*half, D, 2), real and imaginary part, of `grid`."""

    linear = True
    quantities: ClassVar = Mixer.quantities | {"radial_response": replace(Mixer.quantities["radial_response"], span=(0, 0.5))}

    def initialise(self, grid: Sequence[int], width: int, generator: torch.Generator | None = None) -> None:
        """generator: None draws from torch's global state, as constructors of networks do."""
        self.grid = tuple(grid)
        shape = *self.grid[:-1], self.grid[-1] // 2 + 1, width, 2
        self.complex_weight = nn.Parameter(0.02 * torch.randn(shape, generator=generator))

    def weight(self, grid: Sequence[int]) -> Tensor:
        """The half spectrum on a grid, complex, in at least single precision."""
        wide = torch.promote_types(self.complex_weight.dtype, torch.float32)
        return resized(torch.view_as_complex(self.complex_weight.to(wide)), self.grid, grid)

    def set_grid(self, grid: Sequence[int]) -> None:
        """Keep the kernel, and store its spectrum for another grid."""
        weight = torch.view_as_real(self.weight(grid).detach()).to(self.complex_weight.dtype)
        self.grid, self.complex_weight = tuple(grid), nn.Parameter(weight.contiguous())

    def mix(self, patches: Tensor) -> Tensor:
        with torch.autocast(patches.device.type, enabled=False):  # half precision has no such transform
            x = patches.to(torch.promote_types(patches.dtype, torch.float32))
            return gate(x, self.weight(x.shape[1:-1]))

    @torch.no_grad()
    def reading(self) -> dict[str, Tensor]:
        """By channel: kernel, size of the frequency response, its mean over directions."""
        kernel = kernel_of(self.weight(self.grid), self.grid).movedim(-1, 0)
        axes = tuple(range(1, kernel.ndim))
        response = torch.fft.fftshift(torch.fft.fftn(kernel, dim=axes).abs(), dim=axes)
        return {
            "kernel": torch.fft.fftshift(kernel, dim=axes),
            "frequency_response": response,
            "radial_response": radial_mean(response, min(self.grid) // 2 + 1),
        }
