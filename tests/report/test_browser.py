"""The page in a real browser with the network off: visitors find their answers, and no name from outside can do anything."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from report.made import Made, looked_at, sigma, value, write_reading, write_run
from vitreous.report.page import write

HOSTILE = [
    "<script>window.hit=1</script>",
    "</script><script>window.hit=2</script>",
    "\"><img src=x onerror='window.hit=3'>",
    "<svg/onload=window.hit=4>.jpg",
    "<!--<script>window.hit=5",
    "javascript:window.hit=6",
    "{{7*7}}{% raw %}${window.hit=7}",
    "'-(window.hit=8)-'",
    "__proto__",
    "constructor",
    "&lt;b&gt;&amp;&#x3c;",
    "a\u2028b\u2029c",
    "\x1b[31m\x07\u202egpj.exe",
    "\udcff.jpg",
    "https://example.org/x.png",
    "]]></style><style>*{display:none}",
    "very-" + "long" * 60,
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """one.html, two.html, random.html, run.html, runs.html, hostile.html."""
    root = tmp_path_factory.mktemp("pages")
    one = write_reading(root / "one", Made(title="vit_made", images=4, notes=["A note."], queries=2, tokens=True, spectra=True))
    shift = {("effective_tokens", 1, 1): 3.0, ("mean_distance", 2, 0): -0.4}
    two = write_reading(root / "two", Made(title="vit_tuned", images=4, looker=(0, 2), shift=shift))
    random = write_reading(root / "random", Made(title="vit_random", images=2, random=True))
    runs = [
        write_run(root / name, epochs=3, name=name, images=2, best=best, spectra=True)
        for name, best in (("plain", 2), ("SVDA", 1))
    ]
    write([one], root / "one.html")
    write([one, two], root / "two.html")
    write([one, random], root / "random.html")
    write(runs[:1], root / "run.html")
    write(runs, root / "runs.html")
    return root


@contextmanager
def visit(browser, path: Path, fragment: str = "", **settings) -> Iterator:
    """The page in a fresh context without a network. In the end: nothing on the console, no other file was asked for."""
    context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | settings))
    context.set_offline(True)
    said, asked = [], []
    page = context.new_page()
    page.set_default_timeout(20000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri() + fragment)
    assert page.evaluate("document.documentElement.dataset.ready") == "yes"
    yield page
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
    context.close()


ROWS = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"


def cells(page, table: str) -> list[list[str]]:
    """The text of a table's cells, once it is there."""
    page.locator(f"{table} tbody tr").first.wait_for(state="attached")
    return page.locator(f"{table} tbody tr").evaluate_all(ROWS)


def heads(page, table: str) -> list[str]:
    page.locator(f"{table} thead th").first.wait_for(state="attached")
    return page.locator(f"{table} thead th").all_text_contents()


# --- five questions ---------------------------------------------------------------------------------------------------


def test_which_head_looks_most_at_the_object(browser, pages):
    with visit(browser, pages / "one.html") as page:
        assert page.locator("[data-finding=object] button").text_content() == "Layer 2, head 1"
        assert "0.71 [0.68, 0.76]; centre prior 0.41" in page.locator("[data-finding=object]").text_content()
        numbers = "all => all.map(one => [Number(one.textContent), one.dataset.layer, one.dataset.head])"
        shown = page.locator("#object .heat").evaluate_all(numbers)
        assert len(shown) == 4 * 3
        assert max(shown) == [0.71, "2", "1"]
        assert page.locator("#object .peak").get_attribute("aria-label") == "layer 2, head 1: 0.71, the highest"
        page.locator("#object .values > summary").last.click()
        table = "#score-table-a"
        assert cells(page, table)[0][:4] == ["Attention", "2", "1", "0.71 [0.68, 0.76]"]  # sorted by it from the start
        page.get_by_label("AUROC").check(force=True)
        assert "0.73" in page.locator("#object .sentence").text_content()


def test_which_layer_has_the_artifacts(browser, pages):
    with visit(browser, pages / "one.html") as page:
        assert page.locator("[data-finding=artifacts] button").text_content() == "Layer 3"
        assert "layer 3: 3.57 %" in page.locator("#artifacts .sentence").text_content()
        page.locator("#artifact-chart summary").click()
        share = 100 * 7 / 196
        assert cells(page, "#artifact-chart") == [["0", "0"], ["1", "0"], ["2", "0"], ["3", f"{share:.3f}"]]


