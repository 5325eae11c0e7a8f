"""The command line: `vitreous train | list | demo`. Mistakes that a user can mend end in one message and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitreous import __version__
from vitreous.errors import UnknownName, VitreousError

HELP = """\
usage: vitreous COMMAND [options]     (vitreous COMMAND --help says more)

  train DATA   train or fine-tune a vision transformer, with mechanisms grafted into it
  list [NAME]  show the mechanisms and networks there are, or one of them with its settings
  demo         train three small models on made images and compare them, in five minutes

examples:
  vitreous demo
  vitreous list svda
  vitreous train cutouts --graft svda --model-kwargs patch_size=4 --epochs 3
  vitreous train photos/ --model vit_tiny_patch16_224 --pretrained --graft spc:after=11 --lr 1e-4
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 a mistake in what was asked, 130 interrupted."""
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
        COMMANDS[words[0]](words[1:])
    except VitreousError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. What was finished is in the run folder.", file=sys.stderr)
        return 130
    except SystemExit as done:  # tyro's help (0) and its complaints (2)
        return int(done.code or 0)
    return 0


def train(words: list[str]) -> None:
    from vitreous.train.loop import train
    from vitreous.train.settings import from_words

    print(f"Done: {train(from_words(words))}/summary.md")


def show(words: list[str]) -> None:
    from vitreous.listing import show

    show(words)


def demo(words: list[str]) -> None:
    from vitreous.train.demo import demo, from_words

    demo(from_words(words))


COMMANDS = {"train": train, "list": show, "demo": demo}


if __name__ == "__main__":
    sys.exit(main())
