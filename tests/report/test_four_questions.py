"""Four questions of a visitor, answered from pages alone: what is wrong, which class is worst, which arm is better, and
what a head looks at from one patch, whose attention is written out here."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

from report.made import write_run
from report.test_browser import PEAK, await_query, cells, choose, visit
from report.test_mistakes import write_answers
from report.test_study import write_study
from vitreous.lens.look import look
from vitreous.report.page import write

SIDE, PATCH, HEADS, LAYERS, WIDTH = 96, 16, 4, 6, 64
EYE = (1, 3)  # the patch that the eye is on

# where a picture is darkest, as shares of its height and width
DARKEST = """canvas => { const { width, height } = canvas;
    const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);
    const sum = i => data[i] + data[i + 1] + data[i + 2];
    let best = 0;
    for (let i = 0; i < data.length; i += 4) if (sum(i) < sum(best)) best = i;
    return [Math.floor(best / 4 / width) / height, ((best / 4) % width) / width]; }"""


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return write([write_answers(write_run(root / "run", epochs=1, images=1))], root / "run.html")


def test_which_photographs_are_wrong(browser, run_page):
    with visit(browser, run_page) as page:
        wrong = [row[0] for row in cells(page, "#mistake-table")]
        assert wrong == ["dog/05.jpg", "newt/09.jpg", "cat/02.jpg", "newt/08.jpg", "newt/10.jpg"]


def test_which_class_is_worst(browser, run_page):
    with visit(browser, run_page) as page:
        assert "Worst class: newt, 1 of 4 right" in page.locator("#mistakes .sentence").text_content()
        assert cells(page, "#class-table")[0][0] == "newt"


def test_does_arm_b_beat_arm_a(browser, tmp_path):
    with visit(browser, write([write_study(tmp_path / "study")], tmp_path / "study.html")) as page:
        assert page.locator("h1").text_content() == "2 arms against plain"
        assert page.locator("[data-verdict='svda/test'] .verdict-word").text_content() == "Better"
        assert page.locator("[data-verdict='<b>spc</b>/test'] .verdict-word").text_content() == "Undecided"


def head_with_an_eye() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (90, 140, 80))
    draw = ImageDraw.Draw(image)
    draw.ellipse([10, 6, 88, 80], fill=(190, 200, 120))
    y, x = (PATCH * (at + 0.5) for at in EYE)
    draw.ellipse([x - 7, y - 7, x + 7, y + 7], fill=(250, 250, 240))
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=(5, 5, 5))
    return image


def attention_by_hand(model: torch.nn.Module, pixels: torch.Tensor, layer: int, head: int) -> np.ndarray:
    """(N, N) float64: softmax of q k^T / sqrt(K) of a head, from the weights, N of class token and patches."""
    x = model._pos_embed(model.patch_embed(pixels))
    for block in model.blocks[:layer]:
        x = block(x)
    attention = model.blocks[layer].attn
    weight, bias = (p.double().unflatten(0, (3, HEADS, -1)) for p in (attention.qkv.weight, attention.qkv.bias))
    tokens = model.blocks[layer].norm1(x)[0].double()
    q, k = (tokens @ weight[part, head].T + bias[part, head] for part in (0, 1))
    scores = q @ k.T / q.shape[1] ** 0.5
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    return (weights / weights.sum(1, keepdim=True)).numpy()


@torch.no_grad()
def test_what_head_3_of_layer_5_attends_to_from_the_patch_on_the_eye(browser, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, depth=LAYERS, num_heads=HEADS, embed_dim=WIDTH, num_classes=3
    )
    for p in model.parameters():
        p.mul_(3)  # attention that is far from even
    model.eval().pretrained_cfg |= {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0}
    head_with_an_eye().save(tmp_path / "frog.png")
    reading = look(model, [str(tmp_path / "frog.png")], out=tmp_path / "reading", noise=0)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    picture = torch.from_numpy(np.array(head_with_an_eye())).permute(2, 0, 1) / 255
    grid = SIDE // PATCH
    exact = attention_by_hand(model, ((picture - mean) / std)[None], 5, 3)[1 + EYE[0] * grid + EYE[1], 1:].reshape(grid, grid)
    assert exact.max() > 2 / grid**2  # it looks somewhere
    np.testing.assert_allclose(reading.query(0, 5, EYE, 3), exact, atol=exact.max() / 510 + 1e-5)

    with visit(browser, write([tmp_path / "reading"], tmp_path / "report.html")) as page:
        canvas = page.locator("canvas[data-pane='0']")
        choose(page, "Map", "Attention")
        choose(page, "Layer", "5")
        choose(page, "Head", "3")
        # the visitor finds the eye in the picture, the darkest place, and clicks it
        page.get_by_label("Opacity of the map").fill("0")
        place = canvas.evaluate(DARKEST)
        box = canvas.bounding_box()
        canvas.click(position={"x": place[1] * box["width"], "y": place[0] * box["height"]})
        await_query(page)
        caption = page.locator(".pane figcaption").text_content()
        assert caption.endswith(f"Attention, layer 5, head 3, from row {EYE[0] + 1}, column {EYE[1] + 1}")
        highest, row, column = canvas.evaluate(PEAK)
        assert (row, column) == np.unravel_index(exact.argmax(), exact.shape)
        assert highest == pytest.approx(exact.max(), rel=1e-3)
        values = np.array(canvas.evaluate("canvas => [...canvas.closest('.pane').shown.map.values]")).reshape(grid, grid)
        assert np.abs(values - exact).max() <= exact.max() * (1 / 510 + 1 / 126) + 1e-5
