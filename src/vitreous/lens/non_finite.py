"""Where a model stops being finite: weights, and the first module whose output is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitreous.lens.coordinates.field import tensors
from vitreous.lens.preserve_state import preserve_state


def all_finite(value: Any) -> bool:
    """Whether a tensor, or those in lists, tuples and dicts, hold neither NaN nor infinity."""
    return all(bool(x.isfinite().all()) for x in tensors(value) if x.is_floating_point())


def weights_note(model: nn.Module) -> list[str]:
    """A line that names the parameters with NaN or infinity; none if all are finite."""
    names = [name for name, x in model.named_parameters() if not all_finite(x)]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    text = f"Weights that are not finite (NaN or infinite): {', '.join(names[:4])}{more}. Nothing behind them means anything."
    return [text] if names else []


def outputs_note(model: nn.Module, images: Tensor) -> str:
    """A line that names the first module whose output is not finite, by one more pass."""
    names: list[str] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not names and not all_finite(output):
                names.append(f"{name} ({type(module).__name__})")

        return hook

    like = next((x for x in model.parameters() if x.is_floating_point()), images)
    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    try:
        with preserve_state(model), torch.no_grad():
            model(images.to(like))
    finally:
        for handle in handles:
            handle.remove()
    begin = f"from the output of {names[0]} on" if names else "in a pass"
    return f"Activations are not finite (NaN or infinite) {begin}: layers behind it have no maps."
