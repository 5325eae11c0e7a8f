"""The contract that `vitreous.testing` offers to everybody, run over our own catalogue."""

from __future__ import annotations


def test_law(contract_check):
    contract_check.run()
