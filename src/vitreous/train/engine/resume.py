"""`resume` goes on with an interrupted run; `replay` repeats a step that was not finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vitreous.base.errors import DataError
from vitreous.base.files import read_json
from vitreous.base.processes import ALONE, Team, connected
from vitreous.data import Data, OpenOnce, open_data
from vitreous.train.engine import non_finite
from vitreous.train.engine.lock import locked
from vitreous.train.engine.loop import go_on, return_to
from vitreous.train.engine.prepare import fetch, prepare, run_metadata
from vitreous.train.records import reproducibility, summary
from vitreous.train.records.progress_display import speaker
from vitreous.train.records.run_folder import Run, no_run, read_rows
from vitreous.train.records.trackers import TRACKERS
from vitreous.train.run import train_once
from vitreous.train.settings import TrainSettings


def resume(folder: str | Path, allow_changes: bool = False, console: Console | None = None, **changed: Any) -> Path:
    """Go on with an interrupted run, or several seeds of one, to the end it would have had.

    Returns the folder. allow_changes: go on though settings, data, grafts or versions have changed.
    changed: other values for settings that do not bear on a step: workers, save_every, rollbacks,
    rollback_lr, tracker.

    Raises DataError if there is no run, SettingError with the differences if something has changed.
    """
    folder, record = Path(folder), first_record(Path(folder))
    settings = recorded_settings(record, changed)
    with connected(settings.torch_device()) as team:
        console = team.console(console or Console())
        if (folder / "run.json").is_file():
            resume_once(folder, allow_changes, console, changed, team)
            return folder
        seeds = range(*(record.get("seeds") or (0, 0)))
        runs, opening = [folder / f"seed-{seed}" for seed in seeds], OpenOnce()
        for seed, path in zip(seeds, runs, strict=True):
            train_or_resume(replace(settings, seed=seed), path, console, team, opening, changed, allow_changes, seeds)
        if team.first:
            summary.write_seeds(folder, runs)
    return folder


def train_or_resume(
    settings: TrainSettings,
    folder: Path,
    console: Console,
    team: Team,
    opening: OpenOnce,
    changed: dict[str, Any],
    allow_changes: bool = False,
    seeds: range = range(0),
) -> None:
    """One of several runs: from its start, from where it was stopped, or nothing if finished.

    changed, allow_changes: as `resume` takes them. seeds: as `train_once` takes them.
    """
    if team.first_does((folder / "run.json").is_file):
        resume_once(folder, allow_changes, console, changed, team, opening)
    else:
        train_once(settings, folder, console, seeds, team, opening)


def first_record(folder: Path) -> dict[str, Any]:
    """run.json of the run in a folder, or of the first of several seeds in it.

    Raises DataError if there is none.
    """
    paths = [path for path in [folder / "run.json", *sorted(folder.glob("seed-*/run.json"))] if path.is_file()]
    if not paths:
        raise no_run(folder)
    return read_json(paths[0])


def resume_once(
    folder: Path,
    allow_changes: bool,
    console: Console,
    changed: dict[str, Any],
    team: Team = ALONE,
    opening: Callable[..., Data] = open_data,
) -> None:
    """Go on with the run of one seed; does nothing if it is finished.

    opening: as `prepare` takes it.
    """
    run, say = Run(folder), speaker(console)
    with ExitStack() as locks:
        with team.together():
            if team.first:
                locks.enter_context(locked(folder, say))  # before anything is read that another may change
        record = read_json(folder / "run.json")
        settings = recorded_settings(record, changed)
        metric = settings.parsed_task().metrics[0]
        if team.first_does(lambda: not run.states.paths() and run.finished(settings, metric)):
            say(f"The run in {folder} is finished.")
            return
        torch.set_num_threads(record["machine"]["threads"])  # sums in the same order
        state = team.first_does(lambda: run.states.load(say))
        fetch(settings, team)
        with team.together():
            session = prepare(settings, console, team, opening)
            if team.first:
                rows = read_rows(folder / "manifest.csv")
                reproducibility.refuse(
                    reproducibility.since(record, state, session, run_metadata(session), rows), allow_changes, say
                )
        return_to(session, run, state)
        say(
            f"Goes on with {folder} after {session.progress.updates} updates, "
            f"in epoch {session.progress.epoch} of {settings.epochs}."
        )
        go_on(session, run, console)


def replay(folder: str | Path, console: Console | None = None) -> str | None:
    """Repeat the step that ended a run; prints and returns where it is not finite, or None."""
    folder, console = Path(folder), console or Console()
    if not (folder / "run.json").is_file():
        raise no_run(folder)
    record = read_json(folder / "run.json")
    torch.set_num_threads(record["machine"]["threads"])
    alone = {"shard": False, "tracker": ()}  # the record holds whole weights, and no epoch is logged
    session = prepare(recorded_settings(record, alone), console)
    batch = non_finite.load(session, folder)
    origin = non_finite.diagnose(session, batch)
    position = f"Update {session.progress.updates + 1}, in epoch {session.progress.epoch}"
    say = speaker(console)
    say(f"{position}: " + (f"what is not finite begins with {origin}." if origin else "this time, everything is finite."))
    return origin


def recorded_settings(record: dict[str, Any], changed: dict[str, Any]) -> TrainSettings:
    """The settings in a run.json; changed: other values, None where there is none."""
    try:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in record["settings"].items()}
        # trackers of our own alone: nothing that a folder names is imported
        values["tracker"] = tuple(name for name in values.get("tracker", ()) if name in TRACKERS)
        return TrainSettings(**values | {name: value for name, value in changed.items() if value is not None})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"Found a run.json whose settings cannot be read ({error}). Expected those that this version knows. Use the "
            "version that began it."
        ) from error
