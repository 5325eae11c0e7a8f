"""Heads: rings and patterns of planted maps, pruning against a model whose weights are zeros there, the page."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from contract.hosts import build, images
from lens.explicit import explicit, pixels, vit
from report.test_browser import visit
from vitreous import look
from vitreous.base.errors import SettingError
from vitreous.data import Cutouts
from vitreous.data.views import Views
from vitreous.lens.formulas import heads as formulas
from vitreous.lens.probes.heads import Heads, pruned
from vitreous.report.page import write

GRID = (5, 7)
MEASURES = ("head_drop", "head_divergence", "head_flip")


def read(model, batch, text="heads", **options):
    reading = look(model, batch, probes=[text], noise=0, **options)
    return reading, reading.table()


def distances(grid):
    """{(i, j): (rows, columns) between}."""
    cells = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    return cells, {(i, j): (abs(a[0] - b[0]), abs(a[1] - b[1])) for i, a in enumerate(cells) for j, b in enumerate(cells)}


def profile_by_loops(rows, grid):
    cells, between = distances(grid)
    profile = np.zeros(max(grid))
    for (i, j), (y, x) in between.items():
        profile[max(y, x)] += rows[i, j] / len(cells)
    return profile


# -- rings ------------------------------------------------------------------------------------------------------------


def test_rings_of_uniform_identity_and_gaussian_maps():
    cells, between = distances(GRID)
    n, index = len(cells), formulas.ring_index(GRID)
    uniform, identity = torch.full((n, n), 1 / n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    squares = torch.tensor([[sum(d * d for d in between[i, j]) for j in range(n)] for i in range(n)], dtype=torch.float64)
    gaussian = (-squares / (2 * 1.5**2)).softmax(-1)
    for rows in (uniform, identity, gaussian):
        found = formulas.ring_profile(rows, index)
        np.testing.assert_allclose(found, profile_by_loops(rows.numpy(), GRID), atol=1e-12)
        assert float(found.sum()) == pytest.approx(1)
    sizes = [sum(max(pair) == k for pair in between.values()) / n for k in range(max(GRID))]  # clipped at the border
    np.testing.assert_allclose(formulas.ring_profile(uniform, index), np.array(sizes) / n, atol=1e-12)
    assert formulas.ring_profile(identity, index).tolist() == pytest.approx([1] + [0] * (max(GRID) - 1))
    middle = 17
    assert torch.bincount(index[middle])[:2].tolist() == [1, 8]
    wide = formulas.ring_profile(gaussian, index)
    assert (wide[1:-1] > wide[2:]).all()  # falls behind the first ring


def test_rows_that_do_not_count_and_rings_around_the_middle():
    rows = torch.eye(4).expand(2, 3, 4, 4)
    weights = torch.tensor([1.0, 1, 0, 0]).expand(2, 3, 4)
    assert formulas.ring_profile(rows, formulas.ring_index((2, 2)), weights)[1, 2].tolist() == [1, 0]
    assert formulas.middle_index((5, 5)).reshape(5, 5)[2].tolist() == [2, 1, 0, 1, 2]
    assert formulas.middle_index((4, 4)).reshape(4, 4)[1].tolist() == [1, 0, 0, 1]
    assert formulas.middle_index((4, 4)).reshape(4, 4)[0].tolist() == [1, 1, 1, 1]


def test_profiles_are_those_of_the_models_own_attention():
    model, batch = vit(), pixels(2)
    reading, table = read(model, batch, "heads:prune=false")
    layers = explicit(model, batch)
    for number, layer in enumerate(layers):
        found = reading.figures["rings", number]
        own = reading.figures["class_rings", number]
        ring = formulas.middle_index((4, 6)).numpy()
        for image in range(2):
            for head in range(2):
                rows = layer.attention[image, head, 1:, 1:].numpy()
                expected = profile_by_loops(rows, (4, 6))
                np.testing.assert_allclose(found[image, head], expected, rtol=1e-4, atol=1e-6)
                here = (table["layer"] == number) & (table["image"] == image) & (table["head"] == head)
                np.testing.assert_allclose(table["ring_beside"][here], 1 - expected.sum(), rtol=1e-4)
                np.testing.assert_allclose(table["ring_self"][here], expected[0], rtol=1e-4)
                hops = (expected * np.arange(6)).sum() / expected.sum()
                np.testing.assert_allclose(table["ring_hops"][here], hops, rtol=1e-4)
                first = layer.attention[image, head, 0, 1:].numpy()
                for k in range(3):
                    assert own[image, head, k] == pytest.approx(first[ring == k].sum(), rel=1e-4)
    assert not (table["source"] == "head_pruning").any()


# -- patterns ----------------------------------------------------------------------------------------------------------


def planted(grid, seed=0, copies=6):
    """Maps of each known pattern, each with noise of its own; (names, rows, beside)."""
    generator = torch.Generator().manual_seed(seed)
    names, rows, beside = [], [], []
    for name, (pattern, own) in formulas.known_patterns(grid, prefix=True).items():
        for _ in range(copies):
            whole = torch.cat([own[:, None], pattern], dim=1)
            noise = torch.rand(whole.shape, generator=generator) ** 4
            whole = 0.75 * whole + 0.25 * noise / noise.sum(1, keepdim=True)
            names.append(name)
            rows.append(whole[:, 1:])
            beside.append(whole[:, 0])
    return names, torch.stack(rows), torch.stack(beside)


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (6, 9)])
def test_planted_patterns_are_separated_and_named(grid):
    names, rows, beside = planted(grid)
    maps = formulas.binned(rows, beside, 48)
    assert maps.sum(-1).numpy() == pytest.approx(1, abs=1e-5)
    labels = formulas.clusters(maps, 8).tolist()
    kinds = {label: {name for name, own in zip(names, labels, strict=True) if own == label} for label in labels}
    assert all(len(kind) == 1 for kind in kinds.values())  # purity 1
    whole = torch.cat([beside[..., None], rows], dim=-1)
    known = {
        name: torch.cat([own[:, None], pattern], dim=1) for name, (pattern, own) in formulas.known_patterns(grid, True).items()
    }
    for name, one in zip(names, whole, strict=True):
        assert max(known, key=lambda other: float(formulas.likeness(one, known[other]))) == name
    assert len(set(formulas.clusters(maps, 6).tolist())) == 6
    counts = np.bincount(labels)
    assert (counts[:-1] >= counts[1:]).all()  # the largest first


def test_maps_that_do_not_differ_are_one_kind():
    assert formulas.clusters(torch.full((5, 3, 4), 0.25), 4).tolist() == [0] * 5


def test_bins_are_sums_over_keys_and_means_over_queries():
    rows = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beside = torch.arange(6.0, dtype=torch.float64)
    half = formulas.binned(rows, beside, 3)
    for i in range(3):
        assert float(half[i, 0]) == pytest.approx(float(beside[2 * i : 2 * i + 2].mean()))
        for j in range(3):
            expected = rows[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum(1).mean()
            assert float(half[i, 1 + j]) == pytest.approx(float(expected))
    np.testing.assert_allclose(formulas.binned(rows, beside, 6)[:, 1:], rows)
    uneven = formulas.binned(rows, beside, 4)  # the first bin is the first patch and half of the second
    assert float(uneven[0, 1]) == pytest.approx(float((rows[0, 0] + rows[0, 1] / 2 + rows[1, 0] / 2 + rows[1, 1] / 4) / 1.5))
    assert float(uneven[0, 1:].sum()) == pytest.approx(float((rows[0].sum() + rows[1].sum() / 2) / 1.5))


def test_likeness_and_divergence_have_their_ends():
    a, b = torch.tensor([[0.5, 0.5, 0, 0]]), torch.tensor([[0, 0, 0.25, 0.75]])
    assert float(formulas.likeness(a, a)) == pytest.approx(1)
    assert float(formulas.likeness(a, b)) == 0
    assert formulas.divergence(a, a).tolist() == [0]
    assert formulas.divergence(a, b).tolist() == pytest.approx([1])
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
    by_hand = sum(0.5 * x * math.log2(x / ((x + y) / 2)) for u, v in zip(p, q, strict=True) for x, y in [(u, v), (v, u)])
    assert float(formulas.divergence(p, q)) == pytest.approx(float(by_hand))


# -- importance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["plain", "dinov3", "swin"])
def test_pruning_is_a_projection_with_zeros_there(host):
    model, batch = build(host), images(2)
    _, table = read(model, batch, "heads:keep=true")
    with torch.no_grad():
        full = model(batch).double()
        index = full.argmax(-1)
        attentions = [name for name, module in model.named_modules() if name.endswith("attn") and hasattr(module, "proj")]
        for layer, name in enumerate(attentions):
            for kind in ("all but one head", "one head alone"):
                other = copy.deepcopy(model)
                weight = other.get_submodule(name).proj.weight
                weight.unflatten(1, (2, -1))[:, 1 if kind == "all but one head" else 0] = 0
                less = other(batch).double()
                p, q = full.softmax(-1), less.softmax(-1)
                here = (table["layer"] == layer) & (table["head"] == 1) & (table["kind"] == kind)
                np.testing.assert_allclose(table["head_drop"][here], (p - q)[range(2), index], atol=1e-5)
                np.testing.assert_allclose(table["head_flip"][here], (less.argmax(-1) != index).double())
                np.testing.assert_allclose(table["head_divergence"][here], formulas.divergence(p, q), atol=1e-5)
                assert float((p - q).abs().max()) > 1e-3


def test_a_head_whose_projection_is_zero_has_no_importance():
    model = build("plain")
    with torch.no_grad():
        model.blocks[2].attn.proj.weight[:, :16] = 0
    _, table = read(model, images(2))
    here = (table["layer"] == 2) & (table["source"] == "head_pruning")
    for measure in MEASURES:
        np.testing.assert_allclose(table[measure][here & (table["head"] == 0)], 0, atol=1e-6)
    assert (table["head_divergence"][here & (table["head"] == 1)] > 1e-3).all()


def test_settings_choose_layers_images_and_class():
    model, batch = build("plain"), images(3)
    reading, table = read(model, batch, "heads:layers=1+3,images=2,target=4")
    here = table["source"] == "head_pruning"
    assert set(table["layer"][here]) == {1, 3}
    assert set(table["image"][here]) == {0, 1}
    assert set(table["kind"][here]) == {"all but one head"}
    assert [image["classes"]["head_pruning"]["class"] for image in reading.images] == [4, 4, 4]
    with torch.no_grad():
        full = model(batch).softmax(-1)
        with pruned(model.blocks[3].attn.proj, 2, 0, alone=False):
            less = model(batch).softmax(-1)
    first = here & (table["layer"] == 3) & (table["head"] == 0)
    np.testing.assert_allclose(table["head_drop"][first], (full - less)[:2, 4], atol=1e-5)
    with pytest.raises(SettingError):
        Heads(images=0)
    notes = read(model, batch, "heads:layers=9")[0].facts["notes"]
    assert any("Found layers [9]. Expected 0 to 3" in note for note in notes)


def test_the_true_class_counts_where_it_is_known():
    model, scenes = vit(img_size=(16, 16)), Cutouts(4, size=48, seed=1)
    labels = [Views(model, scenes, None, None)[i].label for i in range(4)]
    reading, table = read(model, scenes)
    explained = [image["classes"]["head_pruning"]["class"] for image in reading.images]
    assert explained == labels
    assert len(set(labels)) > 1
    with torch.no_grad():
        batch = torch.stack([Views(model, scenes, None, None)[i].pixels for i in range(4)])
        full = model(batch).softmax(-1)
        with pruned(model.blocks[0].attn.proj, 2, 1, alone=False):
            less = model(batch).softmax(-1)
    here = (table["source"] == "head_pruning") & (table["layer"] == 0) & (table["head"] == 1)
    np.testing.assert_allclose(table["head_drop"][here], (full - less)[range(4), labels], atol=1e-6)


def test_what_cannot_be_read_is_named():
    assert any("heads were not pruned" in note for note in read(build("qk_norm"), images(1))[0].facts["notes"])
    reading, _ = read(build("swin"), images(1), "heads:prune=false")
    assert any("it attends in windows" in note for note in reading.facts["notes"])


def test_the_work_is_shown():
    text = io.StringIO()
    read(build("plain"), images(1), console=Console(file=text, force_terminal=True))
    assert "heads" in text.getvalue()


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_draws_importance_rings_and_kinds(browser, tmp_path):
    reading = look(build("plain"), images(3), probes=["all", "heads:keep=true,clusters=3"], out=tmp_path / "reading", noise=0)
    write([tmp_path / "reading"], tmp_path / "page.html")
    table = reading.table()
    with visit(browser, tmp_path / "page.html") as page:
        part = page.locator("#matrix-head_pruning")
        assert part.locator("button.heat").count() == 4 * 2
        here = (table["kind"] == "all but one head") & (table["layer"] == 2) & (table["head"] == 1)
        shown = part.locator("button.heat[data-layer='2'][data-head='1']")
        assert float(shown.text_content().replace("−", "-")) == pytest.approx(float(table["head_drop"][here].mean()), abs=0.006)
        part.get_by_label("one head alone", exact=True).check(force=True)
        part.get_by_label("the chosen image", exact=True).check(force=True)
        part.get_by_label("Change of the answer", exact=True).check(force=True)
        here = (table["kind"] == "one head alone") & (table["layer"] == 2) & (table["head"] == 1) & (table["image"] == 0)
        assert float(shown.text_content()) == pytest.approx(float(table["head_divergence"][here][0]), abs=0.006)
        pattern = page.locator("#matrix-head_pattern")
        pattern.get_by_label("Alike: global", exact=True).check(force=True)
        assert pattern.locator("button.heat").count() == 4 * 2
        figures = page.locator("#figures")
        assert figures.locator("figure.chart").count() == 4  # rings, a chart for each layer
        figures.get_by_label("Kinds of maps", exact=True).check(force=True)
        kinds = figures.locator(".exact-picture")
        assert kinds.count() == 3
        assert "nearest to" in kinds.first.text_content()
        assert "Where the heads look" not in page.locator("#indicators").text_content()
        shown.click()
        assert "layer 2, head 1" in page.locator(".pane figcaption").text_content().lower()
