"""What SVDA costs against the same ViT with its fused attention: a training step, and inference.

    python benchmarks/svda_speed/run.py                      all cells on the CPU, about an hour on two cores
    python benchmarks/svda_speed/run.py --minutes 1          as much of it as fits; run it again to go on
    python benchmarks/svda_speed/run.py --device cuda --compile

ViT-Ti/16 and ViT-S/16 at 224 pixels, batch 16 and 64, random weights, float32. A training step is forward, cross-entropy,
SVDA's own penalties (as the paper trains; the plain arm has none), backward and AdamW. Rounds are paired and stored a few at
a time, so an interrupted run goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

from vitreous import graft
from vitreous.train.objectives import penalties

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from speed_common import Results, arguments  # noqa: E402

ROUNDS = 60
MODELS = {"ViT-Ti/16": "vit_tiny_patch16_224", "ViT-S/16": "vit_small_patch16_224"}
LIMITS = {"training step": 1.05, "inference": 1.03}


def act(name: str, batch: int, work: str, device: str, compiled: bool, svda: bool) -> Callable[[], object]:
    """One training step, or one pass without gradients, of the plain or grafted model."""
    torch.manual_seed(0)
    host = timm.create_model(name).train(work == "training step")
    if svda:
        graft(host, "svda")
    host = host.to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    forward = torch.compile(host) if compiled else host
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-4)

    def step() -> None:
        loss = F.cross_entropy(forward(images), labels) + sum(penalties(host).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def infer() -> None:
        with torch.no_grad():
            forward(images)

    return step if work == "training step" else infer


def both(*words) -> dict[str, Callable[[], object]]:
    return {"svda": act(*words, svda=True), "plain": act(*words, svda=False)}


def main() -> None:
    options = arguments(
        __doc__,
        compile={"action": "store_true", "help": "both arms compiled; the limit is then 1.02"},
        minutes={"type": float, "default": float("inf"), "help": "stop after about so long"},
        cell={"default": "", "help": "only cells whose name holds this, such as 'Ti/16, batch 16'"},
    )
    part = "compiled" if options.compile else "result" if options.threads > 1 else "one-thread"
    results, end = Results(HERE, options, part=part), time.monotonic() + 60 * options.minutes
    cells = [(work, model, batch) for batch in (16, 64) for model in MODELS for work in LIMITS]
    for work, model, batch in cells:
        cell = f"{model}, batch {batch}"
        if options.cell not in f"{cell}, {work}":
            continue
        for count in range(4, ROUNDS + 1, 4):
            if time.monotonic() > end:
                return
            built = partial(both, MODELS[model], batch, work, options.device, options.compile)
            limit = 1.02 if options.compile else LIMITS[work]
            results.row(f"SVDA {work}", cell, built, count=count, limit=limit, slack=0.01, warmup=2)


if __name__ == "__main__":
    main()
