"""The demo: a look at a small trained model, then four trained on made images.

It ends in one table and a report.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table

from vitreous.base import statistics
from vitreous.base.errors import VitreousError
from vitreous.base.files import read_json
from vitreous.base.metrics import CLASSIFICATION
from vitreous.data import ArraySamples, Cutouts
from vitreous.data.preprocess import Preprocess
from vitreous.grafting import ungraft
from vitreous.lens.direction import FILE, Direction
from vitreous.lens.look import look
from vitreous.lens.reading import Reading
from vitreous.models import model_folder
from vitreous.models.weights import read_weights
from vitreous.report.page import write as write_report
from vitreous.train.engine.loader import loader
from vitreous.train.records.predictions import by_image
from vitreous.train.records.run_folder import choose_folder, read_metrics

ARMS = {"plain": (), "SVDA": ("svda",), "SVDA-sqrt": ("svda:scale=sqrt",), "SVD-ViT": ("spc",)}
NETWORK = ("patch_size=4", "embed_dim=64", "depth=4", "num_heads=4", "mlp_ratio=2.0")
RECIPE = ("--lr", "2e-3", "--warmup-epochs", "0.5", "--clip-grad", "1.0", "--model-kwargs", *NETWORK)  # tuned on the plain arm
DATA = ("cutouts", "--epochs", "5")
QUICK = ("cutouts:train=128,test=60", "--epochs", "1")
SHIPPED = Path(__file__).parents[1] / "weights" / "cutouts"  # trained by `vitreous train`; its README says how
LOOKED_AT = 128  # test scenes on which the four are compared by what they look at


def demo(out: str | None, seed: int, quick: bool) -> Path:
    """Train the four, print the table; returns the folder of their run folders."""
    console = Console()
    folder = choose_folder(out, "demo")
    # On matrices this small a second thread gains little, loses much on a busy machine, and changes
    # the last digits.
    torch.set_num_threads(1)
    first_look(folder / "first-look", seed, console)
    train_arms(folder, (*(QUICK if quick else DATA), *RECIPE, "--seed", str(seed)), console)
    console.print()
    console.print(compare(folder, seed))
    report = write_report([folder / arm for arm in ARMS], folder / "report.html")
    console.print(f"\nReport of the four, epoch by epoch: {report}", soft_wrap=True, highlight=False)
    called = Path(sys.argv[0])  # typed again as it was, where the shell does not find it by its name alone
    program = str(called) if called.name == "vitreous" and not shutil.which("vitreous") else "vitreous"
    following = [program, "train", "cutouts", "--model", str(folder / "plain"), "--graft", "svda:start=gentle,scale=sqrt"]
    folders = ", ".join(str(folder / arm) for arm in ARMS)
    console.print(
        "SVDA and SVD-ViT are as published; SVDA-sqrt is SVDA with the scale sqrt(K) in place of 1/sqrt(K). This is one seed "
        "of one made set: what holds over more is in the project's benchmarks/svda/table.md and benchmarks/svd_vit/table.md.",
        soft_wrap=True,
    )
    console.print(f"Run folders: {folders}; each has a summary.md.", soft_wrap=True)
    console.print("Next, go on from the plain model with SVDA at a scale that lets it select:", soft_wrap=True)
    console.print(f"  {shlex.join([*following, '--epochs', '2', '--lr', '1e-4'])}", soft_wrap=True, highlight=False)
    return folder


def train_arms(folder: Path, words: tuple[str, ...], console: Console) -> None:
    """`vitreous train` of each arm with these words, in processes of their own.

    As many at a time as the machine has cores; their lines are printed as they come, behind the
    arm's name. Raises VitreousError if one fails.
    """
    cores = os.cpu_count() or 1
    running: list[subprocess.Popen] = []
    console.print(
        f"\nTraining {', '.join(ARMS)}: {min(cores, len(ARMS))} at a time, one thread each.", style="bold", highlight=False
    )

    def one(arm: str) -> tuple[str, int]:
        command = [sys.executable, "-m", "vitreous", "train", *words, "--out", str(folder / arm)]
        command += [word for graft in ARMS[arm] for word in ("--graft", graft)]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        running.append(child)
        for line in child.stdout:
            console.print(f"{arm}: {line.rstrip()}", soft_wrap=True, highlight=False, markup=False)
        return arm, child.wait()

    with ThreadPoolExecutor(min(cores, len(ARMS))) as pool:
        try:
            failed = [arm for arm, status in pool.map(one, ARMS) if status]
        finally:  # on Ctrl-C the arms that run have it too, and end by themselves
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running:
                child.wait()
    if failed:
        raise VitreousError(f"Training ended early: {', '.join(failed)}. Expected all to end. The lines above say why.")


def first_look(folder: Path, seed: int, console: Console) -> None:
    """Look at the shipped model on a few scenes, and write its report.

    Half of them have swapped backgrounds.
    """
    usual, swapped = (Cutouts(12, split=split, seed=seed) for split in ("test", "swapped"))
    images, masks = (np.concatenate([getattr(part, name) for part in (usual, swapped)]) for name in ("images", "masks"))
    scenes = ArraySamples(images, np.concatenate([usual.labels, swapped.labels]), masks)
    model = model_folder.load(SHIPPED)
    about = {"name": "cutouts, shipped", "weights": "run"}
    reading = look(model, scenes, direction=Direction.load(SHIPPED / FILE), curves=4, seed=seed, out=folder, about=about)
    report = write_report([folder], folder / "report.html")
    console.print("What a small trained model looks at, before anything is trained:", style="bold", highlight=False)
    console.print(f"  {share(reading)}", highlight=False)
    console.print(f"  Report: {report}", soft_wrap=True, highlight=False)


def share(reading: Reading) -> str:
    """How much of the last layer's attention lies on the object, in words."""
    value, low, high, area = foreground_share(reading)
    return (
        f"{100 * value:.0f} % of the class token's last attention is on the object ({100 * low:.0f} to {100 * high:.0f}), "
        f"which covers {100 * area:.0f} % of the scene."
    )


