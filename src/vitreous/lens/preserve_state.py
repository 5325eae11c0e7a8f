"""`preserve_state`: run a body in eval mode, and restore modes and random state after it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from vitreous.base.errors import HostError


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients in the body; modes and random state restored after it.

    Random state: of torch, numpy and Python, for models that draw from those.
    """
    modules, random_states = list(model.modules()), (random.getstate(), np.random.get_state())
    modes = [module.training for module in modules]
    devices = {p.device for module in modules for p in module._parameters.values() if p is not None and p.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            if any(modes):  # setting an attribute of a module takes longer than reading it
                set_eval(model)
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            if module.training != mode:
                module.training = mode
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])


def set_eval(model: nn.Module) -> None:
    """`model.eval()`. Raises HostError for an exported program, which has no modes."""
    try:
        model.eval()
    except NotImplementedError as error:
        raise HostError(
            f"Found a {type(model).__name__} that refuses eval mode ({error}), as modules of torch.export do: it runs for one "
            "batch size, without the modules it came from. Expected the model itself. Give the one that was exported."
        ) from error
