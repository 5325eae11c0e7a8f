"""`vitreous predict` and `vitreous export` as a user meets them: what they write is what plain timm computes, or nothing."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import vitreous
from data.made import encoded
from vitreous import graft, grafts
from vitreous.base.errors import GraftError
from vitreous.base.statistics import wilson
from vitreous.commands.cli import main
from vitreous.data import Cutouts
from vitreous.data.preprocess import Preprocess
from vitreous.deploy import export, formats, predict
from vitreous.mechanism import mechanism_class
from vitreous.models.classes import set_multi_label
from vitreous.models.load import open_images
from vitreous.train import load, save

SHIPPED = Path(vitreous.__file__).parent / "weights/cutouts"
NET = dict(img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=2, num_classes=3)
HOW_TO = Path(__file__).resolve().parents[2] / "docs/how-to/ship-a-model.md"


@pytest.fixture(autouse=True)
def elsewhere(offline):
    """Run in an empty folder, with no network to ask for weights."""
    return offline


@pytest.fixture
def photos(elsewhere) -> Path:
    """Five scenes in two folders, larger than the model's images, with a folder of masks that must not be predicted."""
    scenes = Cutouts(5, size=50, seed=1)
    for name in ("photos/a", "photos/masks"):
        (elsewhere / name).mkdir(parents=True)
    for i in range(5):
        scenes.image(i).save(elsewhere / ("photos" if i < 3 else "photos/a") / f"{i}.png")
    Image.fromarray(scenes.mask(0)).save(elsewhere / "photos/masks/0.png")
    (elsewhere / "photos/masks/1.png").write_bytes(b"no mask, which is of no concern here")
    return elsewhere / "photos"


def small(folder: str, *texts: str) -> Path:
    """A folder of a small model with mechanisms in it, whose weights no start has."""
    torch.manual_seed(0)
    model = graft(timm.create_model("vit_tiny_patch16_224", **NET), *texts)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save(model, folder, classes=("a", "b", "c"), inputs=dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 16, 16)))
    return Path(folder)


def call(words: str) -> int:
    return main(shlex.split(words))


