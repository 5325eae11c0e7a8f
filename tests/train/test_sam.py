"""Sharpness-aware minimisation: the loop of its paper, a public implementation, and what is left behind by a failed step."""

from __future__ import annotations

import pytest
import pytorch_optimizer
import safetensors.torch
import timm
import torch
from torch.nn import functional as F

from train.interrupting import differing
from train.test_laws import WORDS, run
from vitreous.base.errors import SettingError
from vitreous.commands.cli import main
from vitreous.train import train
from vitreous.train.engine.prepare import prepare
from vitreous.train.updates import UPDATES


def test_sam_without_radius_is_the_plain_update_to_the_last_bit(tmp_path):
    """With dropped paths, mixing and running means: so both passes draw the same."""
    more = "--mixup 0.3 --drop-path 0.3 --epochs 1 --update"
    run(f"{more} plain", tmp_path / "plain")
    run(f"{more} sam:rho=0", tmp_path / "sam")
    assert differing(tmp_path / "plain", tmp_path / "sam") == []
    resnet = f"{WORDS} --model test_resnet --model-kwargs in_chans=3 --epochs 1 --update"
    for update in ("plain", "sam:rho=0"):
        assert main([*resnet.split(), update, "--out", str(tmp_path / f"resnet-{update[:3]}")]) == 0
    assert differing(tmp_path / "resnet-pla", tmp_path / "resnet-sam") == []


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_is_the_loop_of_its_paper(settings, quiet, adaptive):
    rho = 2.0 if adaptive else 0.2
    update = f"sam:rho={rho},adaptive={adaptive}"
    chosen = settings(update=update, opt="momentum", sched="none", weight_decay=0.0, lr=0.05, clip_grad=0.5)
    session = prepare(chosen)
    model, weights = session.model.train(), list(session.model.parameters())
    optimizer, moved = torch.optim.SGD(weights, lr=0.05, momentum=0.9), []
    for epoch in (1, 2):
        session.train.set_epoch(epoch)
        for images, labels in session.train:
            start = [w.detach().clone() for w in weights]
            first = torch.autograd.grad(torch.nn.functional.cross_entropy(model(images), labels), weights)
            scaled = [w.abs() * g if adaptive else g for w, g in zip(start, first, strict=True)]
            length = sum(s.double().square().sum() for s in scaled).sqrt().float()
            with torch.no_grad():
                for w, s in zip(weights, scaled, strict=True):
                    w.add_(rho * s * (w.abs() if adaptive else 1) / length)
            second = torch.autograd.grad(torch.nn.functional.cross_entropy(model(images), labels), weights)
            moved.append(max((a - b).abs().max().item() for a, b in zip(first, second, strict=True)))
            with torch.no_grad():
                for w, value, g in zip(weights, start, second, strict=True):
                    w.copy_(value)
                    w.grad = g
            torch.nn.utils.clip_grad_norm_(weights, 0.5)
            optimizer.step()
    assert min(moved) > 1e-3  # the second gradient is another one
    saved = safetensors.torch.load_file(train(chosen, quiet) / "model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=4, mlp_ratio=2.0, num_classes=3
    ).double()


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_is_that_of_a_public_package(adaptive):
    """Twenty steps from the same weights on the same batches; the norm of pytorch_optimizer 4.1.0 is in float32."""
    rho, images = (
        (1.0 if adaptive else 0.1),
        torch.randn(20, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double(),
    )
    labels, ours, theirs, plain = torch.arange(160).view(20, 8) % 3, vit(), vit(), vit()
    weights = [model.state_dict().values() for model in (ours, theirs, plain)]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05, momentum=0.9)
    beside = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    peer = pytorch_optimizer.SAM(theirs.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, lr=0.05, momentum=0.9)
    update = UPDATES.parse(f"sam:rho={rho},adaptive={str(adaptive).lower()}")

    def norm(tensors=None):
        return torch.stack([t.norm() for t in tensors or [p.grad for p in ours.parameters()]]).norm()

    for x, y in zip(images, labels, strict=True):

        def gradients(model=ours, x=x, y=y):
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return {"loss": loss.detach()}

        update.step(optimizer, gradients, norm, lambda: None)
        gradients(theirs)
        peer.first_step(zero_grad=True)
        gradients(theirs)
        peer.second_step(zero_grad=True)
        gradients(plain)
        beside.step()
    apart = [max((a - b).abs().max().item() for a, b in zip(weights[0], other, strict=True)) for other in weights[1:]]
    assert apart[0] < 1e-6
    assert apart[1] > 1e-3  # the plain update goes elsewhere


def test_weights_are_put_back_where_the_second_gradient_is_not_finite(settings):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    calls = []

    def gradients():
        calls.append(weight.detach().clone())
        if len(calls) == 2:
            raise ArithmeticError
        weight.grad = torch.tensor([3.0, 4.0])

    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(ArithmeticError):
        UPDATES.parse("sam:rho=0.5").step(optimizer, gradients, lambda _: torch.tensor(5.0), lambda: None)
    assert torch.equal(weight, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(calls[1], torch.tensor([1.3, 2.4]))  # w + 0.5 g / |g|


def test_a_bad_radius_is_refused(settings):
    with pytest.raises(SettingError, match=r"Found rho=-1\.0"):
        settings(update="sam:rho=-1")
