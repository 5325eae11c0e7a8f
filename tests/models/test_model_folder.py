"""Models on disk: what is saved comes back, plain timm reads it, and what does not fit is said, name by name."""

import json
import pickle

import pytest
import safetensors.torch
import timm
import torch

from vitreous import SPC, SVDA, graft, grafts, ungraft
from vitreous.base.errors import DataError, UnknownName
from vitreous.models.create import create_model
from vitreous.models.weights import read_weights
from vitreous.train import load, save

NET = dict(img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=2, num_classes=3)
INPUTS = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 16, 16), crop_pct=1.0, interpolation="bilinear")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **NET).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_plain_timm_builds_and_loads_a_plain_folder(model, images, tmp_path):
    save(model, tmp_path, classes=("a", "b", "c"), inputs=INPUTS)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(theirs(images), model(images))
    config = timm.data.resolve_data_config({}, model=theirs)
    assert {name: tuple(v) if isinstance(v := config[name], list) else v for name in INPUTS} == INPUTS
    assert theirs.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_grafts_come_back_with_every_setting(model, images, tmp_path):
    graft(model, SVDA(scale="learned", layers=(1,)), SPC(after=1, sketch=(4, 1, True), ssva=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save(model, tmp_path)
    again = load(tmp_path)
    assert [record.mechanism for record in grafts(again)] == [record.mechanism for record in grafts(model)]
    assert torch.equal(again(images), model(images))
    assert not again.training


def test_a_grafted_folder_ungrafted_is_timms_model_of_the_same_weights(model, images, tmp_path):
    graft(model, "svda", "spc:after=2")
    save(model, tmp_path)
    again = load(tmp_path)
    ungraft(again, all=True)
    never = timm.create_model("vit_tiny_patch16_224", **NET).eval()
    weights = read_weights(tmp_path / "model.safetensors")
    never.load_state_dict({name: weights[name] for name in never.state_dict()})
    assert torch.equal(again(images), never(images))


def test_mechanisms_are_written_out_so_that_later_defaults_do_not_matter():
    assert SVDA(layers=(6, 7, 8)).full_text() == (
        "svda:layers=6-8,scale=paper,start=scratch,orthogonality=0.001,entropy=0.001,seed=0"
    )


def test_an_interrupted_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.head.weight.zero_()

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_is_full_leaves_the_old_file(model, tmp_path, monkeypatch):
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(_tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="No space"):
        save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_differences_are_listed_by_name_and_shape(model, tmp_path):
    save(model, tmp_path)
    weights = read_weights(tmp_path / "model.safetensors")
    weights["extra"] = weights.pop("norm.bias")
    weights["head.bias"] = torch.zeros(4)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"Found 3 differences") as error:
        load(tmp_path)
    for said in ("missing norm.bias", "unexpected extra", "head.bias has shape (4,), expected (3,)"):
        assert said in str(error.value)


def test_a_graft_that_the_weights_do_not_have_is_seen(model, tmp_path):
    save(model, tmp_path)
    (tmp_path / "mechanisms.json").write_text('{"format": 1, "mechanisms": ["svda"]}')
    with pytest.raises(DataError, match=r"missing blocks\.0\.attn\.sigma"):
        load(tmp_path)


def test_another_classifier_only_when_asked_for(model, tmp_path):
    save(model, tmp_path, classes=("a", "b", "c"))
    assert load(tmp_path).num_classes == 3
    kept = load(tmp_path, classes=("a", "b", "c"))
    assert torch.equal(kept.head.weight, model.head.weight)
    assert load(tmp_path, classes=("a", "b")).num_classes == 2
    renamed = load(tmp_path, classes=("c", "a", "b"))  # as many, but not the same: by name, never by position
    assert not torch.equal(renamed.head.weight, model.head.weight)
    assert torch.equal(renamed.norm.weight, model.norm.weight)


def test_other_sizes_and_channels_as_timm_adapts_them(model, tmp_path):
    save(model, tmp_path)
    ours = load(tmp_path, image_size=(24, 24), channels=1)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=24, in_chans=1).eval()
    x = torch.randn(2, 1, 24, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    save(ours, tmp_path / "second")
    assert torch.equal(load(tmp_path / "second")(x), ours(x))


def test_a_file_of_weights_finds_its_number_of_classes(model, images, tmp_path):
    save(model, tmp_path)
    arguments = {name: value for name, value in NET.items() if name != "num_classes"}
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "old.pth")
    for name in ("model.safetensors", "old.pth"):
        assert torch.equal(create_model("vit_tiny_patch16_224", weights=tmp_path / name, **arguments)(images), model(images))


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", ["pickle", "text", "empty", "cut"])
def test_files_that_cannot_be_read_safely(model, tmp_path, capsys, content):
    save(model, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    data = {"pickle": pickle.dumps(Hostile(), protocol=2), "text": b"<html>", "empty": b"", "cut": whole[:-100]}[content]
    for name in ("weights.safetensors", "weights.pth"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="cannot be read safely"):
            read_weights(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_mechanisms_of_others_are_imported_only_when_asked(model, tmp_path):
    save(model, tmp_path)
    (tmp_path / "mechanisms.json").write_text('{"format": 1, "mechanisms": ["antigravity.Fly"]}')
    with pytest.raises(DataError, match="--foreign"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "kind", "said"),
    [
        ("mechanisms.json", '{"format": 99, "mechanisms": []}', DataError, "format 99"),
        ("mechanisms.json", "[]", DataError, "JSON object"),
        ("mechanisms.json", '{"format": 1, "mechanisms": ["svdaa"]}', UnknownName, "svda"),
        ("config.json", "{", DataError, "no readable"),
        ("config.json", '{"architecture": "vit_tinny_patch16_224"}', UnknownName, "vit_tiny_patch16_224"),
    ],
)
def test_records_that_do_not_fit(model, tmp_path, file, content, kind, said):
    save(model, tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(kind, match=said):
        load(tmp_path)


def test_no_network_is_said_with_a_way_out(offline, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(DataError, match="--weights PATH"):
        create_model("vit_tiny_patch16_224", pretrained=True)


def test_unknown_names_offer_near_ones():
    with pytest.raises(UnknownName, match="'vit_tiny_patch16_224'"):
        create_model("vit_tinny_patch16_224")
    with pytest.raises(UnknownName, match="vit_tiny_patch16_224"):
        create_model("vit_tiny_patch16_224.no_such_tag")


def test_a_new_network_does_not_claim_published_weights(tmp_path):
    save(create_model("vit_tiny_patch16_224", **NET), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert not {"tag", "license", "hf_hub_id", "url"} & set(config)
