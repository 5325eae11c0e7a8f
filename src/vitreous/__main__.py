"""`python -m vitreous`, which is what torchrun starts."""

import sys

from vitreous.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
