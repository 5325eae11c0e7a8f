"""Product, softmax and product one by one, against the fused kernel: which is faster at which shape?

    python benchmarks/attention_path/run.py                 about 10 minutes on two cores; run it again to go on
    python benchmarks/attention_path/run.py --threads 1     the same on one core, to one-thread.json
    python benchmarks/attention_path/run.py --device cuda

Attention alone, float32: queries, keys and values are views of one packed tensor, as in a ViT, and the output is merged over
heads; with gradients, the pass back to the packed tensor is part of it. Widths of ViT-Ti, S and B (3, 6 and 12 heads of 64).
The bounds in `layers.attention.written_out_is_faster` are set by eye on a table like this. Left out are cells whose scores
take more than 256 MiB.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from speed_common import Results, arguments  # noqa: E402

WIDTH, SCALE = 64, 64**-0.5
TOKENS, HEADS, BATCHES = (17, 50, 65, 101, 145, 197, 257, 577), {"Ti": 3, "S": 6, "B": 12}, (1, 16, 64)


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * SCALE) @ k.mT).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


def act(way: Callable[..., Tensor], shape: tuple[int, int, int], learning: bool, device: str) -> Callable[[], object]:
    """Attention of (batch, tokens, heads), forward or also back."""
    batch, tokens, heads = shape
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(batch, tokens, 3, heads, WIDTH, device=device, generator=generator, requires_grad=learning)
    given = torch.randn(batch, tokens, heads * WIDTH, device=device, generator=generator)

    def run() -> None:
        with torch.set_grad_enabled(learning):
            out = way(*packed.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(2)
            if learning:
                torch.autograd.grad(out, packed, given)

    return run


def both(*words) -> dict[str, Callable[[], object]]:
    return {"one by one": act(one_by_one, *words), "fused": act(fused, *words)}


def main() -> None:
    options = arguments(__doc__, minutes={"type": float, "default": float("inf"), "help": "stop after about so long"})
    results = Results(HERE, options, part="result" if options.threads > 1 else "one-thread")
    end = time.monotonic() + 60 * options.minutes
    for tokens in TOKENS:
        for name, heads in HEADS.items():
            for batch in BATCHES:
                if batch * heads * tokens**2 * 4 > 2**30 / 4:  # four such tensors live in the pass back
                    continue
                for learning in (False, True):
                    if time.monotonic() > end:
                        return
                    claim = f"One by one against fused attention, {'training' if learning else 'inference'}"
                    built = partial(both, (batch, tokens, heads), learning, options.device)
                    results.row(claim, f"{tokens} tokens, {name}, batch {batch}", built, count=20)


if __name__ == "__main__":
    main()
