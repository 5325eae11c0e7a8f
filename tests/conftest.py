"""Shared fixtures: one thread per worker, real data where they are, hosts small enough for every law."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ATTEMPTS = pytest.StashKey[Path]()  # the file of connections that were stopped
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--require-data", action="store_true", help="fail where the real images and weights are absent")
    parser.addoption("--require-browser", action="store_true", help="fail where there is no Chromium to open the report with")
    parser.addoption("--full", action="store_true", help="all mechanisms, hosts, laws and pairs, for the nightly run")


GUARD = Path(__file__).parent / "no_network" / "sitecustomize.py"
NOWHERE = {"server": "http://127.0.0.1:9"}  # a proxy that nobody listens as: Chromium reaches this machine and no other


def pytest_configure(config):
    torch.set_num_threads(1)  # two workers on two cores; and sums in one order
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        stop_connections(config)


def stop_connections(config):
    """Let no connection leave the machine from this process, which runs tests, nor from those that it starts."""
    folder = Path(tempfile.mkdtemp(prefix="no-network-"))
    spec = importlib.util.spec_from_file_location("sitecustomize", shutil.copy(GUARD, folder))
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    config.stash[ATTEMPTS] = folder / "attempts"


def pytest_unconfigure(config):
    if ATTEMPTS in config.stash:
        shutil.rmtree(config.stash[ATTEMPTS].parent)


@pytest.fixture
def connections(request) -> Callable[[], list[dict[str, str]]]:
    """Call it for the connections that were stopped, each with to, by, at; those are then forgotten, and no failure."""
    log = request.config.stash[ATTEMPTS]

    def taken() -> list[dict[str, str]]:
        found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    return taken


@pytest.fixture(autouse=True)
def no_network(connections):
    """Nothing may try to leave the machine during a test; whoever does is stopped, and named."""
    yield
    if found := connections():
        pytest.fail("\n".join(f"connection to {one['to']} by {one['by']}\n{one['at']}" for one in found), pytrace=False)


def pytest_collection_modifyitems(items):
    """Tests that fork come first: once a re-entrant backward pass has run in a process, torch trains in none of its forks."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)  # stable; each worker keeps this order


def pytest_report_header(config):
    data = f"real data: {'used' if DATA.is_dir() else 'ABSENT, their tests are skipped'} (../shared/data)"
    return [data, f"browser: {chromium() or 'no Chromium is installed, tests of the report page in it are SKIPPED'}"]


def pytest_runtest_logreport(report):
    """A failure is printed when it happens: a suite that is cut off has shown it."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} ({report.when}) failed:\n{report.longreprtext}", flush=True)


def pytest_terminal_summary(terminalreporter, config):
    for line in pytest_report_header(config):
        terminalreporter.write_line(line)


def chromium() -> str | None:
    """The program file of the system's Chromium or Chrome."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="session")
def shared_data(request) -> Path:
    """The folder of real images and weights; skips without it, or fails under --require-data."""
    if not DATA.is_dir():
        (pytest.fail if request.config.getoption("--require-data") else pytest.skip)("../shared/data is absent")
    return DATA


@pytest.fixture(scope="module")
def browser(request):
    """A headless Chromium of the system, which no request leaves; skips without one, or fails under --require-browser.

    It closes with its module. Its driver ends when the pipe to it closes, and every process that is forked while it runs
    holds that pipe open as well: with a browser for the whole session, one left over from a failed test of training would
    keep the session from ever ending.
    """
    program = chromium()
    if program is None:
        (pytest.fail if request.config.getoption("--require-browser") else pytest.skip)("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, proxy=NOWHERE)
        yield opened
        opened.close()


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, with no network to ask for weights."""
    monkeypatch.chdir(tmp_path)

    def unreachable(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("vitreous.models.hub.answers", lambda: False)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", unreachable)
    return tmp_path
