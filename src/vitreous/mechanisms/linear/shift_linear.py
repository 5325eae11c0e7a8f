"""Shift linear (ShiftAddViT): weights that are signed powers of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.grafting import new_parameters
from vitreous.hosts.host import host_of
from vitreous.layers.linear import Linear
from vitreous.mechanism import Mechanism

FRACTION = 16  # bits behind the point, and before it, of fixed-point activations


@dataclass(frozen=True, kw_only=True)
class ShiftLinear(Mechanism):
    """Linear layers get weights sign * 2^shift, with sign -1, 0 or 1 and a whole shift.

        form=ps:  W = 2^round(clamp(p, lo, 0)) * sign(round(s)),  lo = -(2^(bits - 1) - 2)
                  dL/dp = g W ln 2,  dL/ds = g          g = dL/dW, straight through; p, s (out, in)
        form=q:   W = 2^clamp(round(log2 |W'|), lo, 0) * sign(W'),  dL/dW' = g   W' the host's

    Paper: You, Shi, Guo, Lin 2023, arXiv 2306.06446 (ShiftAddViT); the two forms are DeepShift's
        (Elhoushi et al. 2021).
    Differs: the mixture of experts of a shift and a dense layer is not here. p is clamped where it
        is used and never written to; start=import rounds the host's weight, in bfloat16 so that it
        is the same in every precision.
    At start: changes the output, unless the weights are signed powers of two within the range.
    Cost: simulated in floating point, so no time is saved here; form=ps has two numbers per weight
        while it trains.
    Settings: layers (0-based; default all). linears: names such as fc1+fc2 (default: the host's
        linear layers in the block). form: ps or q. bits: of sign and shift together, 2 to 8; 5
        gives shifts from -14 to 0. start, of ps: import, from the host's weight, or random =
        p ~ U(lo, 0), s ~ U(-1, 1). fixed_point: activations and bias floored to 16.16 bits.
        seed: of start=random.
    Raises: HostError for names that a block lacks, GraftError where another graft holds the layer;
        SettingError.
    """

    paper: ClassVar[str] = "You et al. 2023, arXiv 2306.06446"
    requires: ClassVar[tuple[str, ...]] = ("linear",)
    no_decay: ClassVar[tuple[str, ...]] = ("shift", "sign")  # towards 0 a shift decays to a weight of 1
    examples: ClassVar[tuple[str, ...]] = (
        "shift_linear:form=q,bits=4,layers=0+2",
        "shift_linear:start=random,fixed_point=true,layers=2",
    )

    layers: tuple[int, ...] | None = None
    linears: tuple[str, ...] | None = None
    form: Literal["ps", "q"] = "ps"
    bits: int = 5
    start: Literal["import", "random"] = "import"
    fixed_point: bool = False
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise SettingError(f"Found bits={self.bits}. Expected 2 to 8, for sign and shift together. Give such a number.")

    @property
    def keeps_weights(self) -> bool:
        return self.form == "q"

    def changes(self, model: nn.Module) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)

        def make(linear: nn.Linear) -> Linear:
            new = (RoundedLinear if self.form == "q" else ShiftedLinear).of(linear)
            new.initialise(self, generator)
            return new

        changes = {}
        for i in slots.layer_indices(model, self.layers):
            names = own_linears(model, i) if self.linears is None else self.linears
            changes |= slots.adapt_linears(model, i, names, make, self.name)
        return changes


def own_linears(model: nn.Module, layer: int) -> list[str]:
    """Names of the linear layers of a block that no graft brought, each once."""
    # asking gives the model a list of grafts, and `changes` may write nothing
    brought = new_parameters(model) if hasattr(model, "grafts") else {}
    paths = [path for path in host_of(model).linears(layer).values() if f"{path}.weight" not in brought]
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


class RoundedLinear(Linear):
    """A linear layer whose weight is rounded to signed powers of two when used (form=q)."""

    def initialise(self, settings: ShiftLinear, generator: torch.Generator) -> None:
        self.bits, self.fixed_point = settings.bits, settings.fixed_point

    def effective_weight(self) -> Tensor:
        return straight_through(rounded(self.weight.detach(), self.bits), self.weight)

    def effective_bias(self) -> Tensor | None:
        return fixed_point(self.bias) if self.fixed_point and self.bias is not None else self.bias

    def forward(self, x: Tensor) -> Tensor:
        x = fixed_point(x) if self.fixed_point else x
        return F.linear(x, self.effective_weight(), self.effective_bias())


class ShiftedLinear(RoundedLinear):
    """A linear layer whose weight is made of a shift and a sign, (out, in) each (form=ps)."""

    def initialise(self, settings: ShiftLinear, generator: torch.Generator) -> None:
        super().initialise(settings, generator)
        weight = self.weight.detach()
        if settings.start == "import":
            shift, sign = shift_and_sign(weight.bfloat16().to(weight.dtype), settings.bits)
        else:
            shift, sign = (torch.rand(weight.shape, generator=generator) for _ in range(2))
            shift, sign = lowest(settings.bits) * shift, 2 * sign - 1
        del self.weight
        self.shift, self.sign = nn.Parameter(shift), nn.Parameter(sign)

    def effective_weight(self) -> Tensor:
        weight = powers(self.shift, self.sign, self.bits).detach()
        # slopes of the two factors: d 2^p / dp = 2^p ln 2, and 1 for the sign
        return straight_through(weight, self.shift * weight * math.log(2) + self.sign)


def lowest(bits: int) -> int:
    """The smallest shift that `bits` bits hold beside the sign."""
    return 2 - 2 ** (bits - 1)


def powers(shift: Tensor, sign: Tensor, bits: int) -> Tensor:
    """2^round(clamp(shift, lo, 0)) * sign(round(sign)), of shapes (out, in), exact.

    0 where |sign| <= 1/2.
    """
    return torch.ldexp(sign.round().sign(), shift.clamp(lowest(bits), 0).round())


def shift_and_sign(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Exponent of the nearest power of two, by the logarithm, and sign of a weight (out, in)."""
    return weight.abs().log2().clamp(lowest(bits), 0).round(), weight.sign()


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight (out, in) rounded to signed powers of two from 2^lo to 1."""
    return powers(*shift_and_sign(weight, bits), bits)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, to the bit, with the gradient of `surrogate` (finite, of the same shape)."""
    return value.detach() + (surrogate - surrogate.detach())


def fixed_point(x: Tensor) -> Tensor:
    """x floored to multiples of 2^-16, from -2^15 to 2^15; the gradient passes as it is."""
    step, bound = 2.0**-FRACTION, 2.0 ** (FRACTION - 1)
    return straight_through(((x / step).floor() * step).clamp(-bound, bound - step), x)
