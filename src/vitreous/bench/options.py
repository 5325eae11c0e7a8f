"""The options of a bench, as the command line shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitreous.train.options import Repeated


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and where."""

    graft: Repeated = ()
    """A mechanism to put into MODEL, such as svda:scale=one,layers=6-11. See `vitreous list`."""
    against: tuple[str, ...] = ()
    """Other models to compare with: names of timm's, or model folders.
    Grafts are compared with the plain model anyway."""
    mode: tuple[Literal["inference", "training"], ...] = ("inference",)
    """inference: a forward pass.
    training: forward, loss with grafts' penalties, backward, AdamW."""
    batch: tuple[int, ...] = (16,)
    """Images per call, one or several numbers."""
    image_size: tuple[int, ...] = ()
    """Pixels a side, one or several (default: the model's own)."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16: the forward pass under autocast."""
    compile: bool = False
    """Compile every model with torch.compile."""
    rounds: int = 60
    """Rounds of one call per model, 16 or more. The interval narrows with their square root."""
    model_kwargs: tuple[str, ...] = ()
    """MODEL's own arguments: name=value ..., such as depth=6."""
    foreign: bool = False
    """Import mechanisms of other packages, package.module.Class, that a folder names.
    This runs their code."""
    device: str = "auto"
    """auto (a GPU if there is one) | cpu | cuda | cuda:1 ..."""
    out: str | None = None
    """Folder for bench.json and report.html, new or empty (default: the next free bench/NAME)."""
