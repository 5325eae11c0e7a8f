"""Shared fixtures: one thread per worker, real data where they are, hosts small enough for every law."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--require-data", action="store_true", help="fail where the real images and weights are absent")
    parser.addoption("--require-browser", action="store_true", help="fail where there is no Chromium to open the report with")


def pytest_configure(config):
    torch.set_num_threads(1)  # two workers on two cores; and sums in one order


def pytest_collection_modifyitems(items):
    """Tests that fork come first: once a re-entrant backward pass has run in a process, torch trains in none of its forks."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)  # stable; each worker keeps this order


def pytest_report_header(config):
    data = f"real data: {'used' if DATA.is_dir() else 'ABSENT, their tests are skipped'} (../shared/data)"
    return [data, f"browser: {chromium() or 'no Chromium is installed, tests of the report page in it are SKIPPED'}"]


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


@pytest.fixture(scope="session")
def browser(request):
    """A headless Chromium of the system; skips without one, or fails under --require-browser."""
    program = chromium()
    if program is None:
        (pytest.fail if request.config.getoption("--require-browser") else pytest.skip)("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program)
        yield opened
        opened.close()


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, with no network to ask for weights."""
    monkeypatch.chdir(tmp_path)

    def unreachable(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", unreachable)
    return tmp_path