def test_the_value_of_an_indicator_at_a_layer_and_head(browser, pages):
    expected = sum(value("mean_distance", 1, 2, image) for image in range(4)) / 4
    with visit(browser, pages / "one.html") as page:
        page.locator("#by-layer-attention-mean_distance summary").click()
        table = "#by-layer-attention-mean_distance"
        row = cells(page, table)[1]
        assert float(row[heads(page, table).index("head 2")]) == pytest.approx(expected, abs=1e-3)
        page.locator("#indicators > details > summary").click()
        names = heads(page, "#indicator-table-a")
        rows = cells(page, "#indicator-table-a")
        (row,) = [row for row in rows if row[:2] == ["1", "2"]]
        assert float(row[names.index("Attention distance")]) == pytest.approx(expected, abs=1e-3)
        page.locator("#indicator-table-a").get_by_role("button", name="Attention distance").click()
        column = [row[names.index("Attention distance")] for row in cells(page, "#indicator-table-a")]
        numbers = [float(text) for text in column if text != "–"]
        assert numbers == sorted(numbers, reverse=True)
        assert column[len(numbers) :] == ["–"] * 4  # what was not measured comes last
        page.get_by_label("Spectrum of the weights").first.check(force=True)
        assert page.locator("#by-layer-weight-effective_rank").count() == 1


def test_after_which_epoch_a_head_was_sharpest(browser, pages):
    with visit(browser, pages / "run.html") as page:
        page.locator("#maps").get_by_role("radio", name="1", exact=True).first.check(force=True)
        page.get_by_label("heads of layer 1").check(force=True)
        chart = "#by-epoch-attention-effective_tokens"
        page.locator(f"{chart} summary").click()
        page.locator(chart).get_by_role("button", name="head 0").click()
        page.locator(chart).get_by_role("button", name="head 0").click()
        assert heads(page, chart)[1] == "head 0"
        assert page.locator(f"{chart} th[aria-sort]").get_attribute("aria-sort") == "ascending"
        assert cells(page, chart)[0][0] == "2"
        assert page.locator("#accuracy-test figcaption").text_content() == "Accuracy, test%"


def test_what_differs_between_two_models(browser, pages):
    with visit(browser, pages / "two.html") as page:
        assert page.locator("[data-finding=change] button").text_content() == "Layer 1, head 1"
        rows = cells(page, "#changes-table")
        assert rows[0][:3] == ["Layer 1, head 1", "Effective tokens", "attention"]
        assert rows[0][5] == "+3"
        assert rows[1][:2] == ["Layer 2, head 0", "Attention distance"]
        assert rows[1][5] == "−0.4"
        assert [row[-1] for row in rows] == ["4 of 4", "0 of 4"]
        assert len(rows) == 2
        alike = page.locator("#alike .heat").evaluate_all("all => all.map(one => [Number(one.textContent), one.dataset])")
        unlike = {(place["layer"], place["head"]) for share, place in alike if share < 0.9}
        assert unlike == {("2", "1"), ("0", "2")}  # the heads that look at the object in one of the two
        assert page.locator("[data-finding=object] button").all_text_contents() == ["Layer 2, head 1", "Layer 0, head 2"]
        page.locator("#changes-table").get_by_role("button", name="Layer 1, head 1").click()
        assert "layer 1, head 1" in page.locator(".pane figcaption").first.text_content()


# --- looking ----------------------------------------------------------------------------------------------------------

# the values of the large map, [value, row, column] from low to high
VALUES = """canvas => { const map = canvas.closest('.pane').shown.map;
    const all = [...map.values].map((value, i) => [value, Math.floor(i / map.width), i % map.width]);
    return all.sort((a, b) => a[0] - b[0]); }"""
# the colours at the middle of some of its cells
PIXELS = """(canvas, places) => { const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return places.map(([, row, column]) => { const [x, y] = [column, row].map(i => Math.floor((i + 0.5) * canvas.width / 14));
        return [...all.data.slice(4 * (y * all.width + x), 4 * (y * all.width + x) + 3)]; }); }"""


def lightness(color: list[int]) -> float:
    return 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]


def test_the_map_is_bright_where_the_object_is(browser, pages):
    with visit(browser, pages / "one.html") as page:
        page.get_by_label("Clip the highest 2 %").uncheck()
        page.get_by_label("Opacity of the map").fill("100")
        canvas = page.locator("canvas[data-pane='0']")
        choose(page, "Map", "Attention")
        values = canvas.evaluate(VALUES)
        low, middle, high = map(lightness, canvas.evaluate(PIXELS, [values[0], values[150], values[-1]]))
        assert low < 30
        assert high > 200
        assert low <= middle < high
        full = canvas.evaluate("canvas => canvas.toDataURL()")
        page.get_by_label("Opacity of the map").fill("0")
        assert canvas.evaluate("canvas => canvas.toDataURL()") != full
        assert [float(text) for text in page.locator(".legend-ends span").all_text_contents() if text] == [
            pytest.approx(values[0][0], rel=1e-3), pytest.approx(values[-1][0], rel=1e-3)]  # fmt: skip