def rows(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


def files(folder: Path = Path()) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# -- predict -----------------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_plain_timm_on_the_same_tensors(photos, capsys):
    assert call(f"predict {SHIPPED} photos --top 3 --batch-size 2") == 0
    plain = timm.create_model(f"local-dir:{SHIPPED}", pretrained=True).eval()
    prepare = create_transform(**resolve_data_config({}, model=plain))
    names = plain.pretrained_cfg["label_names"]
    found = rows("predictions.csv")
    assert [row["file"] for row in found] == ["0.png", "1.png", "2.png", "a/3.png", "a/4.png"]
    for row in found:
        with torch.no_grad():
            pixels = prepare(Image.open(photos / row["file"]).convert("RGB"))
            best = plain(pixels[None]).softmax(1)[0].sort(descending=True)
        for k, number in enumerate(("", "_2", "_3")):
            assert row[f"predicted{number}"] == names[best.indices[k]]
            assert float(row[f"probability{number}"]) == pytest.approx(best.values[k].item(), rel=1e-4)
        assert row["skipped"] == ""
    assert "Done: predictions.csv (5 images, 0 skipped)" in capsys.readouterr().out


def test_images_are_prepared_as_in_training(photos):
    """From a run of our own, whose folder says how its images were prepared."""
    network = "--model-kwargs patch_size=4 depth=2 embed_dim=24 num_heads=2"
    assert call(f"train cutouts:train=40,test=24,size=16 --epochs 1 {network} --device cpu --out run") == 0
    model = load("run")
    views = predict.open_images(model, ["photos"])
    config = json.loads(Path("run/config.json").read_text())["pretrained_cfg"]
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    trained = Preprocess(**{name: config[name] for name in names})
    batch = next(predict.prepared(views, 5))
    for image in batch:
        assert torch.equal(image.pixels, trained(Image.open(photos / image.name).convert("RGB")))
    assert call("predict run photos --out one.csv") == 0
    assert call("predict run photos --out two.csv --batch-size 2") == 0
    assert [row["predicted"] for row in rows("one.csv")] == [row["predicted"] for row in rows("two.csv")]


def test_grafted_models_predict_with_their_mechanisms(photos):
    folder = small("grafted", "svda", "spc:after=1")
    model = load(folder)
    views = predict.open_images(model, ["photos"])
    pixels = torch.stack([image.pixels for image in next(predict.prepared(views, 5))])
    assert call("predict grafted photos --batch-size 5") == 0
    with torch.no_grad():
        expected = model(pixels).softmax(1).max(1)
    found = rows("predictions.csv")
    assert [row["predicted"] for row in found] == ["abc"[i] for i in expected.indices]
    assert [float(row["probability"]) for row in found] == pytest.approx(expected.values.tolist(), rel=1e-4)


def test_a_labelled_folder_has_its_accuracy(photos, capsys):
    """By folders named after classes, the outermost that is one; what lies in no such folder does not count."""
    small("labelled")
    for name, value in (("test/b/a/x.png", 0), ("test/c/y.png", 1), ("test/c/z.png", 2)):
        Path(f"photos/{name}").parent.mkdir(parents=True, exist_ok=True)
        (photos / f"{value}.png").rename(photos / name)
    shutil.rmtree(photos / "masks", ignore_errors=True)
    (photos / "top.png").write_bytes((photos / "a/3.png").read_bytes())
    (photos / "c.png").write_bytes(b"broken")
    (photos / "test/c/broken.png").write_bytes(b"broken")
    assert call("predict labelled photos --out p.csv") == 0
    found = {row["file"]: row for row in rows("p.csv")}
    assert {name: row["label"] for name, row in found.items()} == {
        "a/3.png": "a", "a/4.png": "a", "c.png": "", "test/b/a/x.png": "b", "test/c/broken.png": "c", "test/c/y.png": "c",
        "test/c/z.png": "c", "top.png": "",
    }  # fmt: skip
    right = sum(row["predicted"] == row["label"] for row in found.values() if row["label"])
    low, high = (100 * end for end in wilson(right, 5))
    said = capsys.readouterr().out
    assert f"Accuracy: {20 * right:.2f} % ({low:.2f} to {high:.2f} %, the 95 % interval): {right} right of 5 images" in said
    assert "1 images lie in no such folder and do not count." in said
    assert call("predict labelled photos --out q.csv --json") == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    shares = {k: [row["predicted"] == k for row in found.values() if row["label"] == k and row["predicted"]] for k in "abc"}
    worst = min(shares, key=lambda k: (sum(shares[k]) / len(shares[k]), -len(shares[k])))
    assert accuracy["value"] == pytest.approx(right / 5)
    assert accuracy["worst"] == {"class": worst, "right": sum(shares[worst]), "images": len(shares[worst])}


def test_folders_that_are_no_classes_are_no_labels(photos, capsys):
    assert call(f"predict {SHIPPED} photos --json") == 0
    assert "accuracy" not in json.loads(capsys.readouterr().out)
    assert "label" not in rows("predictions.csv")[0]


def test_images_that_cannot_be_read_have_their_line_and_their_reason(photos, capsys):
    whole = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(whole[:300])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "=1+1.png").write_bytes(whole)
    assert call(f"predict {SHIPPED} photos --out p.csv --json") == 0
    said = json.loads(capsys.readouterr().out)
    found = {row["file"]: row for row in rows("p.csv")}
    assert set(found) == {"0.png", "1.png", "2.png", "a/3.png", "a/4.png", "empty.jpg", "'=1+1.png"}
    assert {entry["file"] for entry in said["skipped"]} == {"1.png", "empty.jpg"}
    assert said["images"] == 5 == sum(said["classes"].values())
    for entry in said["skipped"]:
        assert found[entry["file"]]["skipped"] == entry["reason"] != ""
        assert found[entry["file"]]["predicted"] == ""
    assert found["empty.jpg"]["skipped"] == "the file is empty"
    assert call(f"predict {SHIPPED} photos --out q.csv") == 0
    shown = capsys.readouterr().out
    assert "skipped: empty.jpg: the file is empty" in shown
    assert "(5 images, 2 skipped)" in shown


def test_what_was_done_to_files_and_what_was_passed_over_is_said(elsewhere, capsys):
    for name, raw in odd_files().items():
        (elsewhere / name).write_bytes(raw)
    for name in ("a.psd", "b.psd"):
        (elsewhere / name).write_bytes(b"")
    assert call(f"predict {SHIPPED} . --out p.csv --json") == 0
    passed, files = json.loads(capsys.readouterr().out)["remarks"]
    assert passed.endswith(": 2 .psd.")
    for text in ("2 12 bits in 16, upper 8 of the 12 kept", "3 16 bits, upper 8 kept", "2 white is zero, inverted"):
        assert text in files
    assert call(f"predict {SHIPPED} . --out q.csv") == 0
    assert files in capsys.readouterr().out
    assert call(f"predict {SHIPPED} palette.png --out r.csv --json") == 0
    assert json.loads(capsys.readouterr().out)["remarks"] == ["Files: 1 palette, converted."]


