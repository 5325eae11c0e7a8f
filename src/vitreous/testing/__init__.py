"""The contract as checks that any test suite can run, and the small hosts they run in."""

from vitreous.base.errors import ContractError
from vitreous.testing.check import Check
from vitreous.testing.contract import contract_checks
from vitreous.testing.hosts import small_hosts
from vitreous.testing.networks import network_checks

__all__ = ["Check", "ContractError", "contract_checks", "network_checks", "small_hosts"]