def test_a_sign_that_is_not_known_is_said(browser, pages):
    with visit(browser, pages / "one.html") as page:
        page.get_by_label("u1", exact=True).check(force=True)
        assert not page.locator(".badge").is_visible()
        ends = page.locator(".legend-ends span").all_text_contents()
        assert ends[1] == "0"
        assert ends[0] == "−" + ends[2]
        page.locator(".thumbs input").nth(2).check(force=True)
        assert "Unsigned: which side is the object is not known (confidence 0.71" in page.locator(".badge").text_content()
        assert page.locator(".legend-ends span").all_text_contents() == ["one side", "0", "other side"]


def test_artifact_tokens_and_the_object_are_marked(browser, pages):
    with visit(browser, pages / "one.html") as page:
        choose(page, "Map", "Attention")
        choose(page, "Layer", "3")
        drawn = [page.locator("canvas[data-pane='0']").evaluate("canvas => canvas.toDataURL()")]
        for name in ("Mark artifact tokens", "Outline the object", "Clip the highest 2 %"):
            page.get_by_label(name).click()
            drawn.append(page.locator("canvas[data-pane='0']").evaluate("canvas => canvas.toDataURL()"))
        assert len(set(drawn)) == 4


# where the large map is highest: [value, row, column]
PEAK = """canvas => { const map = canvas.closest('.pane').shown.map; const at = map.values.indexOf(Math.max(...map.values));
    return [map.values[at], Math.floor(at / map.width), at % map.width]; }"""


def await_query(page) -> None:
    """Wait until the large map is that of a patch; the page's policy forbids Playwright's own way."""
    for _ in range(200):
        if page.evaluate("Boolean(document.querySelector('.pane').shown.map?.query)"):
            return
        page.wait_for_timeout(20)
    raise AssertionError("the attention of the patch never came")


def click_patch(page, row: int, column: int) -> None:
    """Click the middle of a patch of 14 x 14, and wait until what it looks at is shown."""
    canvas = page.locator("canvas[data-pane='0']")
    side = canvas.evaluate("canvas => canvas.getBoundingClientRect().width") / 14
    canvas.click(position={"x": (column + 0.5) * side, "y": (row + 0.5) * side})
    await_query(page)


def choose(page, group: str, name: str) -> None:
    page.get_by_role("group", name=group, exact=True).get_by_label(name, exact=True).check(force=True)


def test_a_click_on_a_patch_shows_what_it_looks_at(browser, pages):
    with visit(browser, pages / "one.html") as page:
        canvas, note = page.locator("canvas[data-pane='0']"), page.locator(".looking-from > p")
        choose(page, "Map", "u1")
        choose(page, "Layer", "3")
        click_patch(page, 4, 9)
        assert "layer 3" in page.locator(".pane figcaption").text_content()
        assert "from row 5, column 10" in page.locator(".pane figcaption").text_content()
        assert page.locator(".controls > .about").text_content() == "What the framed patch looks at, head by head."
        choose(page, "Head", "2")
        assert canvas.evaluate(PEAK) == [pytest.approx(0.6), *looked_at((4, 9), 3, 2, (14, 14))]
        choose(page, "Layer", "2")
        choose(page, "Head", "0")
        await_query(page)
        assert canvas.evaluate(PEAK) == [pytest.approx(0.7), *looked_at((4, 9), 2, 0, (14, 14))]
        choose(page, "Layer", "1")
        assert note.text_content() == "What each patch looks at is not there for layer 1: it attends in windows."
        assert "from row" not in page.locator(".pane figcaption").text_content()
        choose(page, "Layer", "2")
        page.locator(".thumbs input").nth(3).check(force=True)
        assert note.text_content() == "What each patch looks at is there for the first 2 images, not for this one."
        page.locator(".thumbs input").nth(1).check(force=True)
        await_query(page)
        choose(page, "Looking from", "class token")
        assert "from row" not in page.locator(".pane figcaption").text_content()


