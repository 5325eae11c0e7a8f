"""`vitreous demo`: what can be asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vitreous.commands import Command


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Look at a small trained model, train four more on made images and compare them.

    The first comes with the package; the four, a plain one, SVDA as published and with another
    scale, and SVD-ViT's tokens, are compared on usual and on swapped backgrounds. Nothing is
    downloaded; about five minutes on two cores.
    """

    usage: ClassVar[str] = ""

    out: str | None = None
    """Folder for the four run folders, new or empty (default: the next free runs/demo)."""
    seed: int = 0
    """Of the scenes, the weights and the order of images; the same for the four."""
    quick: bool = False
    """Seconds instead of minutes: to see that it runs, not what it finds."""

    def run(self) -> None:
        from vitreous.commands._demo import demo

        demo(self.out, self.seed, self.quick)
