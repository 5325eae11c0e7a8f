"""A study: the same training with other grafts or networks, paired by seed and compared.

    study.json            arms, seeds, settings; in the end the results (`compare_arms`)
    summary.md            the tables
    ARM-seed-N/           the runs, each a run folder of its own

The same command goes on with a study that was interrupted: finished runs stay, one that was stopped
is resumed.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from timm import list_models
from torch import nn

from vitreous.base.environment import command_line
from vitreous.base.errors import DataError, SettingError
from vitreous.base.files import read_json, write_text
from vitreous.base.metrics import Metric
from vitreous.base.processes import Team, connected
from vitreous.data import OpenOnce
from vitreous.grafting import graft
from vitreous.mechanism import parse
from vitreous.train.engine.lock import locked
from vitreous.train.engine.prepare import data_and_model
from vitreous.train.engine.resume import recorded_settings, train_or_resume
from vitreous.train.engine.state import writing
from vitreous.train.records import reproducibility
from vitreous.train.records.progress_display import speaker
from vitreous.train.records.run_folder import STUDY, taken
from vitreous.train.settings import TrainSettings
from vitreous.train.study import compare_arms
from vitreous.train.study.courses import as_record, courses

FORMAT = 1
OWN = ("graft", "seed", "seeds", "out")  # settings that differ from run to run
Arms = dict[str, dict[str, Any]]  # {name of an arm: the settings in which it differs from the common ones}


def study(settings: TrainSettings, arms: Sequence[str], console: Console | None = None) -> Path:
    """Train every arm with every seed, unless finished, and compare; returns the folder.

    settings: of all runs; seeds are counted up from its seed. arms: the words of each, as
    `arm_settings` reads them.

    Raises SettingError for fewer than two arms, equal ones, a folder with another study in it, and
    what `train` raises.
    """
    with connected(settings.torch_device()) as team:
        return study_arms(settings, arm_settings(settings, arms), team.console(console or Console()), team)


def study_arms(settings: TrainSettings, arms: Arms, console: Console, team: Team) -> Path:
    """`study`, by a team of processes."""
    asked, say, opening = plan(settings, arms), speaker(console), OpenOnce()
    folder = team.first_does(lambda: choose(settings, asked))
    with ExitStack() as locks:
        with team.together():
            if team.first:
                if not (folder / STUDY).is_file():
                    check_arms(settings, arms, console, opening)
                with writing(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    locks.enter_context(locked(folder, say))
                    if not (folder / STUDY).is_file():
                        save(folder, {"format": FORMAT, "command": command_line()} | asked)
        runs = run_folders(folder, asked)
        free = {name: getattr(settings, name) for name in reproducibility.FREE if name not in OWN}
        for k, seed in enumerate(asked["seeds"]):
            for name, changes in arms.items():
                say(f"\nArm {name}, seed {seed}")
                own = replace(settings, **changes, seed=seed, seeds=1, out=None)
                train_or_resume(own, runs[name][k], console, team, opening, free)
        if team.first:
            conclude(folder, settings.data, runs, say)
    return folder


def check_arms(settings: TrainSettings, arms: Arms, console: Console, opening: OpenOnce) -> None:
    """Raise VitreousError if data, model or one of the arms do not fit together."""
    models: dict[tuple, nn.Module] = {}
    for changes in arms.values():
        own = replace(settings, **changes)
        network = own.model, own.model_kwargs
        if network not in models:
            models[network] = data_and_model(own, Console(quiet=True) if models else console, opening)[2]
        graft(copy.deepcopy(models[network]), *(parse(text, foreign=True) for text in own.graft))


def conclude(folder: Path, data: str, runs: dict[str, list[Path]], say: Callable[[str], Any]) -> None:
    """Compare the finished runs; write and print the results."""
    results = compare_arms.compare(runs) | {"courses": as_record({name: courses(some) for name, some in runs.items()})}
    title = f"# {' against '.join(runs)} on {data}\n" if len(runs) == 2 else f"# {len(runs)} arms on {data}\n"
    listed = [f"- {name}: " + ", ".join(f"`{run.name}`" for run in some) for name, some in runs.items()]
    with writing(folder):
        save(folder, read_json(folder / STUDY) | {"results": results})
        write_text(folder / "summary.md", "\n".join([title, *compare_arms.tables(results), *listed, ""]))
    metric = Metric(**results["metric"])
    for test, outcome in results["tests"].items():
        for name, difference in outcome["differences"].items():
            size = f"{metric.number(difference['mean'], '+')} {compare_arms.unit(metric)}"
            say(f"{test}: {name}: {compare_arms.verdict(difference, metric)}, {size} to {results['first']}")


def again(folder: Path, console: Console | None = None) -> Path:
    """Go on with the study in a folder. Raises DataError if its record cannot be read."""
    record = read_json(folder / STUDY)
    try:
        settings = recorded_settings(record, {})
        seeds, arms = record["seeds"], [arm["name"] for arm in record["arms"]]
        settings = replace(settings, seed=seeds[0], seeds=len(seeds), out=str(folder))
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"Found a {STUDY} in {folder} that cannot be read ({error!r}). Expected one that `vitreous study` wrote. Give the "
            "command of the study again with a new --out."
        ) from error
    return study(settings, arms, console)


def arm_settings(settings: TrainSettings, arms: Sequence[str]) -> Arms:
    """{name of the arm: the settings that its words change}.

    A word is plain (nothing), a graft, model=NAME (another network, without the common
    `model_kwargs`, which are the first one's), or name=value, an argument of the network. Raises
    SettingError for what is no comparison.
    """
    if settings.graft:
        raise SettingError("Found --graft. Expected the grafts of each arm in its --arm. Write for example --arm svda.")
    named = [" ".join(arm.split()) for arm in arms]
    if len(set(named)) < 2 or len(set(named)) < len(named) or "" in named:
        raise SettingError(
            f"Found the arms {', '.join(map(repr, named)) or 'none'}. Expected at least two, all different, plain being "
            "the one without grafts. Write for example --arm plain --arm svda:scale=sqrt."
        )
    changes: Arms = {}
    for name in named:
        words = [] if name == "plain" else name.split()
        if network := next((word for word in words if word in list_models()), None):
            raise SettingError(
                f"Found the network {network} among the grafts of an arm. Expected model={network}. Write --arm "
                f'"model={network} ..." with the network\'s own arguments.'
            )
        arguments = [word for word in words if word.partition("=")[0].isidentifier() and "=" in word]
        networks = [word.removeprefix("model=") for word in arguments if word.startswith("model=")]
        if len(networks) > 1:
            raise SettingError(f"Found the arm {name!r} with two networks. Expected one model=NAME. Make two arms of it.")
        own = tuple(word for word in arguments if not word.startswith("model="))
        changes[name] = {
            "graft": tuple(word for word in words if word not in arguments),
            "model": networks[0] if networks else settings.model,
            "model_kwargs": own if networks else (*settings.model_kwargs, *own),
        }
        replace(settings, **changes[name])  # raises for what is no mechanism
    return changes


def plan(settings: TrainSettings, arms: Iterable[str]) -> dict[str, Any]:
    """The record of a study: arms with the names of their folders, seeds, and common settings."""
    names: list[str] = []
    for name in arms:
        short = re.sub(r"[^\w.+=-]+", "-", name)[:60].strip("-.")
        number = 1 + sum(re.fullmatch(re.escape(short) + r"(-\d+)?", other) is not None for other in names)
        names.append(short if number == 1 else f"{short}-{number}")
    common = {name: reproducibility.plain(value) for name, value in asdict(settings).items() if name not in OWN}
    return {
        "arms": [{"name": arm, "folder": name} for arm, name in zip(arms, names, strict=True)],
        "seeds": list(range(settings.seed, settings.seed + settings.seeds)),
        "settings": {"data": settings.data} | common,
    }


def choose(settings: TrainSettings, asked: dict[str, Any]) -> Path:
    """The folder of --out, or the first of studies/NAME, NAME-2 ... that is new or its own.

    Raises SettingError if that of --out holds something else.
    """
    if settings.out is None:
        stem = re.sub(r"[^\w.+-]+", "-", Path(settings.data.partition(":")[0]).stem)[:60].strip("-.")
        names = (Path("studies") / (stem if number == 1 else f"{stem}-{number}") for number in count(1))
        return next(folder for folder in names if not folder.exists() or other(folder, asked) == [])
    folder = Path(settings.out)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    differences = other(folder, asked)
    if differences is None:
        raise taken(folder)
    if differences:
        raise SettingError(
            f"Found another study in {folder}: {'; '.join(differences)}. Expected the same arms, seeds and settings, to go on "
            "with it. Give those, or choose another --out."
        )
    return folder


def other(folder: Path, asked: dict[str, Any]) -> list[str] | None:
    """How the study in a folder differs from this one, in words; None without a study in it."""
    if not (folder / STUDY).is_file():
        return None
    record = read_json(folder / STUDY)

    def compared(study: dict[str, Any]) -> dict[str, Any]:
        settings = study.get("settings")
        settings = reproducibility.bearing(settings) if isinstance(settings, dict) else {}
        return {"arms": study.get("arms"), "seeds": study.get("seeds"), "settings": settings}

    return reproducibility.between(compared(record), compared(asked))


def run_folders(folder: Path, asked: dict[str, Any]) -> dict[str, list[Path]]:
    """{arm: its run folders, in the order of the seeds}."""
    return {arm["name"]: [folder / f"{arm['folder']}-seed-{seed}" for seed in asked["seeds"]] for arm in asked["arms"]}


def first_runs(folder: Path) -> list[Path]:
    """The run of each arm with the first seed, to be shown side by side."""
    return [runs[0] for runs in run_folders(folder, read_json(folder / STUDY)).values()]


def save(folder: Path, record: dict[str, Any]) -> None:
    write_text(folder / STUDY, json.dumps(record, indent=2) + "\n")
