"""Scores against scipy, plain loops over thresholds, and masks whose answers are known."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from vitreous.base.errors import DataError
from vitreous.base.statistics import bootstrap
from vitreous.lens.formulas import scores as lens
from vitreous.lens.formulas.scores import MEASURES, coverage, scores

GRID = (5, 8)  # not square
P = 40


def drawn(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some(images=6, heads=3, levels=None, seed=0):
    """Maps (B, H, P), with ties if there are only so many levels, and cover (B, P) with partly covered patches."""
    maps = drawn(images, heads, P, seed=seed) - 0.3
    if levels:
        maps = (maps * levels).round() / levels
    return maps, (1.6 * drawn(images, P, seed=seed + 1) - 0.3).clamp(0, 1)


def close(found, expected):
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# -- masks on the grid -------------------------------------------------------------------------------------------------


def test_coverage_of_whole_patches_is_their_mean():
    mask = drawn(3, 20, 24) > 0.5
    found = coverage(mask, (5, 6))
    assert found.shape == (3, 30)
    for image, row, col in itertools.product(range(3), range(5), range(6)):
        patch = mask[image, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        close(found[image, 6 * row + col], patch.double().mean())


@pytest.mark.parametrize("size", [(7, 11), (3, 2), (13, 13)])
def test_coverage_of_broken_patches_is_their_exact_area(size):
    """The oracle: every pixel blown up to as many points as there are patches, so that patches are whole again."""
    rows, cols = 4, 5
    mask = drawn(*size, seed=3) > 0.4
    fine = mask.repeat_interleave(rows, 0).repeat_interleave(cols, 1).double()
    expected = fine.reshape(rows, size[0], cols, size[1]).mean((1, 3)).flatten()
    close(coverage(mask, (rows, cols)), expected)
    close(coverage(mask.numpy(), (rows, cols)), expected)
    close(coverage(mask, (rows, cols)).mean(), mask.double().mean())


def test_masks_of_three_kinds():
    mask = drawn(8, 8) > 0.5
    expected = coverage(mask, (2, 2))
    close(coverage(mask.to(torch.uint8), (2, 2)), expected)
    close(coverage(mask.to(torch.uint8) * 200 + 20, (2, 2)), expected)  # grey edges of a PNG: above 127
    close(coverage(mask.float() * 0.5, (2, 2)), expected / 2)
    both = torch.stack([mask.to(torch.uint8), mask.to(torch.uint8) * 255])  # levels are those of each mask
    close(coverage(both, (2, 2)), expected.expand(2, -1))


@pytest.mark.parametrize(
    ("mask", "grid"),
    [(torch.ones(4), (2, 2)), (torch.ones(0, 4), (2, 2)), (torch.ones(4, 4), (0, 2)), (torch.full((4, 4), 2.0), (2, 2))],
)
def test_coverage_refuses(mask, grid):
    with pytest.raises(DataError, match=r"Found .* expected"):
        coverage(mask, grid)


# -- known answers -----------------------------------------------------------------------------------------------------


def square():
    """Cover (P,) of a 2 x 3 object, 6 of 40 patches."""
    cover = torch.zeros(GRID)
    cover[1:3, 4:7] = 1
    return cover.flatten()


def test_perfect_map():
    assert {name: value.item() for name, value in scores(square(), square()).items()} == dict.fromkeys(MEASURES, 1.0)


def test_inverted_map():
    found = scores(1 - square(), square())
    for name in ("energy_inside", "auroc", "pointing", "iou_otsu"):
        assert found[name] == 0, name
    close(found["average_precision"], 6 / 40)  # the foreground comes last, all at once
    close(found["iou_best"], 6 / 40)  # the best that can be done is to take everything


@pytest.mark.parametrize("value", [0.0, 0.7, -2.0])
def test_constant_map_gets_the_area(value):
    found = scores(torch.full((P,), value), square())
    for name in MEASURES:
        close(found[name], 0.5 if name == "auroc" else 6 / 40)


def test_pointing_shares_equal_maxima():
    maps = torch.zeros(4, P)
    maps[0, 12] = 1  # row 1, column 4: inside
    maps[1, 0] = 1
    maps[2, [12, 13, 0]] = 5
    maps[3, [0, 1]] = -0.5
    maps[3, 12] = 0.5
    close(lens.pointing(maps, square()), [1, 0, 2 / 3, 1])


def test_energy_is_spread_over_a_patch_and_signed_maps_count_by_their_positive_part():
    cover = square() * 0.75  # patches of which three quarters are covered
    close(lens.energy_inside(square(), cover), 0.75)
    signed = square() - 10 * (1 - square())
    close(lens.energy_inside(signed, square()), 1)
    signed[0] = 6
    close(lens.energy_inside(signed, square()), 0.5)
    close(lens.energy_inside(torch.ones(P), cover), cover.double().mean())
    close(lens.energy_inside(square().double() * 1e-300, square()), 1)


def test_half_covered_is_background():
    cover = torch.zeros(P)
    cover[:2] = torch.tensor([0.5, 0.51])
    maps = torch.zeros(P)
    maps[1] = 1
    close(lens.auroc(maps, cover), 1)
    maps[0] = 2
    close(lens.auroc(maps, cover), 38 / 39)


def test_otsu_parts_two_heaps():
    values = torch.tensor([0.1, 5.2, 0.0, 5.0, 0.2, 5.1])
    assert lens.otsu(values) == values.double()[4]
    assert lens.otsu(1e-9 * values - 7) == (1e-9 * values - 7).double()[4]
    cover = torch.tensor([0.0, 1, 0, 1, 0, 0])
    close(lens.iou_otsu(values, cover), 2 / 3)


# -- against scipy and plain loops -------------------------------------------------------------------------------------


def best_parting(values):
    """Otsu's threshold by trying every value: the first that gives the most variance between the classes."""
    best, found = -1.0, None
    for t in sorted(set(values))[:-1]:
        low, high = [v for v in values if v <= t], [v for v in values if v > t]
        between = len(low) * len(high) * (np.mean(low) - np.mean(high)) ** 2
        if between > best * (1 + 1e-12):
            best, found = between, t
    return found


