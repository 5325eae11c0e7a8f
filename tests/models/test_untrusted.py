"""Model folders of strangers: every file in them can lie, and none may run code, fill the memory or write elsewhere."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from vitreous.base.errors import DataError, VitreousError
from vitreous.commands.cli import main
from vitreous.models.create import create_model
from vitreous.models.weights import read_weights
from vitreous.train import load, save

NET = dict(img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=2, num_classes=3)
ESCAPE = "\x1b]0;owned\x07"
NAMES = ("../../escaped", "=cmd|' /C calc'!A0", f"<script>alert(1)</script>{ESCAPE}\n")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole model folder, in an otherwise empty one."""
    torch.manual_seed(0)
    save(timm.create_model("vit_tiny_patch16_224", **NET), tmp_path / "model", classes=("a", "b", "c"))
    return tmp_path / "model"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(folder: Path, said: str) -> str:
    """Loading ends in one clear error within seconds, and writes nothing anywhere near."""
    before, start = tree(folder.parent), time.perf_counter()
    with pytest.raises(VitreousError) as error:
        load(folder)
    assert time.perf_counter() - start < 10
    assert tree(folder.parent) == before
    text = str(error.value)
    assert said in text, text
    assert len(text) < 2000
    return text


def change(folder: Path, **changes) -> None:
    """Set keys of config.json; "pretrained_cfg.mean" and "model_args.depth" are those within."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        inner, _, last = key.rpartition("__")
        (config[inner] if inner else config)[last] = value
    path.write_text(json.dumps(config))


# -- weights -----------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled without care, this writes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def payloads(marker: Path) -> dict[str, bytes]:
    """Pickles that run a command: bare, in a table of weights, in torch's archive, behind a subclass of dict."""
    archive, inside = io.BytesIO(), io.BytesIO()
    torch.save({"head.weight": Runs(marker)}, archive)
    torch.save({"state_dict": {"head.weight": torch.zeros(2)}, "hook": [{"deep": Runs(marker)}]}, inside)
    return {
        "bare": pickle.dumps(Runs(marker)),
        "old": pickle.dumps(Runs(marker), protocol=0),
        "table": pickle.dumps({"head.weight": Runs(marker)}),
        "archive": archive.getvalue(),
        "beside the weights": inside.getvalue(),
    }


@pytest.mark.parametrize("kind", ["bare", "old", "table", "archive", "beside the weights"])
@pytest.mark.parametrize("name", ["model.safetensors", "weights.pth", "weights.bin"])
def test_a_pickle_is_never_executed(folder, tmp_path, kind, name):
    marker = tmp_path / "executed"
    data = payloads(marker)[kind]
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match="cannot be read safely") as said:
        read_weights(folder / name)
    assert "weights_only" not in str(said.value)  # torch's own words advise to run it
    if name == "model.safetensors":
        refused(folder, "cannot be read safely")
    else:
        with pytest.raises(DataError, match="cannot be read safely"):
            create_model("vit_tiny_patch16_224", weights=folder / name)
    assert not marker.exists()
    if kind == "bare":  # the payload is a real one
        pickle.loads(data)
        assert marker.exists()


def test_a_pickle_beside_the_weights_is_not_even_opened(folder, tmp_path):
    """Without the other file it is read, as timm does, and nothing in it is run."""
    (folder / "pytorch_model.bin").write_bytes(payloads(tmp_path / "executed")["bare"])
    load(folder)
    (folder / "model.safetensors").unlink()
    refused(folder, "cannot be read safely")
    assert not (tmp_path / "executed").exists()


