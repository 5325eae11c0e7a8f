"""Does `vitreous train` beat a linear probe on frozen features? The real ViT-Tiny/16 on 32 animal classes of Tiny-ImageNet.

    python benchmarks/tiny_imagenet/run.py ../shared/data      about 12 minutes on two cores; run it again to go on

Both arms start from the same ImageNet weights, see the same 16,000 training images (64 pixels a side, enlarged to 96) as the
same pixels, and are tested on the same 1,600. The weights have learned these 32 classes already, from larger photographs, so
that neither number says how well a class is learned that was never seen; their difference is what fine-tuning adds.

probe: multinomial logistic regression on the class token behind the last norm, each number standardised, fitted to the end
    by L-BFGS; its L2 penalty is chosen among nine.
fine-tuned: the command line of the README, in a process of its own; its learning rate is chosen among three, in short runs
    on 2,560 images, by the same command.

Both choices are made on every tenth training image, held out for it; nothing was chosen on the test images. Then both arms
train on all. The interval is a paired bootstrap over the test images. The run is then exported to ONNX and tested by
onnxruntime. The run folders stay in runs/tiny_imagenet.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitreous.base.statistics import paired, wilson
from vitreous.data.preprocess import Preprocess
from vitreous.train import TrainSettings
from vitreous.train.engine.loader import loader
from vitreous.train.engine.prepare import data_and_model
from vitreous.train.records.run_folder import read_metrics

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import write  # noqa: E402

WORK, FOLDER = Path("runs/tiny_imagenet"), "tiny-imagenet"
PENALTIES = tuple(10.0**k for k in np.arange(-5, -0.9, 0.5))
RATES = (1e-3, 3e-3, 1e-2)
TENTH, SHORT, SLICE = 10, 2560, 2000  # one in ten is held out; images of the runs that choose the rate, and kept at once
RECIPE = ("--image-size", "96", "--epochs", "2", "--batch-size", "32", "--warmup-epochs", "0.2", "--layer-decay", "0.75")


# -- the photographs ---------------------------------------------------------------------------------------------------


def unpacked(data: Path) -> Path:
    """The archive as a plain folder."""
    if not (WORK / "unpacked").exists():
        WORK.mkdir(parents=True, exist_ok=True)
        with tarfile.open(data / "tiny-imagenet-boxes/tiny_imagenet_32animals.tar.xz") as tar:
            tar.extractall(WORK, filter="data")
        (WORK / "unpacked").touch()
    return WORK / FOLDER


def held_out(photos: Path) -> Path:
    """A folder whose val part is every tenth image of the training part, and whose train part are the others, by link."""
    folder = WORK / "held-out"
    if not (folder / "linked").exists():
        for label in sorted((photos / "train").iterdir()):
            for i, file in enumerate(sorted(label.iterdir())):
                link = folder / ("train" if i % TENTH else "val") / label.name / file.name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    os.link(file, link)
        (folder / "linked").touch()
    return folder


# -- the probe -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features(photos: Path, apart: Path, weights: Path) -> dict[str, Tensor]:
    """What the frozen network says of each image, by the loader and the inputs of `vitreous train`, kept slice by slice.

    x_train, x_test (n, D), y_train, y_test (n), held_out (n) bool.
    """
    data, inputs, model, _ = data_and_model(TrainSettings(str(photos), model=str(weights), image_size=96))
    model.eval()
    found = {}
    for part, images in {"train": data.train, "test": data.tests["test"]}.items():
        slices = []
        for first in range(0, len(images), SLICE):
            path = WORK / f"features-{part}-{first}.pt"
            if not path.exists():
                some = images.subset(np.arange(first, min(first + SLICE, len(images))))
                x = [model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in loader(some, inputs, 64)]
                torch.save(torch.cat(x), path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            slices.append(torch.load(path, weights_only=True))
        found[f"x_{part}"], found[f"y_{part}"] = torch.cat(slices), torch.as_tensor(images.labels)
    held = {file.relative_to(apart / "val").as_posix() for file in (apart / "val").rglob("*.JPEG")}
    found["held_out"] = torch.tensor([name.partition("/")[2] in held for name in data.train.names])
    return found


def fitted(x: Tensor, y: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Logistic regression on standardised features, float64, to the end: features (n, D) -> logits (n, classes)."""
    x = x.double()
    mean, std = x.mean(0), x.std(0) + 1e-9
    x = (x - mean) / std
    weight = torch.zeros(int(y.max()) + 1, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    search.step(loss)
    return lambda new: F.linear((new.double() - mean) / std, weight, bias).detach()


def probe(photos: Path, weights: Path) -> dict:
    """The probe with the penalty that does best on held-out images, trained on all."""
    begun = time.perf_counter()
    found = features(photos, held_out(photos), weights)
    x, y, out = found["x_train"], found["y_train"], found["held_out"]
    scores = {}
    for penalty in PENALTIES:
        guess = fitted(x[~out], y[~out], penalty)(x[out]).argmax(1)
        scores[f"{penalty:.2g}"] = round((guess == y[out]).double().mean().item(), 4)
        print(f"probe, penalty {penalty:.2g}: {scores[f'{penalty:.2g}']}", flush=True)
    best = max(PENALTIES, key=lambda penalty: scores[f"{penalty:.2g}"])
    right = fitted(x, y, best)(found["x_test"]).argmax(1) == found["y_test"]
    seconds = round(time.perf_counter() - begun)
    return {"held_out": scores, "chosen": f"{best:.2g}", "correct": bits(right), "seconds": seconds}


# -- fine-tuning ---------------------------------------------------------------------------------------------------------


def trained(name: str, photos: Path, weights: Path, *words: str) -> Path:
    """The run folder of `vitreous train`, or of `vitreous resume` where it was begun."""
    out = WORK / name
    begun = (out / "run.json").exists()
    command = ["resume", str(out)] if begun else [
        "train", str(photos), "--model", str(weights), *RECIPE, *words, "--save-every", "50", "--out", str(out)
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "vitreous", *command], check=True)
    return out


