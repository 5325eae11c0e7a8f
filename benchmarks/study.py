"""What the two studies of the papers share: one training per (data, arm, seed), one result file each, and their tables.

An arm is a network with mechanisms; a set of data brings its own network and recipe. A result file is written whole, or not
at all, so that a study that was cut off goes on where it was. It holds the command, the commit, versions, machine, wall
time, accuracy per test set, and what the trained model attends to on scenes with masks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import vitreous
from vitreous.base.environment import machine, versions
from vitreous.data import Cutouts
from vitreous.data.preprocess import Preprocess
from vitreous.lens.look import look
from vitreous.lens.reading import Reading
from vitreous.models import model_folder
from vitreous.train import TrainSettings, train
from vitreous.train.records.run_folder import read_metrics, read_table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import late_blocks  # noqa: E402

LOOKED_AT = 128  # test scenes with masks
SCORED = ("attention", "area", "exposed_spc_share")  # against masks
INDICATORS = ("attention_entropy", "effective_tokens", "spectral_entropy", "effective_rank", "angular_alignment")


@dataclass(frozen=True)
class Arm:
    """One way of building the network: grafts, and the network's own arguments beside those of the data's recipe."""

    graft: tuple[str, ...] = ()
    model_kwargs: tuple[str, ...] = ()
    what: str = ""
    model: str | None = None  # another network than the recipe's; `model_kwargs` are then all that it gets
    recipe: Mapping[str, object] = field(default_factory=dict)  # in place of the protocol's: a learning rate of its own
    norms: bool = False  # `late_blocks`: LayerNorm of queries and keys, which from scratch is a keyword of the model


@dataclass(frozen=True)
class Protocol:
    """Data with the network and recipe of all arms, and the seeds of the final tables."""

    recipe: Mapping[str, object]
    seeds: tuple[int, ...]
    floor: float  # accuracy below which a run is broken: never learned, or read the wrong labels
    from_data: bool = False  # the recipe's data is a path below the folder of data
    model_kwargs: tuple[str, ...] = field(default=())
    border: int | None = None  # `late_blocks`: the pretrained blocks that stay as they are


NETWORK = ("patch_size=4", "embed_dim=64", "depth=4", "num_heads=4", "mlp_ratio=2.0")
DEMO = {"data": "cutouts", "epochs": 5, "lr": 2e-3, "warmup_epochs": 0.5, "clip_grad": 1.0}
# The follow-up's experiments, but for the number of images and epochs: post-norm, no positions, Adam, constant rate.
SCRATCH = {"opt": "adam", "lr": 3e-4, "sched": "none", "weight_decay": 0.0, "batch_size": 64}
CIFAR = SCRATCH | {"model": "scratch_vit_patch4_32"}
IMAGENET_100 = SCRATCH | {
    "data": "imagenet-100",
    "model": "scratch_vit_patch8_224",
    "lr": 1e-4,
    "batch_size": 32,
    "epochs": 100,
}
FASHION = SCRATCH | {"data": "fashion-mnist", "model": "scratch_vit_patch4_28", "epochs": 3, "limit": 20_000}
# The network that ships with the package, trained on made scenes, to photographs; `adapters/run.py` says how.
NEW_TASK = {
    "data": "cifar10/cifar10_5k2k.npz",
    "model": str(Path(vitreous.__file__).parent / "weights" / "cutouts"),
    "train": "new+head",
    "epochs": 5,
    "limit": 1000,
    "batch_size": 32,
    "weight_decay": 0.0,
    "warmup_epochs": 0.5,
}
PROTOCOLS = {
    # Seeds 0 to 4 were seen while settings were chosen; these were not.
    "cutouts": Protocol(DEMO, tuple(range(11, 21)), 0.5, model_kwargs=NETWORK),
    "fashion-mnist": Protocol(FASHION, (42, 43, 44), 0.4, from_data=True),
    "fashion-mnist-full": Protocol(FASHION | {"epochs": 100, "limit": None}, (42, 43, 44), 0.8, from_data=True),
    "cifar10": Protocol(CIFAR | {"data": "cifar10/cifar10_5k2k.npz", "epochs": 10}, (42, 43, 44), 0.2, from_data=True),
    "cifar10-full": Protocol(
        CIFAR | {"data": "cifar-10-batches-py", "epochs": 100, "aug": "pad"}, (42, 43, 44), 0.5, from_data=True
    ),
    "cifar100-full": Protocol(
        CIFAR | {"data": "cifar-100-python", "epochs": 100, "aug": "pad"}, (42, 43, 44), 0.2, from_data=True
    ),
    "imagenet-100": Protocol(IMAGENET_100 | {"aug": "flip"}, (42, 43, 44), 0.2, from_data=True),
    "cifar10-from-cutouts": Protocol(NEW_TASK, (42, 43, 44), 0.15, from_data=True),
    "cifar10-from-cutouts-long": Protocol(NEW_TASK | {"epochs": 20, "limit": None}, (42, 43, 44), 0.15, from_data=True),
    # Twice the pixels a side, so that networks that halve the grid from stage to stage have something left to halve.
    "cutouts-64": Protocol(DEMO | {"data": "cutouts:size=64"}, (21, 22, 23), 0.3, model_kwargs=("patch_size=8", *NETWORK[1:])),
    # Rates were chosen on seeds 0 and 1 and on held-out training images, by the plain arm.
    "animals-last-2": Protocol({}, (42, 43, 44), 0.3, from_data=True, border=10),
    "animals-last-5": Protocol({}, (42, 43, 44), 0.3, from_data=True, border=7),
}


def run_one(folder: Path, name: str, arm_name: str, arm: Arm, seed: int, data: Path | None) -> None:
    """Train this arm on this data with this seed, look at it, and write its result file."""
    protocol = PROTOCOLS[name]
    torch.set_num_threads(1)
    begun = time.perf_counter()
    if protocol.border is None:
        found = from_scratch(name, protocol, arm, seed, data)
    else:
        lr = json.loads(late_blocks.CHOICE.read_text(encoding="utf-8"))[str(protocol.border)]["lr"]
        found, reading = late_blocks.run_one(data, protocol.border, arm.graft, arm.norms, seed, lr)
        found["looking"] = {"usual": measures(reading)}
    result = {
        "data": name,
        "arm": arm_name,
        "seed": seed,
        "graft": list(arm.graft),
        "model": arm.model,
        "model_kwargs": arm_arguments(protocol, arm),
        **({"recipe": dict(arm.recipe)} if arm.recipe else {}),
        "command": f"python {folder.relative_to(HERE.parent)}/run.py {name} --arm {arm_name} --seed {seed}",
        **found,
    }
    if protocol.from_data:
        result["command"] += " --data DATA"
    if result["accuracy"]["test"] < protocol.floor:
        result["broken"] = f"accuracy below {protocol.floor}"
    result |= {
        "train_seconds": round(sum(epoch["seconds"] for epoch in result["epochs"]), 1),
        "wall_seconds": round(time.perf_counter() - begun, 1),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }
    write_result(result_path(folder, name, arm_name, seed), result)


def from_scratch(name: str, protocol: Protocol, arm: Arm, seed: int, data: Path | None) -> dict:
    """Train this arm as `vitreous train` does; what its result file holds of it."""
    recipe = dict(protocol.recipe) | ({"model": arm.model} if arm.model else {}) | dict(arm.recipe)
    if protocol.from_data:
        recipe["data"] = str(data / str(recipe["data"]))
    work = Path(tempfile.mkdtemp(prefix="study-"))
    try:
        settings = TrainSettings(
            **recipe,
            model_kwargs=tuple(arm_arguments(protocol, arm)),
            graft=arm.graft,
            seed=seed,
            out=str(work / "run"),
        )
        run = train(settings, Console(quiet=True))
        found = {
            "accuracy": accuracies(run),
            "epochs": [{"tests": epoch["tests"], "seconds": epoch["seconds"]} for epoch in read_metrics(run)],
            "parameters": sum(parameter.numel() for parameter in model_folder.load(run).parameters()),
        }
        return found | ({"looking": looked_at(run, seed)} if name == "cutouts" else {})
    finally:
        shutil.rmtree(work)


def arm_arguments(protocol: Protocol, arm: Arm) -> list[str]:
    """The words of --model-kwargs: those of the protocol's network and the arm's, or of another network the arm's alone."""
    return [*(() if arm.model else protocol.model_kwargs), *arm.model_kwargs]


