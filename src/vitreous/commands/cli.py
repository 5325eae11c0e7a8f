"""The command line. Mistakes that a user can mend end in one message and exit code 2."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
from rich.console import Console
from rich.table import Table

from vitreous import __version__, architectures
from vitreous.base.errors import SettingError, UnknownName, VitreousError
from vitreous.base.processes import launched
from vitreous.base.text_form import summary, written
from vitreous.mechanism import catalogue, mechanism_class

HELP = """\
usage: vitreous COMMAND [options]     (vitreous COMMAND --help says more)

  look MODEL IMAGES...       see what a vision transformer looks at: maps, indicators, one report.html
  compare A B                two readings or runs side by side, in one report.html
  calibrate MODEL PHOTOS...  find a model's foreground direction from photographs, without labels or masks
  train DATA                 train or fine-tune a vision transformer, with mechanisms grafted into it
  study DATA                 train arms with different grafts on the same seeds, and compare them with paired intervals
  resume RUN                 go on with an interrupted run, so that it ends as if it had not been
  replay RUN                 run the step again at which a run stopped since a number was not finite, and say where it begins
  bench MODEL                how fast it is, with grafts and against others: time, memory, operations, with intervals
  predict RUN IMAGES...      the classes of images by a trained model, as a CSV file
  export RUN                 a model as a file that runs without Vitreous (ONNX, torch.export, timm), proved to be the same
  data check DATA            what is wrong with images: unreadable files, copies across parts, classes, masks that do not fit
  list [NAME]                show the mechanisms and networks there are, or one of them with its settings
  demo                       look at a small trained model, train three more on made images and compare them

