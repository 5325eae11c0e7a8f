"""Without a network: the hub is asked once, for two seconds, and then its cache alone; what is missing is said."""

from __future__ import annotations

import time

import pytest
from huggingface_hub import constants

from vitreous.commands.cli import main
from vitreous.models import hub


class Client:
    """One whose request takes so long, or fails."""

    def __init__(self, seconds=0.0, error=None):
        self.seconds, self.error = seconds, error

    def head(self, address, timeout):
        assert (address, timeout) == (constants.ENDPOINT, hub.ANSWER)
        time.sleep(self.seconds)
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("client", "there"), [(Client(), True), (Client(error=OSError("no name")), False), (Client(seconds=1.0), False)]
)
def test_the_hub_is_asked_for_so_long_and_no_longer(monkeypatch, client, there):
    monkeypatch.setattr(hub, "get_session", lambda: client)
    monkeypatch.setattr(hub, "ANSWER", 0.1)
    start = time.monotonic()
    with hub.cache_when_offline():
        assert constants.HF_HUB_OFFLINE is not there
        assert time.monotonic() - start < 0.9
    assert constants.HF_HUB_OFFLINE is False


def test_published_weights_that_are_not_here_are_said_at_once(tmp_path, monkeypatch, capsys):
    """With the hub's own library, which asks nobody then: the guard of this suite would see a connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "answers", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.png").touch()
    start = time.monotonic()
    assert main(["predict", "test_vit", "x.png"]) == 2
    assert main(["predict", "hf-hub:someone/model", "x.png"]) == 2
    assert time.monotonic() - start < 10  # it would be a minute
    shown = capsys.readouterr().err
    assert "Found no published weights of test_vit" in shown
    assert "Found no config.json of hf-hub:someone/model" in shown


@pytest.mark.parametrize("words", ["look", "predict", "calibrate --out x", "export --to onnx --out y --images"])
def test_paths_are_looked_for_before_weights(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitreous.models.load.create_model", lambda *args, **options: 1 / 0)
    command, *options = words.split()
    assert main([command, "test_vit", *options, "nowhere.png"]) == 2
    assert "Found nothing at 'nowhere.png'" in capsys.readouterr().err