def test_an_order_of_classes_that_timm_would_not_give_is_said(elsewhere, capsys):
    model = timm.create_model("vit_tiny_patch16_224", **NET | {"num_classes": 11})
    inputs = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 16, 16))
    for folder, classes in (("texts", sorted(map(str, range(11)))), ("natural", [str(k) for k in range(11)])):
        save(model, folder, classes=classes, inputs=inputs)
        assert call(f"export {folder} --to timm --out {folder}-plain") == 0
        remark = "timm numbers the same folders in natural order (0, 1, 2, 3, ...)"
        assert (remark in capsys.readouterr().out) == (folder == "texts")
        assert bool(json.loads(Path(f"{folder}-plain/export.json").read_text())["remarks"]) == (folder == "texts")


def test_a_prediction_file_appears_whole_or_not_at_all(photos, monkeypatch, capsys):
    before = files()
    forward, calls = predict.logits_of, []

    def stop(model, pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(model, pixels)

    monkeypatch.setattr(predict, "logits_of", stop)
    assert call(f"predict {SHIPPED} photos --batch-size 2") == 130
    assert calls == [2, 2]
    assert files() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("predict model", "no images"),
        ("predict model no/such.png", "no/such.png"),
        ("predict model broken", "no readable image among 1"),
        ("predict model photos --top 0", "--top 0"),
        ("predict model photos --top 7", "Expected 1 to 6"),
        ("predict model photos --batch-size 0", "--batch-size 0"),
        ("predict model photos --device tpu9", "tpu9"),
        ("predict model photos --out photos", "photos already"),
        ("predict model photos --out no/such/file.csv", "no/such"),
        ("predict model photos --weights x.pth", "--weights"),
        ("predict no/such photos", "no/such"),
        ("predict vit_tinny_patch16_224 photos", "'vit_tiny_patch16_224'"),
        ("predict vit_tiny_patch16_224 photos", "vit_tiny_patch16_224"),
        ("predict headless photos", "without a classifier"),
        ("predict sick photos", "not finite"),
        ("predict", "RUN"),
        ("export model --out x", "--to"),
        ("export model --to onnx", "--out"),
        ("export model --to tflite --out x", "tflite"),
        ("export model --to timm --out photos", "photos already"),
        ("export model --to torch-export --out no/such/x.pt2", "no/such"),
        ("export model --to torch-export --out x.pt2 --tolerance 0", "--tolerance"),
        ("export model --to torch-export --out x.pt2 --images broken", "x.png"),
        ("export headless --to timm --out x", "without a classifier"),
        ("export sick --to timm --out x", "not finite"),
    ],
)
def test_mistakes_end_in_a_message_and_code_2(photos, elsewhere, capsys, words, said):
    shutil.copytree(SHIPPED, elsewhere / "model")
    (elsewhere / "broken").mkdir()
    (elsewhere / "broken/x.png").write_bytes(b"no image")
    save(timm.create_model("vit_tiny_patch16_224", **NET | {"num_classes": 0}), "headless")
    sick = timm.create_model("vit_tiny_patch16_224", **NET)
    torch.nn.init.constant_(sick.head.bias, float("nan"))
    save(sick, "sick")
    before = files()
    assert call(words) == 2
    shown = capsys.readouterr()
    text = " ".join((shown.err + shown.out).split())
    assert "Traceback" not in text
    assert said in text, text
    if shown.err.startswith("error: Found"):
        assert re.search(r"Found .*[.;:] ?.*[Ee]xpected .*\. [A-Z]", text), text
    assert files() == before


# -- export ------------------------------------------------------------------------------------------------------------


def onnx_logits(path: str, pixels: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])