examples:
  vitreous demo
  vitreous look vit_tiny_patch16_224 cat.jpg dog.jpg --out reading/
  vitreous list svda
  vitreous train cutouts --graft svda --model-kwargs patch_size=4 --epochs 3
  vitreous train photos/ --model vit_tiny_patch16_224 --pretrained --graft spc:after=11 --lr 1e-4
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done, 1 data with problems, 2 a mistake in what was asked, 130 or 143 stopped by Ctrl-C or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        print(f"vitreous {__version__}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise UnknownName(words[0], "command", COMMANDS, hint="`vitreous --help` shows examples.")
        if words[0] not in TOGETHER:
            refuse_team(words[0])
        COMMANDS[words[0]](words[1:])
    except VitreousError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        if not stopped.args:  # else the command has said how to go on
            print("Interrupted. What was finished is in the folder.", file=sys.stderr)
            print("To go on: `vitreous resume RUN` after train, the same --out for look.", file=sys.stderr)
        return 130
    except SystemExit as done:  # tyro's help (0) and its complaints (2)
        return int(done.code or 0)
    return 0


def refuse_team(what: str) -> None:
    """Raise SettingError for a command that several processes cannot do as one."""
    if (size := launched().size) > 1:
        raise SettingError(
            f"Found `{what}` in {size} processes of torchrun. Expected one process: only {', '.join(TOGETHER)} work in "
            "several. Start it without torchrun."
        )


def look(words: list[str]) -> None:
    from vitreous.commands.looking import look_command

    look_command(words)


def compare(words: list[str]) -> None:
    from vitreous.commands.looking import compare_command

    compare_command(words)


def calibrate(words: list[str]) -> None:
    from vitreous.commands.looking import calibrate_command

    calibrate_command(words)


def train(words: list[str]) -> None:
    from vitreous.train.settings import from_words
    from vitreous.train.train import train

    report(train(from_words(words)))


def resume(words: list[str]) -> None:
    from vitreous.train.engine.resume import resume, resume_words
    from vitreous.train.records.run_folder import STUDY
    from vitreous.train.study.study import again

    folder, allow_changes, changed = resume_words(words)
    if (Path(folder) / STUDY).is_file():
        if allow_changes or any(value is not None for value in changed.values()):
            raise SettingError(
                f"Found options for the study in {folder}. Expected none: its runs go on as they were begun. Leave them out, "
                "or resume one of its runs with them."
            )
        report_study(again(Path(folder)))
    else:
        report(resume(folder, allow_changes, **changed))


def study(words: list[str]) -> None:
    from vitreous.train.study.study import study, study_words

    report_study(study(*study_words(words)))


def replay(words: list[str]) -> None:
    from vitreous.train.engine.resume import replay, replay_words

    replay(replay_words(words))


def report(folder: Path) -> None:
    """Say where the summary of a run is, and write its report."""
    report_runs(folder, sorted(folder.glob("seed-*")) or [folder])


def report_study(folder: Path) -> None:
    """Say where the summary of a study is, and write a report of its arms side by side, each by its first seed."""
    from vitreous.train.study.study import first_runs

    report_runs(folder, first_runs(folder))


def report_runs(folder: Path, runs: list[Path]) -> None:
    from vitreous.report.page import write

    if not launched().first:
        return
    print(f"Done: {folder}/summary.md")
    if all((run / "readings").is_dir() for run in runs):  # none where the model shows no attention; the summary says why
        print(f"Report: {write(runs, folder / 'report.html')}")


def bench(words: list[str]) -> None:
    from vitreous.bench.run import bench_command

    bench_command(words)


def predict(words: list[str]) -> None:
    from vitreous.deploy.predict import predict_command

    predict_command(words)


def export(words: list[str]) -> None:
    from vitreous.deploy.export import export_command

    export_command(words)


def data(words: list[str]) -> None:
    from vitreous.commands.checking import data_command

    sys.exit(data_command(words))


def demo(words: list[str]) -> None:
    from vitreous.commands.demo import demo, from_words

    demo(from_words(words))


# -- vitreous list -------------------------------------------------------------------------------------------------


def show(words: list[str]) -> None:
    """Print the mechanisms and networks there are, or what the one word names. Raises UnknownName."""
    console = Console()
    if words and words[0] in ("-h", "--help"):
        console.print("usage: vitreous list [NAME]\n\nThe mechanisms and networks there are, or one with all its settings.")
    elif not words:
        console.print(mechanisms())
        console.print(networks())
        console.print("`vitreous list NAME` says more. Any other network of timm's can be named as well.", highlight=False)
    elif words[0] in catalogue():
        one(words[0], console)
    elif words[0] in network_names():
        console.print(inspect.getdoc(timm.model_entrypoint(words[0])), markup=False, highlight=False)
    else:
        raise UnknownName(words[0], "mechanism or network", [*catalogue(), *network_names()])


def mechanisms() -> Table:
    """The catalogue: name, slot, what it is, its paper, and its settings with their defaults."""
    table = Table("name", "slot", "what it is", title="Mechanisms", title_justify="left", show_lines=True)
    for name, file in catalogue().items():
        cls = mechanism_class(name)
        said = f"{summary(cls)}\n[dim]{cls.paper}\n{', '.join(f'{key}={value}' for key, value in defaults(name).items())}[/]"
        table.add_row(name, file.parent.name, said)
    return table


def networks() -> Table:
    """Whole networks, by the name that timm knows them by."""
    table = Table("name", "what it is", title="Networks", title_justify="left")
    for name in network_names():
        table.add_row(name, inspect.getdoc(timm.model_entrypoint(name)))
    return table


def one(name: str, console: Console) -> None:
    """One mechanism: its docstring and every setting with its default."""
    console.print(f"{name} ({catalogue()[name].parent.name})\n", style="bold", highlight=False)
    console.print(inspect.getdoc(mechanism_class(name)), markup=False, highlight=False, soft_wrap=True)
    table = Table("setting", "default", "type", title="\nSettings", title_justify="left")
    kinds = {field.name: str(field.type).replace("Literal", "one of ") for field in dataclasses.fields(mechanism_class(name))}
    for key, value in defaults(name).items():
        table.add_row(key, value, kinds[key].replace("[", r"\["))
    console.print(table)
    settings = ",".join(f"{key}={value}" for key, value in list(defaults(name).items())[:2])
    console.print(f"\nvitreous train cutouts --graft {name}:{settings}", highlight=False, soft_wrap=True)


def defaults(name: str) -> dict[str, str]:
    """{setting: default, as text} of a mechanism."""
    return {field.name: written(field.default) for field in dataclasses.fields(mechanism_class(name))}


def network_names() -> list[str]:
    files = [module.name for module in pkgutil.iter_modules(architectures.__path__)]
    return [name for file in files for name in timm.list_models(module=file)]


COMMANDS = {
    "look": look,
    "compare": compare,
    "calibrate": calibrate,
    "train": train,
    "study": study,
    "resume": resume,
    "replay": replay,
    "bench": bench,
    "predict": predict,
    "export": export,
    "data": data,
    "list": show,
    "demo": demo,
}
TOGETHER = ("train", "resume", "look", "study")  # what several processes of torchrun do as one


if __name__ == "__main__":
    sys.exit(main())
