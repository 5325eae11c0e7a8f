"""SVDA against plain attention: what do the operator, its scale, its start and its penalties cost or win?

    python benchmarks/svda/run.py cutouts                          10 arms, 10 seeds, about a minute each on one core
    python benchmarks/svda/run.py animals-last-2 --data DATA       last two blocks of the real ViT-Tiny/16, 3 epochs, 3 seeds
    python benchmarks/svda/run.py fashion-mnist --data DATA        the follow-up's network, 20,000 images, 3 epochs, 3 seeds
    python benchmarks/svda/run.py cifar10 --data DATA              the same on 5,000 images, 10 epochs, 3 seeds
    python benchmarks/svda/run.py fashion-mnist-full --data DATA   60,000 images, 100 epochs: hours on a GPU; so cifar10-full,
                                                                   cifar100-full, imagenet-100

One file per run in a folder of the data's name; the tables are made by `python benchmarks/study_tables.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from study import Arm, main  # noqa: E402

SCRATCH = {
    "plain": Arm(what="the host's own attention"),
    "qk-norm": Arm(model_kwargs=("qk_norm=True",), what="plain with timm's LayerNorm of queries and keys"),
    "paper": Arm(("svda",), what="SVDA as published: scale 1/sqrt(K), both penalties at 1e-3"),
    "paper-no-entropy": Arm(("svda:entropy=0.0",), what="as published, without the entropy penalty"),
    "one": Arm(("svda:scale=one",), what="SVDA, scale 1"),
    "sqrt": Arm(("svda:scale=sqrt",), what="SVDA, scale sqrt(K)"),
    "sqrt-no-entropy": Arm(("svda:scale=sqrt,entropy=0.0",), what="scale sqrt(K), without the entropy penalty"),
    "sqrt-no-penalty": Arm(("svda:scale=sqrt,entropy=0.0,orthogonality=0.0",), what="scale sqrt(K), without penalties"),
    "learned": Arm(("svda:scale=learned",), what="SVDA, one learned scale per head, from sqrt(K)"),
    "learned-no-entropy": Arm(("svda:scale=learned,entropy=0.0",), what="learned scale, without the entropy penalty"),
}

LATE = "svda:layers=10+11,orthogonality=5e-06,entropy=5e-05"  # the weights of the authors' late-block experiment
LAST_2 = {
    "plain": Arm(what="the host's own attention"),
    "qk-norm": Arm(norms=True, what="plain with LayerNorm of queries and keys in the two blocks, new at their start"),
    "paper": Arm((f"{LATE},start=gentle",), what="SVDA as published: scale 1/sqrt(K), sigma near 1"),
    "sqrt": Arm((f"{LATE},start=gentle,scale=sqrt",), what="SVDA, scale sqrt(K)"),
    "import": Arm(
        (f"{LATE},start=import,scale=sqrt",), what="scale sqrt(K), sigma fitted to the host's attention on 16 images"
    ),
    "sqrt-no-entropy": Arm(
        ("svda:layers=10+11,orthogonality=5e-06,entropy=0.0,start=gentle,scale=sqrt",), what="sqrt without the entropy penalty"
    ),
    "import-no-entropy": Arm(
        ("svda:layers=10+11,orthogonality=5e-06,entropy=0.0,start=import,scale=sqrt",),
        what="import without the entropy penalty",
    ),
    "learned": Arm((f"{LATE},start=gentle,scale=learned",), what="SVDA, one learned scale per head, from sqrt(K)"),
}
FROM_SCRATCH = ("cutouts", "fashion-mnist", "cifar10", "fashion-mnist-full", "cifar10-full", "cifar100-full", "imagenet-100")
ARMS = {"animals-last-2": LAST_2} | dict.fromkeys(FROM_SCRATCH, SCRATCH)

if __name__ == "__main__":
    main(HERE, ARMS, sys.argv[1:])