def test_an_onnx_file_computes_the_same_for_any_batch_and_says_what_it_is(photos, capsys):
    import onnx

    folder = small("grafted", "svda")
    assert call("export grafted --to onnx --out model.onnx --images photos/0.png photos/1.png") == 0
    shown = capsys.readouterr().out
    report = json.loads(Path("model.onnx.json").read_text())
    assert report["parity"]["seeded"]["images"] == 4
    assert report["parity"]["given"]["images"] == 2
    assert report["parity"]["largest"] <= 1e-4
    assert report["bytes"] == Path("model.onnx").stat().st_size
    assert f"opset {report['opset']}, any batch size" in shown
    model, generator = load(folder), torch.Generator().manual_seed(7)
    for count in (1, 3, 8):
        pixels = torch.randn(count, 3, 16, 16, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(onnx_logits("model.onnx", pixels), model(pixels), atol=1e-4, rtol=0)
    found = onnx.load("model.onnx")
    onnx.checker.check_model(found)
    facts = {entry.key: entry.value for entry in found.metadata_props}
    assert json.loads(facts["classes"]) == ["a", "b", "c"]
    assert json.loads(facts["mechanisms"]) == ["svda"]
    assert json.loads(facts["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(facts["input_size"]) == [3, 16, 16]
    shape = found.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["batch", 3, 16, 16]
    assert found.opset_import[0].version == report["opset"]
    for place in (str(Path(vitreous.__file__).parent), str(Path(torch.__file__).parent)):
        assert place.encode() not in Path("model.onnx").read_bytes()  # nothing of the machine it was made on


@pytest.mark.parametrize(("precision", "share", "near"), [("half", 0.8, 1e-2), ("int8", 0.7, 0.2)])
def test_a_narrow_onnx_file_is_compared_with_the_float_file(photos, capsys, precision, share, near):
    import onnx

    model = load(small("grafted", "svda", "token_merging:tokens=2"))
    assert call("export grafted --to onnx --out wide.onnx") == 0
    assert call(f"export grafted --to onnx --precision {precision} --out narrow.onnx --images photos/0.png photos/1.png") == 0
    report = json.loads(Path("narrow.onnx.json").read_text())
    assert report["parity"]["largest"] <= 1e-4
    assert report["bytes"] == Path("narrow.onnx").stat().st_size < share * Path("wide.onnx").stat().st_size
    assert (
        f"{precision}: {report['agreement']['given']['same_class']} of 2 given images have the class" in capsys.readouterr().out
    )
    for count in (1, 5):
        pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))
        wide, narrow = onnx_logits("wide.onnx", pixels), onnx_logits("narrow.onnx", pixels)
        assert narrow.dtype == torch.float32
        assert 0 < (wide - narrow).abs().max() < near
        torch.testing.assert_close(narrow, model(pixels).detach(), atol=near, rtol=0)
    facts = {entry.key: entry.value for entry in onnx.load("narrow.onnx").metadata_props}
    assert facts["precision"] == precision
    assert json.loads(facts["classes"]) == ["a", "b", "c"]
    assert not {"onnx.infer", "onnx.quant.pre_process"} & facts.keys()


def test_what_cannot_be_narrow_is_refused(photos, monkeypatch, capsys):
    small("plain-model")
    before = files()
    assert call("export plain-model --to torch-export --precision half --out shipped") == 2
    assert "Found --precision half for torch-export. Expected it for onnx" in capsys.readouterr().err
    monkeypatch.setattr("onnxruntime.transformers.float16.convert_float_to_float16", lambda *args, **options: 1 / 0)
    assert call("export plain-model --to onnx --precision half --out shipped") == 2
    assert "onnxruntime cannot write this model in half" in capsys.readouterr().err
    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", lambda model, path, **options: None)
    assert call("export plain-model --to onnx --precision int8 --out shipped") == 2
    assert "no product of matrices" in capsys.readouterr().err
    assert files() == before


def test_torch_export_is_read_without_the_package(photos):
    """Also with a mechanism whose steps have an autocast of their own."""
    folder = small("grafted", "token_merging")
    report = export.export(load(folder), "model.pt2", "torch-export", images=["photos"])
    assert report["batch"] == "any"
    extra = {"vitreous.json": ""}
    program = torch.export.load("model.pt2", extra_files=extra).module()
    assert json.loads(extra["vitreous.json"])["classes"] == ["a", "b", "c"]
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.testing.assert_close(program(pixels), load(folder)(pixels), atol=1e-5, rtol=0)
    with zipfile.ZipFile("model.pt2") as archive:
        text = b"".join(archive.read(name) for name in archive.namelist())
    assert str(Path(vitreous.__file__).parent).encode() not in text


def test_a_plain_folder_is_read_by_timm_and_its_report_says_what_is_lost(photos, capsys):
    folder = small("grafted", "svda", "adaptformer")
    assert call("export grafted --to timm --out plain --images photos") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert files(Path("plain")) == ["config.json", "export.json", "model.safetensors"]
    plain = timm.create_model("local-dir:plain", pretrained=True).eval()
    assert plain.pretrained_cfg["label_names"] == ["a", "b", "c"]
    model = load(folder)
    kept, theirs = model.state_dict(), plain.state_dict()
    assert set(theirs) < set(kept)
    assert all(torch.equal(theirs[name], kept[name]) for name in theirs)
    report = json.loads(Path("plain/export.json").read_text())
    assert report["parity"]["largest"] == 0
    without = report["without_mechanisms"]
    assert without["parameters"] == sum(value.numel() for name, value in kept.items() if name not in theirs)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, plains = model(pixels), plain(pixels)
    assert without["seeded"]["largest"] == pytest.approx((ours - plains).abs().max().item(), rel=1e-4)
    assert without["seeded"]["largest"] > 1e-3
    assert without["seeded"]["same_class"] == (ours.argmax(1) == plains.argmax(1)).sum().item()
    assert f"Taken out: svda, adaptformer, with {without['parameters']:,} parameters" in shown
    assert f"logits differ by up to {without['given']['largest']:.2g}" in shown
    assert call("predict plain photos") == 0


def test_folded_adapters_are_in_the_plain_folder(photos, capsys):
    """The weights of the folder are the effective ones; parity is with the model as it was."""
    folder = small("grafted", "lora:parts=none")
    assert call("export grafted --to timm --fold --out plain --images photos") == 0
    assert "Folded into the weights: lora:parts=none." in capsys.readouterr().out
    model, plain = load(folder), timm.create_model("local-dir:plain", pretrained=True).eval()
    assert torch.equal(plain.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.effective_weight())
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        largest = (model(pixels) - plain(pixels)).abs().max().item()
        assert (vitreous.ungraft(model) and model(pixels) - plain(pixels)).abs().max() > 1e-3
    report = json.loads(Path("plain/export.json").read_text())
    assert report["folded"] == ["lora:parts=none"]
    assert largest <= report["parity"]["largest"] + 1e-7 < 1e-5
    assert "without_mechanisms" not in report
    small("other", "svda")
    assert call("export other --to timm --fold --out folder") == 2
    assert "Expected grafts of linear layers" in capsys.readouterr().err
    assert not Path("folder").exists()


def test_a_folder_whose_host_weights_are_gone_is_refused(photos, capsys):
    small("grafted", "channelvit")
    before = files()
    assert call("export grafted --to timm --out plain") == 2
    assert "took the place of patch_embed" in capsys.readouterr().err
    assert files() == before


@pytest.mark.parametrize("to", ["onnx", "torch-export", "timm"])
def test_beyond_the_tolerance_nothing_is_left(to, monkeypatch, capsys):
    """A writer that gets one weight wrong is found out."""
    small("plain-model")
    before = files()
    write, read = formats.WRITERS[to]

    def wrong(model, path, facts):
        with torch.no_grad():
            model.head.bias[1] += 1e-3
            done = write(model, path, facts)
            model.head.bias[1] -= 1e-3
        return done

    monkeypatch.setitem(formats.WRITERS, to, (wrong, read))
    assert call(f"export plain-model --to {to} --out shipped") == 2
    assert "largest difference is 0.001" in capsys.readouterr().err
    assert files() == before


@pytest.mark.parametrize("to", ["torch-export", "timm"])
def test_an_interrupt_leaves_nothing(to, monkeypatch):
    small("plain-model")
    before = files()

    def dies(path):
        raise KeyboardInterrupt

    monkeypatch.setitem(formats.WRITERS, to, (formats.WRITERS[to][0], dies))
    assert call(f"export plain-model --to {to} --out shipped") == 130
    assert files() == before


def test_a_report_that_cannot_be_written_takes_the_file_with_it(monkeypatch, capsys):
    small("plain-model")
    before = files()

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_text", full)
    assert call("export plain-model --to torch-export --out shipped.pt2") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert files() == before


def test_mechanisms_that_cannot_be_exported_are_refused_with_the_reason(monkeypatch):
    model = load(small("grafted", "svda"))
    assert [record.mechanism.name for record in grafts(model)] == ["svda"]
    monkeypatch.setattr(mechanism_class("svda"), "onnx", False)
    with pytest.raises(GraftError, match=r"svda in the model, whose tag says onnx = False: it uses operators"):
        export.export(model, "model.onnx", "onnx")
    monkeypatch.setattr(mechanism_class("svda"), "static_shapes", False)
    with pytest.raises(GraftError, match="its number of tokens depends on the image"):
        export.export(model, "model.pt2", "torch-export")
    assert files() == ["grafted", *(f"grafted/{name}" for name in ("config.json", "mechanisms.json", "model.safetensors"))]


def test_a_network_whose_batch_is_fixed_is_exported_for_one_image():
    """The reason is in the report, and the file is compared image by image."""

    class Fixed(type(timm.create_model("test_vit"))):
        def forward(self, x):
            return super().forward(x) * (1 if int(x.sum(dim=(1, 2, 3)).shape[0]) % 2 else 1.5)

    model = load(small("plain-model"))
    model.__class__ = Fixed
    report = export.export(model, "model.pt2", "torch-export")
    assert report["batch"] == 1
    assert report["batch_reason"]
    assert torch.export.load("model.pt2").module()(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_without_the_extra_the_way_to_it_is_said(monkeypatch, capsys):
    small("plain-model")
    before = files()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert call("export plain-model --to onnx --out model.onnx") == 2
    assert 'pip install "vitreous[onnx]"' in capsys.readouterr().err
    assert files() == before


# -- the page ----------------------------------------------------------------------------------------------------------


def odd_files():
    """{name: bytes} of the kinds of image files that are read by a rule of their own."""
    greys = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint16)
    colours = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8))
    keyed, negative = colours.quantize(9), {"tiffinfo": {262: 0}}
    cut = colours.copy()
    cut.putalpha(Image.fromarray(greys.astype(np.uint8)))
    return {
        "eight.png": encoded(Image.fromarray(greys)),
        "twelve.png": encoded(Image.fromarray(greys * 16)),
        "sixteen.png": encoded(Image.fromarray(greys * 257)),
        "sixteen.pgm": b"P5\n50 40\n65535\n" + (greys * 257).astype(">u2").tobytes(),
        "negative.tif": encoded(Image.fromarray(greys * 257), "TIFF", **negative),
        "negative-twelve.tif": encoded(Image.fromarray(greys * 16), "TIFF", **negative),
        "negative-eight.tif": encoded(Image.fromarray(greys.astype(np.uint8)), "TIFF", **negative),
        "palette.png": encoded(keyed),
        "keyed.png": encoded(keyed, transparency=3),
        "alpha.png": encoded(cut),
        "grey-alpha.png": encoded(cut.convert("LA")),
        "cmyk.jpg": encoded(colours.convert("CMYK"), "JPEG"),
        "one-bit.png": encoded(colours.convert("1")),
    }


