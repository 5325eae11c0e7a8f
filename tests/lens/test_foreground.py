"""Foreground maps: the formulas as loops, planted subjects, no position in them, and twenty real photographs."""

from __future__ import annotations

import io
import math
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lens.explicit import vit
from vitreous.base.errors import DataError, HostError
from vitreous.data import Cutouts
from vitreous.lens.direction import Direction, centre_bump, find_direction
from vitreous.lens.foreground import foreground, foreground_of, references, wanted
from vitreous.lens.formulas.maps import gram_filter
from vitreous.lens.formulas.scores import auroc, coverage
from vitreous.lens.layer_features import LayerFeatures, layer_features
from vitreous.lens.look import look

GRID = (5, 6)
P = GRID[0] * GRID[1]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def subjects() -> torch.Tensor:
    """(4, P): 1 on a subject of 2 x 3 patches, in a corner, at an edge, in the middle."""
    inside = torch.zeros(4, *GRID)
    for b, (row, col) in enumerate([(0, 0), (1, 2), (3, 3), (2, 0)]):
        inside[b, row : row + 2, col : col + 3] = 1
    return inside.flatten(1)


def look_at(inside: torch.Tensor, layers: int = 4, noisy: float = 0.3) -> list[LayerFeatures]:
    """Layers in which the subject has its own direction, and the class token looks there a little more."""
    b, d, axes = len(inside), 8, noise(2, 8, seed=99)
    found = []
    for n in range(layers):
        x = [axes[0] + inside[..., None] * (axes[1] - axes[0]) + noisy * noise(b, P, d, seed=10 * n + j) for j in range(3)]
        a = (inside[:, None] + noisy * noise(b, 2, P, seed=n)).softmax(-1)
        found.append(LayerFeatures(n, (f"blocks.{n}.attn", 0), "token", True, GRID, a, x[0], GRID, x[1], x[2]))
    return found


def made_direction() -> Direction:
    w = noise(2, 8, seed=99)
    w = w[1] / w[1].norm() - w[0] / w[0].norm()
    return Direction(((1, "k"), (2, "o")), (w, 0.5 * w), (3, 0), 10, GRID)


def standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std()


def rows(x: torch.Tensor) -> np.ndarray:
    z = x.double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return z - z.mean(0)


