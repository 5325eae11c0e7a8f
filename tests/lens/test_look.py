"""`look` as a whole: it disturbs nothing, the same images read the same, and what it says equals passes written out."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from lens.explicit import GRID, PATCH, explicit, pixels, vit
from vitreous import graft, parse
from vitreous.base.errors import DataError, HostError, SettingError
from vitreous.data import Cutouts, PictureSamples
from vitreous.data.views import Views
from vitreous.lens import look as module
from vitreous.lens import reading as reading_module
from vitreous.lens.look import look
from vitreous.lens.reading import Reading

HALF = 6e-4  # relative: maps are kept as float16, each with a scale


@pytest.fixture(scope="module")
def plain():
    """A model, five images, its reading, and the same pass written out."""
    model, images = vit(), pixels(5)
    return model, images, look(model, images), explicit(model, images)


def same(a: Reading, b: Reading, *, rounding: float = 0.0) -> None:
    """The same table, maps and confidences; rounding: relative, for other batches."""
    ours, theirs = a.table(), b.table()
    assert list(ours) == list(theirs)
    for name, column in ours.items():
        if column.dtype.kind == "f" and rounding:
            np.testing.assert_allclose(column, theirs[name], rtol=rounding, atol=rounding, err_msg=name)
        else:
            np.testing.assert_array_equal(column, theirs[name], err_msg=name)
    assert list(a.maps) == list(b.maps)
    for component, layer in a.maps:
        found, expected = (reading.maps.heads(component, layer) for reading in (a, b))
        np.testing.assert_allclose(found, expected, rtol=2 * HALF * bool(rounding), atol=4 * HALF * bool(rounding))
        sure = [reading.maps.confidence(component, layer) for reading in (a, b)]
        np.testing.assert_allclose(*sure, atol=1e-3 * bool(rounding))


def rows(table: dict, **wanted) -> np.ndarray:
    """Which rows have these values."""
    return np.logical_and.reduce([table[name] == value for name, value in wanted.items()])


# -- it disturbs nothing -----------------------------------------------------------------------------------------------


class Drawing(nn.Module):
    """A model that draws from every global generator in its forward pass, and may fail in one of them."""

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.vit, self.passes, self.fail_at = vit(), [], fail_at

    def forward(self, x):
        self.passes.append((torch.rand(()), np.random.rand(), random.random()))
        if len(self.passes) == self.fail_at:
            raise RuntimeError("the model fails")
        return self.vit(x)


def state_of(model: nn.Module) -> list:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    found = [(name, child.training, [dict(getattr(child, hook)) for hook in hooks]) for name, child in model.named_modules()]
    weights = [(name, value.clone(), value._version, value.requires_grad) for name, value in model.named_parameters()]
    drawn = (torch.get_rng_state(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate())
    return [found, weights, drawn, torch.is_grad_enabled(), all(p.grad is None for p in model.parameters())]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("fail_at", [None, 1, 2])
def test_mode_hooks_weights_and_random_state_are_as_before_also_after_an_error(fail_at):
    model, called = Drawing(fail_at), []
    model.train()
    model.vit.blocks[1].eval()
    model.vit.norm.register_forward_hook(lambda *_: called.append(1))
    before = state_of(model)
    if fail_at is None:
        look(model, pixels(3), curves=1)
        assert called
    else:
        with pytest.raises(HostError if fail_at == 1 else RuntimeError, match="the model fails"):
            look(model, pixels(3))
        assert len(model.passes) == fail_at
    assert equal(state_of(model), before)
    assert torch.overrides._get_current_function_mode() is None


# -- the same images read the same -------------------------------------------------------------------------------------


def test_tensors_paths_pictures_folders_and_sets_read_the_same(tmp_path):
    model, rng = vit(), np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(3)]
    for i, image in enumerate(pictures):
        image.save(tmp_path / f"{i}.png")
    expected = look(model, torch.stack([Views(model, pictures)[i].pixels for i in range(3)]))
    forms = [pictures, tmp_path, [tmp_path / f"{i}.png" for i in range(3)], str(tmp_path), PictureSamples(pictures)]
    for form in forms:
        same(look(model, form), expected)
    assert [image["name"] for image in look(model, tmp_path).images] == ["0.png", "1.png", "2.png"]
    assert look(model, tmp_path).images[0]["width"] == 30


@pytest.mark.parametrize("spec", [None, "token_merging"])
def test_batches_and_chunks_change_nothing_but_rounding(spec, monkeypatch):
    model, images = vit(), pixels(7)
    if spec:
        graft(model, parse(spec))
    whole = look(model, images, batch_size=8)
    same(look(model, images, batch_size=1), whole, rounding=1e-4)
    monkeypatch.setattr(module, "CHUNK", 3)
    parts = look(model, images, batch_size=2)
    assert [len(part.images) for part in parts.parts] == [3, 3, 1]
    assert [image["image"] for image in parts.images] == list(range(7))
    same(parts, whole, rounding=1e-4)
    same(look(model, images, batch_size=8, memory=0.001), whole, rounding=1e-4)
    np.testing.assert_allclose(look(model, images, limit=2).maps["u1", 1], whole.maps["u1", 1][:2], atol=2e-3)


def test_a_seed_gives_the_same_reading_twice_and_another_one_other_noise(plain):
    model, images, reading, _ = plain
    same(look(model, images), reading)
    table, other = reading.table(), look(model, images, seed=1).table()
    noise = [name for name in table if not np.array_equal(table[name], other[name], equal_nan=table[name].dtype.kind == "f")]
    assert sorted(noise) == ["angular_alignment_paper", "perturbation_robustness", "perturbation_robustness_paper"]


# -- what it says ------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_every_head_image_and_source(plain):
    table = plain[2].table()
    for layer in range(3):
        for source, count in (("attention", 5 * 3), ("weight", 2), ("score", 5 * 2), ("learned", 0)):
            assert rows(table, layer=layer, source=source).sum() == count
    assert set(table["kind"]) == {"token"}
    assert (table["image"][rows(table, source="weight")] == -1).all()


def test_indicators_equal_those_of_the_maps_written_out(plain):
    table, layers = plain[2].table(), plain[3]
    y, x = np.divmod(np.arange(24), GRID[1])
    far = np.hypot(y[:, None] - y, x[:, None] - x) * PATCH  # pixels, patch to patch
    for number, layer in enumerate(layers):
        for head in range(2):
            for image in range(5):
                a = layer.attention[image, head].numpy()
                here = rows(table, layer=number, head=head, image=image, source="attention")
                entropy = -(a * np.log(a)).sum(-1).mean()
                tokens = (1 / (a**2).sum(-1)).mean()
                between = a[1:, 1:]
                distance = ((between * far).sum(-1) / between.sum(-1)).mean()
                found = [float(table[name][here][0]) for name in ("attention_entropy", "effective_tokens", "mean_distance")]
                np.testing.assert_allclose(found, [entropy, tokens, distance], rtol=1e-4)


def test_robustness_is_the_relative_change_under_noise_of_the_images_own_stream(plain):
    model, images, reading, layers = plain
    noisy = []
    for number, image in enumerate(images):
        generator = torch.Generator().manual_seed(number)
        grain = torch.randn(image.shape, generator=generator)
        noisy.append(((image * 0.5 + 0.5 + 0.01 * grain).clamp(0, 1) - 0.5) / 0.5)
    others, table = explicit(model, torch.stack(noisy)), reading.table()
    for number, (clean, other) in enumerate(zip(layers, others, strict=True)):
        change = (other.attention - clean.attention).flatten(2).norm(dim=-1) / clean.attention.flatten(2).norm(dim=-1)
        for head in range(2):
            found = table["perturbation_robustness"][rows(table, layer=number, head=head, source="attention")]
            np.testing.assert_allclose(found, change[:, head], rtol=5e-3)
    without = look(model, images, noise=0.0).table()
    assert np.isnan(without["perturbation_robustness"]).all()


def test_attention_and_rollout_maps_are_those_written_out(plain):
    _, _, reading, layers = plain
    joint = torch.eye(25, dtype=torch.float64)
    for number, layer in enumerate(layers):
        expected = layer.attention[:, :, 0, 1:].unflatten(-1, GRID).numpy()
        np.testing.assert_allclose(reading.maps.heads("attention", number), expected, rtol=HALF, atol=1e-6)
        np.testing.assert_allclose(reading.maps["attention", number, 1], expected[:, 1], rtol=HALF, atol=1e-6)
        np.testing.assert_allclose(reading.maps["attention", number], expected.mean(1), rtol=HALF, atol=1e-6)
        joint = (0.5 * layer.attention.mean(1) + 0.5 * torch.eye(25)) @ joint
        np.testing.assert_allclose(reading.maps["rollout", number], joint[:, 0, 1:].unflatten(-1, GRID), rtol=HALF, atol=1e-6)


def test_singular_maps_are_numpys_and_their_signs_follow_the_attention(plain):
    _, _, reading, layers = plain
    reference = layers[1].attention[:, :, 0, 1:].log().mean(1).numpy()  # 7/12 and 9/12 of three layers: the second
    components = {found["name"]: found for found in reading.facts["components"]}
    assert components["u1"]["rule"] == "attention"
    for number, layer in enumerate(layers):
        for name, features, rank in (("u", layer.tokens[:, 1:], 3), ("k", layer.keys[:, 1:], 1)):
            unit = components[f"{name}1"]["rows"][str(number)] == "unit"
            for image in range(5):
                x = features[image].numpy()
                if unit:
                    x = x / np.linalg.norm(x, axis=1, keepdims=True)
                    x = x - x.mean(0)
                u, s, _ = np.linalg.svd(x, full_matrices=False)
                for r in range(rank):
                    if min(abs(s[r] - s[r + 1]), abs(s[r] - (s[r - 1] if r else np.inf))) < 0.05 * s[0]:
                        continue  # nearly equal singular values turn within their plane
                    found = reading.maps[f"{name}{r + 1}", number][image].ravel()
                    assert abs(abs(found @ u[:, r]) - 1) < 2e-3, (name, number, image, r)
                    match = np.corrcoef(found, reference[image])[0, 1]
                    assert match > -1e-3
                    sure = reading.maps.confidence(f"{name}{r + 1}", number)[image]
                    assert 0 <= sure <= 1
                    assert abs(np.linalg.norm(found) - 1) < 2e-3


def test_layers_say_what_they_are_and_how_they_were_verified(plain):
    for number, layer in enumerate(plain[2].layers):
        expected = {
            "layer": number, "name": f"blocks.{number}.attn", "number": 0, "kind": "token", "heads": 2, "queries": 25,
            "keys": 25, "windows": 1, "prefix": 1, "grid": [4, 6], "has_class": True, "effective": False, "note": "",
        }  # fmt: skip
        assert {key: layer[key] for key in expected} == expected
        assert layer["verified"] == "output recomputed"
        assert 0 <= layer["error"] < 1e-5


@pytest.mark.parametrize("spec", ["evit:keep=0.5,layers=0-1", "token_merging", "spc:after=1", "svda"])
def test_grafted_models_are_read_on_the_grid_of_the_image(spec):
    model, images = vit(), pixels(3)
    graft(model, parse(spec))
    before = model.training
    reading = look(model, images, curves=1)
    assert model.training == before
    assert all(layer["grid"] == [4, 6] and layer["has_class"] and layer["prefix"] == 1 for layer in reading.layers)
    assert {reading.maps[key].shape for key in reading.maps} == {(3, 4, 6)}
    assert reading.facts["model"]["mechanisms"] == [str(parse(spec))]
    merged = [bool(layer["note"]) for layer in reading.layers]
    assert merged == ([False, True, True] if spec.startswith(("evit", "token")) else [False] * 3)
    if spec == "svda":
        table = reading.table()
        sigma = model.blocks[1].attn.sigma.detach().double().numpy()[1]
        p = sigma**2 / (sigma**2).sum()
        found = table["spectral_entropy"][rows(table, layer=1, head=1, source="learned")]
        np.testing.assert_allclose(found, [-(p[p > 0] * np.log(p[p > 0])).sum()], rtol=1e-5)


def test_windows_pooling_and_registers_alone():
    gap = look(vit(class_token=False, global_pool="avg"), pixels(2))
    registers = look(vit(class_token=False, global_pool="avg", reg_tokens=2), pixels(2))
    for reading, prefix in ((gap, 0), (registers, 2)):
        assert {(layer["has_class"], layer["prefix"]) for layer in reading.layers} == {(False, prefix)}
    assert "border" in next(found["rule"] for found in registers.facts["components"] if found["name"] == "u1")
    attention = explicit(vit(class_token=False, global_pool="avg", reg_tokens=2), pixels(2))[0].attention
    expected = attention[:, 0].mean(1)[:, 2:].unflatten(-1, GRID)
    np.testing.assert_allclose(registers.maps["attention", 0, 0], expected, rtol=HALF, atol=1e-6)


def test_predictions_are_the_models_and_have_the_names_it_came_with(plain):
    model, images, reading, _ = plain
    model.eval()
    likely = model(images).softmax(-1).max(-1)
    for i, said in enumerate(reading.images):
        assert said["predicted"] == f"class {likely.indices[i]}"
        assert said["probability"] == pytest.approx(likely.values[i].item(), rel=1e-4)
    named = look(model, images, about={"classes": ["a", "b", "c", "d", "e"]}).images
    assert [said["predicted"] for said in named] == ["abcde"[i] for i in likely.indices]
    assert {said["predicted"] for said in look(vit(num_classes=0), images).images} == {None}


def test_random_weights_are_noted(plain):
    model, images, reading, _ = plain
    assert not reading.facts["random_weights"]
    assert reading.facts["model"]["weights"] == "given"
    random_one = look(model, images, limit=1, about={"weights": "random", "name": "mine"})
    assert random_one.facts["random_weights"]
    assert random_one.facts["notes"][0].startswith("Random weights")
    assert random_one.facts["title"] == "mine"


# -- masks and curves --------------------------------------------------------------------------------------------------


def test_scores_against_masks_are_those_computed_by_hand():
    scenes, model = Cutouts(6, size=48, seed=1), vit(img_size=(16, 16))
    reading = look(model, scenes, curves=2)
    table = reading.scores()
    assert set(table["component"]) == {"attention", "rollout", "u1", "u2", "u3", "k1", "centre", "random", "area"}
    views = Views(model, scenes)
    for image in range(6):
        cover = views[image].mask.reshape(4, 4, 4, 4).mean((1, 3))
        value = reading.maps["attention", 1, 0][image].astype(np.float64)
        here = rows(table, component="attention", layer=1, head=0, image=image)
        assert table["energy_inside"][here] == pytest.approx((value * cover).sum() / value.sum(), rel=2e-3)
        area = rows(table, component="area", image=image)
        assert table["energy_inside"][area] == pytest.approx(cover.mean())
        inside = cover > 0.5
        if 0 < inside.sum() < 16:
            pairs = value[inside][:, None] - value[~inside][None]
            assert table["auroc"][here] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=0.03)
    summary = reading.facts["summary"]
    here = (summary["component"] == "attention") & (summary["layer"] == 1) & (summary["head"] == 0)
    here &= summary["measure"] == "energy_inside"
    ours = table["energy_inside"][rows(table, component="attention", layer=1, head=0)]
    assert summary["mean"][here] == pytest.approx(np.nanmean(ours))
    assert reading.images[0]["mask"]
    assert {entry["component"] for entry in reading.curves} == {"attention", "rollout", "u1", "k1"}
    for entry in reading.curves:
        assert entry["fractions"] == [k / 16 for k in range(17)]  # between its own points by straight lines
        assert entry["insertion"][-1] == pytest.approx(entry["deletion"][0])
        assert entry["insertion"][0] == pytest.approx(entry["deletion"][-1])
        assert abs(entry["randomised"]) <= 1


def test_images_without_masks_have_no_scores_beside_others_that_have(tmp_path):
    scenes = [Cutouts(1, size=24, seed=i).image(0) for i in range(3)]
    mask = Cutouts(1, size=24, seed=1).mask(0)
    reading = look(vit(), PictureSamples(scenes, masks=[None, mask, None]))
    assert set(reading.scores()["image"]) == {1}
    assert [image["mask"] for image in reading.images] == [False, True, False]
    assert look(vit(), PictureSamples(scenes)).scores() == {}


def test_curves_take_many_images_in_batches_and_survive_shuffled_weights_that_show_nothing(monkeypatch):
    model, images, sizes = vit(), pixels(5), []
    seen = module.look_at_batch

    def sized(plan, findings, views, first):
        sizes.append(len(views))
        return seen(plan, findings, views, first)

    monkeypatch.setattr(module, "look_at_batch", sized)
    reading = look(model, images, curves=5, batch_size=2)
    assert max(sizes) == 2
    assert {entry["images"] for entry in reading.curves} == {5}

    def refused(plan, findings, views, first):
        if plan.model is not model:
            raise HostError("shuffled")
        return seen(plan, findings, views, first)

    monkeypatch.setattr(module, "look_at_batch", refused)
    reading = look(model, images, curves=2)
    assert {entry["randomised"] for entry in reading.curves} == {None}
    assert any("shuffled" in note for note in reading.facts["notes"])


def test_a_compiled_model_reads_as_the_one_inside_and_is_never_compiled_for_it(plain):
    model, images, reading, _ = plain
    found = look(torch.compile(model, backend=lambda *_: pytest.fail("compiled")), images, curves=1)
    same(found, reading)
    assert found.curves


class Tabled(nn.Module):
    """A model that keeps a constant in a plain attribute, as position tables are kept."""

    def __init__(self):
        super().__init__()
        self.vit, self.tables = vit(), {"scale": torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)}

    def forward(self, x):
        return self.vit(x * self.tables["scale"])


def test_constants_in_plain_attributes_are_no_obstacle_also_in_the_shuffled_copy():
    reading = look(Tabled(), pixels(2), curves=2)
    assert not any("shuffled" in note for note in reading.facts["notes"])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": -0.1}, "noise=-0.1"),
        ({"noise": 1.1}, "Expected 0 to 1"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"memory": 0}, "memory=0"),
        ({"curves": -1}, "curves=-1"),
        ({"limit": 0}, "limit=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_out_of_range_are_said(changes, said):
    with pytest.raises(SettingError, match=said):
        look(vit(), pixels(1), **changes)


def test_a_model_without_attention_leaves_nothing_behind(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    model(pixels(1))
    with pytest.raises(HostError, match="showed no attention map"):
        look(model, pixels(2), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_read_are_named_and_the_others_are_read(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / f"{i}.png")
    expected = look(vit(), [tmp_path / f"{i}.png" for i in (1, 3)])
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "2.png").write_bytes(b"")
    reading = look(vit(), tmp_path, curves=2)
    assert [found["name"] for found in reading.facts["skipped"]] == ["0.png", "2.png"]
    assert all("cannot be read" in found["reason"] for found in reading.facts["skipped"])
    assert [(image["image"], image["name"]) for image in reading.images] == [(0, "1.png"), (1, "3.png")]
    assert reading.facts["images"] == 2
    same(reading, expected)
    with pytest.raises(DataError, match=r"no readable image among 2.*'0\.png'.*Expected.*Replace"):
        look(vit(), [tmp_path / "0.png", tmp_path / "2.png"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mask_of_another_size_costs_that_image_alone(tmp_path):
    (tmp_path / "masks").mkdir()
    for i in range(2):
        Image.new("RGB", (30, 20), (9 * i, 100, 50)).save(tmp_path / f"{i}.png")
        Image.new("L", (30 - i, 20), 255).save(tmp_path / "masks" / f"{i}.png")
    reading = look(vit(), tmp_path)
    assert [image["name"] for image in reading.images] == ["0.png"]
    assert "29 x 20" in reading.facts["skipped"][0]["reason"]


# -- folders, and going on ---------------------------------------------------------------------------------------------


def bytes_of(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def interrupted(monkeypatch, after: int):
    """Writer.add is interrupted once so many parts are written."""
    add = reading_module.Writer.add

    def stop(writer, number, part):
        if number == after:
            raise KeyboardInterrupt
        add(writer, number, part)

    monkeypatch.setattr(reading_module.Writer, "add", stop)


@pytest.mark.parametrize("broken", [(), (0, 1, 2)])
def test_an_interrupted_look_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(module, "CHUNK", 3)
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(photos / f"{i}.png")
        if i in broken:
            (photos / f"{i}.png").write_bytes(b"no")
    model, passes, looked = vit(), [], []
    model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    look(model, photos, out=tmp_path / "whole", curves=1)
    with monkeypatch.context() as patch:
        interrupted(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            look(model, photos, out=tmp_path / "out", curves=1)
    assert sorted(bytes_of(tmp_path / "out")) == ["parts/00000.safetensors", "parts/00001.safetensors", "parts/fingerprint"]
    first = bytes_of(tmp_path / "out")
    seen = module.look_at_batch

    def see(plan, findings, views, first):
        looked.append([view.name for view in views])
        return seen(plan, findings, views, first)

    monkeypatch.setattr(module, "look_at_batch", see)
    reading = look(model, photos, out=tmp_path / "out", curves=1)
    assert looked[0] == ["6.png", "7.png"]
    assert len(looked) == 3  # and the image of the curves, with the weights and with shuffled ones
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert {name: bytes_of(tmp_path / "out")[name] for name in first} == first
    assert len(reading.images) == 8 - len(broken)
    looked.clear()
    passes.clear()
    same(look(model, photos, out=tmp_path / "out", curves=1), reading)
    assert (looked, passes) == ([], [])


def test_more_than_sixteen_images_are_kept_in_parts(tmp_path):
    reading = look(vit(), pixels(17), out=tmp_path / "out", noise=0.0)
    names = [path.name for path in sorted((tmp_path / "out/parts").glob("*.safetensors"))]
    assert names == ["00000.safetensors", "00001.safetensors"]
    with safe_open(tmp_path / "out/parts/00001.safetensors", "numpy") as file:
        assert [image["image"] for image in json.loads(file.metadata()["images"])] == [16]
        assert file.get_tensor("attention/2").shape == (1, 2, 4, 6)
        assert file.get_tensor("attention/2").dtype == np.float16
        assert {"picture/16", "rows/layer", "u1/0/confidence"} <= set(file.keys())
    same(reading, look(vit(), pixels(17), noise=0.0))
    assert len(look(vit(), pixels(17), limit=4, noise=0.0).images) == 4


def test_a_part_without_a_readable_image_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    for i in range(6):
        Image.new("RGB", (30, 20), (40 * i, 255 - 40 * i, 90)).save(tmp_path / f"{i}.png")
    for i in (0, 1, 4, 5):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    reading = look(vit(), [tmp_path / f"{i}.png" for i in range(6)], out=tmp_path / "out")
    first = bytes_of(tmp_path / "out")
    for number in (0, 2):
        (tmp_path / f"out/parts/0000{number}.safetensors").unlink()
        look(vit(), [tmp_path / f"{i}.png" for i in range(6)], out=tmp_path / "out")
        assert bytes_of(tmp_path / "out") == first
    for found in (reading, look(vit(), [tmp_path / f"{i}.png" for i in range(6)])):
        assert [image["name"] for image in found.images] == ["2.png", "3.png"]
        assert found.maps["u1", 2].shape == (2, 4, 6)
        assert set(found.table()["image"]) == {-1, 0, 1}


@pytest.mark.parametrize("what", ["weights", "heads", "graft", "images", "masks", "noise", "limit", "direction"])
def test_another_look_into_the_same_folder_is_refused_and_loses_nothing(tmp_path, monkeypatch, what):
    out, images = tmp_path / "out", pixels(2)
    given = {"model": vit(), "images": images}
    look(**given, out=out)
    before = bytes_of(out)
    if what == "weights":
        given["model"] = vit(seed=1)
    elif what == "heads":  # the very same weights
        given["model"] = vit(num_heads=3)
        given["model"].load_state_dict(vit().state_dict())
    elif what == "graft":
        graft(given["model"], parse("evit:keep=0.5,layers=1"))
    elif what == "images":
        given["images"] = images * 0.99
    elif what == "masks":
        given["masks"] = np.ones((2, 16, 24), bool)
    elif what == "direction":
        given["direction"] = planted(given["model"])
    else:
        given[what] = {"noise": 0.02, "limit": 1}[what]
    with pytest.raises(SettingError, match=r"another reading in .*Expected.*--out"):
        look(**given, out=out)
    assert bytes_of(out) == before


def planted(model, sign: float = 1.0):
    """A direction of this model along its first key and output."""
    from vitreous.lens.direction import Direction, identity, sample_of

    w = torch.zeros(24)
    w[3] = sign
    return Direction(((1, "k"), (2, "o")), (w, w), (1,), 9, GRID, {}, identity(model), sample_of(model))


def test_a_direction_signs_the_maps_and_makes_the_foreground(tmp_path):
    model, images = vit(), pixels(4)
    readings = [look(model, images, direction=planted(model, sign)) for sign in (1.0, -1.0)]
    rules = {found["name"]: found.get("rule") for found in readings[0].facts["components"]}
    assert (rules["foreground"], rules["u1"]) == ("direction and class attention", "fixed+attention")
    assert "foreground_unsigned" not in rules
    np.testing.assert_allclose(readings[0].maps["u1", 2], -readings[1].maps["u1", 2], atol=1e-3)
    keys = explicit(model, images)[1].keys[:, 1:]
    output = explicit(model, images)[2].output[:, 1:]
    along = 0
    for x in (keys, output):
        z = x / x.norm(dim=-1, keepdim=True)
        along = along + (z - z.mean(1, keepdim=True))[..., 3]
    for image in range(4):
        assert np.corrcoef(readings[0].maps["u1", 2][image].ravel(), along[image])[0, 1] > 0
    with pytest.raises(HostError, match="weights are others"):
        look(vit(seed=1), images, direction=planted(model))
    look(model, images, direction=planted(model), out=tmp_path / "out")
    with pytest.raises(SettingError, match="another reading"):
        look(model, images, direction=planted(model, -1.0), out=tmp_path / "out")


def test_the_same_model_in_another_copy_goes_on(tmp_path):
    look(vit(), pixels(2), out=tmp_path / "out")
    model = copy.deepcopy(vit()).train()
    assert len(look(model, pixels(2), out=tmp_path / "out").images) == 2
