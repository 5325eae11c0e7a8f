"""The weights that are shipped: small, loadable by us and by timm alone, and as good as their README says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vitreous
from vitreous.base.files import read_json
from vitreous.commands._demo import NETWORK
from vitreous.data import open_data
from vitreous.data.preprocess import Preprocess
from vitreous.models import model_folder
from vitreous.train.engine.loader import loader

FOLDER = Path(vitreous.__file__).parent / "weights" / "cutouts"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_they_are_small_and_whole():
    names = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(names) == {"model.safetensors", "config.json", "mechanisms.json", "README.md", "foreground.safetensors"}
    assert sum(names.values()) < 2_000_000


@torch.no_grad()
def test_timm_alone_loads_the_same_model():
    ours, theirs = model_folder.load(FOLDER), timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))
    parameters = sum(p.numel() for p in ours.parameters())
    assert f"{parameters:,}" in README
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_they_are_of_the_demos_network():
    arguments = read_json(FOLDER / "config.json")["model_args"]
    assert set(NETWORK) <= {f"{name}={value}" for name, value in arguments.items()}
    assert " ".join(NETWORK) in README


@pytest.mark.parametrize("name", ["test", "swapped"])
@torch.no_grad()
def test_accuracy_is_what_the_readme_says(name):
    stated = float(re.search(rf"`{name}`\) \| ([0-9.]+) %", README).group(1))
    model, data = model_folder.load(FOLDER), open_data("cutouts:train=6")
    config = model.pretrained_cfg
    inputs = Preprocess(**{key: config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")})
    right = [(model(images).argmax(1) == labels).numpy() for images, labels in loader(data.tests[name], inputs, 250)]
    assert read_json(FOLDER / "config.json")["label_names"] == list(data.classes)
    assert 100 * np.concatenate(right).mean() == pytest.approx(stated, abs=0.15)  # two scenes, for another machine's roundings