def test_a_patch_is_chosen_with_the_keyboard(browser, pages):
    with visit(browser, pages / "one.html") as page:
        canvas = page.locator("canvas[data-pane='0']")
        canvas.focus()
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        await_query(page)
        assert canvas.evaluate(PEAK)[1:] == list(looked_at((1, 1), 2, 1, (14, 14)))  # layer 2, head 1 from the start
        page.keyboard.press("Escape")
        assert "from row" not in page.locator(".pane figcaption").text_content()


def test_a_look_opens_with_the_foreground_where_its_sign_is_known(browser, pages, tmp_path):
    with visit(browser, pages / "one.html") as page:
        assert page.locator("main > section").first.get_attribute("id") == "maps"
        assert "Foreground, whole model" in page.locator(".pane figcaption").text_content()
    folder = write_reading(tmp_path / "unknown", Made(images=1))
    facts = json.loads((folder / "reading.json").read_text())
    for component in facts["components"]:
        if component["name"] == "foreground":
            component["rule"] = "anything, without a calibrated direction"
    (folder / "reading.json").write_text(json.dumps(facts))
    with visit(browser, write([folder], tmp_path / "unknown.html")) as page:
        assert "Attention, layer 2, head 1" in page.locator(".pane figcaption").text_content()
    with visit(browser, pages / "run.html") as page:
        assert page.locator("main > section").first.get_attribute("id") == "glance"


def test_an_address_opens_the_view_that_it_was_taken_from(browser, pages):
    with visit(browser, pages / "one.html") as page:
        choose(page, "Map", "Attention")
        choose(page, "Layer", "3")
        choose(page, "Head", "2")
        page.locator(".thumbs input").nth(1).check(force=True)
        click_patch(page, 4, 9)
        caption = page.locator(".pane figcaption").text_content()
        address = page.get_by_role("link", name="Link to this view").get_attribute("href")
        page.wait_for_timeout(400)
        assert page.evaluate("location.hash") == address
    with visit(browser, pages / "one.html", address) as page:
        await_query(page)
        assert page.locator(".pane figcaption").text_content() == caption
        assert page.locator("canvas[data-pane='0']").evaluate(PEAK)[1:] == list(looked_at((4, 9), 3, 2, (14, 14)))
        page.evaluate("location.hash = '#maps?image=0&map=u1&layer=0&head=-1'")
        page.wait_for_timeout(50)
        assert "photo-00.jpg u1, layer 0" in page.locator(".pane figcaption").text_content()
    with visit(browser, pages / "runs.html", "#maps?image=1&map=attention&layer=1&head=0&show=1.2_0.1") as page:
        assert page.locator(".pane figcaption strong").all_text_contents() == ["SVDA, epoch 2", "plain, epoch 1"]
        assert "layer 1, head 0" in page.locator(".pane figcaption").first.text_content()


@pytest.mark.parametrize(
    "address",
    ["#maps?image=99&map=constructor&layer=-3&head=1e9&query=a.b&show=7.7_x", "#maps?", "#maps?query=99.99&slice=-4&image=-1",
     "#maps?show=0.0_0.0_0.0&layer=&head=NaN"],
)  # fmt: skip
def test_an_address_that_fits_nothing_opens_the_page_as_ever(browser, pages, address):
    with visit(browser, pages / "one.html", address) as page:
        assert "photo-00.jpg Foreground, whole model" in page.locator(".pane figcaption").text_content()


def test_a_map_is_saved_as_it_is_drawn(browser, pages):
    with visit(browser, pages / "one.html", "#maps?image=1&map=attention&layer=3&head=2&query=4.9") as page:
        await_query(page)
        drawn = page.locator("canvas[data-pane='0']").evaluate("canvas => canvas.toDataURL('image/png')")
        with page.expect_download() as download:
            page.get_by_role("button", name="Save this map").click()
        assert download.value.suggested_filename == "photo-01_attention_layer-3_head-2_from-5-10.png"
        assert Path(download.value.path()).read_bytes() == base64.b64decode(drawn.partition(",")[2])


def test_epochs_are_played(browser, pages):
    with visit(browser, pages / "run.html") as page:
        caption = page.locator(".pane figcaption strong")
        page.evaluate("""() => { const real = window.setInterval; window.setInterval = (call) => real(call, 30);
            window.seen = []; new MutationObserver(() => window.seen.push(
                document.querySelector('.pane figcaption strong').textContent))
                .observe(document.querySelector('.pane figcaption'), { childList: true }); }""")
        page.get_by_role("button", name="Play").click()
        for _ in range(100):
            if page.evaluate("document.querySelector('.play').textContent") == "Play":
                break
            page.wait_for_timeout(20)
        assert caption.text_content() == "plain, epoch 3"
        assert page.evaluate("window.seen") == [f"plain, epoch {epoch}" for epoch in range(4)]