def short(rate: float, photos: Path, weights: Path) -> dict:
    """A short run at a learning rate, tested on the held-out images."""
    out = trained(f"rate-{rate:g}", held_out(photos), weights, "--lr", f"{rate:g}", "--limit", str(SHORT))
    lines = read_metrics(out)
    return {"accuracy": round(lines[-1]["tests"]["test"]["accuracy"], 4), "seconds": round(sum(m["seconds"] for m in lines))}


def fine_tuned(photos: Path, weights: Path, rate: float) -> dict:
    """All training images, at the chosen rate."""
    out = trained("fine-tuned", photos, weights, "--lr", f"{rate:g}")
    lines = read_metrics(out)
    with open(out / "predictions.csv", encoding="utf-8", newline="") as file:
        right = [row["label"] == row["predicted"] for row in csv.DictReader(file)]
    return {"chosen": f"{rate:g}", "correct": bits(right), "seconds": round(sum(line["seconds"] for line in lines))}


def onnx(photos: Path, weights: Path) -> dict:
    """The run as an ONNX file: how many test images onnxruntime gives the class that the run gave them."""
    import onnxruntime

    run, file = WORK / "fine-tuned", WORK / "animals.onnx"
    if not file.exists():
        words = ["export", str(run), "--to", "onnx", "--out", str(file), "--images", str(photos / "val")]
        subprocess.run([sys.executable, "-m", "vitreous", *words], check=True)
    record = json.loads((run / "run.json").read_text())
    data, *_ = data_and_model(TrainSettings(str(photos), model=str(run)))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    batches = loader(data.tests["test"], Preprocess(**record["data"]["inputs"]), 64)
    guesses = np.concatenate([session.run(["logits"], {"images": x.numpy()})[0].argmax(1) for x, _ in batches])
    with open(run / "predictions.csv", encoding="utf-8", newline="") as table:
        same = sum(int(row["predicted"]) == guess for row, guess in zip(csv.DictReader(table), guesses, strict=True))
    parity = json.loads(Path(f"{file}.json").read_text())["parity"]["largest"]
    return {"images": len(guesses), "same class": int(same), "largest difference of a logit": parity}


# -- the table -----------------------------------------------------------------------------------------------------------


def bits(right) -> str:
    """Right or wrong, image by image, as text of 1 and 0."""
    return "".join(str(int(one)) for one in right)


def table(found: dict) -> str:
    """Both accuracies with their intervals, and the paired difference."""
    arms = {"linear probe": found["probe"], "fine-tuned": found["fine-tuned"]}
    right = {name: np.array([c == "1" for c in arm["correct"]]) for name, arm in arms.items()}
    lines = ["| arm | chosen | accuracy | against the probe, paired |", "|---|---|---|---|"]
    for name, what in (("linear probe", "L2 penalty"), ("fine-tuned", "learning rate")):
        low, high = wilson(int(right[name].sum()), len(right[name]))
        gain, least, most = paired(right[name], right["linear probe"])
        lines.append(
            f"| {name} | {what} {arms[name]['chosen']} | {right[name].mean():.3f} [{low:.3f}, {high:.3f}] "
            f"| {gain:+.3f} [{least:.3f}, {most:.3f}] |"
        )
    same = found["onnx"]
    lines += ["", f"onnxruntime gives {same['same class']:,} of {same['images']:,} test images the class that the run gave."]
    return "\n".join(lines) + "\n"


def main(data: Path, *chosen: str) -> None:
    path = HERE / "result.json"
    photos, weights = unpacked(data), data / "weights/vit_tiny_patch16_224"
    parts: dict[str, Callable[[dict], dict]] = {"probe": lambda _: probe(photos, weights)}
    for rate in RATES:
        parts[f"rate {rate:g}"] = lambda _, rate=rate: short(rate, photos, weights)
    best = lambda found: max(RATES, key=lambda rate: found[f"rate {rate:g}"]["accuracy"])  # noqa: E731
    parts["fine-tuned"] = lambda found: fine_tuned(photos, weights, best(found))
    parts["onnx"] = lambda _: onnx(photos, weights)
    for name in chosen or parts:
        found = json.loads(path.read_text()) if path.exists() else {}
        if name not in found:
            made = parts[name](found)
            write(path, found | {"command": "python benchmarks/tiny_imagenet/run.py ../shared/data", name: made})
            print(name, {key: value for key, value in made.items() if key != "correct"}, flush=True)
    found = json.loads(path.read_text())
    if all(name in found for name in parts):
        (HERE / "table.md").write_text(table(found))
        print(table(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
