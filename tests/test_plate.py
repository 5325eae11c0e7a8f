"""The plate of SVD-ViT: its maps against numpy's SVD, its numbers, and what it leaves out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from vitreous import graft, look, save

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS / "svd_vit"))
import plate  # noqa: E402

from vitreous.lens.formulas.scores import auroc, coverage  # noqa: E402


def vit():
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **settings).eval()


def test_maps_are_left_singular_vectors_of_the_patches_along_class_attention():
    model, pixels = vit(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    maps, grid = plate.components(model, pixels, [1, 3])
    assert grid == (4, 4)
    with torch.no_grad():
        blocks = model.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
    reading = look(model, pixels, probes=["attention_maps"], noise=0)
    logs = [np.log(reading.maps["attention", layer]).reshape(2, 16) for layer in (1, 2)]
    reference = sum((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in logs)
    for number, x in ((1, blocks[0]), (3, blocks[2])):
        for image in range(2):
            u = np.linalg.svd(x[image].double().numpy(), full_matrices=False)[0]
            for i in range(2):
                sign = np.sign(np.corrcoef(u[:, i], reference[image])[0, 1])
                assert np.abs(maps[number][image, i].numpy() - sign * u[:, i]).max() < 1e-3


def test_inserted_tokens_are_no_part_of_a_map():
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain, _ = plate.components(vit(), pixels, [1, 2])
    inserted, _ = plate.components(graft(vit(), "spc:after=2"), pixels, [1, 2])
    for number in (1, 2):  # tokens join behind block 2, whose own are as before
        assert inserted[number].shape == (1, 3, 16)
        assert (inserted[number].abs() - plain[number].abs()).abs().max() < 1e-4


def test_the_plate_and_its_numbers(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for k in range(2):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"photos/{k}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks/0.png")
    for name, graft_text in (("plain", None), ("spc", "spc:after=2")):
        model = vit()
        save(graft(model, graft_text) if graft_text else model, tmp_path / name)
    words = [str(tmp_path / "photos"), "--masks", str(tmp_path / "masks"), "--plain", str(tmp_path / "plain")]
    plate.main([*words, "--svd-vit", str(tmp_path / "spc"), "--blocks", "1", "2", "--out", str(tmp_path / "out.png")])
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert len(numbers) == 2 * 2 * 2 * 3
    assert {line["auroc"] for line in numbers if line["image"] == "1.png"} == {None}
    sheet = Image.open(tmp_path / "out.png")
    assert sheet.width > 7 * plate.SIDE
    image = next(line for line in numbers if line["image"] == "0.png" and line["component"] == 2)
    views = plate.Views(vit(), str(tmp_path / "photos"), str(tmp_path / "masks"))
    pixels = torch.stack([views[0].pixels, views[1].pixels])
    expected = auroc(plate.components(vit(), pixels, [1, 2])[0][1][0, 1], coverage(views[0].mask, (4, 4))).item()
    assert abs(image["auroc"] - expected) < 1e-6


def test_the_stored_plate_is_of_every_photograph_and_small():
    numbers = json.loads((BENCHMARKS / "svd_vit/plate.json").read_text())
    assert {line["image"] for line in numbers} == set(plate.OUTLINES)
    assert {line["model"] for line in numbers} == {"plain"}
    assert {line["block"] for line in numbers} == {1, 10}
    assert all(0 <= line["auroc"] <= 1 for line in numbers)
    assert (BENCHMARKS / "svd_vit/plate.jpg").stat().st_size < 200_000