def test_the_learned_spectrum_is_drawn_head_by_head(browser, pages):
    # bars of a small picture: [height, whether it is negative], in their order
    drawn = """button => ['a', 'b'].flatMap(look => [...button.querySelector(`.bar.${look}`).getAttribute('d')
        .matchAll(/M([\\d.]+) 40v(-[\\d.]+)/g)].map(([, x, v]) => [Number(x), -Number(v), look]))
        .sort((a, b) => a[0] - b[0]).map(([, height, look]) => [height, look === 'b'])"""
    with visit(browser, pages / "one.html") as page:
        assert page.locator("#spectra .spectrum").count() == 4 * 3
        top = max(abs(value) for head in range(3) for value in sigma(Made(), 2, head))
        expected = [[39 * abs(value) / top, value < 0] for value in sorted(sigma(Made(), 2, 1), key=abs, reverse=True)]
        shown = page.locator("[data-place='2/1']").evaluate(drawn)
        assert [negative for _, negative in shown] == [negative for _, negative in expected]
        assert [height for height, _ in shown] == pytest.approx([height for height, _ in expected], abs=0.01)
        page.locator("[data-place='3/2']").click()
        assert page.evaluate("document.activeElement.dataset.place") == "3/2"
        page.locator("#spectrum-chart summary").click()
        names, rows = heads(page, "#spectrum-chart"), cells(page, "#spectrum-chart")
        column = [float(row[names.index("head 2")].replace("−", "-")) for row in rows]
        assert column == pytest.approx(sorted(sigma(Made(), 3, 2), key=abs, reverse=True), rel=1e-3)
        choose(page, "Heights compare within", "all alike")
        height = max(height for height, _ in page.locator("[data-place='0/0']").evaluate(drawn))
        assert height == pytest.approx(39 / max(sigma(Made(), 3, 2)), abs=0.1)
    with visit(browser, pages / "run.html") as page:
        assert "plain, epoch 0" in page.locator("#spectra .key").first.text_content()  # behind what is shown
        page.locator("#spectra").get_by_label("each epoch").check(force=True)
        page.locator("#spectrum-chart summary").click()
        assert heads(page, "#spectrum-chart")[1:] == [f"plain, epoch {epoch}" for epoch in range(4)]
    with visit(browser, pages / "random.html") as page:
        page.get_by_role("button", name="Show only A").click()
        page.get_by_label("Reading A").select_option("vit_random")
        assert not page.locator("#spectra").is_visible()


def pixels(canvas, places: list[tuple[int, int]]) -> list[list[int]]:
    """The colours at the middle of some cells of 14 x 14 of a canvas."""
    file = base64.b64decode(canvas.evaluate("canvas => canvas.toDataURL()").partition(",")[2])
    image = Image.open(io.BytesIO(file)).convert("RGB")
    step = image.width / 14
    return [list(image.getpixel((int((column + 0.5) * step), int((row + 0.5) * step)))) for row, column in places]


def test_merged_and_dropped_tokens_are_drawn(browser, pages):
    with visit(browser, pages / "one.html", "#maps?image=0&map=attention&layer=3&head=1") as page:
        canvas, fact = page.locator("canvas[data-pane='0']"), page.locator(".image-facts")
        page.get_by_label("Mark artifact tokens").uncheck()
        assert f"{13 * 14 - 3} tokens for 196 patches, one of 4 patches, 14 dropped" in fact.text_content()
        assert page.locator(".tile", has_text=f"layer 2: {13 * 14 - 3}").count() == 1
        places = [(0, 3), (2, 3), (4, 4)]
        dropped, whole, merged = pixels(canvas, places)
        page.get_by_label("Draw merged and dropped tokens").uncheck()
        before = pixels(canvas, places)
        assert lightness(dropped) < 0.4 * lightness(before[0])
        assert whole == before[1]
        assert merged != before[2]
        canvas.focus()
        for key in ("ArrowRight", *["ArrowDown"] * 4, *["ArrowRight"] * 4):
            page.keyboard.press(key)
        assert page.locator(".pane > .readout").text_content().endswith(", one token with 3 other patches")
        choose(page, "Layer", "1")
        assert "tokens for" not in fact.text_content()
    with visit(browser, pages / "run.html") as page:
        assert not page.get_by_label("Draw merged and dropped tokens").is_visible()