def foreground_share(reading: Reading) -> tuple[float, float, float, float]:
    """Mean share of the last layer's attention on the object, with its 95 % interval.

    Heads are averaged; the object's area comes last.
    """
    summary = reading.facts["summary"]
    last = max(reading.layers, key=lambda layer: layer["layer"])["layer"]

    def row(component: str, layer: int) -> int:
        keys = {"component": component, "layer": layer, "head": -1, "measure": "energy_inside"}
        return int(np.flatnonzero(np.logical_and.reduce([summary[key] == value for key, value in keys.items()]))[0])

    here = row("attention", last)
    return *(float(summary[name][here]) for name in ("mean", "low", "high")), float(summary["mean"][row("area", -1)])


def compare(folder: Path, seed: int) -> Table:
    """One table of the four runs, from their folders and from looking at the same scenes."""
    scenes = {arm: test_scenes(folder / arm, LOOKED_AT, seed) for arm in ARMS}
    readings = {
        arm: look(model_folder.load(folder / arm), scenes[arm][0], inputs=scenes[arm][1].config(), seed=seed) for arm in ARMS
    }
    table = Table(
        title="cutouts, backgrounds usual or swapped: accuracy, gain over plain, attention (95 %)", title_justify="left"
    )
    table.add_column("")
    for arm in ARMS:
        table.add_column(arm, justify="right")
    right = {
        arm: {name: np.array([*values.values()]) for name, values in by_image(folder / arm, CLASSIFICATION[0]).items()}
        for arm in ARMS
    }
    rows = {
        "usual": lambda arm: accuracy(right[arm]["test"]),
        "swapped": lambda arm: accuracy(right[arm]["swapped"]),
        "lost by swap": lambda arm: difference(right[arm]["swapped"], right[arm]["test"]),
        "gain, usual": lambda arm: None if arm == "plain" else difference(right[arm]["test"], right["plain"]["test"]),
        "gain, swapped": lambda arm: None if arm == "plain" else difference(right[arm]["swapped"], right["plain"]["swapped"]),
        "on the object": lambda arm: on_object(readings[arm]),
        "effective tokens": lambda arm: indicator(readings[arm], "effective_tokens"),
        "attention entropy": lambda arm: indicator(readings[arm], "attention_entropy"),
        "learned spectral entropy": lambda arm: indicator(readings[arm], "spectral_entropy", source="learned"),
        "seconds": lambda arm: f"{sum(epoch['seconds'] for epoch in read_metrics(folder / arm)):.0f}",
        "graft removed:\nmax difference": lambda arm: f"{left_behind(folder / arm, *scenes[arm]):g}" if ARMS[arm] else None,
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(arm) or "" for arm in ARMS))
    return table


def accuracy(right: np.ndarray) -> str:
    low, high = statistics.wilson(int(right.sum()), len(right))
    return f"{100 * right.mean():.1f} %\n{100 * low:.1f} to {100 * high:.1f}"


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Points of accuracy between two that saw the same objects, and what they come to."""
    value, low, high = statistics.paired(ours, theirs, draws=10_000, few_values=True)
    return f"{100 * value:+.1f}\n{100 * low:+.1f} to {100 * high:+.1f}\n{statistics.verdict([(low, high)])}"


def on_object(reading: Reading) -> str:
    value, low, high, area = foreground_share(reading)
    return f"{100 * value:.1f} % of {100 * area:.1f} %\n{100 * low:.1f} to {100 * high:.1f}"


def indicator(reading: Reading, name: str, source: str = "attention") -> str | None:
    """Mean over layers, heads and images; None where there is no such measure."""
    table = reading.table()
    values = table[name][(table["source"] == source) & np.isfinite(table[name])]
    return f"{np.mean(values):.2f}" if len(values) else None


@torch.no_grad()
def left_behind(folder: Path, scenes: Cutouts, inputs: Preprocess) -> float:
    """Largest difference of logits between a model after ungrafting and one never grafted.

    The second is built by timm alone and given the same host weights.
    """
    model = model_folder.load(folder)
    ungraft(model, all=True)
    name, arguments = model_folder.network_of(folder, read_json(folder / model_folder.CONFIG), {})
    never = timm.create_model(name, **arguments).eval()
    weights = read_weights(folder / model_folder.WEIGHTS)
    images = next(iter(loader(scenes, inputs, 64)))[0]
    never.load_state_dict({name: weights[name] for name in never.state_dict()})
    return (model.eval()(images) - never(images)).abs().max().item()


def test_scenes(folder: Path, count: int, seed: int) -> tuple[Cutouts, Preprocess]:
    """Test scenes, and how the run in the folder prepared its own."""
    inputs = read_json(folder / "run.json")["data"]["inputs"]
    return Cutouts(count, split="test", seed=seed), Preprocess(**inputs)
