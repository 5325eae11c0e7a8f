"""Going on with a run that was interrupted, and running a step again that was not finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vitreous.base.errors import DataError
from vitreous.base.processes import ALONE, Team, connected
from vitreous.data import Data, OpenOnce, open_data
from vitreous.models import model_folder
from vitreous.train.engine import early_stopping, non_finite
from vitreous.train.engine.lock import locked
from vitreous.train.engine.loop import go_on
from vitreous.train.engine.prepare import fetch, prepare, run_metadata
from vitreous.train.engine.state import restore
from vitreous.train.records import reproducibility, summary
from vitreous.train.records.progress_display import speaker
from vitreous.train.records.run_folder import Run, read_metrics, read_rows
from vitreous.train.records.trackers import TRACKERS
from vitreous.train.run import train_once
from vitreous.train.settings import TrainSettings


def resume(folder: str | Path, allow_changes: bool = False, console: Console | None = None, **changed: Any) -> Path:
    """Go on with an interrupted run (or several seeds of one) so that it ends as if it had not
    been; returns the folder.

    allow_changes: go on though settings, data, grafts or versions have changed. changed: other
    values for settings that do not bear on a step: workers, save_every, rollbacks, rollback_lr,
    tracker.

    Raises DataError if there is no run, SettingError with the differences if something has changed.
    """
    with connected(recorded_device(Path(folder))) as team:
        return resume_seeds(Path(folder), allow_changes, team.console(console or Console()), changed, team)


def resume_seeds(folder: Path, allow_changes: bool, console: Console, changed: dict[str, Any], team: Team) -> Path:
    """`resume`, by a team of processes."""
    if (folder / "run.json").is_file():
        resume_once(folder, allow_changes, console, changed, team)
        return folder
    record = model_folder.read_json(begun(folder)[0])
    seeds = range(*(record.get("seeds") or (0, 0)))
    settings = recorded_settings(record, changed)
    runs, opening = [folder / f"seed-{seed}" for seed in seeds], OpenOnce()
    for seed, path in zip(seeds, runs, strict=True):
        if team.first_does((path / "run.json").is_file):
            resume_once(path, allow_changes, console, changed, team, opening)
        else:
            train_once(replace(settings, seed=seed), path, console, seeds, team, opening)
    if team.first:
        summary.write_seeds(folder, runs)
    return folder


def begun(folder: Path) -> list[Path]:
    """The run.json of the run in a folder, or those of several seeds in it.

    Raises DataError if there is none.
    """
    records = [path for path in [folder / "run.json", *sorted(folder.glob("seed-*/run.json"))] if path.is_file()]
    if not records:
        raise no_run(folder)
    return records


def recorded_device(folder: Path) -> torch.device:
    """Where the run in a folder, or the first of several seeds in it, was told to be."""
    return recorded_settings(model_folder.read_json(begun(folder)[0]), {}).torch_device()


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
                locks.enter_context(locked(folder, say))
        record = model_folder.read_json(folder / "run.json")
        settings = recorded_settings(record, changed)
        if team.first_does(lambda: already_finished(run, settings)):
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
        if state is not None:
            restore(session, state)
            run.states.latest = session.progress.updates
        if team.first:
            run.rewind(session.progress.epoch, begun=session.progress.updates > 0)
        say(
            f"Goes on with {folder} after {session.progress.updates} updates, "
            f"in epoch {session.progress.epoch} of {settings.epochs}."
        )
        go_on(session, run, console)


def already_finished(run: Run, settings: TrainSettings) -> bool:
    return not run.states.paths() and early_stopping.finished(
        read_metrics(run.folder), settings.epochs, settings.patience, settings.parsed_task().metrics[0]
    )


def replay(folder: str | Path, console: Console | None = None) -> str | None:
    """Run the step again at which a run stopped because it was not finite.

    Says, and returns, where it begins, or None.
    """
    folder, console = Path(folder), console or Console()
    if not (folder / "run.json").is_file():
        raise no_run(folder)
    record = model_folder.read_json(folder / "run.json")
    torch.set_num_threads(record["machine"]["threads"])
    alone = {"shard": False, "tracker": ()}  # the record is of whole weights, and nobody is told
    session = prepare(recorded_settings(record, alone), console)
    batch = non_finite.load(session, folder)
    origin = non_finite.diagnose(session, batch)
    position = f"Update {session.progress.updates + 1}, in epoch {session.progress.epoch}"
    say = speaker(console)
    say(f"{position}: " + (f"what is not finite begins with {origin}." if origin else "this time, everything is finite."))
    return origin


def recorded_settings(record: dict[str, Any], changed: dict[str, Any]) -> TrainSettings:
    """The settings in a run.json, with others for those that do not bear on a step."""
    try:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in record["settings"].items()}
        values["tracker"] = tuple(name for name in values.get("tracker", ()) if name in TRACKERS)  # no code that a folder names
        return TrainSettings(**values | {name: value for name, value in changed.items() if value is not None})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"Found a run.json whose settings cannot be read ({error}). Expected those that this version knows. Use the "
            "version that began it."
        ) from error


def no_run(folder: Path) -> DataError:
    return DataError(f"Found no run.json in {folder}. Expected the folder of a run. Check the path.")