def test_readings_without_queries_say_how_to_get_them(browser, pages):
    with visit(browser, pages / "random.html") as page:  # the one has them, the other not
        page.locator("canvas[data-pane='0']").click()
        note = page.locator(".looking-from > p").text_content()
        assert note.startswith("A: Click another patch")
        assert note.endswith("B: What each patch looks at is not in this reading (vitreous look --query-budget).")


def test_alarms_of_training_are_findings(browser, tmp_path):
    text = "rank collapse in layer 1: <img src=x onerror=window.hit=9>"
    one = {"alarm": "rank collapse", "layer": 1, "value": 0.01, "before": 0.8, "text": text}
    run = write_run(tmp_path / "hot", epochs=3, images=2, alarms={2: [one | {"layer": 0}, one]})
    write([run], tmp_path / "hot.html")
    with visit(browser, tmp_path / "hot.html") as page:
        finding = page.locator("[data-finding=alarms]")
        assert finding.locator("button").text_content() == "Rank collapse, layer 1"
        assert f"{text}, after epoch 2; 2 alarms by now" in finding.text_content()
        page.get_by_label("Epoch of hot").fill("1")
        assert "None by this epoch." in page.locator("[data-finding=alarms]").text_content()


def test_runs_without_alarms_say_nothing_of_them(browser, pages):
    with visit(browser, pages / "runs.html") as page:
        assert page.locator("[data-finding=change]").count() == 1
        assert page.locator("[data-finding=alarms]").count() == 0


def test_epochs_are_scrubbed_and_runs_stand_side_by_side(browser, pages):
    with visit(browser, pages / "runs.html") as page:
        assert page.locator(".pane figcaption strong").all_text_contents() == ["plain, epoch 3", "SVDA, epoch 3"]
        page.get_by_role("button", name="Show only A").click()
        page.get_by_label("Epoch of plain").fill("1")
        assert page.locator(".pane figcaption strong").all_text_contents() == ["plain, epoch 1"]
        page.get_by_role("button", name="Compare side by side").click()
        assert page.locator(".pane figcaption strong").all_text_contents() == ["plain, epoch 1", "SVDA, epoch 3"]
        page.get_by_label("Reading B").select_option("plain")
        page.get_by_role("button", name="One epoch back").last.click()
        assert page.locator(".pane figcaption strong").all_text_contents() == ["plain, epoch 1", "plain, epoch 2"]
        assert [row[0] for row in cells(page, "#runs-table")] == ["plain", "SVDA"]
        assert page.locator("#changes").is_visible()
        page.get_by_role("button", name="Show only A").click()
        assert not page.locator("#changes").is_visible()


def test_random_weights_are_stamped_on_every_view(browser, pages):
    with visit(browser, pages / "random.html") as page:
        stamp = page.locator("body > .stamp")
        assert stamp.text_content() == "B: random weights: these maps say nothing about a trained model"
        assert [one.is_visible() for one in page.locator(".pane > .stamp").all()] == [False, True]
        for name in ("maps", "indicators", "facts"):
            page.locator(f"#{name}").scroll_into_view_if_needed()
            assert stamp.evaluate("node => node.getBoundingClientRect().top") == 0
        page.get_by_role("button", name="Show only A").click()
        assert not stamp.is_visible()
    with visit(browser, pages / "one.html") as page:
        assert page.locator("body > .stamp").count() == 0


@pytest.mark.parametrize(
    ("made", "components"),
    [
        (Made(images=0, masks=False, curves=False), None),
        (Made(images=2, masks=False, curves=False), []),
        (Made(images=2, grid=(7, 20), heads=16, layers=24, looker=(20, 13)), None),
        (Made(images=1, heads=1, layers=1, looker=(0, 0), artifacts=0), None),
    ],
    ids=["no images", "no maps", "wide and deep", "one of each"],
)
def test_unusual_readings_are_shown_without_a_word_on_the_console(browser, tmp_path, made, components):
    folder = write_reading(tmp_path / "reading", made)
    if components is not None:
        facts = json.loads((folder / "reading.json").read_text())
        (folder / "reading.json").write_text(json.dumps(facts | {"components": components}))
    with visit(browser, write([folder], tmp_path / "r.html")) as page:
        page.evaluate("for (const box of document.querySelectorAll('input:enabled, summary, .tile, th button')) box.click()")
        page.wait_for_timeout(100)
        assert len(cells(page, "#layer-table-a")) == made.layers
        if components is None and made.images:
            assert "layer 20, head 13" in page.content() or made.layers == 1


