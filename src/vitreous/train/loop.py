"""The training loop, one and visible: epochs of steps, tests and readings, written into a run folder."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.errors import VitreousError
from vitreous.grafting import new_parameters
from vitreous.lens.look import look
from vitreous.mechanism import parse
from vitreous.train import checkpoint, summary
from vitreous.train.inputs import Loader
from vitreous.train.objectives import penalties, set_progress
from vitreous.train.prepare import Job, facts, prepare
from vitreous.train.run import Run, choose_folder
from vitreous.train.settings import TrainSettings


class NotFinite(VitreousError):
    """A loss or gradient is not a finite number."""


def train(settings: TrainSettings, console: Console | None = None) -> Path:
    """Run as told, for each seed; returns the run folder (with several seeds: the one around their folders).

    Raises VitreousError before anything is written if data, model or settings do not fit.
    """
    console = console or Console()
    arm = "+".join(parse(text, foreign=True).name for text in settings.graft) or "plain"
    folder = choose_folder(settings.out, f"{Path(settings.data.partition(':')[0]).stem}-{arm}")
    if settings.seeds == 1:
        train_once(settings, folder, console)
        return folder
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for seed in seeds:
        train_once(replace(settings, seed=seed, seeds=1), folder / f"seed-{seed}", console)
    summary.write_seeds(folder, [folder / f"seed-{seed}" for seed in seeds])
    return folder


def train_once(settings: TrainSettings, folder: Path, console: Console) -> None:
    """One run with one seed, into a folder."""
    job = prepare(settings)
    run = Run(folder)
    run.start(settings={"data": settings.data} | asdict(settings), **facts(job))
    for remark in [f"Run folder: {folder}", *job.remarks]:
        console.print(remark, soft_wrap=True, highlight=False, markup=False)
    read(job, run, 0)
    for epoch in range(1, settings.epochs + 1):
        started = time.perf_counter()
        metrics = train_epoch(job, epoch, console)
        set_progress(job.tested, job.progress)
        outcomes = {name: test(job, batches) for name, batches in job.tests.items()}
        metrics["tests"] = {name: score(*outcome) for name, outcome in outcomes.items()}
        metrics["seconds"] = time.perf_counter() - started
        read(job, run, epoch)
        checkpoint.save(job.tested, folder, classes=job.data.classes, inputs=job.inputs.config())
        write_predictions(run, outcomes)
        run.log(metrics)
        summary.write(run.folder)
        console.print(summary.line(metrics, settings.epochs), soft_wrap=True, highlight=False, markup=False)


def train_epoch(job: Job, epoch: int, console: Console) -> dict[str, Any]:
    """One pass over the training images; returns mean losses and (unclipped) gradient norms by name, the last rate, speed."""
    job.model.train()
    learning = [p for p in job.model.parameters() if p.requires_grad]
    watched = {name: p for name, p in new_parameters(job.model).items() if p.requires_grad}
    losses, norms, seen, started = Means(), Means(), 0, time.perf_counter()
    job.train.set_epoch(epoch)
    description, quiet = f"epoch {epoch}/{job.settings.epochs}", not console.is_terminal
    for images, labels in track(job.train, description, console=console, transient=True, disable=quiet):
        images, labels = images.to(job.device), labels.to(job.device)
        set_progress(job.model, job.progress)
        if job.mixing is not None:
            images, labels = job.mixing(images, labels)
        with job.autocast():
            logits = job.model(images)
        parts = {"classification": job.loss(logits.float(), labels)} | penalties(job.model)
        loss = sum(parts.values())
        job.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        total = nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
        if not torch.isfinite(loss + total):
            raise not_finite(job, epoch, parts, total)
        norms.add({"total": total} | {name: p.grad.norm() for name, p in watched.items() if p.grad is not None})
        if job.settings.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(learning, job.settings.clip_grad, total)
        job.optimizer.step()
        job.updates += 1
        job.scheduler.step_update(job.updates)
        if job.ema is not None:
            job.ema.update(job.model, step=job.updates)
        losses.add({"total": loss, **parts}, len(images))
        seen += len(images)
    lr = max(group["lr"] for group in job.optimizer.param_groups)
    speed = seen / (time.perf_counter() - started)
    return {"epoch": epoch, "lr": lr, "losses": losses.values(), "gradients": norms.values(), "images_per_second": speed}


@torch.no_grad()
def test(job: Job, batches: Loader) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n) of a test set, on the CPU."""
    model = job.tested.eval()
    found = []
    for images, labels in batches:
        with job.autocast():
            found.append((model(images.to(job.device)).float().cpu(), labels))
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels)


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, 0 to 1, and mean cross-entropy in nats."""
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": accuracy, "loss": F.cross_entropy(logits, labels).item()}


def read(job: Job, run: Run, epoch: int) -> None:
    """Look at the sample images, if attention can be seen, and write that down."""
    if job.sample is not None:
        about = {"weights": "run", "classes": list(job.data.classes)}
        look(job.tested, job.sample, inputs=job.inputs.config(), out=run.reading(epoch), about=about)


class Means:
    """Weighted means of scalars by name, added up where they lie, without waiting for a device."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.weight = 0

    def add(self, values: dict[str, Tensor], weight: int = 1) -> None:
        self.weight += weight
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + weight * value.detach().double()

    def values(self) -> dict[str, float]:
        return {name: (total / self.weight).item() for name, total in self.sums.items()}


def write_predictions(run: Run, outcomes: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Write predictions.csv: what the model says of each test image, and how probable it holds that to be."""
    lines = []
    for name, (logits, labels) in outcomes.items():
        probability, predicted = logits.softmax(1).max(1)
        rows = zip(labels.tolist(), predicted.tolist(), probability.tolist(), strict=True)
        lines += [(name, i, label, guess, f"{p:.6f}") for i, (label, guess, p) in enumerate(rows)]
    run.table("predictions.csv", ["set", "index", "label", "predicted", "probability"], lines)


def not_finite(job: Job, epoch: int, parts: dict[str, Tensor], total: Tensor) -> NotFinite:
    """The error for a step that was not taken."""
    shown = ", ".join(f"{name} {value.item():.4g}" for name, value in (parts | {"gradient norm": total}).items())
    bad = [name for name, p in job.model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return NotFinite(
        f"Found {shown} at step {job.updates + 1}, in epoch {epoch}"
        + (f"; {len(bad)} gradients are not finite, the first of {bad[0]}" if bad else "")
        + f". Expected finite numbers. The step was not taken, and the folder holds the model after epoch {epoch - 1}. "
        "Try a lower --lr, a longer --warmup-epochs or --clip-grad 1."
    )
