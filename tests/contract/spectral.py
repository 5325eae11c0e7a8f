"""A mixer as a third party would write it, outside the package: each channel of the picture is filtered, by frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitreous import Mechanism, slots
from vitreous.hosts.mixer import Mixer


class Gate(Mixer):
    """irfft2(gain * rfft2(x)), the gain a learned low pass by frequency, for grids of any size."""

    def initialise(self, width: int, generator: torch.Generator) -> None:
        self.gain, self.slope = (nn.Parameter(torch.rand(width, generator=generator)) for _ in range(2))

    def mix(self, patches: Tensor) -> Tensor:
        with torch.autocast(patches.device.type, enabled=False):  # half precision has no such transform
            x = patches.to(torch.promote_types(patches.dtype, torch.float32))
            height, width = x.shape[1:3]
            rows, columns = torch.fft.fftfreq(height, device=x.device), torch.fft.rfftfreq(width, device=x.device)
            square = (rows[:, None].square() + columns.square()).to(x.dtype)[..., None]  # (H, W // 2 + 1, 1)
            gain = self.gain.to(x.dtype) * (-square * self.slope.to(x.dtype)).exp()
            return torch.fft.irfft2(torch.fft.rfft2(x, dim=(1, 2)) * gain, s=(height, width), dim=(1, 2))


@dataclass(frozen=True, kw_only=True)
class SpectralGate(Mechanism):
    """In the chosen blocks a filter of each channel takes the place of attention."""

    paper: ClassVar[str] = "made for this test"
    requires: ClassVar[tuple[str, ...]] = ("stream", "grid", "halves")
    keeps_weights: ClassVar[bool] = False
    onnx: ClassVar[bool] = False

    layers: tuple[int, ...] | None = (0, 1)
    seed: int = 0

    def changes(self, model):
        changes = slots.open_stream(model, self.name)
        layers = slots.layer_indices(model, self.layers)
        slots.check_still_read(model, layers, self.name)
        generator = torch.Generator().manual_seed(self.seed)
        for i in layers:
            new = Gate.instead_of(slots.displaced_attention(model, i, self.name))
            new.initialise(slots.width(model), generator)
            changes[f"blocks.{i}.attn"] = new
        return changes
