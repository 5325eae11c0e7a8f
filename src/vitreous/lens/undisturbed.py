"""A model is left as it was found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients while the body runs; afterwards every module's mode and the random state as before.

    Random state: of torch, numpy and Python, for models that draw from those.
    """
    modes, drawn = {module: module.training for module in model.modules()}, (random.getstate(), np.random.get_state())
    try:
        with torch.no_grad(), torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
