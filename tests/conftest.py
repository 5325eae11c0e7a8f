"""Shared fixtures: one thread per worker, real data where they are, hosts small enough for every law."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--require-data", action="store_true", help="fail where the real images and weights are absent")


def pytest_configure(config):
    torch.set_num_threads(1)  # two workers on two cores; and sums in one order


def pytest_report_header(config):
    return f"real data: {'used' if DATA.is_dir() else 'ABSENT, their tests are skipped'} (../shared/data)"


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(pytest_report_header(config))


@pytest.fixture(scope="session")
def shared_data(request) -> Path:
    """The folder of real images and weights; skips without it, or fails under --require-data."""
    if not DATA.is_dir():
        (pytest.fail if request.config.getoption("--require-data") else pytest.skip)("../shared/data is absent")
    return DATA
