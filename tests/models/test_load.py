"""A model by name or folder: one source of weights, never random ones unasked."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from vitreous.base.errors import DataError, SettingError
from vitreous.data.preprocess import Preprocess
from vitreous.models import load, model_folder
from vitreous.models.create import create_model
from vitreous.models.load import open_model, weights_source

NAME = "vit_tiny_patch16_224"
NET = {"patch_size": 8, "img_size": 16, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}


def test_each_source_gives_its_own_weights(tmp_path):
    torch.manual_seed(7)
    model = create_model(NAME, **NET)
    model_folder.save(model, tmp_path / "run")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    net = {key: value for key, value in NET.items() if key != "num_classes"}
    opened = {
        "run": open_model(str(tmp_path / "run")),
        "file": open_model(NAME, str(tmp_path / "w.safetensors"), arguments=net),
    }
    for source, other in opened.items():
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items()), source
        assert not other.training
    assert weights_source(str(tmp_path / "run")) == "run"
    assert weights_source(NAME, tmp_path / "w.safetensors") == "file"
    assert weights_source(NAME, random_weights=True) == "random"
    assert weights_source(NAME) == "pretrained"


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (open_model(NAME, random_weights=True, arguments=NET).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_of_any_image_size_get_images_of_the_size_that_was_asked_for(tmp_path):
    said = []
    widths = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_classes": 3}
    model = open_model("convnext_atto", random_weights=True, image_size=64, arguments=widths, say=said.append)
    assert Preprocess.of_model(model).input_size == (3, 64, 64)
    assert said[-1].startswith("Images: 64 x 64 px")
    model_folder.save(model, tmp_path / "run")
    sizes = [Preprocess.of_model(open_model(str(tmp_path / "run"), image_size=size)).input_size for size in (None, 96)]
    assert sizes == [(3, 64, 64), (3, 96, 96)]


def test_two_sources_of_weights_are_refused(tmp_path):
    with pytest.raises(SettingError, match=r"--weights and --random-weights for vit.*one source"):
        open_model(NAME, "w.safetensors", random_weights=True)
    with pytest.raises(SettingError, match=r"--weights for .*, a folder that has its own.*one source"):
        open_model(str(tmp_path), "w.safetensors")


def test_weights_that_cannot_be_had_are_never_replaced_by_random_ones(monkeypatch):
    said = []

    def offline(name, **_):
        raise DataError(f"timm's weights of {name} cannot be had: no network. Expected a network.")

    monkeypatch.setattr(load, "create_model", offline)
    with pytest.raises(DataError, match=r"of vit_tiny.*no network.*--weights PATH\.$") as error:
        open_model(NAME, say=said.append)
    assert "--random-weights" not in str(error.value)
    with pytest.raises(DataError, match=r"no network.*--random-weights: its maps mean nothing"):
        open_model(NAME, random_weights=False)
    assert said == [f"Weights: those that timm publishes for {NAME}."]


def test_a_network_that_cannot_be_built_names_its_arguments():
    with pytest.raises(DataError, match=r"cannot build vit_tiny_patch16_224: .*Check its arguments: num_heads=5, depth=1\.$"):
        create_model(NAME, num_heads=5, depth=1)
