"""The command line: the files of this folder are the commands.

Mistakes that a user can mend end in a message and code 2.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from vitreous import __version__
from vitreous.base.entry import item_files, read_entry
from vitreous.base.errors import SettingError, UnknownName, VitreousError
from vitreous.commands import Command

USAGE = "usage: vitreous COMMAND [options]     (vitreous COMMAND --help says more)\n"
EXAMPLES = """
examples:
  vitreous demo
  vitreous look vit_tiny_patch16_224 cat.jpg dog.jpg --out reading/
  vitreous list svda
  vitreous train cutouts --graft svda --model-kwargs patch_size=4 --epochs 3
  vitreous train photos/ --model vit_tiny_patch16_224 --pretrained --graft spc:after=11,read=gated --lr 1e-4
"""
COMMANDS = {name: file for name, file in item_files(Path(__file__).parent).items() if name != "cli"}
PIPE_CLOSED = 141  # what a shell reports of a program that wrote into a pipe that nobody reads: 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done, 1 data with problems, 2 a mistake in what was asked, 130 or 143 stopped by Ctrl-C or
    SIGTERM, 141 a closed pipe.
    """
    try:
        code = answer(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except SystemExit as done:  # tyro's help (0) and its complaints (2); of rich, where it meets a closed pipe
        code = PIPE_CLOSED if isinstance(done.__context__, BrokenPipeError) else int(done.code or 0)
    except BrokenPipeError:
        if not nobody_reads(sys.stdout):  # another pipe, such as one to a worker process
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        code = PIPE_CLOSED
    except KeyboardInterrupt:  # outside of a command
        code = 130
    return code


def nobody_reads(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has gone, as in `vitreous list | head -1`."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # no event: errors are reported anyway
    except (OSError, AttributeError):  # no file behind it; no poll on Windows
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def answer(words: list[str]) -> int:
    """Do what the words ask for; returns the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(overview(), end="")
        return 0
    if words[0] == "--version":
        print(f"vitreous {__version__}")
        return 0
    try:
        command = command_class(words[0])
        if not command.together:
            refuse_team(words[0])
        return command.read(words[1:]).run() or 0
    except VitreousError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        if not stopped.args:  # else the command has said how to go on
            print("Interrupted. What was finished is in the folder.", file=sys.stderr)
            print("To go on: `vitreous resume RUN` after train, the same --out for look.", file=sys.stderr)
        return 130


def overview() -> str:
    """The commands, each with the first line of its help."""
    lines = []
    for name, file in COMMANDS.items():
        entry = read_entry(file)
        typed = f"{name} {entry.constants['usage']}"
        lines.append(f"  {typed:26} {entry.summary.rstrip('.')}")
    return "\n".join([USAGE, *lines, EXAMPLES])


def command_class(name: str) -> type[Command]:
    """The class of a command, its file imported. Raises UnknownName."""
    if name not in COMMANDS:
        raise UnknownName(name, "command", COMMANDS, hint="`vitreous --help` shows examples.")
    return getattr(importlib.import_module(f"vitreous.commands.{name}"), read_entry(COMMANDS[name]).class_name)


def refuse_team(command: str) -> None:
    """Raise SettingError for a command that several processes of torchrun cannot do as one."""
    size = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if size > 1:
        able = ", ".join(name for name, file in COMMANDS.items() if read_entry(file).constants.get("together"))
        raise SettingError(
            f"Found `{command}` in {size} processes of torchrun. Expected one process: only {able} work in several. Start it "
            "without torchrun."
        )
