"""The training loop, one and visible: epochs of steps, tests and readings, written into a run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.base.errors import HostError, NotReached
from vitreous.base.processes import ALONE, Team, connected, naming_the_lost
from vitreous.data import Data, OpenOnce, open_data
from vitreous.grafting import new_parameters
from vitreous.lens.look import look
from vitreous.lens.reading import Reading
from vitreous.lens.reading import read as read_reading
from vitreous.mechanism import parse
from vitreous.models import model_folder
from vitreous.train.engine import early_stopping, non_finite
from vitreous.train.engine.distributed import step_gradients
from vitreous.train.engine.loader import Loader
from vitreous.train.engine.lock import locked
from vitreous.train.engine.prepare import Job, facts, fetch, prepare
from vitreous.train.engine.sharding import whole
from vitreous.train.engine.signals import Stopping
from vitreous.train.engine.state import NotFinite, random_states, restore, writing
from vitreous.train.objectives import set_progress
from vitreous.train.records import alarms, reproducibility, summary
from vitreous.train.records.lost_images import gather_lost, write_quarantine
from vitreous.train.records.progress_display import Shown, speaker
from vitreous.train.records.run_folder import Run, choose_folder, read_metrics, taken, to_resume
from vitreous.train.settings import TrainSettings


def train(settings: TrainSettings, console: Console | None = None) -> Path:
    """Run as told, for each seed; returns the run folder (with several seeds: the one around their folders).

    Raises VitreousError before anything is written if data, model or settings do not fit. Ctrl-C and SIGTERM end it after
    the step, with the state saved: as KeyboardInterrupt, and SystemExit(143).
    """
    with connected(settings.torch_device()) as team:
        return train_seeds(settings, team.console(console or Console()), team)


def train_seeds(settings: TrainSettings, console: Console, team: Team) -> Path:
    """`train`, by a team of processes."""
    arm = "+".join(parse(text, foreign=True).name for text in settings.graft) or "plain"
    name = f"{Path(settings.data.partition(':')[0]).stem}-{arm}"
    folder = team.first_does(lambda: choose_folder(settings.out, name))
    if settings.seeds == 1:
        train_once(settings, folder, console, team=team)
        return folder
    seeds, opening = range(settings.seed, settings.seed + settings.seeds), OpenOnce()
    for seed in seeds:
        train_once(replace(settings, seed=seed, seeds=1), folder / f"seed-{seed}", console, seeds, team, opening)
    if team.first:
        summary.write_seeds(folder, [folder / f"seed-{seed}" for seed in seeds])
    return folder


def train_once(
    settings: TrainSettings,
    folder: Path,
    console: Console,
    seeds: range = range(0),
    team: Team = ALONE,
    opening: Callable[..., Data] = open_data,
) -> None:
    """One run with one seed, into a folder; seeds: of all runs that it is one of; opening: as `prepare` takes it."""
    say = speaker(console)
    fetch(settings, team)
    with ExitStack() as held:
        with team.together():
            job = prepare(settings, console, team, opening)
            run = Run(folder, made=team.first)
            if team.first:
                held.enter_context(locked(folder, say))
                begin(job, run, seeds)
        for remark in [f"Run folder: {folder}", *job.remarks]:
            say(remark)
        run.states.save(job)
        go_on(job, run, console)


def begin(job: Job, run: Run, seeds: range) -> None:
    """Write what is known before training. Raises SettingError if the folder was taken since it was chosen."""
    if (run.folder / "run.json").exists():
        raise taken(run.folder)
    with writing(run.folder):
        run.table("manifest.csv", reproducibility.COLUMNS, reproducibility.manifest(job.data))
        asked = {"data": job.settings.data} | asdict(job.settings)
        write_quarantine(job, run)
        run.start(settings=asked, seeds=[seeds.start, seeds.stop] if seeds else None, **facts(job))


def go_on(job: Job, run: Run, console: Console) -> None:
    """Train from where the job is, to the end."""
    say, first = speaker(console), job.place.epoch
    followed, shown = job.followers.of(run.folder, first, say), Shown(console, job.settings.epochs)
    with Stopping(to_resume(run.folder), say) as stopping, naming_the_lost(), followed, shown, closing(job.train):
        if not job.updates:
            job.collect()
            read(job, run, 0)
        while not finished(job, run):
            try:
                train_epoch(job, run, stopping, shown)
            except NotFinite as error:
                roll_back(job, run, error, say)
                continue
            finish_epoch(job, run, stopping, shown)
            job.place = job.place.next_epoch()
        if job.settings.patience is not None and job.team.first:
            say(early_stopping.why(read_metrics(run.folder), job.settings.epochs, job.settings.patience))
    if job.team.first:
        run.states.clear()


def finished(job: Job, run: Run) -> bool:
    """Whether nothing is left to train, by the metrics that the first process wrote."""
    return job.team.first_does(
        lambda: early_stopping.finished(read_metrics(run.folder), job.settings.epochs, job.settings.patience)
    )


def train_epoch(job: Job, run: Run, stopping: Stopping, shown: Shown) -> None:
    """What is left of a pass over the training images; the state is saved at its end, when told to stop, and when due."""
    job.model.train()
    place, due = job.place, job.settings.save_every
    for _ in shown.batches(steps(job, run), len(job.train) - place.step, place.epoch):
        if stopping.agree(job.team) or (due and job.updates % due == 0):
            run.states.save(job)
            stopping.end(job.team)
    run.states.save(job)
    stopping.end(job.team)


def steps(job: Job, run: Run) -> Iterator[None]:
    """The steps of what is left of a pass over the training images, one taken at each `next`."""
    place = job.place
    job.train.set_epoch(place.epoch, place.step)
    learning = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
    watched = [name for name in new_parameters(job.model) if name in learning]
    started = time.perf_counter()
    for batch in job.train:
        if job.updates + 1 not in place.left_out:
            take_step(job, run, batch, learning, watched)
        job.updates += 1
        place.lr = set_rate(job)
        place.step += 1
        now = time.perf_counter()
        place.seconds, started = place.seconds + now - started, now
        yield


def take_step(job: Job, run: Run, batch: tuple[Tensor, Tensor], learning: dict[str, nn.Parameter], watched: list[str]) -> None:
    """One update, unless a loss or gradient is not finite: then NotFinite, and batch and state are in the run folder.

    learning: the parameters that learn. watched: those whose gradient norms are logged.
    """
    before = random_states(job.device)
    images, labels = (tensor.to(job.device) for tensor in batch)
    job.optimizer.zero_grad(set_to_none=True)
    parts, count = step_gradients(job, images, labels)
    loss = sum(parts.values())
    total = whole(nn.utils.get_total_norm([p.grad for p in learning.values() if p.grad is not None]))
    if not torch.isfinite(loss + total):
        raise not_finite(job, run, (images, labels), before, parts | {"gradient norm": total})
    norms = {name: whole(learning[name].grad.norm()) for name in watched if learning[name].grad is not None}
    if job.settings.clip_grad is not None:
        nn.utils.clip_grads_with_norm_(learning.values(), job.settings.clip_grad, total)
    job.optimizer.step()
    if job.ema is not None:
        job.ema.update(job.model, step=job.updates + 1)
    job.place.norms.add({"total": total} | norms)
    job.place.losses.add({"total": loss, **parts}, count)
    job.place.seen += count


def set_rate(job: Job) -> float:
    """Set the learning rate that follows from the updates so far, lowered for each return to a good state if so told.

    Returns the highest of the parameter groups.
    """
    job.scheduler.step_update(job.updates)
    for group in job.optimizer.param_groups:
        group["lr"] *= job.settings.rollback_lr ** len(job.place.left_out)
    return max(group["lr"] for group in job.optimizer.param_groups)


def finish_epoch(job: Job, run: Run, stopping: Stopping, shown: Shown) -> None:
    """Test, look, and write what the epoch came to. All of it follows from the state that was saved before."""
    started, place = time.perf_counter(), job.place
    job.collect()
    set_progress(job.tested, job.progress)
    pause = stopping.end if job.team.size == 1 else bool  # several processes end together, afterwards
    outcomes = {name: test(job, batches, pause) for name, batches in job.tests.items()}
    gather_lost(job)
    stopping.end(job.team)
    if not job.team.first:
        return
    metrics = {
        "epoch": place.epoch,
        "lr": place.lr,
        "losses": place.losses.values(),
        "gradients": place.norms.values(),
        "images_per_second": place.seen / place.seconds,
        "tests": {name: score(*outcome) for name, outcome in outcomes.items()},
        "seconds": place.seconds + time.perf_counter() - started,
    }
    with writing(run.folder):
        metrics |= watch(job, run, place.epoch)
        stopping.end()
        if early_stopping.kept([*read_metrics(run.folder), metrics], job.settings.patience) is metrics:
            model_folder.save(job.tested, run.folder, classes=job.data.classes, inputs=job.inputs.config())
            write_predictions(run, outcomes, {name: batches.missing for name, batches in job.tests.items()})
        lost = write_quarantine(job, run)
        run.log(metrics)
        job.followers.log(metrics)
        summary.write(run.folder)
    shown.epoch(read_metrics(run.folder))
    for line in [*summary.warnings([metrics]), *lost]:
        shown.say(line)
    stopping.end()


@torch.no_grad()
def test(job: Job, batches: Loader, pause: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n) of a test set, on the CPU; none but in the first process.

    pause: called after each batch.
    """
    model = job.tested.eval()
    found = []
    for images, labels in batches:
        with job.autocast():
            found.append((model(images.to(job.device)).float().cpu(), labels))
        pause()
    found = job.team.in_turn(found) or [(torch.empty(0), torch.empty(0))]
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels)


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, 0 to 1, and mean cross-entropy in nats."""
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": accuracy, "loss": F.cross_entropy(logits, labels).item()}


def read(job: Job, run: Run, epoch: int) -> Reading | None:
    """Look at the sample images, if attention can be seen, and write that down."""
    if job.sample is None or not job.team.first:
        return None
    about = {"weights": "run", "classes": list(job.data.classes)}
    return look(job.tested, job.sample, inputs=job.inputs.config(), out=run.reading(epoch), about=about)


def watch(job: Job, run: Run, epoch: int) -> dict[str, Any]:
    """`read` after an epoch; for its metrics the indicators by layer, and alarms over earlier epochs.

    A network that has gone astray may no longer show its attention as before: then there is no reading, and why is said.
    """
    try:
        found = read(job, run, epoch)
    except (HostError, NotReached) as error:
        shutil.rmtree(run.reading(epoch), ignore_errors=True)
        return {"unread": str(error)}
    if found is None:
        return {}
    before = [alarms.indicators(read_reading(run.reading(0)))]
    before += [line["indicators"] for line in read_metrics(run.folder) if "indicators" in line]
    present = alarms.indicators(found)
    return {"indicators": present, "alarms": alarms.alarms([*before, present])}


def write_predictions(run: Run, outcomes: dict[str, tuple[Tensor, Tensor]], missing: dict[str, set[int]]) -> None:
    """Write predictions.csv: what the model says of each test image that could be read, and how probable it holds that to be.

    missing: {set: indices of images that could not be read}.
    """
    lines = []
    for name, (logits, labels) in outcomes.items():
        probability, predicted = logits.softmax(1).max(1)
        rows = zip(labels.tolist(), predicted.tolist(), probability.tolist(), strict=True)
        indices = (i for i in count() if i not in missing[name])
        lines += [(name, i, label, guess, f"{p:.6f}") for i, (label, guess, p) in zip(indices, rows, strict=False)]
    run.table("predictions.csv", ["set", "index", "label", "predicted", "probability"], lines)


def not_finite(job: Job, run: Run, batch: tuple[Tensor, Tensor], rng: dict[str, Any], shown: dict[str, Tensor]) -> NotFinite:
    """The error for a step that was not taken, after its batch and the state before it were written for `replay`."""
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in shown.items())
    gradients = {name: p.grad for name, p in job.model.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not whole(torch.isfinite(gradient).all())]
    non_finite.dump(job, batch, rng, run.folder)
    origin = non_finite.find_origin(job, batch, rng)
    error = NotFinite(
        f"Found {values} at step {job.updates + 1}, in epoch {job.place.epoch}"
        + (f"; {len(bad)} gradients are not finite, the first of {bad[0]}" if bad else "")
        + (f"; it begins with {origin}" if origin else "; run again, the step was finite")
        + f". Expected finite numbers. The step was not taken; `vitreous replay {run.folder}` runs it again. "
        "Try a lower --lr, a longer --warmup-epochs or --clip-grad 1; or leave the step out: "
        f"`vitreous resume {run.folder} --rollbacks 1`."
    )
    error.update = job.updates + 1
    return error


def roll_back(job: Job, run: Run, error: NotFinite, say: Callable[[str], Any]) -> None:
    """Put the job into the last good state, the update that failed to be left out; raise the error if no return is left."""
    left_out = [*job.place.left_out, error.update]
    if error.update is None or len(left_out) > job.settings.rollbacks or len(left_out) >= len(job.train):
        job.team.fail(error)
    restore(job, job.team.first_does(lambda: run.states.load(say)))
    run.states.latest = job.updates  # a newer one was damaged, and will be written again
    job.place.left_out = left_out
    set_rate(job)
    if job.team.first:
        run.rewind(job.place.epoch, begun=job.updates > 0)
        job.followers.back_to(job.place.epoch)
    if not job.updates:
        job.collect()
        read(job, run, 0)
    say(f"{error} Went back to the state after {job.updates} updates; update {error.update} is left out.")
