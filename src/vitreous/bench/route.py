"""Choose a sub-network of an elastic model by its measured latency."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vitreous.base.errors import SettingError
from vitreous.bench.operation_count import operations
from vitreous.bench.timing import rounds
from vitreous.hosts.subnetwork import Subnetwork, check_plain, cut_out


@dataclass(frozen=True)
class Route:
    """A sub-network. seconds: median of a forward pass of one image; operations: of it."""

    part: Subnetwork
    seconds: float
    operations: int


def measured(
    model: nn.Module,
    parts: Iterable[Subnetwork],
    count: int = 10,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Route]:
    """The parts, each timed on one image in `count` rounds in which all take turns.

    The smallest number of operations first. Raises HostError for a network that is no plain ViT.
    """
    check_plain(model)
    image = torch.zeros(1, model.in_chans, *model.patch_embed.img_size, device=device)
    networks = {part: cut_out(model, part).to(device) for part in parts}
    with torch.no_grad():
        calls = {str(part): partial(network, image) for part, network in networks.items()}
        seconds = rounds(calls, count, device=device, progress=progress)
        routes = [Route(part, statistics.median(seconds[str(part)]), operations(calls[str(part)]).total) for part in networks]
    return sorted(routes, key=lambda route: route.operations)


def choose(routes: list[Route], seconds: float) -> Route:
    """The one of the most operations that takes at most so long.

    Raises SettingError where none does.
    """
    fitting = [route for route in routes if route.seconds <= seconds]
    if not fitting:
        fastest = min(route.seconds for route in routes)
        raise SettingError(
            f"Found a limit of {1e3 * seconds:.3g} ms. Expected {1e3 * fastest:.3g} ms or more, which the fastest sub-network "
            "takes here. Give a higher limit."
        )
    return max(fitting, key=lambda route: route.operations)
