"""A model is left as it was found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients while the body runs; afterwards every module's mode and the random state as before.

    Random state: of torch, numpy and Python, for models that draw from those.
    """
    modules, drawn = list(model.modules()), (random.getstate(), np.random.get_state())
    modes = [module.training for module in modules]
    devices = {p.device for module in modules for p in module._parameters.values() if p is not None and p.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            if any(modes):  # to set an attribute of a module takes longer than to read it
                model.eval()
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            if module.training != mode:
                module.training = mode
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