def slowly(values, cover):
    """All scores of one map by loops over its thresholds."""
    values, cover = values.tolist(), cover.tolist()
    inside = [share > 0.5 for share in cover]
    n = sum(inside)
    precision, recall, unions = [], [0.0], []
    for t in sorted(set(values), reverse=True):
        taken = [v >= t for v in values]
        hit = sum(a and b for a, b in zip(taken, inside, strict=True))
        precision.append(hit / sum(taken))
        recall.append(hit / n)
        unions.append(hit / (sum(taken) + n - hit))
    t = best_parting(values)
    above = [(v > t, i) for v, i in zip(values, inside, strict=True)]
    mass = [max(v, 0) for v in values]
    maxima = [inside[i] for i, v in enumerate(values) if v == max(values)]
    theirs = {side: [v for v, i in zip(values, inside, strict=True) if i == side] for side in (True, False)}
    return {
        "energy_inside": sum(m * c for m, c in zip(mass, cover, strict=True)) / sum(mass),
        "auroc": stats.mannwhitneyu(theirs[True], theirs[False]).statistic / (n * (len(values) - n)),
        "average_precision": sum(p * (b - a) for p, a, b in zip(precision, recall, recall[1:], strict=False)),
        "pointing": sum(maxima) / len(maxima),
        "iou_otsu": sum(a and i for a, i in above) / sum(a or i for a, i in above),
        "iou_best": max(unions),
    }


@pytest.mark.parametrize("levels", [None, 4, 1], ids=["no ties", "ties", "two values"])
def test_scores_equal_loops(levels):
    maps, cover = some(levels=levels)
    found = scores(maps, cover[:, None])
    for image, head in itertools.product(range(6), range(3)):
        for name, value in slowly(maps[image, head], cover[image]).items():
            close(found[name][image, head], value)


