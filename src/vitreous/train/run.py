"""The entry of training: from settings to a run folder, for one seed or several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from vitreous.base.processes import ALONE, Team, connected
from vitreous.data import Data, OpenOnce, open_data
from vitreous.mechanism import parse
from vitreous.train.engine.lock import locked
from vitreous.train.engine.loop import go_on
from vitreous.train.engine.prepare import check_start, fetch, prepare, run_metadata
from vitreous.train.engine.session import Session
from vitreous.train.engine.state import writing
from vitreous.train.records import reproducibility, summary
from vitreous.train.records.lost_images import write_quarantine
from vitreous.train.records.progress_display import speaker
from vitreous.train.records.run_folder import Run, choose_folder, taken
from vitreous.train.settings import TrainSettings


def train(settings: TrainSettings, console: Console | None = None) -> Path:
    """Train for each seed; returns the run folder, that around them for several seeds.

    Raises VitreousError before anything is written if data, model or settings do not fit. Ctrl-C
    and SIGTERM end it after the step, with the state saved: as KeyboardInterrupt, and
    SystemExit(143).
    """
    with connected(settings.torch_device()) as team:
        console = team.console(console or Console())
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
    """One run with one seed, into a folder.

    seeds: those of all runs that it is one of. opening: as `prepare` takes it.
    """
    say = speaker(console)
    fetch(settings, team)
    with ExitStack() as locks:
        with team.together():
            session = prepare(settings, console, team, opening)
            check_start(session)
            run = Run(folder, made=team.first)
            if team.first:
                locks.enter_context(locked(folder, say))
                begin(session, run, seeds)
        for remark in [f"Run folder: {folder}", *session.remarks]:
            say(remark)
        run.states.save(session)
        go_on(session, run, console)


def begin(session: Session, run: Run, seeds: range) -> None:
    """Write what is known before training.

    Raises SettingError if the folder was taken since it was chosen.
    """
    if (run.folder / "run.json").exists():
        raise taken(run.folder)
    with writing(run.folder):
        run.table("manifest.csv", reproducibility.COLUMNS, reproducibility.manifest(session.data))
        settings = {"data": session.settings.data} | asdict(session.settings)
        write_quarantine(session, run)
        run.start(settings=settings, seeds=[seeds.start, seeds.stop] if seeds else None, **run_metadata(session))
