"""Checkpoints of other trainers: what is read is what timm reads, or what stands in the way is named."""

from __future__ import annotations

import argparse
import collections
import csv
import json
import pathlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import load_checkpoint

from vitreous import read
from vitreous.base.errors import DataError, SettingError
from vitreous.commands.cli import main
from vitreous.data.preprocess import Preprocess
from vitreous.models.create import create_model
from vitreous.models.load import open_model
from vitreous.models.weights import common_prefix, read_weights
from vitreous.train import load, save

NAME = "deit_tiny_patch16_224"
NET = dict(img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=2)
WORDS = [f"{name}={value}" for name, value in NET.items()]


def network(seed: int = 0, classes: int = 3, name: str = NAME) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, **NET, num_classes=classes).eval()
    torch.nn.init.normal_(model.get_classifier().bias if classes else model.norm.bias)
    return model


def table(seed: int = 0, prefix: str = "", **options) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in network(seed, **options).state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


NAMESPACE = argparse.Namespace(lr=0.1, model=NAME, opt_betas=None)
LIKE_TIMM = {
    "timm's last": {"epoch": 3, "state_dict": table(1), "args": NAMESPACE, "metric": 0.7},
    "timm's with averages": {"state_dict": table(1), "state_dict_ema": table(2), "args": NAMESPACE},
    "averages that were off": {"state_dict": table(1), "state_dict_ema": None},
    "DeiT's": {"model": table(1), "model_ema": table(2), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "compiled and spread": {"state_dict": table(1), "state_dict_ema": table(2, "module._orig_mod.")},
    "averages before all": {"model": table(1), "state_dict": table(3), "model_ema": table(2)},
    "bare": table(1),
}


@pytest.mark.parametrize("kind", LIKE_TIMM)
def test_a_checkpoint_gives_the_weights_that_timm_reads_of_it(kind, tmp_path):
    torch.save(LIKE_TIMM[kind], tmp_path / "c.pth.tar")
    theirs, lines = network(9), []
    load_checkpoint(theirs, str(tmp_path / "c.pth.tar"))
    ours = open_model(NAME, tmp_path / "c.pth.tar", arguments=NET, say=lines.append)
    assert same(ours.state_dict(), theirs.state_dict())
    key = {"bare": None, "DeiT's": "model_ema", "timm's last": "state_dict", "averages that were off": "state_dict"}
    expected = key.get(kind, "model_ema" if "all" in kind else "state_dict_ema")
    assert [line for line in lines if line.startswith("Weights")] == (
        [f"Weights: the {'averaged ' * ('ema' in expected)}weights under {expected} in c.pth.tar."] if expected else []
    )


OTHERS = {
    "a wrapper's": {"state_dict": table(1, "net.")},
    "two wrappers'": {"state_dict": table(1, "student.encoder._orig_mod."), "pytorch-lightning_version": "2.5"},
    "one table by another name": {"weights_of_epoch_3": table(1), "epoch": 3},
    "one table in a table": {"state_dict": {"model": table(1)}},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_prefixes_and_single_tables_are_read_and_said(kind, tmp_path):
    torch.save(OTHERS[kind], tmp_path / "c.ckpt")
    lines = []
    ours = open_model(NAME, tmp_path / "c.ckpt", arguments=NET, say=lines.append)
    assert same(ours.state_dict(), table(1))
    said = {
        "a wrapper's": "'net.'",
        "two wrappers'": "'student.encoder._orig_mod.'",
        "one table by another name": "weights_of_e",
    }
    assert said.get(kind, "state_dict / model") in " ".join(lines)


def test_of_several_tables_one_must_be_chosen(tmp_path):
    torch.save({"teacher": table(1, "backbone."), "student": table(2, "module.backbone.")}, tmp_path / "c.pth")
    with pytest.raises(DataError, match=r"Found 2 tables.*teacher; student.*--weights-table KEY"):
        read_weights(tmp_path / "c.pth")
    for key, seed in (("teacher", 1), ("student", 2)):
        ours = open_model(NAME, tmp_path / "c.pth", arguments=NET, weights_table=key)
        assert same(ours.state_dict(), table(seed))
    with pytest.raises(DataError, match=r"no table of tensors under 'ema'.*one of teacher, student"):
        read_weights(tmp_path / "c.pth", "ema")
    with pytest.raises(SettingError, match=r"--weights-table without --weights"):
        open_model(NAME, weights_table="teacher")


def test_a_pickle_of_objects_is_refused_by_their_names(tmp_path):
    torch.save({"state_dict": table(1), "where": pathlib.PurePosixPath("/x"), "n": collections.Counter()}, tmp_path / "c.pth")
    with pytest.raises(DataError, match=r"it holds pathlib\.PurePosixPath beside tensors") as error:
        read_weights(tmp_path / "c.pth")
    assert "options" not in str(error.value)


def test_the_prefix_is_that_of_most_names():
    wanted = [f"blocks.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    assert common_prefix([f"a.b.{name}" for name in wanted], wanted) == "a.b."
    assert common_prefix([f"a.{name}" for name in wanted[:4]] + wanted[4:], wanted) == "a."
    assert common_prefix(wanted, wanted) == ""
    assert common_prefix([f"a.{name}" for name in wanted[:2]] + ["head.weight"], wanted) == ""  # of another network
    assert common_prefix([f"a.{name}" for name in wanted] + [f"b.{name}" for name in wanted], wanted) in ("a.", "b.")


def test_what_fits_is_loaded_only_when_asked_for_and_all_else_is_listed(tmp_path):
    tensors = table(1, "backbone.", classes=0) | {"decoder.weight": torch.ones(3)}
    del tensors["backbone.norm.bias"]
    tensors["backbone.pos_embed"] = torch.zeros(1, 7, 5)
    torch.save({"model": tensors}, tmp_path / "c.pth")
    net = NET | {"global_pool": "token"}
    with pytest.raises(DataError) as error:
        create_model(NAME, weights=tmp_path / "c.pth", **net)
    assert len(str(error.value)) < 1000
    tensors["backbone.pos_embed"] = table(1, classes=0)["pos_embed"]
    torch.save({"model": tensors}, tmp_path / "c.pth")
    with pytest.raises(DataError, match=r"Found 2 differences, without the prefix 'backbone\.'.*--partial-weights") as error:
        create_model(NAME, weights=tmp_path / "c.pth", **net)
    assert "missing norm.bias; unexpected decoder.weight" in str(error.value)
    lines = []
    model = create_model(NAME, weights=tmp_path / "c.pth", partial=True, say=lines.append, **net)
    count = len(model.state_dict())
    assert lines[-1] == (
        f"Weights: {count - 1} of the model's {count} tensors are from c.pth. New: norm.bias. Left out: decoder.weight."
    )
    known = table(1, classes=0)
    assert all(torch.equal(tensor, known[name]) for name, tensor in model.state_dict().items() if name != "norm.bias")
    torch.save({"other.weight": torch.ones(2)}, tmp_path / "none.pth")
    with pytest.raises(DataError, match="do not fit"):
        create_model(NAME, weights=tmp_path / "none.pth", partial=True, **net)


# -- through the commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def picture(offline) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save("x.png")
    safetensors.torch.save_file(table(1), "w.safetensors")
    return offline / "x.png"


GIVEN = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6", "--interpolation", "bilinear", "--image-size", "24"]


def expected_logits(pixels_of) -> torch.Tensor:
    model = timm.create_model(NAME, **NET, num_classes=3).eval()
    model.load_state_dict(table(1))
    model.set_input_size((24, 24))
    with torch.no_grad():
        return model(pixels_of(Image.open("x.png").convert("RGB"))[None])


def test_how_images_are_prepared_can_be_given_and_is_said(picture, capsys):
    source = [NAME, "--weights", "w.safetensors", "--model-kwargs", *WORDS]
    crop = timm.get_pretrained_cfg(NAME).crop_pct
    theirs = create_transform((3, 24, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=crop)
    truth = expected_logits(theirs).softmax(1)[0]
    assert main(["predict", source[0], "x.png", *source[1:], *GIVEN]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Images: 24 x 24 px, mean 0.1 0.2 0.3, std 0.4 0.5 0.6, bilinear, crop_pct 0.9" in said
    row = next(csv.DictReader(Path("predictions.csv").read_text().splitlines()))
    assert row["predicted"] == f"class {truth.argmax()}"
    assert float(row["probability"]) == pytest.approx(truth.max().item(), rel=1e-4)
    assert main(["export", *source, *GIVEN, "--to", "timm", "--out", "plain"]) == 0
    again = timm.create_model("local-dir:plain", pretrained=True).eval()
    prepare = create_transform(**timm.data.resolve_data_config({}, model=again))
    with torch.no_grad():
        torch.testing.assert_close(again(prepare(Image.open("x.png"))[None]).softmax(1)[0], truth, atol=1e-6, rtol=0)
    assert main(["look", source[0], "x.png", *source[1:], *GIVEN, "--curves", "0", "--noise", "0", "--out", "r"]) == 0
    assert read("r").images[0]["probability"] == pytest.approx(truth.max().item(), rel=1e-4)


def test_what_is_assumed_of_weights_is_said_and_of_a_folder_nothing(picture, capsys):
    assert main(["predict", NAME, "x.png", "--weights", "w.safetensors", "--model-kwargs", *WORDS, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (line,) = answer["remarks"]
    assert f"as {NAME} has them; --mean, --std, --interpolation, --image-size give others" in line
    assert answer["inputs"]["std"] == list(timm.get_pretrained_cfg(NAME).std)
    save(network(1), "folder")
    assert main(["predict", "folder", "x.png", "--json", "--out", "p.csv"]) == 0
    assert json.loads(capsys.readouterr().out)["remarks"] == []


def test_training_takes_and_keeps_them(picture, capsys):
    words = ["--model", NAME, "--weights", "w.safetensors", "--model-kwargs", *WORDS, *GIVEN[:10], "--recipe", "none"]
    data = ["cutouts:train=12,test=12,size=16", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    assert main(["train", *data, *words, "--out", "run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Images: 16 x 16 px, mean 0.1 0.2 0.3, std 0.4 0.5 0.6, bilinear" in said
    inputs = Preprocess.of_model(load("run"))
    assert (inputs.mean, inputs.std, inputs.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")


@pytest.mark.parametrize("words", [["--mean", "0.5"], ["--std", "1", "1", "0"], ["--mean", "nan", "0", "0"]])
def test_values_that_do_not_fit_the_channels(picture, words, capsys):
    assert main(["predict", NAME, "x.png", "--weights", "w.safetensors", "--model-kwargs", *WORDS, *words]) == 2
    assert f"Found {words[0]}" in capsys.readouterr().err
