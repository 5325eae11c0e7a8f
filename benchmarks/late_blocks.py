"""The last blocks of the real ViT-Tiny/16, trained on stored tokens of its first ones, which stay as they are.

The 32 animals of Tiny-ImageNet at 112 pixels: what stands before the border is run once per image, without augmentation, and
stored in half precision; a training step starts there. That takes a third of the time of a whole step or less, and is the
late-block protocol of SVDA's authors, but for data, resolution and length.

    python benchmarks/late_blocks.py choose DATA [BORDER ...]    the learning rates, on every tenth training image, held out

The learning rate is chosen on those for the plain arm alone, so that it favours no mechanism; the final runs train on all
training images, with other seeds. The tokens stay in runs/late_blocks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitreous
from vitreous.base.environment import versions
from vitreous.data import Data, Samples
from vitreous.data.preprocess import Preprocess
from vitreous.grafting import penalties
from vitreous.layers.stream import Stream, TokenState
from vitreous.lens.reading import Reading
from vitreous.train import TrainSettings
from vitreous.train.engine.loader import loader
from vitreous.train.engine.prepare import data_and_model
from vitreous.train.optimizer import make_scheduler, parameter_groups

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from common import write  # noqa: E402
from tiny_imagenet.run import TENTH, unpacked  # noqa: E402

WORK = Path("runs/late_blocks")
SLICE, BATCH, LOOKED_AT = 2000, 64, 128
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
CHOICE = HERE / "late_blocks.json"


@dataclass(frozen=True)
class Tokens:
    """Behind the border: train and test (n, 1 + N, D) in half precision, their labels, and the names of the test images."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    test_names: tuple[str, ...]


def settings(data: Path, **more: object) -> TrainSettings:
    """Of the network before the border, and of everything behind it."""
    weights = data / "weights" / "vit_tiny_patch16_224"
    recipe = {"image_size": 112, "epochs": 3, "batch_size": BATCH, "opt": "adamw", "weight_decay": 1e-4, "warmup_epochs": 0.2}
    return TrainSettings(str(unpacked(data)), model=str(weights), **(recipe | more))


def network(data: Path, seed: int) -> tuple[Data, Preprocess, nn.Module]:
    """Data, preparation, and the pretrained network with a new classifier of 32 classes, drawn by the seed."""
    found, inputs, model, _ = data_and_model(settings(data, seed=seed))
    return found, inputs, model


@cache
@torch.no_grad()
def tokens_behind(data: Path, border: int) -> Tokens:
    """The tokens of all images behind so many blocks, stored slice by slice."""
    found, inputs, model = network(data, 0)
    model.eval()
    parts: dict[str, Tensor] = {}
    for part, images in {"train": found.train, "test": found.tests["test"]}.items():
        slices = []
        for first in range(0, len(images), SLICE):
            path = WORK / f"tokens-{border}-{part}-{first}.pt"
            if not path.exists():
                WORK.mkdir(parents=True, exist_ok=True)
                some = images.subset(np.arange(first, min(first + SLICE, len(images))))
                run = [
                    vitreous.run(model, vitreous.embed(model, x), stop=border).x.half() for x, _ in loader(some, inputs, BATCH)
                ]
                torch.save(torch.cat(run), path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
                print(
                    f"tokens behind block {border}, {part}: {first + len(some)} of {len(images)}", file=sys.stderr, flush=True
                )
            slices.append(torch.load(path, weights_only=True))
        parts[part], parts[f"{part}_labels"] = torch.cat(slices), torch.as_tensor(images.labels)
    return Tokens(**parts, test_names=tuple(found.tests["test"].names))


def held_out(tokens: Tokens) -> Tokens:
    """Every tenth training image in place of the test images."""
    out = torch.arange(len(tokens.train)) % TENTH == 0
    return replace(
        tokens,
        train=tokens.train[~out],
        train_labels=tokens.train_labels[~out],
        test=tokens.train[out],
        test_labels=tokens.train_labels[out],
        test_names=(),
    )


def prepared(model: nn.Module, border: int, graft: tuple[str, ...], norms: bool, images: Callable[[], Tensor]) -> None:
    """Graft, with images for what is fitted to them (SVDA's start=import), and freeze what stands before the border.

    norms: timm's LayerNorm of queries and keys in the blocks behind the border, as `qk_norm` has it, at its start.
    """
    if norms:
        for block in model.blocks[border:]:
            block.attn.q_norm = nn.LayerNorm(block.attn.head_dim)
            block.attn.k_norm = nn.LayerNorm(block.attn.head_dim)
    if graft:
        vitreous.graft(model, *(vitreous.parse(text) for text in graft))
        if any("start=import" in text for text in graft):
            vitreous.calibrate(model, images())
    before = [model.patch_embed, *model.blocks[:border]]
    for parameter in (model.cls_token, model.pos_embed, *(p for module in before for p in module.parameters())):
        parameter.requires_grad_(False)


def logits(model: nn.Module, tokens: Tensor, state: TokenState, border: int) -> Tensor:
    return vitreous.finish(model, vitreous.run(model, Stream(tokens.float(), state), start=border))


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tokens, state: TokenState, border: int) -> float:
    """Share of the test images that are recognised."""
    model.eval()
    right = [
        (logits(model, x, state, border).argmax(1) == y).double()
        for x, y in zip(tokens.test.split(BATCH), tokens.test_labels.split(BATCH), strict=True)
    ]
    return torch.cat(right).mean().item()


