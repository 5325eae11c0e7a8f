"""Model folders among other readers: what timm and transformers make of ours, and we of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import vitreous
from vitreous import graft, grafts
from vitreous.base.errors import DataError, HostError
from vitreous.commands.cli import main
from vitreous.deploy.export import export
from vitreous.models import hub
from vitreous.models.load import open_model

NAME = "eva02_tiny_patch14_224"
NET = dict(img_size=28, depth=2, embed_dim=24, num_heads=2, num_classes=3)
CLASSES = ("ant", "bee", "cat")


def network(name: str = NAME) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **NET, **({"patch_size": 7} if name != NAME else {})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def vit(*texts: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **NET, patch_size=7).eval()
    return graft(model, *texts)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return getattr(out := model.eval()(images), "logits", out)


@pytest.mark.parametrize("texts", [("svda",), ("extra_tokens", "adaptformer")])
@pytest.mark.parametrize("pretrained", [True, False])
def test_timm_refuses_a_folder_with_grafts_and_says_who_reads_it(texts, pretrained, images, tmp_path):
    model = vit(*texts)
    vitreous.save(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"vit_tiny_patch16_224 with grafts: open this folder with vitreous\.load"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=pretrained)
    again = vitreous.load(tmp_path)
    assert [record.mechanism for record in grafts(again)] == [record.mechanism for record in grafts(model)]
    assert again.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"
    assert torch.equal(logits(again, images), logits(model, images))
    vitreous.save(again, tmp_path / "second")
    assert torch.equal(logits(vitreous.load(tmp_path / "second"), images), logits(model, images))


def test_older_folders_with_grafts_still_load(images, tmp_path):
    model = vit("svda")
    vitreous.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"] = "vit_tiny_patch16_224"
    config["model_args"]["num_classes"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(vitreous.load(tmp_path), images), logits(model, images))


def test_a_grafted_folder_without_the_record_of_its_grafts_is_refused(tmp_path):
    vitreous.save(vit("svda:start=gentle"), tmp_path)
    (tmp_path / "mechanisms.json").unlink()
    with pytest.raises(DataError, match=r"with grafts, and no record.*mechanisms\.json"):
        vitreous.load(tmp_path)


@pytest.mark.parametrize("name", [NAME, "vit_tiny_patch16_224"])
def test_transformers_opens_a_plain_folder_with_equal_logits_and_names(name, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = network(name=name)
    inputs = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 28, 28)}
    vitreous.save(model, tmp_path / "ours", classes=CLASSES, inputs=inputs)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, images), logits(model, images), atol=1e-6, rtol=0)
    assert tuple(theirs.config.id2label[i] for i in range(3)) == CLASSES
    assert torch.equal(
        logits(timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True), images), logits(model, images)
    )
    theirs.save_pretrained(tmp_path / "theirs")  # a folder of TimmWrapper
    again = vitreous.load(tmp_path / "theirs")
    torch.testing.assert_close(logits(again, images), logits(model, images), atol=1e-6, rtol=0)
    assert tuple(again.pretrained_cfg["label_names"]) == CLASSES
    assert tuple(again.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)


def test_a_network_of_transformers_is_refused_in_true_words(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "dinov2", "architectures": ["Dinov2ForImageClassification"]})
    )
    with pytest.raises(DataError, match=r"of transformers \(Dinov2ForImageClassification\).*give the model to vitreous\.look"):
        vitreous.load(tmp_path)


def test_a_folder_with_a_pickle_alone_is_read_without_running_code(images, tmp_path):
    model = network()
    vitreous.save(model, tmp_path)
    torch.save(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(logits(vitreous.load(tmp_path), images), logits(model, images))


def test_names_of_the_hub(images, tmp_path, monkeypatch, offline, capsys):
    model = vit("svda")
    vitreous.save(model, tmp_path / "repository")
    asked = []
    Path("x.png").touch()

    def download(repository: str, file: str, revision: str | None = None) -> str:
        asked.append((repository, file, revision))
        if not (tmp_path / "repository" / file).exists():
            raise hub.EntryNotFoundError(file)
        return str(tmp_path / "repository" / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    ours = open_model("hf-hub:someone/model@v2")
    assert torch.equal(logits(ours, images), logits(model, images))
    assert asked == [("someone/model", f, "v2") for f in ("config.json", "model.safetensors", "mechanisms.json")]
    (tmp_path / "repository/mechanisms.json").unlink()
    with pytest.raises(DataError, match="no record of them"):
        open_model("hf-hub:someone/model")
    assert torch.equal(logits(open_model(f"local-dir:{folder_of(network())}"), images), logits(network(), images))
    (tmp_path / "repository/config.json").unlink()
    assert main(["predict", "hf_hub:someone/model", "x.png"]) == 2
    assert "Found no config.json of hf_hub:someone/model" in capsys.readouterr().err
    assert main(["predict", "someone/model", "x.png"]) == 2
    assert "hf-hub:someone/model" in capsys.readouterr().err


def folder_of(model: torch.nn.Module) -> Path:
    vitreous.save(model, "plain")
    return Path("plain")


# -- tied weights, half precision --------------------------------------------------------------------------------------


def test_tied_weights_are_saved_and_exported(images, tmp_path):
    model = network()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.blocks[1].mlp.fc2.weight.data = model.blocks[0].mlp.fc2.weight.data  # one memory, two parameters
    vitreous.save(model, tmp_path / "model")
    assert torch.equal(logits(vitreous.load(tmp_path / "model"), images), logits(model, images))
    assert export(model, tmp_path / "plain", "timm")["parity"]["largest"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", ["timm", "torch-export"])
def test_other_precisions_are_refused_by_export_and_saved_as_they_are(dtype, to, images, tmp_path):
    model = network("vit_tiny_patch16_224").to(dtype)
    with pytest.raises(HostError, match=rf"{dtype}.*Export model\.float\(\)"):
        export(model, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    vitreous.save(model, tmp_path / "model")
    assert torch.equal(logits(vitreous.load(tmp_path / "model"), images), logits(model.float(), images))
