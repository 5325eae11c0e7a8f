"""The direction of a model: formulas as loops, planted features that follow subjects or the position, files, wrong models."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.functional import interpolate

from vitreous.base.errors import DataError, HostError
from vitreous.lens import direction as module
from vitreous.lens.direction import Direction, Scan, centre_bump, corners, subject_in_corner
from vitreous.lens.formulas.scores import auroc
from vitreous.lens.layer_features import LayerFeatures

GRID = (8, 10)
P = GRID[0] * GRID[1]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def subjects(count: int, seed: int = 0, corner: bool = False) -> torch.Tensor:
    """(count, P): 1 on the subject. In photographs it is near the centre; in their corners it is where it moves to."""
    generator = torch.Generator().manual_seed(seed)
    shift = 0.1 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in GRID)
    inside = []
    for i in range(count):
        centre, size = 0.5 + shift[i], 0.18
        if corner:
            start = torch.tensor([i % 4 // 2, i % 2]) * (1 - module.SIDE)
            centre, size = (centre - start) / module.SIDE, size / module.SIDE
        inside.append(((y[:, None] - centre[0]).abs() < size) & ((x[None] - centre[1]).abs() < size))
    return torch.stack(inside).flatten(1).float()


def look_at(inside: torch.Tensor, seed: int) -> list[LayerFeatures]:
    """Three layers of made features: 0 knows the position alone, 1 the subject, 2 neither."""
    b, d = len(inside), 12
    axes = noise(2, d, seed=99)
    place = centre_bump(GRID)[None, :, None] * axes[0]
    layers = [place.expand(b, P, d), inside[..., None] * 3 * axes[1], torch.zeros(b, P, d)]
    attentions = [centre_bump(GRID).expand(b, 2, P), 2 * inside[:, None].expand(b, 2, P), torch.zeros(b, 2, P)]
    found = []
    for n, (x, a) in enumerate(zip(layers, attentions, strict=True)):
        made = [x + 0.7 * noise(b, P, d, seed=1000 * seed + 10 * n + j) for j in range(3)]
        a = (a + 0.3 * noise(b, 2, P, seed=seed)).softmax(-1)
        layer = LayerFeatures(n, (f"blocks.{n}.attn", 0), "token", True, GRID, a, made[0], GRID, made[1], made[2])
        found.append(layer)
    return found


class Net(nn.Module):
    """A model by its parameters alone."""

    def __init__(self, width: int = 6, seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(noise(width, 40, seed=seed))
        self.bias = nn.Parameter(torch.zeros(width))


def scanned(count: int = 64, batch: int = 16) -> Scan:
    scan, whole, parts = Scan(), subjects(count), subjects(count, corner=True)
    halves = [(look_at(whole, 1), scan.learn), (look_at(parts, 2), scan.judge)]
    for layers, take in halves:
        for first in range(0, count, batch):
            take([cut(layer, slice(first, first + batch)) for layer in layers])
    return scan


def cut(layer: LayerFeatures, part: slice) -> LayerFeatures:
    names = ("attention", "keys", "output", "tokens")
    return replace(layer, **{name: getattr(layer, name)[part] for name in names})


# -- the parts of the scan ---------------------------------------------------------------------------------------------


def test_the_bump_is_the_formula():
    found = centre_bump(GRID, (0.3, 0.8), 0.4)
    raw = [
        math.exp(-(((r + 0.5) / GRID[0] - 0.3) ** 2 + ((c + 0.5) / GRID[1] - 0.8) ** 2) / (2 * 0.4**2))
        for r in range(GRID[0])
        for c in range(GRID[1])
    ]
    np.testing.assert_allclose(found, (np.array(raw) - np.mean(raw)) / np.std(raw), atol=1e-5)


def test_corners_are_shown_in_turn_at_full_size():
    images = noise(6, 3, 20, 30)
    found = corners(images, first=3)
    assert found.shape == images.shape
    for i, (top, left) in enumerate([(8, 12), (0, 0), (0, 12), (8, 0), (8, 12), (0, 0)]):
        part = images[i : i + 1, :, top : top + 12, left : left + 18]
        torch.testing.assert_close(found[i : i + 1], interpolate(part, (20, 30), mode="bicubic", antialias=True))
    torch.testing.assert_close(corners(images[2:], first=5), found[2:])


@pytest.mark.parametrize("image", range(4))
def test_the_subject_is_expected_where_the_corner_shows_the_centre(image):
    found = subject_in_corner(GRID, image)
    assert abs((found * centre_bump(GRID)).mean()) < 1e-5  # a map that only knows the corner's own centre gets nothing
    row, col = divmod(found.argmax().item(), GRID[1])
    assert (row < GRID[0] / 2) == (image // 2 == 1)
    assert (col < GRID[1] / 2) == (image % 2 == 1)


# -- the scan ----------------------------------------------------------------------------------------------------------


def test_the_scan_takes_what_follows_the_subject_and_not_what_knows_the_position():
    found = scanned().direction(Net())
    assert found.features == ((1, "k"), (1, "o"))
    assert found.attention == (1,)
    strength = found.strength
    assert min(strength["k1"], strength["o1"], strength["x1"]) > 0.5
    assert max(abs(strength[f"{kind}{n}"]) for kind in "kox" for n in (0, 2)) < 0.2
    assert strength["a1"] > 0.5
    assert found.photographs == 64
    assert found.grid == GRID


def test_agreement_with_the_bump_itself_would_have_taken_the_position():
    """The trap that the corners avoid: on centred photographs, layer 0 agrees best."""
    scan, whole = scanned(), look_at(subjects(64), 3)
    agreement = {}
    for layer in whole:
        z = module.rows_of(layer)[0][2]
        along = z @ scan.features[layer.layer, "k"].vector()
        agreement[layer.layer] = np.mean([np.corrcoef(a, centre_bump(GRID))[0, 1] for a in along])
    assert agreement[0] > agreement[1] > agreement[2]


def test_the_direction_finds_subjects_off_the_centre():
    found = scanned().direction(Net())
    inside = subjects(40, seed=5, corner=True)
    rows = {(s.layer, kind): z for s in look_at(inside, 6) for kind, _, z in module.rows_of(s)}
    along = found.along([rows[feature] for feature in found.features])
    assert auroc(along, inside).nanmean() > 0.97
    assert auroc(centre_bump(GRID).expand(40, P), inside).nanmean() < 0.6


def test_vectors_are_the_formula_and_batches_do_not_matter():
    scan = scanned()
    x = look_at(subjects(64), 1)[1].keys.double().numpy()
    z = x / np.linalg.norm(x, axis=-1, keepdims=True)
    z = z - z.mean(1, keepdims=True)
    bump = centre_bump(GRID).double().numpy()
    expected = sum(z[i].T @ bump for i in range(64)) / sum((z[i] ** 2).sum() for i in range(64))
    np.testing.assert_allclose(scan.features[1, "k"].vector(), expected, atol=1e-6)
    other = scanned(batch=7)
    torch.testing.assert_close(other.features[1, "k"].vector(), scan.features[1, "k"].vector())
    assert other.direction(Net()).strength == pytest.approx(scan.direction(Net()).strength, abs=1e-4)


def test_each_half_is_judged_with_the_vectors_of_the_other():
    scan = scanned(count=16)
    z = module.rows_of(look_at(subjects(16), 1)[1])[0][2].double()
    seen = module.rows_of(look_at(subjects(16, corner=True), 2)[1])[0][2].double().numpy()
    bump, half = centre_bump(GRID).double(), [i // 4 % 2 for i in range(16)]
    total = 0.0
    for i in range(16):
        w = sum((bump @ z[j]).numpy() for j in range(16) if half[j] != half[i])
        total += np.corrcoef(seen[i] @ w, subject_in_corner(GRID, i))[0, 1]
    assert scan.direction(Net()).strength["k1"] == pytest.approx(total / 16, abs=1e-3)


def test_too_few_photographs_and_features_that_follow_nothing_are_refused():
    with pytest.raises(DataError, match=r"4 photographs.*at least 8"):
        scanned(count=4).direction(Net())
    scan = scanned()
    scan.features = {key: sums for key, sums in scan.features.items() if key[0] != 1}
    with pytest.raises(DataError, match=r"no feature above [0-9.-]+ .*64 photographs"):
        scan.direction(Net())
    with pytest.raises(DataError, match="0 photographs"):
        Scan().direction(Net())


# -- the file, and the model it belongs to -----------------------------------------------------------------------------


def test_a_direction_travels_in_a_small_file(tmp_path):
    net = Net()
    found = scanned().direction(net)
    found.save(tmp_path / "foreground.safetensors")
    again = Direction.load(str(tmp_path / "foreground.safetensors"))
    for name in ("features", "attention", "photographs", "grid", "strength", "model"):
        assert getattr(again, name) == getattr(found, name), name
    assert all(torch.equal(a, b) for a, b in zip(again.vectors, found.vectors, strict=True))
    again.check(net)
    first = (tmp_path / "foreground.safetensors").read_bytes()
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first
    assert len(first) < 20_000


def test_files_that_are_no_direction_are_refused(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("weights.safetensors", "text.safetensors", "absent.safetensors"):
        with pytest.raises(DataError, match=rf"{name}.*vitreous calibrate"):
            Direction.load(tmp_path / name)


def test_another_model_is_refused_and_another_precision_is_not():
    found = scanned().direction(Net())
    found.check(copy.deepcopy(Net()).bfloat16())
    with pytest.raises(HostError, match=r"Net with 246 parameters, whose weights are others, by \d+%.*vitreous calibrate"):
        found.check(Net(seed=1))
    with pytest.raises(HostError, match=r"328 parameters, whose parameters have other names or shapes.*the Net with 246"):
        found.check(Net(width=8))


def test_features_of_another_width_are_refused():
    found = scanned().direction(Net())
    with pytest.raises(HostError, match=r"5 wide\. Expected 12"):
        found.along([torch.zeros(1, P, 5)] * len(found.features))