def trained(model: nn.Module, tokens: Tokens, border: int, recipe: TrainSettings, seed: int) -> list[dict]:
    """Train what stands behind the border; per epoch accuracy and seconds. The order is drawn by the seed."""
    with torch.no_grad():
        state = vitreous.embed(model, torch.zeros(1, 3, 112, 112)).state
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.lr)
    steps = len(tokens.train) // BATCH
    schedule, generator, epochs, done = make_scheduler(optimizer, recipe, steps), torch.Generator().manual_seed(seed), [], 0
    for _ in range(recipe.epochs):
        begun = time.perf_counter()
        model.train()
        for chosen in torch.randperm(len(tokens.train), generator=generator)[: steps * BATCH].split(BATCH):
            schedule.step_update(done)
            loss = F.cross_entropy(logits(model, tokens.train[chosen], state, border), tokens.train_labels[chosen])
            loss = loss + sum(penalties(model).values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
        seconds = time.perf_counter() - begun
        epochs.append({"tests": {"test": accuracy(model, tokens, state, border)}, "seconds": round(seconds, 1)})
    return epochs


def run_one(data: Path, border: int, graft: tuple[str, ...], norms: bool, seed: int, lr: float) -> tuple[dict, Reading]:
    """Train one arm: what a result file holds of it, and a reading of test images with boxes, every class alike."""
    tokens = tokens_behind(data, border)
    found, inputs, model = network(data, seed)
    prepared(model, border, graft, norms, lambda: calibration_images(found.train, inputs))
    epochs = trained(model, tokens, border, settings(data, seed=seed, lr=lr), seed)
    images = found.tests["test"]
    chosen = images.subset(np.arange(0, len(images), len(images) // LOOKED_AT)[:LOOKED_AT])
    reading = vitreous.look(model.eval(), chosen, inputs=inputs.config(), noise=0, seed=seed)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return {"accuracy": epochs[-1]["tests"], "epochs": epochs, "parameters": numbers, "lr": lr}, reading


def calibration_images(images: Samples, inputs: Preprocess) -> Tensor:
    """One training image of every second class, (16, 3, 112, 112), for mechanisms that look at images before training."""
    some = images.subset(np.arange(0, len(images), len(images) // 16)[:16])
    return torch.cat([x for x, _ in loader(some, inputs, 16)])


def choose(data: Path, borders: Iterable[int]) -> None:
    """The rate of each border by held-out accuracy of the plain arm, with two seeds that are in no table.

    What is stored already is not done again.
    """
    torch.set_num_threads(1)
    stored: dict[str, dict] = json.loads(CHOICE.read_text(encoding="utf-8")) if CHOICE.exists() else {}
    for border in borders:
        scores = stored.get(str(border), {}).get("held_out", {})
        for lr in (rate for rate in RATES if f"{rate:g}" not in scores):
            values = []
            for seed in (0, 1):
                model = network(data, seed)[2]
                prepared(model, border, (), False, Tensor)
                tokens = held_out(tokens_behind(data, border))
                values.append(trained(model, tokens, border, settings(data, seed=seed, lr=lr), seed)[-1]["tests"]["test"])
            scores[f"{lr:g}"] = round(float(np.mean(values)), 4)
            print(f"border {border}, lr {lr:g}: {values}", file=sys.stderr, flush=True)
            stored[str(border)] = {
                "held_out": scores,
                "lr": max((rate for rate in RATES if f"{rate:g}" in scores), key=score(scores)),
            }
            write(CHOICE, stored | {"command": "python benchmarks/late_blocks.py choose DATA", "versions": versions()})


def score(scores: Mapping[str, float]) -> Callable[[float], float]:
    return lambda rate: scores[f"{rate:g}"]


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "choose":
        raise SystemExit("usage: python benchmarks/late_blocks.py choose DATA [BORDER ...]")
    choose(Path(sys.argv[2]), [int(border) for border in sys.argv[3:]] or (10, 7))
