"""A law names what it holds for: `text` and `host` (mechanisms in hosts that take them), or one of the two."""

from __future__ import annotations

import pytest
import torch

from contract.hosts import HOSTS, TEXTS, cases, law_checks


def pytest_generate_tests(metafunc):
    names, full = set(metafunc.fixturenames), metafunc.config.getoption("full")
    if "contract_check" in names:
        checks = list(law_checks(full))
        metafunc.parametrize("contract_check", [check for _, check in checks], ids=[f"{text}-{c.name}" for text, c in checks])
    elif {"text", "host"} <= names:
        metafunc.parametrize(("text", "host"), cases(full))
    elif "text" in names:
        metafunc.parametrize("text", TEXTS)
    elif "host" in names:
        metafunc.parametrize("host", HOSTS)


@pytest.fixture
def random_state_untouched():
    """Nothing that the law calls may draw from the global random state."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global random state moved"
