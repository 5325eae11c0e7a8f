"""The training loop: epochs of steps, tests and readings, into a run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vitreous.base.errors import DataError, HostError, NotReached
from vitreous.base.processes import naming_the_lost
from vitreous.lens.direction import FILE, Direction, find_direction
from vitreous.lens.look import look
from vitreous.lens.reading import Reading
from vitreous.lens.reading import read as read_reading
from vitreous.models import model_folder
from vitreous.tasks import Outputs, save_objective
from vitreous.train.engine import early_stopping, non_finite
from vitreous.train.engine.loader import Loader
from vitreous.train.engine.session import Session
from vitreous.train.engine.sharding import collect_weights, whole
from vitreous.train.engine.signals import Stopping
from vitreous.train.engine.state import NotFinite, ValueNotFinite, random_states, restore, writing
from vitreous.train.engine.step import Step, set_schedules
from vitreous.train.records import alarms, summary
from vitreous.train.records.lost_images import gather_lost, write_quarantine
from vitreous.train.records.predictions import write_mistakes, write_predictions
from vitreous.train.records.progress_display import Shown, speaker
from vitreous.train.records.run_folder import Run, read_metrics, to_resume


def go_on(session: Session, run: Run, console: Console) -> None:
    """Train from the progress of the session to the end."""
    say, first = speaker(console), session.progress.epoch
    settings, metric = session.settings, session.task.metrics[0]
    tracked, shown = session.trackers.of(run.folder, first, say), Shown(console, settings.epochs, metric)
    with Stopping(to_resume(run.folder), say) as stopping, naming_the_lost(), tracked, shown, closing(session.train):
        # a run that was stopped before its first step reads again: `rewind` removed that reading
        if not session.progress.updates:
            collect_weights(session)
            read(session, run, 0)
        while not session.team.first_does(lambda: run.finished(settings, metric)):
            try:
                train_epoch(session, run, stopping, shown)
            except NotFinite as error:
                roll_back(session, run, error, say)
                continue
            finish_epoch(session, run, stopping, shown)
            session.progress = session.progress.next_epoch()
        if settings.patience is not None and session.team.first:
            say(early_stopping.why(read_metrics(run.folder), settings.epochs, settings.patience, metric))
    if session.team.first:
        with writing(run.folder):
            write_mistakes(run, session)
        run.states.clear()


def train_epoch(session: Session, run: Run, stopping: Stopping, shown: Shown) -> None:
    """The rest of a pass over the training images.

    The state is saved at its end, when the run is to stop, and every --save-every updates.
    """
    session.objective.train()
    progress, due = session.progress, session.settings.save_every
    for _ in shown.batches(steps(session, run), len(session.train) - progress.step, progress.epoch):
        if stopping.agree(session.team) or (due and session.progress.updates % due == 0):
            run.states.save(session)
            stopping.end(session.team)
    run.states.save(session)
    stopping.end(session.team)


def steps(session: Session, run: Run) -> Iterator[None]:
    """The steps in the rest of a pass over the training images, one taken at each `next`."""
    progress = session.progress
    session.train.set_epoch(progress.epoch, progress.step)
    started = time.perf_counter()
    for batch in session.train:
        if progress.updates + 1 not in progress.left_out:  # else its batch passes by
            take_step(session, run, batch)
        progress.updates += 1
        progress.lr = set_rate(session)
        progress.step += 1
        now = time.perf_counter()
        progress.seconds, started = progress.seconds + now - started, now
        yield


def take_step(session: Session, run: Run, batch: tuple[Tensor, Tensor]) -> None:
    """One update, unless a loss or gradient is not finite.

    Then NotFinite is raised, and batch and state are in the run folder. batch: images and target as
    they are loaded.
    """
    before, progress = random_states(session.device), session.progress  # for `replay`, should it fail
    images, target = (tensor.to(session.device) for tensor in batch)
    step = Step(session, images, target)
    try:
        losses = session.update.step(session.optimizer, step.gradients, step.norm, step.clip)
    except ValueNotFinite as error:
        raise not_finite(session, run, (images, target), before, error.values) from None
    session.objective.after_update(progress.updates + 1)
    if session.ema is not None:
        session.ema.update(session.objective, step=progress.updates + 1)
    progress.norms.add(step.norms)
    progress.losses.add({"total": losses.total, **losses.by_name}, step.count)
    progress.add_to_curve(losses.total.item(), step.count, len(session.train))
    progress.seen += step.count


def set_rate(session: Session) -> float:
    """Set the learning rate by the number of updates; returns the highest of the groups.

    It is lowered by --rollback-lr for each return to a good state.
    """
    session.scheduler.step_update(session.progress.updates)
    for group in session.optimizer.param_groups:
        group["lr"] *= session.settings.rollback_lr ** len(session.progress.left_out)
    return max(group["lr"] for group in session.optimizer.param_groups)


def finish_epoch(session: Session, run: Run, stopping: Stopping, shown: Shown) -> None:
    """Test, look, and write the results of the epoch.

    All of it follows from the state that was saved before, so that a killed run does it again.
    """
    started, progress = time.perf_counter(), session.progress
    collect_weights(session)
    set_schedules(session.tested, session.fraction_done)
    # `end` is collective, and processes test different numbers of batches: several end afterwards
    pause = stopping.end if session.team.size == 1 else bool
    outcomes = {name: test(session, batches, pause) for name, batches in session.tests.items()}
    gather_lost(session)
    stopping.end(session.team)
    if not session.team.first:
        return
    metrics = {
        "epoch": progress.epoch,
        "lr": progress.lr,
        "losses": progress.losses.values(),
        "gradients": progress.norms.values(),
        "loss_by_update": [[update, total / weight] for update, total, weight in progress.curve],
        "images_per_second": progress.seen / progress.seconds,
        "tests": {name: session.tested.score(outputs) for name, outputs in outcomes.items()},
        "seconds": progress.seconds + time.perf_counter() - started,
    }
    with writing(run.folder):
        direction, reason = calibrate(session)
        metrics |= watch(session, run, progress.epoch, direction) | ({"uncalibrated": reason} if reason else {})
        stopping.end()  # the last chance: from here on the files of the epoch belong together
        lines = [*read_metrics(run.folder), metrics]
        if early_stopping.to_keep(lines, session.settings.patience, session.task.metrics[0]) is metrics:
            model_folder.save(session.tested.model, run.folder, classes=session.data.classes, inputs=session.inputs.config())
            save_objective(session.tested, run.folder)
            if direction is not None:
                direction.save(run.folder / FILE)
            else:  # that of an earlier epoch is not this model's
                (run.folder / FILE).unlink(missing_ok=True)
            write_predictions(run, session, outcomes)
        lost = write_quarantine(session, run)
        run.log(metrics)  # this line says that the epoch is finished: all that it promises is there
        session.trackers.log(metrics)
        summary.write(run.folder)
    shown.epoch(read_metrics(run.folder))
    for line in [*summary.warnings([metrics]), *lost]:
        shown.say(line)
    stopping.end()


@torch.no_grad()
def test(session: Session, batches: Loader, pause: Callable[[], None]) -> Outputs:
    """Outputs of a test set on the CPU, in the first process; empty in the others.

    pause: called after each batch.
    """
    objective, parts = session.tested.eval(), []
    for images, target in batches:
        batch = {"images": images.to(session.device), "target": target.to(session.device)}
        with session.autocast():
            outputs = objective.predict(batch)
        parts.append({name: value.cpu() for name, value in outputs.items()})
        pause()
    parts = session.team.in_turn(parts)  # whole batches were dealt out to the processes in turn
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def calibrate(session: Session) -> tuple[Direction | None, str]:
    """The direction of the model's features that points at the subject, for foreground maps.

    It is found on training images, whose labels play no part. Else None and the reason, such as
    that no feature follows their subjects.
    """
    if session.sample is None:
        return None, ""
    images = next(iter(session.calibration))[0].to(session.device)
    try:
        return find_direction(session.tested.model.eval(), images), ""
    except (DataError, HostError, NotReached) as error:
        return None, str(error)


def read(session: Session, run: Run, epoch: int, direction: Direction | None = None) -> Reading | None:
    """Write a reading of the sample images, if the attention of the model can be read."""
    if session.sample is None or not session.team.first:
        return None
    about = {"weights": "run", "classes": list(session.data.classes)}
    options = {"inputs": session.inputs.config(), "out": run.reading(epoch), "about": about, "direction": direction}
    return look(session.tested.model, session.sample, query_budget=0, **options)


def watch(session: Session, run: Run, epoch: int, direction: Direction | None) -> dict[str, Any]:
    """`read` after an epoch; returns indicators by layer and alarms, for its metrics.

    Where attention can no longer be read, as of a network whose weights have grown without bound,
    there is no reading, and the metrics hold the reason.
    """
    try:
        reading = read(session, run, epoch, direction)
    except (HostError, NotReached) as error:
        shutil.rmtree(run.reading(epoch), ignore_errors=True)
        return {"unread": str(error)}
    if reading is None:
        return {}
    before = [alarms.indicators(read_reading(run.reading(0)))]
    before += [line["indicators"] for line in read_metrics(run.folder) if "indicators" in line]
    present = alarms.indicators(reading)
    return {"indicators": present, "alarms": alarms.alarms([*before, present])}


def not_finite(
    session: Session, run: Run, batch: tuple[Tensor, Tensor], rng: dict[str, Any], values: dict[str, Tensor]
) -> NotFinite:
    """The error for a step that was not taken; writes batch and state before it for `replay`."""
    text = ", ".join(f"{name} {value.item():.4g}" for name, value in values.items())
    gradients = {name: p.grad for name, p in session.parameters.items() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not whole(torch.isfinite(gradient).all())]
    non_finite.dump(session, batch, rng, run.folder)
    origin = non_finite.find_origin(session, batch, rng)
    error = NotFinite(
        f"Found {text} at step {session.progress.updates + 1}, in epoch {session.progress.epoch}"
        + (f"; {len(bad)} gradients are not finite, the first of {bad[0]}" if bad else "")
        + (f"; it begins with {origin}" if origin else "; run again, the step was finite")
        + f". Expected finite numbers. The step was not taken; `vitreous replay {run.folder}` runs it again. "
        "Try a lower --lr, a longer --warmup-epochs or --clip-grad 1; or leave the step out: "
        f"`vitreous resume {run.folder} --rollbacks 1`."
    )
    error.update = session.progress.updates + 1
    return error


def roll_back(session: Session, run: Run, error: NotFinite, say: Callable[[str], Any]) -> None:
    """Put the session into the last good state; the update that failed will be left out.

    Raises the error if no return is left.
    """
    left_out = [*session.progress.left_out, error.update]
    # were all updates of an epoch left out, it would have no losses to record
    if error.update is None or len(left_out) > session.settings.rollbacks or len(left_out) >= len(session.train):
        session.team.fail(error)
    return_to(session, run, session.team.first_does(lambda: run.states.load(say)))
    session.progress.left_out = left_out
    set_rate(session)
    if session.team.first:
        session.trackers.back_to(session.progress.epoch)
    if not session.progress.updates:
        collect_weights(session)
        read(session, run, 0)
    say(f"{error} Went back to the state after {session.progress.updates} updates; update {error.update} is left out.")


def return_to(session: Session, run: Run, state: dict[str, Any] | None) -> None:
    """Put session and folder into a saved state; None: into that before training."""
    if state is not None:
        restore(session, state)
        run.states.latest = session.progress.updates  # a newer one was damaged, and will be written again
    if session.team.first:
        run.rewind(session.progress.epoch, begun=session.progress.updates > 0)