def test_order_of_patches_and_scale_do_not_matter():
    maps, cover = some(levels=6)
    order = torch.randperm(P, generator=torch.Generator().manual_seed(0))
    first, second = scores(maps, cover[:, None]), scores(maps[..., order] * 1e-3, cover[:, None, order])
    for name in MEASURES:
        close(first[name], second[name])
    half = scores(maps.half(), cover[:, None])
    close(half["auroc"], lens.auroc(maps.half().double(), cover[:, None]))


def test_images_without_foreground_or_background_have_no_score():
    maps = drawn(5, P)
    maps[3, 7], maps[4, 7] = torch.nan, torch.inf
    cover = square().repeat(5, 1)
    cover[0], cover[1] = 0, 1
    for name, value in scores(maps, cover).items():
        assert value.isnan().tolist() == [True, True, False, True, True], name


def test_maps_and_cover_must_fit():
    with pytest.raises(DataError, match=r"Found maps of shape .* expected the same number of patches"):
        scores(drawn(2, P), drawn(2, P + 1))


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_random_maps_follow_from_the_image_alone():
    whole = lens.baselines(GRID, range(10), seed=1)
    part = lens.baselines(GRID, [3, 7], seed=1)
    close(part["random"], whole["random"][[3, 7]])
    assert not torch.equal(whole["random"], lens.baselines(GRID, range(10), seed=2)["random"])
    assert whole["random"].unique().numel() == 10 * P
    assert tuple(whole) == lens.BASELINES
    assert {value.shape for value in whole.values()} == {(10, P)}
    assert lens.baselines(GRID, [])["random"].shape == (0, P)


def test_a_random_map_scores_at_chance_and_the_area_exactly():
    cover = torch.stack([square().reshape(GRID).roll((i, i // 5), (0, 1)).flatten() for i in range(400)])
    maps = lens.baselines(GRID, range(400))
    found = {name: scores(maps[name], cover) for name in maps}
    mean, low, high = bootstrap(found["random"]["auroc"])
    assert low < 0.5 < high
    assert high - low < 0.05
    assert abs(mean - 0.5) < 0.02
    assert bootstrap(found["area"]["energy_inside"]) == pytest.approx((0.15, 0.15, 0.15))
    assert bootstrap(found["area"]["auroc"]) == (0.5, 0.5, 0.5)


# -- intervals and summaries -------------------------------------------------------------------------------------------


MAPS = [("attention", 3, 0), ("attention", 3, 1), ("attention", 7, 0), ("centre", 3, -1), ("centre", -1, -1)]


def table():
    """Rows as in scores.csv: a map at two layers with two heads, and a centre prior, on 12 images."""
    random = np.random.default_rng(0)
    rows = [(image, *which, *random.random(2)) for image in range(12) for which in MAPS]
    names = ("image", "component", "layer", "head", "auroc", "pointing")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    columns["auroc"][0] = np.nan
    return columns


def chosen(columns, component, layer, head, name):
    where = zip(columns["component"], columns["layer"], columns["head"], strict=True)
    return np.array([value for at, value in zip(where, columns[name], strict=True) if at == (component, layer, head)])


def lines(columns):
    return list(zip(*(column.tolist() for column in columns.values()), strict=True))


def test_summary():
    found = lens.summary(table())
    assert list(found) == ["component", "layer", "head", "measure", "mean", "low", "high", "images"]
    assert len(found["mean"]) == 10
    for component, layer, head, measure, mean, low, high, images in lines(found):
        values = chosen(table(), component, layer, head, measure)
        assert (mean, low, high) == pytest.approx(bootstrap(values))
        assert images == 12 - np.isnan(values).sum()
    assert found["images"].tolist() == [11] + [12] * 9
    shuffled = np.random.default_rng(0).permutation(60)
    again = lens.summary({name: np.array(column)[shuffled] for name, column in table().items()})
    for first, second in zip(sorted(lines(again)), sorted(lines(found)), strict=True):
        assert first[:4] == second[:4]
        assert first[4:] == pytest.approx(second[4:])
