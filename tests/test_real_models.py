"""The three real models: they load by path, give their reference logits, take grafts, and give them back bit for bit."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import timm
import torch

from vitreous import SPC, SVDA, check, graft, ungraft
from vitreous.models.model_folder import load, save

MODELS = {"vit_tiny_patch16_224": 1e-3, "vit_fashionmnist": 1e-4, "vit_cifar10": 1e-4}  # name: tolerance of its reference
GRAFTS = {
    "svda": [SVDA()],
    "svda, last two blocks": [SVDA(layers=(2, 3), start="gentle")],
    "spc": [SPC()],
    "spc after the first block, mixed": [SPC(after=1, ssva=True)],
    "both": [SVDA(), SPC(after=2)],
}


def reference_images(data, name: str) -> torch.Tensor:
    """The images that the reference logits belong to, normalised as the model's config says."""
    if name == "vit_tiny_patch16_224":
        pixels = np.load(data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"]
    elif name == "vit_cifar10":
        pixels = np.load(data / "cifar10" / "cifar10_5k2k.npz")["x_test"][:64]
    else:
        with gzip.open(data / "fashion-mnist" / "t10k-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(16 + 64 * 784), np.uint8, offset=16).reshape(64, 28, 28, 1)
    config = timm.create_model(f"local-dir:{data}/weights/{name}", pretrained=True).pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2) / 255 - mean) / std


@pytest.fixture(params=MODELS)
def real(request, shared_data):
    """(name, model, images, reference logits)."""
    folder = shared_data / "weights" / request.param
    model = load(folder)
    reference = torch.from_numpy(np.load(folder / "reference.npz")["logits"])
    return request.param, model, reference_images(shared_data, request.param), reference


@torch.no_grad()
def test_reference_logits(real):
    name, model, images, reference = real
    assert (model(images) - reference).abs().max() < MODELS[name]


@pytest.mark.parametrize("grafts", GRAFTS.values(), ids=GRAFTS)
@torch.no_grad()
def test_grafts_go_in_and_come_out_bit_for_bit(real, grafts):
    _, model, images, _ = real
    images = images[:8]
    before, objects = model(images), {n: id(m) for n, m in model.named_modules()}
    check(graft(model, *grafts), images)
    assert (model(images) - before).abs().max() > 1e-3
    removal = ungraft(model, all=True)
    assert removal.changed == ()
    assert torch.equal(model(images), before)
    assert {n: id(m) for n, m in model.named_modules()} == objects


@torch.no_grad()
def test_gated_spc_at_gate_zero_keeps_the_logits_exactly(real):
    _, model, images, _ = real
    before = model(images[:8])
    graft(model, SPC(read="gated"))
    assert torch.equal(model(images[:8]), before)


@torch.no_grad()
def test_a_grafted_real_model_is_saved_and_loaded(real, tmp_path):
    _, model, images, _ = real
    graft(model, SVDA(layers=(1,)), SPC(after=2))
    save(model, tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(images[:8]), model(images[:8]))
