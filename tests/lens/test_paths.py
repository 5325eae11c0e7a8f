"""The classifier's input as a sum of paths, against the sum written out, and hosts for which it does not hold."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from contract.hosts import build, images
from report.test_browser import visit
from vitreous import graft, look
from vitreous.lens.formulas.paths import fine_share
from vitreous.lens.probes.paths import paths_of
from vitreous.report.page import write

LINEAR = (
    "plain", "dinov2", "test_vit2", "test_vit4", "distilled", "clip", "res_post", "class_avg", "fc_norm", "parallel_scaling",
    "parallel_things", "eva02", "dinov3",
)  # fmt: skip


def read(model, batch, text="paths"):
    """{(layer, kind, measure): (images,)} of the paths, and the reading."""
    reading = look(model, batch, probes=[text], noise=0)
    table, values = reading.table(), {}
    for layer, kind in dict.fromkeys(zip(table["layer"].tolist(), table["kind"].tolist(), strict=True)):
        here = (table["layer"] == layer) & (table["kind"] == kind)
        values |= {(layer, kind, name): table[name][here] for name in reading.measures}
    return values, reading


def told(model, batch) -> str:
    """The note of a look that refused."""
    reading = look(model, batch, probes=["attention_rows", "paths"], noise=0)
    assert "path" not in set(reading.table()["source"])
    (note,) = (note for note in reading.facts["notes"] if note.startswith("paths was left out"))
    return note


@pytest.mark.parametrize("name", LINEAR)
def test_sums_of_paths_equal_the_output(name):
    model, batch = build(name).double(), images(2).double()
    values, _ = read(model, batch)
    assert (values[-1, "constant", "path_error"] < 1e-10).all()
    with torch.no_grad():
        largest = model(batch).amax(-1)
    total = sum(value for (_, _, measure), value in values.items() if measure == "path_logit")
    np.testing.assert_allclose(total, largest, rtol=1e-10, atol=1e-10)
    kinds = {kind for layer, kind, _ in values if layer >= 0}
    assert kinds == ({"attention and MLP"} if name == "parallel_scaling" else {"attention", "MLP"})


def test_each_contribution_is_the_formula():
    """W (gamma (p - mean p) / sigma), sigma of the whole sum, and removal with the norm as it is, written out."""
    model, batch = build("plain").double(), images(1).double()
    values, _ = read(model, batch)
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(batch)))
        paths = {(-1, "embedding"): x[0, 0]}
        for number, block in enumerate(model.blocks):
            attention = block.ls1(block.attn(block.norm1(x)))
            mlp = block.ls2(block.mlp(block.norm2(x + attention)))
            paths |= {(number, "attention"): attention[0, 0], (number, "MLP"): mlp[0, 0]}
            x = x + attention + mlp
        whole, norm, head = x[0, 0], model.norm, model.head
        logits = head(norm(whole))
        index, sigma = int(logits.argmax()), (whole.var(correction=0) + norm.eps).sqrt()
        added = {key: float((head.weight @ (norm.weight * (p - p.mean()) / sigma))[index]) for key, p in paths.items()}
        for key, path in paths.items():
            less = head(norm(whole - path))
            assert values[(*key, "path_logit")][0] == pytest.approx(added[key], abs=1e-12)
            assert values[(*key, "path_share")][0] == pytest.approx(abs(added[key]) / sum(map(abs, added.values())))
            drop = logits.softmax(-1)[index] - less.softmax(-1)[index]
            assert values[(*key, "path_drop")][0] == pytest.approx(float(drop), abs=1e-12)
            assert values[(*key, "path_agreement")][0] == float(less.argmax() == index)
        constant = head.weight @ norm.bias + head.bias
    assert values[-1, "constant", "path_logit"][0] == pytest.approx(float(constant[index]), abs=1e-12)


def test_a_path_of_zeros_adds_nothing_and_the_others_do():
    model = build("plain").double()
    torch.nn.init.zeros_(model.blocks[1].mlp.fc2.weight)
    torch.nn.init.zeros_(model.blocks[1].mlp.fc2.bias)
    values, _ = read(model, images(2).double())
    for measure in ("path_logit", "path_share", "path_drop"):
        np.testing.assert_allclose(values[1, "MLP", measure], 0, atol=1e-14)
        assert (abs(values[2, "MLP", measure]) > 1e-6).all()
    assert (values[1, "MLP", "path_agreement"] == 1).all()
    assert np.isnan(values[1, "MLP", "path_fine"]).all()


def test_the_class_can_be_named():
    model, batch = build("plain").double(), images(2).double()
    values, reading = read(model, batch, "paths:target=3")
    total = sum(value for (_, _, measure), value in values.items() if measure == "path_logit")
    with torch.no_grad():
        np.testing.assert_allclose(total, model(batch)[:, 3], rtol=1e-10)
    assert [image["classes"]["path"]["class"] for image in reading.images] == [3, 3]


def test_fine_share_of_known_maps():
    y, x = torch.meshgrid(*[torch.arange(16, dtype=torch.float64)] * 2, indexing="ij")
    checks, waves = (-1) ** (x + y), torch.cos(2 * torch.pi * x / 16)
    maps = torch.stack([checks, waves, checks + waves, 5 + 0 * x])[..., None]
    share = fine_share(maps + 3)
    assert share[:2].tolist() == pytest.approx([1, 0], abs=1e-20)
    assert float(share[2]) == pytest.approx(1 / 1.5)  # energies 1 and 1/2
    assert share[3].isnan()
    noise = fine_share(torch.randn(1, 16, 16, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    f = torch.fft.fftfreq(16)
    radius = (f[:, None] ** 2 + f**2).sqrt()
    assert float(noise) == pytest.approx(float((radius > 0.25).sum() / (radius > 0).sum()), abs=0.01)


def test_a_mixer_is_a_path_and_an_adapter_one_of_its_own():
    batch = images(2).double()
    mixed, _ = read(graft(build("class_avg"), "spectral_gate:layers=1").double(), batch)
    assert {kind for layer, kind, _ in mixed if layer == 1} == {"attention", "MLP"}
    assert (mixed[1, "attention", "path_logit"] != 0).all()
    model = graft(build("plain"), "adaptformer:layers=2").double()
    with torch.no_grad():
        for p in model.blocks[2].parameters():
            p.add_(0.05)
    adapted, _ = read(model, batch)
    assert {kind for layer, kind, _ in adapted if layer == 2} == {"attention", "MLP", "other"}
    assert {kind for layer, kind, _ in adapted if layer == 1} == {"attention", "MLP"}
    assert (adapted[2, "other", "path_logit"] != 0).all()
    assert (adapted[-1, "constant", "path_error"] < 1e-10).all()


def test_what_is_no_sum_is_refused_by_name():
    batch = images(1)
    assert "token_merging" in told(graft(build("plain"), "token_merging:tokens=2"), batch)
    assert "extra_tokens" in told(graft(build("plain"), "extra_tokens"), batch)
    assert "off by" in told(build("class_map"), batch)
    assert "off by" in told(build("max"), batch)
    post = timm.create_model("scratch_vit_patch4_32", num_classes=5)
    assert "blocks.0 (PostNormBlock) gives something else" in told(post, batch)


def test_half_precision_within_its_digits():
    model = build("plain").bfloat16()
    values, _ = read(model, images(1))
    assert 0 < values[-1, "constant", "path_error"][0] < 0.05


def test_paths_come_in_order_and_the_model_stays():
    model = build("plain")
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    paths, output = paths_of(model.eval(), images(1))
    assert [(path.layer, path.half) for path in paths] == [
        (-1, "embedding"), *((layer, half) for layer in range(4) for half in ("attention", "MLP"))
    ]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(output, model(images(1)))
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == before


def test_the_page_draws_a_bar_for_each_path(browser, tmp_path):
    reading = look(build("plain"), images(3), probes=["all", "paths"], out=tmp_path / "reading", noise=0)
    write([tmp_path / "reading"], tmp_path / "page.html")
    table = reading.table()
    with visit(browser, tmp_path / "page.html") as page:
        part = page.locator("#sum-path")
        assert part.get_by_role("heading", name="Paths to the answer").is_visible()
        assert part.locator("rect.column").count() == 2 + 2 * 4  # constant and embedding, two for each layer
        part.get_by_label("Probability lost without it", exact=True).check(force=True)
        assert part.locator("rect.column").count() == 1 + 2 * 4
        part.get_by_label("the chosen image", exact=True).check(force=True)
        chart = part.locator("figure.chart")
        assert "class" in chart.locator(".chart-title").text_content()
        chart.locator(".values > summary").click()
        head = chart.locator("table thead th").all_text_contents()
        column = next(i for i, text in enumerate(head) if "MLP" in text)
        line = next(row for row in chart.locator("table tbody tr").all() if row.locator("th,td").first.text_content() == "2")
        here = (table["layer"] == 2) & (table["kind"] == "MLP") & (table["image"] == 0)
        shown = float(line.locator("th,td").nth(column).text_content().replace("−", "-"))
        assert shown == pytest.approx(float(table["path_drop"][here][0]), rel=1e-3)
        sources = page.locator("#indicators").text_content()
        assert "Paths to the answer" not in sources