@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
def test_the_pages_script_runs_the_file_without_our_package(photos, crop_pct):
    """Thirty lines in a process of their own, in which Vitreous, torch and timm cannot be imported; odd files, too."""
    script = next(block for block in re.findall(r"```py\n(.*?)```", HOW_TO.read_text(), re.S) if "onnxruntime" in block)
    assert len(script.splitlines()) <= 30
    model = load(SHIPPED)
    model.pretrained_cfg["crop_pct"] = crop_pct
    set_multi_label(model, crop_pct < 1)
    export.export(model, "model.onnx", "onnx")
    scenes = Cutouts(2, size=50, seed=3)
    scenes.image(0).crop((0, 0, 50, 37)).save("wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    scenes.image(1).crop((0, 0, 33, 50)).save("turned.jpg", quality=95, exif=exif)
    odd = odd_files() if crop_pct < 1 else {}
    for name, raw in odd.items():
        Path(name).write_bytes(raw)
    images = ["photos/0.png", "wide.png", "turned.jpg", *odd]
    expected = [next(iter(predict.predict(model, open_images(model, [name]), top=1))) for name in images]
    barred = "import sys; sys.modules.update(dict.fromkeys(['vitreous', 'torch', 'torchvision', 'timm']))"
    Path("classify.py").write_text(f"{barred}\n{script}")
    words = [sys.executable, "classify.py", "model.onnx", *images]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    for line, name, one in zip(done.stdout.splitlines(), images, expected, strict=True):
        assert line.split()[:2] == [name, one.classes[0]]
        assert float(line.split()[2]) == pytest.approx(one.probabilities[0], abs=2e-4)
    Path("float.tif").write_bytes(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    done = subprocess.run([*words[:3], "float.tif"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "float.tif: 32 bits per pixel\n")