def header(entries: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "longer than the file": header({}, length=1 << 20),
    "of 8 exabytes": header({}, length=1 << 63),
    "no JSON": header(b"{" * 10),
    "nested": header(b'{"a":' * 200_000),
    "data that is not there": header({"a": F32}),
    "more shape than data": header({"a": F32 | {"shape": [1 << 40]}}, bytes(8)),
    "shapes that overflow": header({"a": F32 | {"shape": [1 << 62, 1 << 62]}}, bytes(8)),
    "two tensors in one place": header({"a": F32, "b": F32}, bytes(8)),
    "negative": header({"a": F32 | {"data_offsets": [-8, 0]}}, bytes(8)),
    "an unknown type": header({"a": F32 | {"dtype": "PYOBJECT"}}, bytes(8)),
    "data behind the end": header({"a": F32}, bytes(1 << 16)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(folder, lie):
    (folder / "model.safetensors").write_bytes(LIES[lie])
    refused(folder, "cannot be read safely")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("head.bias", torch.zeros(4), "head.bias has shape (4,), expected (3,)"),
        ("head.bias", torch.zeros(3, 0), "head.bias has shape (3, 0), expected (3,)"),
        ("head.bias", torch.zeros(3, dtype=torch.int64), "head.bias holds torch.int64, expected torch.float32"),
        ("head.bias", torch.zeros(3, dtype=torch.bool), "head.bias holds torch.bool"),
        ("head.bias", torch.zeros(3, dtype=torch.complex64), "head.bias holds torch.complex64"),
        ("../../etc/x", torch.zeros(3), "unexpected ../../etc/x"),
        ("__class__", torch.zeros(3), "unexpected __class__"),
        ("head.forward", torch.zeros(3), "unexpected head.forward"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, name, value, said):
    weights = read_weights(folder / "model.safetensors") | {name: value}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    refused(folder, said)


def test_ten_thousand_extra_keys_make_a_short_message(folder):
    weights = read_weights(folder / "model.safetensors") | {f"extra{i}": torch.zeros(1) for i in range(10_000)}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    assert "Found 10000 differences" in refused(folder, "and 9992 more")


def test_half_precision_is_read_as_it_is(folder):
    """A smaller floating type loses nothing on the way in: that is no lie."""
    weights = {name: value.half() for name, value in read_weights(folder / "model.safetensors").items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    assert torch.equal(load(folder).head.weight, weights["head.weight"].float())


def test_tables_that_hold_no_plain_tensors(tmp_path):
    tables = ({1: torch.zeros(2)}, {"a": torch.zeros(2, device="meta")}, {"a": torch.eye(2).to_sparse()}, {"a": 1}, [1], 1)
    for i, table in enumerate(tables):
        torch.save(table, tmp_path / f"{i}.pth")
        with pytest.raises(DataError, match=r"without a plain table of tensors|cannot be read safely"):
            read_weights(tmp_path / f"{i}.pth")


def test_an_archive_that_would_fill_the_memory_is_not_unpacked(tmp_path):
    torch.save({"a": torch.zeros(8 << 20)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 1 << 20
    assert read_weights(tmp_path / "plain.pth")["a"].shape == (8 << 20,)
    with pytest.raises(DataError, match="unpacked it would have"):
        read_weights(tmp_path / "bomb.pth")


# -- config.json and mechanisms.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"architecture": "vit_tiny_patch16_224", "num_classes": NaN}', "NaN is no number"),
        ('{"architecture": "vit_tiny_patch16_224", "num_classes": -Infinity}', "-Infinity is no number"),
        ('{"architecture": "a", "architecture": "vit_tiny_patch16_224"}', "a key stands there twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "too deep"),
        ('{"a": ' + "[" * 30 + "]" * 30 + "}", "20 deep"),
        ('{"a": ' + "9" * 10_000 + "}", "no readable"),
        ('{"a": "' + "x" * (17 << 20) + '"}', "the limit is"),
        (b'{"architecture": "\xff\xfe"}', "no readable"),
        ("[]", "JSON object"),
        ("", "no readable"),
        ('{"architecture": ["vit_tiny_patch16_224"]}', "Unknown architecture"),
        ('{"architecture": "../../../etc/passwd"}', "Unknown architecture"),
        ('{"architecture": "hf-hub:stranger/model"}', "Unknown architecture"),
        ('{"architecture": "local-dir:/"}', "Unknown architecture"),
        ('{"architecture": "os.system"}', "Unknown architecture"),
        ('{"architecture": "' + "x" * 1_000_000 + '"}', "Unknown architecture"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "mechanisms.json"])
def test_records_that_are_no_records(folder, name, text, said):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, said if name == "config.json" or "architecture" not in said else "another form")


def test_a_record_that_would_keep_a_reader_waiting(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(DataError, match="no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_args", [], "an object"),
        ("pretrained_cfg", "x", "an object"),
        ("model_args__depth", 10**9, "depth = 1000000000"),
        ("model_args__depth", 90_000, "far larger network"),
        ("model_args__depth", 1e300, "at most"),
        ("model_args__depth", -3, ""),
        ("model_args__depth", "2", ""),
        ("model_args__depth", None, ""),
        ("model_args__embed_dim", 99_996, "far larger network"),
        ("model_args__embed_dim", 2400, "far larger network"),
        ("model_args__img_size", 99_996, "far larger network"),
        ("model_args__patch_size", 0, ""),
        ("model_args__num_heads", 0, ""),
        ("model_args__num_heads", 5, ""),
        ("model_args__in_chans", 99_996, "far larger network"),
        ("model_args__num_classes", 99_996, "far larger network"),
        ("model_args__block_fn", "os.system", ""),
        ("model_args__norm_layer", "__import__('os')", ""),
        ("model_args__act_layer", {"_target_": "os.system"}, ""),
        ("model_args__attn_layer", "../../x.py", ""),
        ("model_args__checkpoint_path", "/etc/passwd", ""),
        ("model_args__pretrained", True, ""),
        ("model_args__pretrained_cfg", {"url": "https://example.com/x.pth"}, ""),
        ("model_args__cache_dir", "/", ""),
        ("model_args__features_only", True, ""),
        ("num_classes", "3", "num_classes"),
        ("num_classes", -1, "num_classes"),
        ("num_classes", 10**12, "num_classes"),
        ("label_names", "abc", "label_names"),
        ("label_names", [1, 2, 3], "label_names"),
        ("label_names", ["a", "b"], "2 names"),
        ("label_names", ["x" * 10_000] * 3, "label_names"),
        ("pretrained_cfg__mean", "0.5", "mean"),
        ("pretrained_cfg__mean", [1e308, 0, 0], "mean"),
        ("pretrained_cfg__mean", [0.5, 0.5], "mean"),
        ("pretrained_cfg__std", [0, 0, 0], "std"),
        ("pretrained_cfg__input_size", [3, 10**9, 10**9], "input_size"),
        ("pretrained_cfg__input_size", [3, 16], "input_size"),
        ("pretrained_cfg__input_size", "../..", "input_size"),
        ("pretrained_cfg__crop_pct", 0, "crop_pct"),
        ("pretrained_cfg__crop_pct", True, "crop_pct"),
        ("pretrained_cfg__crop_mode", "../x", "crop_mode"),
        ("pretrained_cfg__interpolation", ["bicubic"], "interpolation"),
    ],
)
def test_a_config_that_lies(folder, key, value, said):
    """One clear error, or where timm takes no notice of the lie, the model as it was."""
    if said:
        change(folder, **{key: value})
        refused(folder, said)
        return
    x, before = torch.zeros(1, 3, 16, 16), load(folder)(torch.zeros(1, 3, 16, 16))
    change(folder, **{key: value})
    try:
        model = load(folder)
    except VitreousError as error:
        assert len(str(error)) < 2000
    else:
        assert torch.equal(model(x), before)


def test_a_path_in_a_config_is_neither_read_nor_written(folder, tmp_path):
    """What timm would follow with pretrained=True: another file, an address, custom loading."""
    other = {name: value + 1 for name, value in read_weights(folder / "model.safetensors").items()}
    safetensors.torch.save_file(other, tmp_path / "other.safetensors")
    before = load(folder).head.weight.clone()
    tricks = {"file": str(tmp_path / "other.safetensors"), "url": "file:///etc/passwd", "hf_hub_id": "..", "custom_load": True}
    change(folder, **{f"pretrained_cfg__{key}": value for key, value in tricks.items()})
    files = tree(tmp_path)
    assert torch.equal(load(folder).head.weight, before)
    assert tree(tmp_path) == files


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["svda:layers=0-999999999999"], "5 digits"),
        (["svda:layers=" + "9" * 5000], "another form"),
        (["extra_tokens:tokens=1000000000"], "at most 100,000"),
        (["os.system:command=x"], "--foreign"),
        (["../../x"], ""),
        (["svda:__class__=1"], "Unknown setting"),
        (["svda"] * 3, ""),
        ([["svda"]], "another form"),
    ],
)
def test_mechanisms_that_lie(folder, texts, said):
    (folder / "mechanisms.json").write_text(json.dumps({"format": 1, "mechanisms": texts}))
    refused(folder, said)


