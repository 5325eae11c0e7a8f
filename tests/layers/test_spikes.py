"""Spiking neurons: recorded spikes, the loop, the gradient by hand, and no memory of earlier calls."""

from __future__ import annotations

import math

import pytest
import torch

from vitreous.layers.spikes import LIF, SLOPE, lif, step


def test_spikes_are_the_recorded_ones():
    inputs = torch.tensor([[0.9, 1.2, 2.5], [0.9, 1.2, 0.1], [1.4, 0.2, 1.0], [2.0, 2.0, 2.0]])
    expected = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert torch.equal(lif(inputs), expected)
    assert torch.equal(lif(inputs.requires_grad_()), expected)  # with its gradient they are the same, to the bit


@pytest.mark.parametrize(("threshold", "tau"), [(1.0, 2.0), (0.5, 2.0), (0.3, 4.0)])
def test_spikes_are_the_formula(threshold, tau):
    x = 2 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spikes = LIF(threshold, tau)(x)
    for n in range(5):
        v = 0.0
        for t in range(6):
            h = v + (x[t, n].item() - v) / tau
            assert spikes[t, n] == float(h >= threshold)
            v = 0.0 if h >= threshold else h
    assert 0 < spikes.mean() < 1


def test_gradient_is_that_of_a_sigmoid_and_stops_at_the_reset():
    """Two steps by hand: d s2 / d x1 = sigma'(h2 - 1) (1 - 1/tau) (1 - s1) / tau; a spike at step 1 cuts it off."""
    for first, second in ((0.6, 1.1), (2.6, 1.1)):
        x = torch.tensor([first, second], dtype=torch.float64, requires_grad=True)
        spikes = lif(x)
        (gradient,) = torch.autograd.grad(spikes[1], x)
        h1 = first / 2
        fired = float(h1 >= 1)
        h2 = h1 * (1 - fired) / 2 + second / 2
        sigma = 1 / (1 + math.exp(-SLOPE * (h2 - 1)))
        slope = SLOPE * sigma * (1 - sigma)
        torch.testing.assert_close(gradient, torch.tensor([slope * (1 - fired) / 4, slope / 2], dtype=torch.float64))
    x = torch.tensor([-3.0, 0.0, 3.0], requires_grad=True)
    assert torch.equal(step(x), torch.tensor([0.0, 1.0, 1.0]))


def test_a_constant_input_has_the_known_rates():
    """Below the threshold none; from tau times the threshold on every step; in between more with more input."""
    counts = lif(torch.tensor([0.99, 1.2, 1.5, 2.0]).expand(12, 4)).sum(0).tolist()
    assert counts[0] == 0
    assert counts[3] == 12
    assert 0 < counts[1] < counts[2] < 12


def test_nothing_is_remembered():
    neuron, x = LIF(), torch.full((3, 2), 1.5)
    assert torch.equal(neuron(x), neuron(x))
    assert not torch.equal(lif(torch.cat([x, x]))[3:], neuron(x))  # within one call the potential goes on
    assert not neuron.state_dict()
