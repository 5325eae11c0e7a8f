"""What a run folder records of its start."""

import sys

import pytest

from vitreous.base.environment import command_line


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/usr/bin/vitreous", "vitreous train 'my photos'"),
        ("vitreous.exe", "vitreous train 'my photos'"),
        ("/lib/vitreous/__main__.py", "vitreous train 'my photos'"),  # python -m vitreous, also under torchrun
        ("/lib/pytest/__main__.py", "from Python"),
        ("__main__.py", "from Python"),
        ("", "from Python"),
    ],
)
def test_the_command_is_what_was_typed(monkeypatch, program, said):
    monkeypatch.setattr(sys, "argv", [program, "train", "my photos"])
    assert command_line() == said
