"""`vitreous` and `python -m vitreous`, which is what torchrun starts."""

import sys


def main() -> int:
    """The command line; returns its exit code. Ctrl-C during its import is quiet, too."""
    try:
        from vitreous.commands.cli import main as run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
