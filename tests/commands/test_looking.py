"""`vitreous look`, `compare` and `calibrate` as a user meets them: what they write, and that mistakes cost nothing."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitreous
from report.made import Made, write_reading
from vitreous.commands.cli import main
from vitreous.data import Cutouts
from vitreous.lens import reading as reading_module
from vitreous.lens.reading import read
from vitreous.train import load

SHIPPED = Path(vitreous.__file__).parent / "weights/cutouts"
STRANGE = 'it\'s <script>alert(1)<\u2215script> "cat" & (1).png'
TINY = "vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=8 depth=2 embed_dim=24 num_heads=2 --curves 0"


@pytest.fixture(autouse=True)
def elsewhere(offline):
    """Run in an empty folder, with no network to ask for weights."""
    return offline


@pytest.fixture
def model(elsewhere) -> Path:
    """A folder of a trained model, without a direction."""
    shutil.copytree(SHIPPED, elsewhere / "model")
    (elsewhere / "model/foreground.safetensors").unlink()
    return elsewhere / "model"


@pytest.fixture
def photos(elsewhere) -> Path:
    """Three scenes with masks."""
    scenes = Cutouts(3, size=48, seed=1)
    (elsewhere / "photos/masks").mkdir(parents=True)
    for i in range(3):
        scenes.image(i).save(elsewhere / f"photos/{i}.png")
        Image.fromarray(scenes.mask(i)).save(elsewhere / f"photos/masks/{i}.png")
    return elsewhere / "photos"


def call(words: str) -> int:
    return main(shlex.split(words))


def refused(capsys, words: str, *said: str) -> str:
    """The command ends in one clear message and code 2."""
    capsys.readouterr()
    assert call(words) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    text = " ".join((shown.err + shown.out).split())
    for part in said:
        assert part in text, text
    if shown.err.startswith("error: Found"):
        assert re.search(r"Found .*[.;:] ?.*[Ee]xpected .*\. [A-Z]", text), text
    return text


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# -- look --------------------------------------------------------------------------------------------------------------


def test_look_at_a_folder_with_masks_writes_a_reading_and_its_report(model, photos, capsys):
    assert call("look model photos --out reading --curves 2 --curve-fill black --curve-fractions 0 0.5 1") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Report: reading/report.html" in shown.out
    assert "\x1b" not in shown.out
    assert files(Path("reading")) == [
        "curves.json", "parts/00000.safetensors", "parts/fingerprint", "reading.json", "report.html", "scores.csv",
        "summary.csv", "table.csv", "table.json",
    ]  # fmt: skip
    reading = read("reading")
    assert [image["name"] for image in reading.images] == ["0.png", "1.png", "2.png"]
    assert reading.facts["model"]["weights"] == "run"
    assert not reading.facts["random_weights"]
    assert {(curve["fill"], tuple(curve["fractions"])) for curve in reading.curves} == {("black", (0, 0.5, 1))}
    assert {tuple(curve["difference"][1:]) for curve in reading.curves} == {(None, None)}  # of two images: no interval
    assert reading.facts["settings"]["fill"] == "black"
    names = json.loads((SHIPPED / "config.json").read_text())
    known = set(names.get("label_names") or names["pretrained_cfg"]["label_names"])
    assert {image["predicted"] for image in reading.images} <= known
    x = torch.stack([view.pixels for view in looking_views(model, photos)])
    probability = load(model)(x).softmax(-1).amax(-1)
    assert [image["probability"] for image in reading.images] == pytest.approx(probability.tolist(), rel=1e-4)
    scores = list(csv.DictReader(io.StringIO(Path("reading/scores.csv").read_text())))
    assert {row["image"] for row in scores} == {"0", "1", "2"}


def test_an_empty_mask_and_files_that_are_passed_over_are_said(model, photos, capsys):
    assert call("look model photos --curves 0 --out before") == 0
    assert "no pixel of the view" not in capsys.readouterr().out
    (mask,) = [path for path in photos.rglob("0.png") if "masks" in path.parts]
    Image.new("L", Image.open(mask).size).save(mask)
    (photos / "phone.psd").write_bytes(b"")
    assert call("look model photos --curves 0 --out after") == 0
    shown = capsys.readouterr().out
    assert "Some masks mark no pixel of the view: no map can be scored against them." in shown
    assert "1 .psd" in shown
    scores = list(csv.DictReader(io.StringIO(Path("after/scores.csv").read_text())))
    assert {row["auroc"] for row in scores if row["image"] == "0"} <= {"", "nan"}


def test_maps_of_a_class_are_asked_for_and_named(model, photos):
    names = json.loads((model / "config.json").read_text())["label_names"]
    assert call("look model photos --noise 0 --class-maps --out predicted") == 0
    assert call(f"look model photos --noise 0 --class {names[1]} --probes attention_maps relevance --out one") == 0
    for folder in ("predicted", "one"):
        reading = read(folder)
        assert {("relevance", -1), ("grad_attention", 0), ("attention", 0)} <= set(reading.maps)
        for image in reading.images:
            expected = image["predicted"] if folder == "predicted" else names[1]
            assert [image["classes"][name]["name"] for name in ("relevance", "grad_attention")] == [expected] * 2
    assert read("one").facts["probes"] == ["attention_maps", "relevance:target=1", "grad_attention:target=1"]


def looking_views(model, photos):
    from vitreous.data.views import Views

    views = Views(load(model), photos)
    return [views[i] for i in range(len(views))]


def test_modules_of_a_model_without_attention_are_named(photos, capsys):
    command = (
        "look convnext_atto photos --random-weights --model-kwargs dims=8,8,8,8 depths=1,1,1,1 --modules 'stages.2.blocks.*'"
    )
    assert call(f"{command} stages.3.blocks.0.conv_dw --masks photos/masks --out reading") == 0
    shown = capsys.readouterr().out
    assert "What moves each patch is stored for 2 images" in shown
    assert re.search(r"layer +kind +heads +grid +mixed +from +itself", shown)
    assert re.search(r"0 stages\.2\.blocks\.0 +mixing +1 +14x14", shown)
    reading = read("reading")
    assert [layer["name"] for layer in reading.layers] == ["stages.2.blocks.0", "stages.3.blocks.0.conv_dw"]
    assert np.isfinite(reading.table()["mixing_foreground"]).all()
    text = Path("reading/report.html").read_text()
    assert "Mixing, middle patch" in text


def test_attention_and_mixing_maps_have_a_table_each(photos, capsys):
    network = "img_size=32 patch_size=8 embed_dim=16 num_heads=2 depth=2 spectral=1"
    command = f"look spectformer_tiny photos --random-weights --model-kwargs {network} --image-size 32"
    assert call(f"{command} --noise 0 --out reading") == 0
    shown = capsys.readouterr().out
    assert re.search(r"layer +kind +heads +grid +entropy +tokens +distance +alike *\n0 blocks\.1\.attn +token +2 +4x4", shown)
    assert re.search(r"layer +kind +heads +grid +mixed +from +itself *\n1 blocks\.0\.attn +mixing +1 +4x4", shown)


def test_a_run_of_ours_can_be_looked_at_and_readings_get_free_names(photos, capsys):
    network = "--model-kwargs patch_size=4 depth=2 embed_dim=24 num_heads=2"
    assert call(f"train cutouts:train=40,test=24,size=16 --epochs 1 {network} --out run") == 0
    assert call("look run photos/0.png --curves 0") == 0
    assert call("look run photos/0.png --curves 0") == 0
    assert sorted(path.name for path in Path("readings").iterdir()) == ["run", "run-2"]
    assert Path("readings/run/table.csv").read_bytes() == Path("readings/run-2/table.csv").read_bytes()
    assert call("compare run run --out both") == 0
    assert call("look . photos/0.png") == 2
    capsys.readouterr()


def test_photographs_of_every_kind_are_seen_in_one_look(model, photos, elsewhere):
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    others = elsewhere / "others"
    others.mkdir()
    upright.save(others / "turned.png", exif=exif)
    upright.convert("L").save(others / "grey.png")
    upright.convert("P").save(others / "moving.gif", save_all=True, append_images=[upright.rotate(180).convert("P")])
    upright.save(others / STRANGE)
    assert main(["look", "model", "photos/0.png", "others", str(others / "grey.png"), "--out", "reading"]) == 0
    images = {image["name"]: image for image in read("reading").images}
    assert set(images) == {"0.png", "turned.png", "grey.png", "moving.gif", STRANGE, "grey.png (2)"}
    assert (images["turned.png"]["width"], images["turned.png"]["height"]) == (40, 60)
    assert (images["moving.gif"]["width"], images["moving.gif"]["height"]) == (60, 40)
    page = Path("reading/report.html").read_text()
    assert "<script>alert" not in page
    assert "alert(1)" in page


def test_look_takes_weights_of_a_file_and_says_so(photos, capsys):
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    other = timm.create_model("vit_tiny_patch16_224", **small, num_classes=7)
    save_file(other.state_dict(), "weights.safetensors")
    assert call(f"look {TINY} photos --weights weights.safetensors --out reading") == 0
    reading = read("reading")
    assert reading.facts["model"]["weights"] == "file"
    assert reading.layers[0]["grid"] == [4, 4]
    assert {image["predicted"] for image in reading.images} <= {f"class {i}" for i in range(7)}
    given = "photos --weights weights.safetensors --out other"
    refused(capsys, f"look vit_tiny_patch16_224 {given}", "do not fit", "missing blocks.2")
    refused(capsys, f"look {TINY} photos --weights no.safetensors --out other", "no file no.safetensors")
    refused(capsys, f"look {TINY} photos --weights weights.safetensors --random-weights", "--weights and --random-weights")
    assert not Path("other").exists()


def test_random_weights_are_asked_for_by_name_and_stamped_everywhere(photos, capsys):
    assert call(f"look {TINY} photos --random-weights --out reading") == 0
    assert "Random weights" in capsys.readouterr().out
    facts = json.loads(Path("reading/reading.json").read_text())
    assert facts["random_weights"] is True
    assert facts["model"]["weights"] == "random"
    assert any("Random weights" in note for note in facts["notes"])
    assert "Random weights" in Path("reading/report.html").read_text()
    assert call("compare reading reading --out both") == 0
    assert "Random weights" in Path("both/report.html").read_text()
    assert call(f"look {TINY} photos --random-weights --out again") == 0
    assert Path("again/table.csv").read_bytes() == Path("reading/table.csv").read_bytes()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "scratch_vit_patch4_28"])
def test_weights_that_cannot_be_had_are_never_random_ones_by_accident(name, photos, capsys, elsewhere):
    before = files(elsewhere)
    refused(capsys, f"look {name} photos", name, "--weights PATH", "--random-weights", "every page says so")
    assert files(elsewhere) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("look model", "no images"),
        ("look model no/such.png", "Found nothing at 'no/such.png'"),
        ("look model photos/0.png no/such.png", "no/such.png"),
        ("look model empty", "no image in"),
        ("look model note.txt", "no readable image among 1"),
        ("look model photos --masks no/masks", "no/masks"),
        ("look model photos --masks strangers", "no mask in"),
        ("look model photos/0.png --masks small", "of 5 x 4 pixels"),
        ("look model photos --noise 2", "noise=2.0"),
        ("look model photos --limit 0", "limit=0"),
        ("look model photos --batch-size 0", "batch_size=0"),
        ("look model photos --seed -1", "seed=-1"),
        ("look model photos --direction note.txt", "cannot be read as a direction"),
        ("look model photos --direction model/model.safetensors", "vitreous calibrate"),
        ("look model photos --weights note.txt", "--weights for model"),
        ("look model photos --device tpu9", "tpu9"),
        ("look model photos --class sphinx", "class 'sphinx'"),
        ("look model photos --class 999", "class 999 of"),
        ("look model photos --probes rolout", "'rollout'"),
        ("look model photos --out photos", "something in photos"),
        ("look model photos --out note.txt", "note.txt"),
        ("look model photos --out note.txt/below", "note.txt"),
        ("look no/such/run photos", "no/such/run"),
        ("look photos photos", "photos/config.json"),
        ("look vit_tinny_patch16_224 photos", "'vit_tiny_patch16_224'"),
        ("look resnet10t photos --random-weights", "showed no attention map"),
        ("look resnet10t photos --random-weights --modules layer1.1", "Unknown module 'layer1.1'"),
        ("look resnet10t photos --random-weights --modules fc", "no axis of places"),
        ("look vit_tiny_patch16_224 photos --random-weights --model-kwargs depht=2", "depht"),
        ("look vit_tiny_patch16_224 photos --random-weights --model-kwargs classes=3", "classes=3"),
        ("look vit_tiny_patch16_224 photos --random-weights --model-kwargs img_size=32,patch=2", "--model-kwargs"),
        ("look model photos --nois 0", "--nois"),
        ("look", "MODEL"),
        ("compare model model", "Expected"),
        ("compare no/a no/b", "no/a"),
        ("compare photos photos", "photos"),
        ("calibrate model photos", "photographs to calibrate on"),
        ("calibrate model", "no images"),
        ("calibrate vit_tiny_patch16_224 photos", "--out"),
        ("calibrate model photos --out photos", "--out"),
        ("calibrate model photos --out no/such/file.safetensors", "no/such"),
    ],
)
def test_mistakes_end_in_a_message_and_code_2(model, photos, elsewhere, capsys, words, said):
    for name in ("empty", "strangers", "small"):
        (elsewhere / name).mkdir()
    (elsewhere / "note.txt").write_text("no image")
    Image.new("L", (48, 48)).save("strangers/z.png")
    Image.new("L", (5, 4)).save("small/0.png")
    before = files(elsewhere)
    refused(capsys, words, said)
    assert files(elsewhere) == before
    assert not (elsewhere / "readings").exists()


def test_unreadable_images_among_good_ones_are_named_and_the_rest_is_read(model, photos, capsys):
    (photos / "1.png").write_bytes(b"no image")
    assert call("look model photos --out reading --curves 1") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "skipped: 1.png: Found '1.png', which cannot be read" in shown
    assert [image["name"] for image in read("reading").images] == ["0.png", "2.png"]
    assert "1.png" in Path("reading/report.html").read_text()


def test_an_interrupt_is_code_130_and_the_same_command_goes_on(model, photos, elsewhere, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(3, 18):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(photos / f"{i:02}.png")
    assert call("look model photos --out whole --curves 1") == 0
    add = reading_module.Writer.add

    def stop(writer, number, part):
        if number == 1:
            raise KeyboardInterrupt
        add(writer, number, part)

    with monkeypatch.context() as patch:
        patch.setattr(reading_module.Writer, "add", stop)
        assert call("look model photos --out reading --curves 1") == 130
    assert "the same --out" in capsys.readouterr().err
    assert files(Path("reading")) == ["parts/00000.safetensors", "parts/fingerprint"]
    refused(capsys, "compare reading whole", "reading")
    first = Path("reading/parts/00000.safetensors").stat().st_mtime_ns
    refused(capsys, "look model photos --out reading --curves 2", "another reading")
    assert call("look model photos --out reading --curves 1") == 0
    assert Path("reading/parts/00000.safetensors").stat().st_mtime_ns == first
    assert files(Path("reading")) == files(Path("whole"))
    for name in files(Path("whole")):
        if name != "report.html":  # which is titled by its folder
            assert Path("reading", name).read_bytes() == Path("whole", name).read_bytes(), name


# -- compare and calibrate ---------------------------------------------------------------------------------------------


def test_compare_puts_two_readings_on_one_page_and_overwrites_none(model, photos, capsys):
    assert call("look model photos --out a --curves 0") == 0
    assert call("look model photos --out b --curves 0 --noise 0.05") == 0
    capsys.readouterr()
    assert call("compare a b") == 0
    assert "Report: readings/comparison/report.html" in capsys.readouterr().out
    page = Path("readings/comparison/report.html").read_bytes()
    assert call("compare a b") == 0
    assert Path("readings/comparison-2/report.html").read_bytes() == page
    refused(capsys, "compare a b --out readings/comparison", "report.html already", "--out")
    refused(capsys, "compare a nothing --out other", "nothing")
    assert not Path("other").exists()
    (photos / "note").write_text("")
    refused(capsys, "compare a b --out photos/note", "photos/note", "--out")


def test_calibrate_writes_a_direction_that_look_then_uses_and_other_models_refuse(model, photos, elsewhere, capsys):
    (elsewhere / "many").mkdir()
    scenes = Cutouts(48, size=48, seed=5)
    for i in range(48):
        scenes.image(i).save(elsewhere / f"many/{i}.png")
    assert call("look model photos --out before --curves 0") == 0
    assert call("calibrate model many") == 0
    assert "Done: model/foreground.safetensors" in capsys.readouterr().out
    assert call("calibrate model many --out other.safetensors") == 0
    assert Path("other.safetensors").read_bytes() == Path("model/foreground.safetensors").read_bytes()
    assert call("look model photos --out after --curves 0") == 0
    assert call("look model photos --out given --curves 0 --direction other.safetensors") == 0
    components = [read(name).facts["components"] for name in ("before", "after", "given")]
    rules = [{found["name"]: found.get("rule") for found in several} for several in components]
    assert ("foreground" in rules[0], "foreground_unsigned" in rules[0]) == (False, True)
    assert rules[1]["foreground"] == "direction and class attention"
    assert rules[1] == rules[2]
    assert Path("after/scores.csv").read_bytes() == Path("given/scores.csv").read_bytes()
    table = read("after").scores()
    assert np.nanmean(table["auroc"][table["component"] == "foreground"]) > 0.8
    refused(capsys, f"look {TINY} photos --random-weights --direction other.safetensors --out x", "Calibrate this model")
    refused(capsys, "calibrate model many/0.png", "photographs to calibrate on")
    (elsewhere / "many/broken.png").write_bytes(b"no")
    assert call("calibrate model many --out third.safetensors") == 0
    assert "skipped: Found 'broken.png'" in capsys.readouterr().out
    assert Path("third.safetensors").read_bytes() == Path("other.safetensors").read_bytes()
    refused(capsys, "calibrate model many/broken.png --out fourth.safetensors", "no readable photograph among 1")
    assert not Path("fourth.safetensors").exists()


def test_readings_without_a_common_image_are_not_compared(elsewhere, capsys):
    for name, images in (("a", ["x.jpg", "y.jpg"]), ("b", ["z.jpg", "y.jpg"]), ("c", ["u.jpg", "v.jpg"])):
        write_reading(elsewhere / name, Made(images=2, names=images))
    assert call("compare a b --out ab") == 0
    capsys.readouterr()
    assert call("compare a c --out ac") == 2
    assert "Found no image that both have, by name (vit_made (a): 2, the first 'x.jpg'" in capsys.readouterr().err
    assert not (elsewhere / "ac").exists()
