"""The laws of networks from outside: each fails, under its name, for a network that breaks it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch import nn

from vitreous.architectures import cvt
from vitreous.base.errors import ContractError
from vitreous.testing import Check, laws_networks, network_checks
from vitreous.testing.contract import laws
from vitreous.testing.networks import Network

SMALL = {"embed_dims": (8, 12), "depths": (1, 1), "num_heads": (1, 2), "num_classes": 5}


@dataclass(frozen=True)
class Planted(Network):
    """A network with a fault."""

    fault: str = ""

    def build(self, **arguments):
        model = super().build(**arguments)
        FAULTS[self.fault](model)
        return model

    def create(self, **arguments):
        model = super().create(**arguments)
        if self.fault == "features_are_as_announced" and "features_only" in arguments:
            model.feature_info.info[0]["reduction"] = 2
        return model


def patched(name, function):
    """A fault: a method of the model replaced by function(model, its method, *arguments)."""

    def fault(model):
        plain = getattr(model, name)
        setattr(model, name, MethodType(lambda self, *args, **kwargs: function(self, plain, *args, **kwargs), model))

    return fault


def raising(model, plain, x):
    if x.shape[-1] != 64:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    return plain(x)


def counted(model, plain, x):
    model.calls = getattr(model, "calls", 0) + 1
    return plain(x) + model.calls


def set_flag(model, plain, enable=True):
    model.head_drop = nn.Dropout(0.9)


FAULTS = {
    "configuration_names_modules": lambda model: model.pretrained_cfg.update(first_conv="patch_embed"),
    "features_are_as_announced": lambda model: None,
    "intermediates_end_in_the_features": patched("forward_features", lambda model, plain, x: plain(x) + 1),
    "outputs_are_logits": patched("forward", lambda model, plain, x: plain(x)[:, :3]),
    "one_channel": patched("forward", lambda model, plain, x: plain(x) / 0),
    "calls_agree": patched("forward", counted),
    "batch_mates_do_not_matter": patched("forward", lambda model, plain, x: plain(x) - plain(x).mean(0)),
    "double_precision_agrees": patched("forward", lambda model, plain, x: plain(x) + (x.dtype == torch.float64)),
    "autocast_is_close": patched("forward", lambda model, plain, x: plain(x) * (2 if torch.is_autocast_enabled("cpu") else 1)),
    "classifier_can_be_replaced": patched("reset_classifier", lambda model, plain, classes: None),
    "layers_are_in_order": patched("group_matcher", lambda model, plain, coarse=False: {"stem": "^head"}),
    "every_parameter_learns": lambda model: model.register_parameter("idle", nn.Parameter(torch.ones(1))),
    "checkpointing_changes_nothing": patched("set_grad_checkpointing", set_flag),
    "other_sizes_run_or_are_refused": patched("forward", raising),
    "copies_are_whole": patched("forward", lambda model, plain, x: plain(x)),  # a method of the original, or none
    "exports": patched("forward", lambda model, plain, x: plain(x) * int(x.shape[0])),
    "look_reads_or_refuses": patched("forward", counted),
}


@pytest.mark.parametrize("law", FAULTS)
def test_a_fault_is_found_under_its_name(law):
    function = getattr(laws_networks, law)
    Check(function, Network("cvt_13", SMALL)).run()  # without the fault
    with pytest.raises(ContractError, match=f"^{law} does not hold for cvt_13: .*Expected: "):
        Check(function, Planted("cvt_13", SMALL, fault=law)).run()


def test_checkpointing_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setattr(cvt.CvT, "set_grad_checkpointing", lambda self, enable=True: None)
    with pytest.raises(ContractError, match=r"(\d+) numbers stored with checkpointing, \1 without"):
        Check(laws_networks.checkpointing_changes_nothing, Network("cvt_13", SMALL)).run()


def test_a_network_without_words_or_source_is_found(monkeypatch):
    check = Check(laws_networks.is_registered, Network("cvt_13", SMALL))
    check.run()
    with monkeypatch.context() as patch:
        patch.setattr(cvt.cvt_13, "__doc__", None)
        with pytest.raises(ContractError, match="no docstring of the function that is registered"):
            check.run()
    monkeypatch.setattr(cvt.CvT, "__doc__", "A network in stages.")
    with pytest.raises(ContractError, match="no 'Paper:' in the docstring of its class"):
        check.run()


def test_checks_by_name_or_by_the_registered_function():
    names = [check.name for check in network_checks("cvt_13", **SMALL)]
    assert names == [law.__name__ for law in laws(laws_networks, ["network"])]
    assert set(FAULTS) < set(names)
    by_function = network_checks(cvt.cvt_13, size=32, **SMALL)
    assert [check.item for check in by_function] == [Network("cvt_13", SMALL, 32)] * len(names)
    by_function[names.index("outputs_are_logits")].run()
    assert network_checks("cvt_13", img_size=12)[0].item.size == 12


def test_a_name_that_timm_does_not_know():
    with pytest.raises(ContractError, match="is_registered does not hold for no_such_network"):
        network_checks("no_such_network")[0].run()


def test_the_page_on_networks_lists_the_laws():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "add-a-network.md").read_text()
    assert {check.name for check in network_checks("cvt_13")} <= set(re.findall(r"`(\w+)`", page))
