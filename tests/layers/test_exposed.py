"""An exposed value is seen by a hook and leaves no trace in the module, its state or its exported graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitreous.base.errors import SettingError
from vitreous.layers.exposed import Exposed


class Scaled(nn.Module):
    def __init__(self, exposed: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.shown = Exposed("scale", "number", "What each column is multiplied by.") if exposed else None

    def forward(self, x):
        return x * (self.scale if self.shown is None else self.shown(self.scale))


def test_a_hook_sees_the_value_and_nothing_is_kept():
    module, seen = Scaled(True), []
    handle = module.shown.register_forward_hook(lambda _module, _args, value: seen.append(value))
    x = torch.ones(4, 2)
    assert torch.equal(module(x), x * module.scale)
    assert seen[0] is module.scale
    handle.remove()
    assert list(module.state_dict()) == list(Scaled(False).state_dict()) == ["scale"]
    assert not [v for v in vars(module.shown).values() if isinstance(v, torch.Tensor)]
    graphs = [torch.export.export(Scaled(exposed).eval(), (x,)).graph for exposed in (True, False)]
    assert str(graphs[0]) == str(graphs[1])


def test_an_unknown_kind_is_refused():
    with pytest.raises(SettingError, match=r"kind='matrix'.*Expected one of map, pairs, index, number"):
        Exposed("scale", "matrix", "")
    assert "scale: number" in repr(Scaled(True))