def blur(values: np.ndarray) -> np.ndarray:
    places = [(i // GRID[1], i % GRID[1]) for i in range(P)]
    found = np.zeros(P)
    for i, (y, x) in enumerate(places):
        weights = np.array([math.exp(-((y - r) ** 2 + (x - c) ** 2) / (2 * 0.5**2)) for r, c in places])
        found[i] = values @ weights / weights.sum()
    return found


@pytest.mark.parametrize("class_token", [True, False])
def test_with_a_direction_the_map_is_the_formula(class_token):
    layers, direction = look_at(subjects()), made_direction()
    found = foreground_of(references(layers, direction, class_token))
    assert found.rule == ("direction and class attention" if class_token else "direction")
    assert found.grid == GRID
    for b in range(4):
        z = [rows(layers[1].keys[b]), rows(layers[2].output[b])]
        seed = standard(sum(part @ w.double().numpy() for part, w in zip(z, direction.vectors, strict=True)))
        if class_token:
            logs = [standard(np.log(layers[n].attention[b].double().numpy()).mean(0)) for n in (3, 0)]
            seed = seed + standard(sum(logs))
        filtered = sum(part @ (part.T @ seed) / (part**2).sum() for part in z)
        np.testing.assert_allclose(found.maps[b].flatten(), blur(filtered), atol=1e-5)


@pytest.mark.parametrize("has_class", [True, False])
def test_without_a_direction_the_map_is_that_of_attention_or_border_distance(has_class):
    layers = [replace(layer, has_class=has_class) for layer in look_at(subjects())]
    features, pair = wanted(4)
    found = foreground_of(references(layers))
    assert "without a calibrated direction" in found.rule
    assert ("class attention" in found.rule) == has_class
    assert ("border distance" in found.rule) != has_class
    for b in range(4):
        z = [rows(layers[n].feature(kind)[b]) for n, kind in features]
        if has_class:
            seed = standard(sum(standard(np.log(layers[n].attention[b].double().numpy()).mean(0)) for n in pair))
        else:
            seed = np.zeros(P)
            for n in (n for n, kind in features if kind == "k"):
                k = layers[n].keys[b].double().numpy()
                k = k / np.linalg.norm(k, axis=1, keepdims=True)
                edge = [i for i in range(P) if i // GRID[1] in (0, GRID[0] - 1) or i % GRID[1] in (0, GRID[1] - 1)]
                seed = seed + standard(np.linalg.norm(k - k[edge].mean(0), axis=1))
            seed = standard(seed)
        filtered = sum(part @ (part.T @ seed) / (part**2).sum() for part in z)
        np.testing.assert_allclose(found.maps[b].flatten(), blur(filtered), atol=1e-5)


@pytest.mark.parametrize("direction", [None, made_direction()])
@pytest.mark.parametrize("class_token", [True, False])
def test_planted_subjects_are_found(direction, class_token):
    inside = subjects()
    found = foreground_of(references(look_at(inside), direction, class_token)).maps.flatten(1)
    assert auroc(found, inside).min() > 0.95
    assert auroc(centre_bump(GRID).expand(4, P), inside).mean() < 0.7


def test_no_map_knows_where_a_patch_is():
    """The trap is a centre bump per image. Patches in another order give the same values in that order, before the blur."""
    layers, direction = look_at(subjects()), made_direction()
    order = torch.randperm(P, generator=torch.Generator().manual_seed(0))
    moved = []
    for layer in layers:
        parts = {name: getattr(layer, name)[:, order] for name in ("keys", "output", "tokens")}
        moved.append(replace(layer, attention=layer.attention[..., order], **parts))
    a, b = references(layers, direction), references(moved, direction)
    torch.testing.assert_close(b.fixed, a.fixed[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(b.attention, a.attention[:, order], atol=1e-5, rtol=0)
    whole, again = (gram_filter(r.rows, r.fixed + r.attention) for r in (a, b))
    torch.testing.assert_close(again, whole[:, order], atol=1e-5, rtol=0)


def test_references_go_to_the_grid_of_another_layer():
    found = references(look_at(subjects()), made_direction())
    same, finer = found.on(GRID), found.on((10, 12))
    assert same["fixed"] is found.fixed
    assert all(x.shape == (4, 120) for x in finer.values())
    assert references(look_at(subjects()), None, class_token=False).on((10, 12))["attention"] is None


def test_layers_on_another_grid_or_without_places_are_left_out_without_a_direction_and_refused_with_one():
    layers = look_at(subjects(), layers=12)
    layers[7] = replace(layers[7], grid=None, keys=None, token_grid=None, attention=None)
    layers[8] = replace(layers[8], grid=(1, P))
    found = references(layers)
    assert found.grid == GRID
    assert len(found.rows) == len(wanted(12)[0]) - 3
    with pytest.raises(HostError, match=r"features k1.*calibrate"):
        references([replace(s, keys=None) for s in look_at(subjects())], made_direction())
    with pytest.raises(HostError, match=r"k2, o2"):
        references([replace(s, keys=None, output=None) for s in look_at(subjects())])


@pytest.mark.parametrize(("layers", "features", "pair"), [(1, 2, (0,)), (4, 2, (1, 2)), (12, 6, (6, 8)), (24, 12, (13, 17))])
def test_the_usual_layers_are_at_the_depths_of_the_model_that_was_measured(layers, features, pair):
    found, attention = wanted(layers)
    assert len(found) == features
    assert {kind for _, kind in found} == {"k", "o"}
    assert attention == pair
    assert wanted(layers, made_direction()) == (made_direction().features, (3, 0))


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    torch.manual_seed(0)  # of ten photographs, features of other random weights may seem to follow subjects by chance
    return timm.create_model("test_vit", img_size=96).eval()


def test_maps_of_a_model_do_not_depend_on_batches(small):
    images = noise(5, 3, 96, 96)
    whole, parts = foreground(small, images), foreground(small, images, batch=2)
    assert whole.maps.shape == (5, 6, 6)
    assert "class attention" in whole.rule
    assert "border" in foreground(small, images, class_token=False).rule
    torch.testing.assert_close(whole.maps, parts.maps, atol=1e-5, rtol=0)
    with pytest.raises(DataError, match="no images"):
        foreground(small, images[:0])


def test_a_scan_of_noise_finds_nothing_and_reports_its_progress(small):
    steps = []
    with pytest.raises(DataError, match="no feature above"):
        find_direction(small, noise(10, 3, 96, 96), batch=4, progress=lambda done, of: steps.append((done, of)))
    assert steps == [(4, 20), (8, 20), (10, 20), (14, 20), (18, 20), (20, 20)]


def test_a_direction_of_another_model_is_refused(small):
    with pytest.raises(HostError, match="was calibrated"):
        foreground(small, noise(1, 3, 96, 96), made_direction())


def test_real_photographs(shared_data):
    """Calibrated on 24 photographs without masks, the real ViT-Tiny/16 finds the objects of 20 others."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    with np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz") as file:
        photographs = torch.from_numpy(file["images"][:24]).permute(0, 3, 1, 2).float() / 127.5 - 1
    direction = find_direction(model, photographs)
    assert {layer for layer, _ in direction.features} <= {3, 4, 5, 6, 7, 8, 9}
    assert 8 in direction.attention
    assert direction.strength["k0"] < 0.3 < direction.strength["k7"]
    images, cover = objects(shared_data, 20)
    seen = layer_features(model, images)
    maps = {
        "both": foreground(model, images, direction),
        "direction": foreground_of(references(seen, direction, class_token=False)),
        "attention": foreground_of(references(seen)),
        "border": foreground_of(references(seen, class_token=False)),
    }
    torch.testing.assert_close(maps["both"].maps, foreground_of(references(seen, direction)).maps, atol=1e-3, rtol=0)
    scores = {name: auroc(found.maps.flatten(1), cover) for name, found in maps.items()}
    scores["centre"] = auroc(centre_bump((14, 14)).expand(20, 196), cover)
    scores = {name: value.mean().item() for name, value in scores.items()}
    assert min(scores["both"], scores["direction"]) > 0.975, scores
    assert min(scores["attention"], scores["border"]) > 0.95, scores
    assert scores["centre"] < 0.93, scores


def objects(data, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first photographs of ECSSD, squashed and normalised, and the shares of their patches that are foreground."""
    images, masks = [], []
    with tarfile.open(data / "ecssd" / "ecssd_500.tar") as tar:
        names = sorted(name for name in tar.getnames() if "/images/" in name)[: 2 * count : 2]
        for name in names:
            image = Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGB").resize((224, 224), Image.BICUBIC)
            mask = Image.open(io.BytesIO(tar.extractfile(name.replace("images", "masks").replace("jpg", "png")).read()))
            images.append(np.asarray(image))
            masks.append(coverage(np.asarray(mask) > 127, (14, 14)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.stack(masks)


@pytest.mark.parametrize("class_token", [True, False])
def test_without_a_direction_no_map_is_called_the_foreground(class_token):
    """Which side of it is the subject is not known: it has no sign, no score and no curve, and says what it lacks."""
    model = vit(class_token=class_token, global_pool="token" if class_token else "avg")
    reading = look(model, Cutouts(3, size=32, seed=1), noise=0, curves=2)
    assert {key for key in reading.maps if key[1] < 0} == {("foreground_unsigned", -1)}
    np.testing.assert_array_equal(reading.maps.confidence("foreground_unsigned", -1), [0, 0, 0])
    (record,) = [record for record in reading.facts["components"] if record["name"] == "foreground_unsigned"]
    assert record["label"] == "Foreground or background"
    assert "not known without a calibrated direction" in record["explains"]
    assert "rule" not in record
    assert not {"foreground", "foreground_unsigned"} & {
        *reading.scores()["component"],
        *(c["component"] for c in reading.curves),
    }
    found = foreground(model, torch.zeros(1, 3, 16, 24))
    assert not found.sign_known
