"""Probabilities: one class per image or several, as recorded with the model, and the same through every command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitreous import look
from vitreous.base.errors import DataError
from vitreous.commands.cli import main
from vitreous.deploy.export import export
from vitreous.lens.faithfulness import Judge
from vitreous.models.classes import MULTI_LABEL, activation, multi_label, probabilities, set_multi_label
from vitreous.models.load import logits_of, open_images, prepared
from vitreous.train import load, save

NET = dict(img_size=16, patch_size=4, depth=1, embed_dim=24, num_heads=2)
INPUTS = dict(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(3, 16, 16), crop_pct=1.0)


def network(classes: int = 3, several: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **NET, num_classes=classes).eval()
    torch.nn.init.normal_(model.head.bias)
    set_multi_label(model, several)
    return model


@pytest.fixture
def picture(offline) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save("x.png")
    return offline / "x.png"


def logits(model: torch.nn.Module, path: Path) -> np.ndarray:
    pixels = (np.asarray(Image.open(path), np.float32) / 255 - 0.5) / 0.5
    with torch.no_grad():
        return model(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].double().numpy()


def expected(values: np.ndarray, several: bool) -> np.ndarray:
    return 1 / (1 + np.exp(-values)) if several else np.exp(values) / np.exp(values).sum()


@pytest.mark.parametrize("several", [True, False])
def test_every_command_shows_the_probabilities_of_the_models_kind(picture, several, capsys):
    model = network(several=several)
    save(model, "model", classes=("a", "b", "c"), inputs=INPUTS)
    truth = expected(logits(model, picture), several)
    order = truth.argsort()[::-1]
    assert main(["predict", "model", "x.png", "--top", "3"]) == 0
    assert ("Several classes may be right" in capsys.readouterr().out) == several
    row = next(csv.DictReader(Path("predictions.csv").read_text().splitlines()))
    for k, number in enumerate(("", "_2", "_3")):
        assert row[f"predicted{number}"] == "abc"[order[k]]
        assert float(row[f"probability{number}"]) == pytest.approx(truth[order[k]], rel=1e-5)
    reading = look(load("model"), [picture], curves=0, noise=0)
    assert reading.images[0]["probability"] == pytest.approx(truth.max(), rel=1e-4)
    assert export(load("model"), "m.pt2", "torch-export")["probabilities"] == ("sigmoid" if several else "softmax")


def test_the_curves_follow_the_probability_of_the_models_kind(picture):
    model = network()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = model(x)
        torch.testing.assert_close(Judge(model, x, 2, None).clean, answers.double().sigmoid().max(1).values)
        single = network(1)
        torch.testing.assert_close(Judge(single, x, 2, True).clean, single(x).double().sigmoid()[:, 0])
        set_multi_label(model, False)
        torch.testing.assert_close(Judge(model, x, 2, None).clean, answers.double().softmax(1).max(1).values)


def test_a_run_on_sets_of_classes_carries_its_kind_and_one_on_classes_does_not(picture):
    for k in range(12):
        Image.open(picture).save(f"{k}.png")
    parts = ["train"] * 6 + ["test"] * 6
    rows = [f"{k}.png,{part},{k % 2},1,{(k + 1) % 2}" for k, part in enumerate(parts)]
    Path("table.csv").write_text("\n".join(["file,split,label:a,label:b,label:c", *rows]))
    words = [
        "--model-kwargs",
        "patch_size=4",
        "depth=1",
        "embed_dim=24",
        "num_heads=2",
        "--image-size",
        "16",
        "--device",
        "cpu",
    ]
    train = ["train", "table.csv", *words, "--epochs", "1", "--batch-size", "4", "--recipe", "none"]
    assert main([*train, "--task", "multi_label", "--out", "run"]) == 0
    assert json.loads(Path("run/config.json").read_text())["problem_type"] == MULTI_LABEL
    model = load("run")
    assert main(["predict", "run", "x.png", "--top", "3"]) == 0
    row = next(csv.DictReader(Path("predictions.csv").read_text().splitlines()))
    shown = sorted(float(row[f"probability{n}"]) for n in ("", "_2", "_3"))
    pixels = next(prepared(open_images(model, ["x.png"]), 1))[0].pixels
    assert shown == pytest.approx(sorted(logits_of(model, pixels[None])[0].sigmoid().tolist()), rel=1e-4)
    rows = [f"{k}.png,{part},{'abc'[k % 3]}" for k, part in enumerate(parts)]
    Path("table.csv").write_text("\n".join(["file,split,label", *rows]))
    again = [
        "train",
        "table.csv",
        "--model",
        "run",
        "--epochs",
        "1",
        "--recipe",
        "none",
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    assert main([*again, "--out", "one"]) == 0
    assert "problem_type" not in json.loads(Path("one/config.json").read_text())


def test_plain_timm_reads_the_folder_and_older_folders_are_classification(picture):
    model = network()
    save(model, "model", classes=("a", "b", "c"), inputs=INPUTS)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(timm.create_model("local-dir:model", pretrained=True).eval()(x), model(x))
    config = json.loads(Path("model/config.json").read_text())
    del config["problem_type"]
    Path("model/config.json").write_text(json.dumps(config))
    assert not multi_label(load("model"))
    Path("model/config.json").write_text(json.dumps(config | {"problem_type": "several"}))
    with pytest.raises(DataError, match=r"problem_type = 'several'.*one of regression"):
        load("model")


def test_models_of_transformers_say_it_themselves():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4)
    for kind in (MULTI_LABEL, "single_label_classification"):
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, problem_type=kind))
        assert multi_label(model) == (kind == MULTI_LABEL)


def test_one_logit_is_against_nought():
    model = network(1, several=False)
    assert activation(model, 1) == "sigmoid"
    assert probabilities(model, torch.zeros(2, 1)).tolist() == [[0.5], [0.5]]
