"""Penalties of activations are part of the loss of a step, as if they were added by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contract.hosts import build, images
from train.terms import Sizes
from vitreous import check, graft
from vitreous.tasks import TASKS
from vitreous.testing import contract_checks
from vitreous.train.engine.distributed import StepModule

LABELS = torch.tensor([0, 1, 2])


LAWS = ("compiles", "exports", "gradient_checkpointing", "removal_is_exact", "exact_at_init")
CHECKS = [check for check in contract_checks(Sizes(layers=(1,)), hosts=("dinov2",)) if check.law.__name__ in LAWS]


@pytest.mark.parametrize("law", CHECKS, ids=lambda check: check.name)
def test_contract(law):
    law.run()


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("host", ["dinov2", "eva"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_adds_them_to_the_loss(host, checkpointing):
    model = check(graft(build(host), Sizes(layers=(1,))), images()).train()
    outputs = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, out: outputs.append(out.x))
    by_hand = F.cross_entropy(model(images()), LABELS)
    by_hand = by_hand + 0.1 * outputs[0].square().mean((1, 2)).mean()
    handle.remove()
    expected = gradients(model, by_hand)
    model.set_grad_checkpointing(checkpointing)
    step = StepModule(TASKS.parse("classification").build(model, None), nullcontext)
    losses, penalties = step({"images": images(), "target": LABELS}, 0.0, True)
    assert (list(losses)[1:], penalties) == (["size"], {})
    torch.testing.assert_close(sum(losses.values()), by_hand)
    found = gradients(model, sum(losses.values()))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    without = gradients(model, next(iter(step({"images": images(), "target": LABELS}, 0.0, True)[0].values())))
    assert (without["blocks.0.mlp.fc1.weight"] - expected["blocks.0.mlp.fc1.weight"]).abs().max() > 1e-4


class TwoPasses(nn.Module):
    """An objective with a pass of its own without gradients, and one over each half of the batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def losses(self, batch, progress):
        with torch.no_grad():
            self.model(batch["images"])
        logits = [self.model(half) for half in batch["images"].chunk(2)]
        return {"loss": torch.cat(logits).square().mean(), "size": logits[0].new_ones(())}


def test_every_pass_with_gradients_counts_and_a_loss_of_that_name_stays():
    model = graft(build("plain"), Sizes(layers=(0, 2)))
    x, values = images(4), []
    for i in (0, 2):
        model.blocks[i].register_forward_hook(lambda module, args, out: values.append(out.x.square().mean()))
    with torch.no_grad():
        for half in x.chunk(2):
            model(half)
    expected = 1 + 0.1 * sum(values)
    losses, _ = StepModule(TwoPasses(model), nullcontext)({"images": x}, 0.0, True)
    torch.testing.assert_close(losses["size"].detach(), expected)
