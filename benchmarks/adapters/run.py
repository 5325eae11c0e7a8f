"""Do adapters teach a trained network a new task better than a linear probe, and which of them?

    python benchmarks/adapters/run.py choose --data DATA                   learning rates: two each, on seed 0
    python benchmarks/adapters/run.py cifar10-from-cutouts --data DATA     5 arms, 3 seeds, under a minute each on one core
    python benchmarks/adapters/run.py cifar10-from-cutouts-long --data DATA     all 5,000 images, 20 epochs: minutes each

The network that ships with the package was trained on made scenes of six shapes; the new task is CIFAR-10, photographs, of
which 1,000 training images are used. Its weights stay frozen (`--train new+head`): the probe trains the classifier alone, the
other arms the adapters in all four blocks, too. All get the same images in the same order, five epochs, batches of 32, AdamW
without weight decay, and a choice of two learning rates: by the accuracy on a fifth of the training images, held out, with
seed 0, which is in no table. Adapters are as their cards have them by default, so that they differ in how many numbers learn.
Five epochs are short for a probe: fitted to the end (LBFGS, the best of four ridges by test images) on the first 1,000 images
it reaches 27.5 %. Read the differences as what is learned within the budget, and see the long protocol.
The first study of adapters, on the real ViT-Tiny/16, is in `../adaptformer`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import write  # noqa: E402
from study import PROTOCOLS, Arm, accuracies, main  # noqa: E402

from vitreous.base.environment import versions  # noqa: E402
from vitreous.data.holdout import HELD_OUT  # noqa: E402
from vitreous.train import TrainSettings, train  # noqa: E402

NAME, RATES, SEED = "cifar10-from-cutouts", (3e-3, 1e-2), 0
CHOICE = HERE / "rates.json"
KINDS = {  # arm: (graft, what it is)
    "probe": ("", "linear probe: the classifier alone, 650 numbers"),
    "lora": ("lora", "updates of rank 8 of queries and values"),
    "adaptformer": ("adaptformer", "a bottleneck of 64 beside each MLP"),
    "dense-zero": ("dense_adapter:start=zero", "bottlenecks of 64 behind attention and MLP, starting as the host"),
    "dense": ("dense_adapter", "the same with its released start, which changes the output"),
}


def arms() -> dict[str, Arm]:
    """Each with the rate that was chosen for it; none before that."""
    chosen = json.loads(CHOICE.read_text(encoding="utf-8"))["lr"] if CHOICE.exists() else {}
    return {
        name: Arm(tuple(filter(None, [graft])), what=f"{what}; rate {chosen[name]:g}", recipe={"lr": chosen[name]})
        for name, (graft, what) in KINDS.items()
        if name in chosen
    }


ARMS = dict.fromkeys((NAME, f"{NAME}-long"), arms())


def held_out_accuracy(data: Path, graft: str, lr: float) -> float:
    """After the last epoch, on a fifth of the training images."""
    recipe = dict(PROTOCOLS[NAME].recipe)
    recipe["data"] = str(data / str(recipe["data"]))
    work = Path(tempfile.mkdtemp(prefix="adapters-"))
    try:
        settings = TrainSettings(
            **recipe, graft=tuple(filter(None, [graft])), lr=lr, seed=SEED, hold_out=0.2, out=str(work / "run")
        )
        return accuracies(train(settings, Console(quiet=True)))[HELD_OUT]
    finally:
        shutil.rmtree(work)


def choose(data: Path) -> None:
    """Write the best rate of each arm; what is stored already is not done again."""
    torch.set_num_threads(1)
    stored = json.loads(CHOICE.read_text(encoding="utf-8")) if CHOICE.exists() else {"held_out": {}, "lr": {}}
    for name, (graft, _) in KINDS.items():
        scores = stored["held_out"].setdefault(name, {})
        for lr in (rate for rate in RATES if f"{rate:g}" not in scores):
            scores[f"{lr:g}"] = round(held_out_accuracy(data, graft, lr), 4)
            print(f"{name}, rate {lr:g}: {scores[f'{lr:g}']}", file=sys.stderr, flush=True)
            facts = {"command": "python benchmarks/adapters/run.py choose --data DATA", "versions": versions()}
            stored["lr"] |= {name: max(RATES, key=lambda rate: scores[f"{rate:g}"])} if len(scores) == len(RATES) else {}
            write(CHOICE, stored | facts)


if __name__ == "__main__":
    if sys.argv[1:2] == ["choose"]:
        parser = argparse.ArgumentParser(description="Choose the learning rate of each arm.")
        parser.add_argument("choose")
        parser.add_argument("--data", type=Path, required=True)
        choose(parser.parse_args().data)
    else:
        main(HERE, ARMS, sys.argv[1:])