# --- keyboard, phone, colours, print ----------------------------------------------------------------------------------


def tab_to(page, test: str, limit: int = 80) -> None:
    """Press Tab until the element in focus passes a test; each one on the way shows that it is in focus."""
    for _ in range(limit):
        page.keyboard.press("Tab")
        outline = """node => [node, node.nextElementSibling].filter(Boolean).some(one =>
            parseFloat(getComputedStyle(one).outlineWidth) >= 2 && getComputedStyle(one).outlineStyle !== 'none')"""
        focused = page.evaluate_handle("document.activeElement")
        assert focused.evaluate(outline), focused.evaluate("node => node.outerHTML.slice(0, 200)")
        if focused.evaluate(f"node => {test}"):
            return
    raise AssertionError(f"never came to {test}")


def test_everything_can_be_done_with_the_keyboard(browser, pages):
    with visit(browser, pages / "one.html") as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "To the maps"
        tab_to(page, "node.closest('.thumbs')")
        page.keyboard.press("ArrowRight")
        assert "photo-01.jpg" in page.locator(".pane figcaption").text_content()
        tab_to(page, "node.matches('canvas[data-pane]')")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        read = page.locator(".pane > .readout").text_content()
        shown = page.locator("canvas[data-pane]").evaluate("canvas => canvas.closest('.pane').shown.map.values[1 * 14 + 1]")
        assert re.fullmatch(r"Row 2, column 2: −?[\d.]+", read)
        assert float(read.split(": ")[1].replace("−", "-")) == pytest.approx(shown, rel=1e-3)
        tab_to(page, "node.closest('fieldset')?.textContent.startsWith('Map')")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")  # foreground, rollout, attention
        tab_to(page, "node.closest('fieldset')?.textContent.startsWith('Layer')")
        page.keyboard.press("ArrowRight")
        assert "layer 3, head 1" in page.locator(".pane figcaption").text_content()
        tab_to(page, "node.getAttribute('aria-label') === 'Opacity of the map, percent'")
        page.keyboard.press("ArrowLeft")
        assert page.get_by_label("Opacity of the map").input_value() == "60"
        tab_to(page, "node.closest('.tiles')")
        page.keyboard.press("Enter")
        assert "head 0" in page.locator(".pane figcaption").text_content()
        assert page.evaluate("document.activeElement.className") == "tile"
        tab_to(page, "node.matches('#by-layer-attention-effective_tokens svg')")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        said = page.locator("#by-layer-attention-effective_tokens .readout").text_content()
        assert said == "Layer 1, mean of heads: 1.11 tokens"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        assert "layer 1, head 2" in page.locator(".pane figcaption").text_content()
        tab_to(page, "node.matches('#layer-table-a .sort')")
        page.keyboard.press("Enter")
        assert page.locator("#layer-table-a th").first.get_attribute("aria-sort") == "descending"
        assert [row[0] for row in cells(page, "#layer-table-a")] == ["3", "2", "1", "0"]