# -- names -------------------------------------------------------------------------------------------------------------


def test_hostile_class_names_are_harmless_wherever_they_appear(folder, tmp_path, monkeypatch, capsys):
    """As file, on the terminal and in JSON: no folder of that name, no formula, no escape sequence."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    change(folder, label_names=list(NAMES))
    Image.new("RGB", (16, 16), "red").save("=1+1.png")
    Image.new("RGB", (16, 16), "red").save("\x1b[31m.png")
    outside = {name for name in tree(tmp_path) if not name.startswith("here/")}
    assert main(["predict", str(folder), ".", "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert ESCAPE not in shown
    assert "\x1b[31m.png" not in shown
    text = Path("predictions.csv").read_text()
    assert ESCAPE not in text
    assert "\x1b" not in text
    cells = [cell.strip('"') for line in text.splitlines() for cell in line.split(",")]
    assert any("cmd|" in cell for cell in cells)
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r")]
    assert main(["predict", str(folder), ".", "--json", "--out", "again.csv"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert set(json.loads(printed)["classes"]) <= set(NAMES)
    assert main(["export", str(folder), "--to", "timm", "--out", "plain"]) == 0
    assert timm.create_model("local-dir:plain", pretrained=True).pretrained_cfg["label_names"] == list(NAMES)
    assert {name for name in tree(tmp_path) if not name.startswith("here/")} == outside
    assert not (tmp_path.parent / "escaped").exists()
