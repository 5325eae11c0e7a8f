"""A training run of a second: sixteen-pixel scenes and one small network."""

from __future__ import annotations

import pytest
from rich.console import Console

from vitreous.train import TrainSettings

SMALL = ("patch_size=4", "depth=2", "embed_dim=24", "num_heads=2")


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def settings(tmp_path):
    """`settings(graft=..., ...)`: those of a run of a second into a folder of the test's own."""

    def build(**changes) -> TrainSettings:
        given = dict(data="cutouts:train=40,test=24,size=16", epochs=2, batch_size=16, model_kwargs=SMALL, device="cpu")
        return TrainSettings(**{**given, "out": str(tmp_path / "run"), **changes})

    return build