def accuracies(run: Path) -> dict[str, float]:
    """{test set: share of images that were recognised}, in the last epoch."""
    right: dict[str, list[bool]] = {}
    for line in read_table(run / "predictions.csv"):
        right.setdefault(line["set"], []).append(line["label"] == line["predicted"])
    return {part: float(np.mean(values)) for part, values in right.items()}


def looked_at(run: Path, seed: int) -> dict[str, dict[str, float]]:
    """{"usual" | "swapped": `measures`} of made scenes with masks, backgrounds usual and swapped."""
    inputs = Preprocess(**json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]["inputs"])
    return {
        name: measures(
            look(model_folder.load(run), Cutouts(LOOKED_AT, split=split, seed=seed), inputs=inputs.config(), seed=seed)
        )
        for name, split in (("usual", "test"), ("swapped", "swapped"))
    }


def measures(reading: Reading) -> dict[str, float]:
    """{"measure, layer": mean over images}: what the model attends to on images with masks or boxes.

    The class token's attention, all heads averaged, and each token's share in the SPC tokens, against the mask: share of the
    energy inside (beside the area), AUROC, pointing game. Then the indicators, means over heads, and the share of artifact
    tokens among the patches.
    """
    summary, values = reading.facts["summary"], {}
    for i, measure in enumerate(summary["measure"]):
        component, layer, head = summary["component"][i], int(summary["layer"][i]), int(summary["head"][i])
        if component in SCORED and head == -1 and measure in ("energy_inside", "auroc", "pointing"):
            values[f"{component} {measure}, {layer}"] = float(summary["mean"][i])
    table = reading.table()
    for measure in INDICATORS:
        for source in ("attention", "learned"):
            for layer in np.unique(table["layer"]):
                rows = (table["source"] == source) & (table["layer"] == layer) & np.isfinite(table[measure])
                if rows.any():
                    values[f"{source} {measure}, {layer}"] = float(table[measure][rows].mean())
    for component, layer in reading.maps:
        if component == "artifacts":
            values[f"artifacts, {layer}"] = float(reading.maps[component, layer].mean())
    return {key: round(value, 5) for key, value in values.items()}


