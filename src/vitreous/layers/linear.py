"""`Linear`: a host's linear layer to override; `affine`: the weight of any linear layer.

An adapter changes what a layer computes and leaves `layer.weight` as it was. Whoever needs the
weight of a layer (spectra, penalties, a direction's model check) takes `affine(layer)`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vitreous.base.errors import HostError
from vitreous.layers.adoption import adopt

L = TypeVar("L", bound="Linear")
SCALES = (1.0, 30.0)  # of the random inputs on which a measured map has to hold
SAME = 1e-4  # of the largest output: rounding in float32 stays below, eight-bit activations do not
EXACT, CHECKED = (
    1e-9,
    64,
)  # of the largest output of so many inputs: rounding in float64 stays below, activations of 16 bits do not


class Linear(nn.Linear):
    """Base of what takes the place of a host's `nn.Linear`; made by `of`.

    As it is, it equals the host's layer bit for bit. A subclass overrides `effective_weight` or
    `effective_bias`, and `forward` where the output costs less than the weight.
    """

    @classmethod
    def of(cls: type[L], linear: nn.Linear) -> L:
        """Adopt a host's layer: same parameters, names and hooks."""
        return adopt(cls, linear)

    def effective_weight(self) -> Tensor:
        """W (out, in) of y = W x + b, differentiable."""
        return self.weight

    def effective_bias(self) -> Tensor | None:
        """b (out,) of y = W x + b, differentiable; None for zero."""
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.effective_bias())


def acts_as_linear(layer: object) -> bool:
    """Whether `affine` may be tried: on linear layers, wrappers of one, 1 x 1 convolutions."""
    return isinstance(layer, nn.Module) and (_is_pointwise(layer) or _input_width(layer) is not None)


def affine(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(W (out, in), b (out,) or None) of a layer that computes y = W x + b in eval mode.

    The result is differentiable.

    Read from a plain layer, asked of one with `effective_weight`, and measured of any other: its
    response to zero and to the unit vectors, which is exact for an affine map. Hooks on the layer
    are not part of it. Raises HostError if the layer cannot be run on such inputs, or if its
    response to others is not that of the map found.
    """
    if callable(getattr(layer, "effective_weight", None)):
        bias = getattr(layer, "effective_bias", None)
        return layer.effective_weight(), bias() if callable(bias) else getattr(layer, "bias", None)
    if type(layer).forward is nn.Linear.forward:
        return layer.weight, layer.bias
    if _is_pointwise(layer):
        return layer.weight.flatten(1), layer.bias
    return _measured(layer)


@torch.no_grad()
def folds(layer: Linear) -> bool:
    """Whether its output in eval mode is that of its effective weight and bias.

    Measured in float64 on random inputs.
    """
    twin = _twin(layer, shared=False).double()
    draws = torch.randn(CHECKED, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([scale * draws for scale in SCALES]).to(next(twin.parameters()).device)
    expected = F.linear(x, twin.effective_weight(), twin.effective_bias())
    return bool((twin(x) - expected).abs().amax() <= EXACT * expected.abs().amax())


def _is_pointwise(layer: nn.Module) -> bool:
    """True for a convolution that sees one place at a time, all channels together."""
    own = type(layer).forward in [kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]
    return own and layer.groups == 1 and layer.weight[0, 0].numel() == 1


def _input_width(layer: nn.Module) -> int | None:
    """The input width of a layer, or of the first module inside that has one."""
    for module in layer.modules():
        width, weight = getattr(module, "in_features", None), getattr(module, "weight", None)
        if isinstance(width, int):
            return width
        if isinstance(weight, Tensor) and weight.ndim == 2:
            return weight.shape[1]
    return None


def _measured(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """`affine` from the outputs for zero and unit vectors, checked on random ones."""
    name, width = f"{type(layer).__module__}.{type(layer).__name__}", _input_width(layer)
    advice = "Give it a method effective_weight() -> (out, in), or merge the adapter into the layer."
    if width is None:
        raise HostError(
            f"Found a {name} whose input width is not known. Expected a linear layer or a wrapper around one. {advice}"
        )
    tensors = dict([*layer.named_parameters(), *layer.named_buffers()])
    like = next((t for t in tensors.values() if t.is_floating_point()), torch.zeros(0))
    wide = {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}
    basis = torch.cat([torch.zeros(1, width), torch.eye(width)]).double()
    others = torch.randn(basis.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # The check is a sequence of its own: a layer that mixes tokens would answer alike within one.
    inputs = torch.stack([basis, *(scale * others for scale in SCALES)]).to(like.device)
    try:
        with torch.autocast(like.device.type, enabled=False):
            outputs = functional_call(_twin(layer), wide, (inputs,))  # (1 + scales, 1 + width, out)
        bias, weight = outputs[0, 0], (outputs[0, 1:] - outputs[0, 0]).mT
    except Exception as error:
        raise HostError(
            f"Found a {name} that cannot be run on {width} numbers in float64: {error}. Expected a layer that computes "
            f"W x + b. {advice}"
        ) from error
    expected = F.linear(inputs[1:], weight, bias)
    error, size = (t.detach().abs().amax((1, 2)) for t in (outputs[1:] - expected, expected))
    if not bool((error <= SAME * size).all()):
        raise HostError(f"Found a {name} whose output is no affine map of its input. Expected W x + b. {advice}")
    return weight.to(like.dtype), bias.to(like.dtype) if bias.any() else None


def _twin(layer: nn.Module, shared: bool = True) -> nn.Module:
    """A copy in eval mode, without hooks; shared: with the very tensors of the layer."""
    memo = {id(t): t for t in (*layer.parameters(), *layer.buffers())} if shared else {}
    for module in layer.modules():  # a hook may hold on to the whole model
        memo |= {id(hooks): OrderedDict() for name, hooks in vars(module).items() if name.endswith("_hooks")}
    return copy.deepcopy(layer, memo).eval()
