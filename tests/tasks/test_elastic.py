"""Elastic classification: draws, the loss by hand, what learns, and the way to a network of its own by `vitreous route`."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from vitreous import load
from vitreous.base.errors import HostError, SettingError
from vitreous.bench.route import Route, choose, measured
from vitreous.commands.cli import main
from vitreous.hosts.subnetwork import Subnetwork, cut_out
from vitreous.tasks import Dice
from vitreous.tasks.elastic import Elastic

SMALL = {"img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 16, "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 3}


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL | options)


def pictures(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def dice(count, rows=None):
    return Dice((3,), count, np.arange(count) if rows is None else rows, torch.device("cpu"))


def test_sizes_are_shares_of_the_model():
    assert Elastic().sizes(vit()) == ((2, 3, 4), (16, 24, 32), (2, 3, 4))
    assert Elastic(widths=(0.1, 0.2), mlps=(1.0,), depths=(0.5,)).subnetworks(vit()) == [Subnetwork(1, 32, 2)]
    parts = Elastic().subnetworks(vit())
    assert len(parts) == 27
    assert (parts[0], parts[-1]) == (Subnetwork(2, 16, 2), Subnetwork(4, 32, 4))


def test_draws_are_alike_often_and_the_same_in_two_processes():
    objective = Elastic().build(vit(), None)
    images, target = pictures(1).expand(3000, -1, -1, -1), torch.zeros(3000, dtype=torch.long)
    batch = objective.draw(images, target, dice(3000))
    for name, sizes in (("heads", (2, 3, 4)), ("hidden", (16, 24, 32)), ("depth", (2, 3, 4))):
        found = Counter(batch[name].tolist())
        assert set(found) == set(sizes)
        assert all(abs(n - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for n in found.values())
    half = objective.draw(images[:7], target[:7], dice(3000, np.arange(5, 12)))
    assert torch.equal(half["heads"], batch["heads"][5:12])
    pairs = Counter(zip(batch["heads"].tolist(), batch["depth"].tolist(), strict=True))
    assert min(pairs.values()) > 250  # nine pairs of 333 each: drawn apart


def test_the_loss_is_the_mean_over_cut_out_networks():
    model = vit().eval()
    objective, images, target = Elastic().build(model, None).eval(), pictures(5), torch.tensor([0, 1, 2, 0, 1])
    batch = objective.draw(images, target, dice(5))
    losses = []
    for i in range(5):
        part = Subnetwork(*(int(batch[name][i]) for name in ("heads", "hidden", "depth")))
        losses.append(F.cross_entropy(cut_out(model, part)(images[i : i + 1]), target[i : i + 1]))
    torch.testing.assert_close(objective.losses(batch, 0.0)["elastic"], torch.stack(losses).mean(), atol=1e-6, rtol=1e-5)


def test_what_lies_behind_a_prefix_has_no_gradient():
    model = vit()
    objective = Elastic(widths=(0.5,), mlps=(0.5,), depths=(0.5,)).build(model, None)
    batch = objective.draw(pictures(4), torch.tensor([0, 1, 2, 0]), dice(4))
    objective.losses(batch, 0.0)["elastic"].backward()
    fc1, proj = model.blocks[0].mlp.fc1.weight.grad, model.blocks[0].attn.proj.weight.grad
    assert fc1[:16, :8].any()
    assert not fc1[16:].any()
    assert not fc1[:, 8:].any()
    assert proj[:8, :8].any()
    assert not proj[8:].any()
    assert not proj[:, 8:].any()
    assert not any(p.grad.any() for p in model.blocks[2:].parameters())


def test_steps_on_one_batch_lower_the_loss_of_both_ends():
    model = vit().train()
    objective, images, target = Elastic().build(model, None), pictures(8), torch.arange(8) % 3
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    before = objective.eval().score(objective.predict({"images": images, "target": target}))
    for step in range(60):
        batch = objective.train().draw(images, target, Dice((step,), 8, np.arange(8), torch.device("cpu")))
        optimizer.zero_grad()
        objective.losses(batch, 0.0)["elastic"].backward()
        optimizer.step()
    after = objective.eval().score(objective.predict({"images": images, "target": target}))
    assert after["loss"] < before["loss"] / 2
    assert after["smallest"] > before["smallest"]
    outputs = objective.predict({"images": images, "target": target})
    torch.testing.assert_close(outputs["smallest"], cut_out(model, Subnetwork(2, 16, 2))(images), atol=1e-5, rtol=1e-5)


def test_bad_input():
    for settings in ({"widths": (-1.0,)}, {"mlps": (0.0,)}, {"depths": (1.5,)}):
        with pytest.raises(SettingError, match=r"^Found \w+=.*Expected shares above 0"):
            Elastic(**settings)
    with pytest.raises(HostError, match=r"^Found ResNet of another kind"):
        Elastic().build(timm.create_model("test_resnet"), None)


def test_the_largest_within_the_limit_is_chosen():
    routes = [Route(Subnetwork(i, i, i), seconds, 10 * i) for i, seconds in ((1, 0.001), (2, 0.004), (3, 0.003), (4, 0.009))]
    assert choose(routes, 0.005).part.heads == 3
    assert choose(routes, 0.0035).part.heads == 3
    assert choose(routes, 1.0).part.heads == 4
    with pytest.raises(SettingError, match=r"^Found a limit of 0\.5 ms\. Expected 1 ms or more"):
        choose(routes, 0.0005)


def test_every_subnetwork_is_timed():
    task = Elastic(widths=(0.5, 1.0), mlps=(1.0,), depths=(0.5, 1.0))
    routes = measured(vit(), task.subnetworks(vit()), count=2)
    assert {route.part for route in routes} == set(task.subnetworks(vit()))
    assert [route.operations for route in routes] == sorted(route.operations for route in routes)
    assert all(route.seconds > 0 for route in routes)
    assert routes[0].operations < routes[-1].operations / 2


def test_a_run_becomes_a_folder_of_a_subnetwork(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "train cutouts:train=40,test=24,size=16 --model-kwargs patch_size=4 depth=2 embed_dim=24 num_heads=2 --batch-size 16"
    )
    assert main(f"{words} --epochs 1 --device cpu --task elastic:widths=0.5,mlps=0.5+1.0,depths=1.0 --out run".split()) == 0
    tests = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["tests"]["test"]
    assert {"accuracy", "loss", "smallest"} <= set(tests)
    assert main(["route", "run", "--limit", "1000", "--rounds", "2", "--out", "part"]) == 0
    assert "1 heads, 96 hidden features, 2 blocks" in capsys.readouterr().out
    part, model = load("part"), load("run")
    assert torch.equal(part(pictures(2)), cut_out(model, Subnetwork(1, 96, 2))(pictures(2)))
    assert part.pretrained_cfg["label_names"] == model.pretrained_cfg["label_names"]
    assert main(["route", "run", "--limit", "0.00001", "--rounds", "1", "--out", "other"]) == 2
    assert "Give a higher limit" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(f"{words} --epochs 1 --device cpu --out plain".split()) == 0
    assert main(["route", "plain", "--limit", "5", "--out", "other"]) == 2
    assert "Expected one of --task elastic" in capsys.readouterr().err
