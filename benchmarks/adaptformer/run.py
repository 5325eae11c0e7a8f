"""Do AdaptFormer's adapters learn more than a linear probe? On the real ViT-Tiny/16 and 32 animal classes of Tiny-ImageNet.

    python benchmarks/adaptformer/run.py ../shared/data        about 6 minutes on two cores; run it again to go on

Both arms see the same 1,280 training images (40 per class, 64 pixels a side, enlarged to 112) in the same order, and the same
frozen network: the probe trains the classifier on its class token, AdaptFormer the classifier and adapters in the last six
blocks. Each gets the same epochs and the same three learning rates, of which one is chosen on a fifth of the training images
that is held out; then it trains on all. What the frozen blocks say is computed once. A third arm gives the probe twenty times
the epochs. The interval is a paired bootstrap over the 1,600 validation images, on which nothing was chosen.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import AdaptFormer, check, graft, new_parameters
from vitreous.data import Samples, open_data
from vitreous.hosts.host import embed
from vitreous.hosts.host import run as run_blocks

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import vit_tiny, write  # noqa: E402

SIZE, IMAGES, FROZEN = 112, 1280, 6
EPOCHS, BATCH, RATES = 6, 32, (1e-3, 3e-3, 1e-2)
ARMS = {"linear probe": EPOCHS, "AdaptFormer": EPOCHS, "linear probe, 20 x the epochs": 20 * EPOCHS}


def network(data: Path, classes: int) -> nn.Module:
    """The pretrained network for smaller images, with a new classifier."""
    model = vit_tiny(data)
    model.set_input_size(SIZE)
    torch.manual_seed(0)
    model.reset_classifier(classes)
    return model


@torch.no_grad()
def frozen_tokens(model: nn.Module, images: Samples) -> Tensor:
    """Tokens (n, N, D) behind the blocks that stay frozen in both arms."""
    images.transform = lambda image: torch.from_numpy(np.array(image.convert("RGB").resize((SIZE, SIZE), 3))).permute(2, 0, 1)
    parts = []
    for batch in torch.utils.data.DataLoader(images, batch_size=80):
        parts.append(run_blocks(model, embed(model, batch[0].float() / 127.5 - 1), 0, FROZEN).x)
        print(f"frozen blocks: {80 * len(parts)} of {len(images)} images", flush=True)
    return torch.cat(parts)


def built(arm: str, data: Path, classes: int) -> tuple[nn.Module, Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """(model, inputs -> logits, what learns) of an arm at its start; the probe's inputs are features, AdaptFormer's tokens."""
    model = network(data, classes).requires_grad_(False)
    model.head.requires_grad_(True)
    if arm != "AdaptFormer":
        return model, model.head, list(model.head.parameters())
    graft(model, AdaptFormer(layers=range(FROZEN, 12)))
    check(model, torch.zeros(1, 3, SIZE, SIZE))
    learning = [*new_parameters(model).values(), *model.head.parameters()]
    return model, lambda x: rest(model, x), [p.requires_grad_(True) for p in learning]


def rest(model: nn.Module, tokens: Tensor, *, pre_logits: bool = False) -> Tensor:
    """From the tokens behind the frozen blocks to logits, or to the features that the classifier reads."""
    return model.forward_head(model.norm(model.blocks[FROZEN:](tokens)), pre_logits=pre_logits)


def fitted(arm: str, data: Path, x: Tensor, y: Tensor, test: Tensor, rate: float) -> Tensor:
    """The arm trained on x (n, ...), y (n,) at a learning rate; its predicted class of each of `test`."""
    model, forward, learning = built(arm, data, int(y.max()) + 1)
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0)
    epochs = ARMS[arm]
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, started = torch.Generator().manual_seed(0), time.perf_counter()
    model.train()
    for epoch in range(epochs):
        for part in torch.randperm(len(x), generator=order).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=arm == "AdaptFormer"):
                loss = F.cross_entropy(forward(x[part]).float(), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % (epochs // EPOCHS) == 0:
            print(f"{arm}, rate {rate}: epoch {epoch + 1} of {epochs}, {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        return torch.cat([forward(part).argmax(1) for part in test.split(200)])


def accuracy(correct: Tensor) -> tuple[float, float, float]:
    """Mean with its 95 % bootstrap interval over images (10,000 draws)."""
    generator = torch.Generator().manual_seed(0)
    draws = correct[torch.randint(len(correct), (10_000, len(correct)), generator=generator)].mean(1)
    low, high = draws.quantile(torch.tensor([0.025, 0.975]))
    return round(correct.mean().item(), 4), round(low.item(), 4), round(high.item(), 4)


def table(found: dict) -> str:
    """Accuracies, and what each arm gains image by image on the probe."""
    correct = {arm: torch.tensor([float(c) for c in found["correct"][arm]]) for arm in ARMS}
    lines = ["| arm | learning | rate | accuracy | against the probe, paired |", "|---|---|---|---|---|"]
    for arm in ARMS:
        cells = [
            f"{a:.3f} [{b:.3f}, {c:.3f}]"
            for a, b, c in (accuracy(correct[arm]), accuracy(correct[arm] - correct["linear probe"]))
        ]
        lines.append(f"| {arm} | {found['learning'][arm]:,} | {found['rates'][arm]} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main(data: Path) -> None:
    path = HERE / "result.json"
    found = json.loads(path.read_text()) if path.exists() else {"held_out": {}, "rates": {}, "learning": {}, "correct": {}}
    found |= {"command": "python benchmarks/adaptformer/run.py ../shared/data", "images": IMAGES, "epochs": ARMS}
    images = open_data(str(data / "tiny-imagenet-boxes" / "tiny_imagenet_32animals.tar.xz"), limit=IMAGES)
    y, y_test = (torch.as_tensor(np.array(part.labels)) for part in (images.train, images.tests["test"]))
    model = network(data, len(images.classes))
    tokens, tokens_test = frozen_tokens(model, images.train), frozen_tokens(model, images.tests["test"])
    with torch.no_grad():
        x, x_test = ([rest(model, part, pre_logits=True) for part in t.split(200)] for t in (tokens, tokens_test))
    inputs = {arm: (torch.cat(x), torch.cat(x_test)) for arm in ARMS} | {"AdaptFormer": (tokens, tokens_test)}
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for label in range(len(images.classes)):
        held_out[(y == label).nonzero()[::5]] = True
    for arm in ARMS:
        x, x_test = inputs[arm]
        scores = found["held_out"].setdefault(arm, {})
        for rate in RATES:
            if str(rate) not in scores:
                guess = fitted(arm, data, x[~held_out], y[~held_out], x[held_out], rate)
                scores[str(rate)] = round((guess == y[held_out]).float().mean().item(), 4)
                write(path, found)
        if arm not in found["correct"]:
            best = max(RATES, key=lambda rate, scores=scores: scores[str(rate)])
            guess = fitted(arm, data, x, y, x_test, best)
            found["correct"][arm] = "".join(str(int(right)) for right in guess == y_test)
            found["rates"][arm] = best
            found["learning"][arm] = sum(p.numel() for p in built(arm, data, len(images.classes))[2])
            write(path, found)
        print(arm, scores, found["correct"][arm].count("1") / len(y_test), flush=True)
    (HERE / "table.md").write_text(table(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