def commit() -> str:
    """Of this checkout, with a plus sign where files differ from it."""
    here = ["git", "-C", str(HERE)]
    name = subprocess.run([*here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*here, "status", "--porcelain", "../src"], capture_output=True, text=True, check=True).stdout
    return name + "+" * bool(changed)


def result_path(folder: Path, name: str, arm: str, seed: int) -> Path:
    return folder / name / f"{arm}-{seed}.json"


def write_result(path: Path, result: Mapping[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def results(folder: Path, name: str) -> dict[str, dict[int, dict]]:
    """{arm: {seed: result}} of what is stored; broken runs are left out."""
    found: dict[str, dict[int, dict]] = {}
    for path in sorted((folder / name).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "broken" not in result:
            found.setdefault(result["arm"], {})[result["seed"]] = result
    return found


def broken(folder: Path, name: str) -> int:
    """How many stored runs are broken."""
    return sum("broken" in json.loads(path.read_text(encoding="utf-8")) for path in (folder / name).glob("*.json"))


def main(folder: Path, arms_by_data: Mapping[str, Mapping[str, Arm]], words: Iterable[str]) -> None:
    """`run.py DATA [--arm ARM ...] [--seed SEED ...] [--data FOLDER]`: what is stored already is not done again.

    Seed by seed, so that a study that is cut off has the same seeds in every arm.
    """
    import argparse

    parser = argparse.ArgumentParser(description="Train what is missing of the study.")
    parser.add_argument("protocol", choices=arms_by_data)
    parser.add_argument("--arm", nargs="+")
    parser.add_argument("--seed", nargs="+", type=int)
    parser.add_argument("--data", type=Path, help="the folder that holds fashion-mnist, weights and the others")
    asked = parser.parse_args(list(words))
    name, protocol, arms = asked.protocol, PROTOCOLS[asked.protocol], arms_by_data[asked.protocol]
    if protocol.from_data and asked.data is None:
        parser.error(f"{name} needs --data, the folder that holds {protocol.recipe.get('data', 'weights')}")
    if unknown := sorted(set(asked.arm or ()) - set(arms)):
        parser.error(f"found the arm {unknown[0]!r}; {name} has {', '.join(arms)}")
    left = [
        (seed, arm)
        for seed in asked.seed or protocol.seeds
        for arm in asked.arm or arms
        if not result_path(folder, name, arm, seed).exists()
    ]
    for i, (seed, arm) in enumerate(left, 1):
        if result_path(folder, name, arm, seed).exists():
            continue  # another process has done it meanwhile
        print(f"{i} of {len(left)}: {name}, {arm}, seed {seed}", file=sys.stderr, flush=True)
        run_one(folder, name, arm, arms[arm], seed, asked.data)
