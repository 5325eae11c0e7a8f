"""Every network keeps the laws of networks (`vitreous.testing.network_checks`); no code for one of them here.

A network's own test holds `SMALL_NETWORKS`, {registered name: keyword arguments for which it is small}, with a name for each
class of the file.
"""

from __future__ import annotations

import importlib

import pytest

from test_cards import networks
from vitreous.testing import network_checks

SMALL = {stem: getattr(importlib.import_module(f"architectures.test_{stem}"), "SMALL_NETWORKS", {}) for stem in networks()}
CASES = [(name, settings) for small in SMALL.values() for name, settings in small.items()]


def pytest_generate_tests(metafunc):
    """An ONNX file takes ten seconds, so that without --full only the first network is written into one."""
    if "law" in metafunc.fixturenames:
        checks = [(name, check) for name, settings in CASES for check in network_checks(name, **settings)]
        if not metafunc.config.getoption("full"):
            checks = [(name, check) for name, check in checks if name == CASES[0][0] or check.name != "converts_to_onnx"]
        metafunc.parametrize("law", [check for _, check in checks], ids=[f"{name}-{check.name}" for name, check in checks])


def test_law(law):
    law.run()


@pytest.mark.parametrize("stem", networks())
def test_each_class_has_a_small_version(stem):
    classes = networks()[stem]
    assert SMALL[stem], f"tests/architectures/test_{stem}.py has no SMALL_NETWORKS"
    assert {classes[name] for name in SMALL[stem]} == set(classes.values())