def test_names_for_screen_readers(browser, pages):
    unnamed = """() => [...document.querySelectorAll('input, button, select, [tabindex]')].filter(node =>
        !(node.ariaLabel || (node.closest('label') || node).textContent.trim())).map(node => node.outerHTML)"""
    with visit(browser, pages / "runs.html") as page:
        assert page.evaluate(unnamed) == []
        assert page.locator("figure.chart > svg").count() == page.locator(".chart summary").count() > 0
        assert page.evaluate("[...document.querySelectorAll('table')].filter(t => !t.caption).length") == 0
        assert page.locator("h1").count() == 1
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["one", "two", "runs", "random"])
def test_a_phone_needs_no_sideways_scrolling(browser, pages, name):
    with visit(browser, pages / f"{name}.html", viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as page:
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        page.wait_for_timeout(100)
        wide = """() => [...document.querySelectorAll('main *, header *')].filter(node =>
            !node.closest('.scroll, .thumbs, .unseen') && node.getBoundingClientRect().right > innerWidth + 1)
            .map(node => node.outerHTML.slice(0, 120))"""
        assert page.evaluate(wide) == []
        assert page.evaluate("[document.documentElement.scrollWidth, visualViewport.width]") == [360, 360]


# the text whose contrast to what is behind it is below 4.5 (WCAG AA), as [contrast, text]
FAINT = """() => {
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const ground = node => { for (let at = node; at; at = at.parentElement) {
    const c = parse(getComputedStyle(at).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (node.closest('script, fieldset:disabled, .unseen')) continue;
    const style = getComputedStyle(node);
    const color = parse(node.closest('svg') ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(color), light(ground(node.closest('svg')?.parentElement || node))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found.push([contrast, walker.currentNode.data, style.color]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, pages, scheme):
    grounds = {}
    for name in ("random", "runs"):
        with visit(browser, pages / f"{name}.html", color_scheme=scheme) as page:
            page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
            assert page.evaluate(FAINT) == []
            grounds["system"] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            other = "light" if scheme == "dark" else "dark"
            page.locator("#theme").get_by_label(other).check(force=True)
            assert page.evaluate(FAINT) == []
            grounds["chosen"] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds["system"] != grounds["chosen"]


def test_reduced_motion_and_print(browser, pages):
    with visit(browser, pages / "one.html", reduced_motion="reduce") as page:
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()
        assert page.locator("canvas[data-pane]").is_visible()
        assert len(page.pdf()) > 10_000


# --- names from outside -----------------------------------------------------------------------------------------------


def hostile_folder(root: Path) -> Path:
    """A reading in which every text that comes from outside is one of HOSTILE."""
    made = Made(title=HOSTILE[0], images=len(HOSTILE), layers=len(HOSTILE), names=HOSTILE, labels=HOSTILE[::-1], notes=HOSTILE)
    folder = write_reading(root / "hostile", made)
    facts = json.loads((folder / "reading.json").read_text())
    facts["model"] = {"name": HOSTILE[1], "class": HOSTILE[2], "parameters": 1, "weights": HOSTILE[3], "mechanisms": HOSTILE}
    facts["settings"] = {text: text for text in HOSTILE}
    facts["versions"] = {text: text for text in HOSTILE}
    facts["refused"] = facts["skipped"] = [{"name": text, "reason": text} for text in HOSTILE]
    for layer, text in zip(facts["layers"], HOSTILE, strict=True):
        layer |= {"name": text, "kind": text, "route": text, "verified": text, "note": text}
    for component in facts["components"]:
        component |= {"about": HOSTILE[2], "rule": HOSTILE[1]}
    (folder / "reading.json").write_text(json.dumps(facts))
    table = json.loads((folder / "table.json").read_text())["columns"]
    table["source"] = [text if text == "attention" else HOSTILE[2] for text in table["source"]]
    for text in HOSTILE:
        table[text] = table["angular_alignment"]
    (folder / "table.json").write_text(json.dumps({"columns": table}))
    lines = (folder / "summary.csv").read_text().replace("pointing", '"' + HOSTILE[2].replace('"', '""') + '"')
    lines = lines.replace("iou_best", "__proto__").replace("iou_otsu", "<svg/onload=window.hit=9>")
    (folder / "summary.csv").write_text(lines)
    curves = json.loads((folder / "curves.json").read_text())
    curves[0]["component"] = HOSTILE[4]
    (folder / "curves.json").write_text(json.dumps(curves))
    return folder


def test_no_name_can_do_anything(browser, tmp_path):
    folder = hostile_folder(tmp_path)
    out = write([folder, folder], tmp_path / "hostile.html")
    with visit(browser, out, fragment="#<img src=x onerror=window.hit=10>") as page:
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        page.evaluate("""for (const field of document.querySelectorAll('fieldset:enabled'))
            [...field.querySelectorAll('input')].slice(-2).forEach(box => box.click())""")
        page.evaluate("for (const box of document.querySelectorAll('.thumbs input, #changes-table button')) box.click()")
        page.wait_for_timeout(100)
        assert page.evaluate("window.hit") is None
        assert page.locator("img").count() == len(HOSTILE)  # the thumbnails and nothing else
        assert page.locator("script, style").count() == 3
        assert page.evaluate("({}).polluted") is None
        shown = page.locator(".thumb-name").all_text_contents()
        for text, name in zip(HOSTILE, shown, strict=True):
            if text.isascii() and text.isprintable():
                assert name == text
        assert shown[12] == "\\x1b[31m\\x07\\u202egpj.exe"
        assert shown[13] == "\\udcff.jpg"
        assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_a_run_of_any_name_is_shown_as_it_is(browser, tmp_path):
    names = ["<b>bold<b>", "__proto__", "'\"&"]
    runs = [write_run(tmp_path / name, epochs=1, name=name, images=1, layers=3) for name in names]
    with visit(browser, write(runs, tmp_path / "r.html")) as page:
        assert [row[0] for row in cells(page, "#runs-table")] == names
        assert page.locator("h1").text_content() == "<b>bold<b>, __proto__ and '\"&"
        assert page.locator("b").count() == 0
