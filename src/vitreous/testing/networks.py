"""The checks of a whole network that is registered with timm, for any test suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitreous.testing import laws_networks
from vitreous.testing.check import Check
from vitreous.testing.contract import laws
from vitreous.testing.hosts import strengthened


@dataclass(frozen=True)
class Network:
    """A small version of a registered network: its name, keyword arguments, and image side."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    size: int = 64

    def __str__(self) -> str:
        return self.name

    def create(self, **arguments: Any) -> nn.Module:
        """The model as timm builds it; `arguments` go before its own."""
        return timm.create_model(self.name, **(self.arguments | arguments))

    def build(self, **arguments: Any) -> nn.Module:
        """The model in eval mode with large weights, the same at every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = strengthened(self.create(**arguments))
            for module in model.modules():
                if isinstance(module, _BatchNorm) and module.affine:  # spiking layers are silent without such a bias
                    module.bias.data.add_(1.2)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (self.channels, self.size, self.size)}
        return model

    @property
    def channels(self) -> int:
        """Of the images that it takes."""
        return self.arguments.get("in_chans", timm.get_pretrained_cfg(self.name).input_size[0])

    def images(self, count: int = 3, size: tuple[int, int] | None = None, seed: int = 1) -> Tensor:
        """Made images, (count, channels, height, width)."""
        height, width = size or (self.size, self.size)
        return torch.randn(count, self.channels, height, width, generator=torch.Generator().manual_seed(seed))


def network_checks(network: str | Callable[..., nn.Module], *, size: int | None = None, **small: Any) -> list[Check]:
    """The checks of a network that is registered with timm (`register_model`).

    network: its name, or the function that was registered. small: keyword arguments of
    `timm.create_model` for which it is small; the laws build it some thirty times. size: of the
    images, in pixels; default `img_size` of `small`, or else 64. Each check has a `name` and a
    `run()`, which raises ContractError:

        @pytest.mark.parametrize("check", network_checks("mine_tiny", depth=1))
        def test_contract(check):
            check.run()
    """
    name = network if isinstance(network, str) else network.__name__
    item = Network(name, small, size or small.get("img_size", Network.size))
    return [Check(law, item) for law in laws(laws_networks, ["network"])]
