"""A law names what it holds for: `text` and `host` (each mechanism in each host that takes it), or one of the two."""

from __future__ import annotations

import pytest
import torch

from contract.hosts import CASES, HOSTS, TEXTS


def pytest_generate_tests(metafunc):
    names = set(metafunc.fixturenames)
    if {"text", "host"} <= names:
        metafunc.parametrize(("text", "host"), CASES)
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
