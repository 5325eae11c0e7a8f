"""A run's page answers which photographs are wrong and which class is worst; files of older runs and of many classes do."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from report.made import write_run
from report.test_browser import FAINT, HOSTILE, cells, visit
from vitreous.base.errors import DataError
from vitreous.base.statistics import wilson
from vitreous.report.page import write

NAMES = ["cat", "dog", "newt"]
# class, predicted, probability: newt is the worst class, 1 of 4; a dog taken for a cat is the surest mistake
ANSWERS = [
    (0, 0, 0.9), (0, 0, 0.8), (0, 2, 0.55), (1, 1, 0.9), (1, 1, 0.99), (1, 0, 0.97), (1, 1, 0.7),
    (2, 2, 0.6), (2, 0, 0.5), (2, 0, 0.8), (2, 1, 0.4),
]  # fmt: skip


def picture() -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


def write_answers(run: Path, answers=ANSWERS, names=NAMES, old: bool = False, pictures: int = 3) -> Path:
    """predictions.csv and pictures of the surest mistakes; old: as runs had it that knew no names of files."""
    head = ["set", "index", "label", "predicted", "probability", *([] if old else ["file", "label_class", "predicted_class"])]
    with open(run / "predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for i, (label, predicted, p) in enumerate(answers):
            more = [] if old else [f"{names[label]}/{i:02d}.jpg", names[label], names[predicted]]
            writer.writerow(["test", i, label, predicted, p, *more])
    wrong = [i for i, (label, predicted, _) in enumerate(answers) if label != predicted]
    wrong.sort(key=lambda i: -answers[i][2])
    if not old and wrong:
        safetensors.numpy.save_file({f"test/{i}": picture() for i in wrong[:pictures]}, run / "mistakes.safetensors")
    return run


@pytest.fixture
def page_of(tmp_path):
    """`page_of(answers=..., ...)`: the page of a run with these answers."""

    def build(**options) -> Path:
        run = write_answers(write_run(tmp_path / "run", epochs=1, images=1), **options)
        return write([run], tmp_path / "run.html")

    return build


def test_which_photographs_are_wrong_and_which_class_is_worst(browser, page_of):
    low, high = (f"{100 * end:.1f}" for end in wilson(1, 4))
    with visit(browser, page_of()) as page:
        sentence = page.locator("#mistakes .sentence").text_content()
        assert sentence.startswith("54.5 % of 11 images are right [")
        assert sentence.endswith(f"5 wrong. Worst class: newt, 1 of 4 right [{low}, {high}].")
        assert cells(page, "#class-table")[0] == ["newt", f"25.0 % [{low}, {high}]", "1 of 4"]
        assert [row[:3] for row in cells(page, "#mistake-table")] == [
            ["dog/05.jpg", "dog", "cat"], ["newt/09.jpg", "newt", "cat"], ["cat/02.jpg", "cat", "newt"],
            ["newt/08.jpg", "newt", "cat"], ["newt/10.jpg", "newt", "dog"],
        ]  # fmt: skip
        shown = page.locator("#gallery img")
        assert shown.evaluate_all("all => all.map(one => [one.alt, one.naturalWidth])") == [
            ["dog/05.jpg", 32], ["newt/09.jpg", 32], ["cat/02.jpg", 32],
        ]  # fmt: skip
        assert "2 more of these mistakes are in the table alone" in page.locator("#mistakes").text_content()


def test_a_number_of_the_confusion_matrix_shows_its_mistakes(browser, page_of):
    with visit(browser, page_of()) as page:
        counts = page.locator("#confusion tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].slice(1).map(cell => Number(cell.textContent)))"
        )
        assert counts == [[2, 0, 1], [1, 3, 0], [2, 1, 1]]
        page.get_by_role("button", name="newt taken for cat: 2").click()
        assert [row[0] for row in cells(page, "#mistake-table")] == ["newt/09.jpg", "newt/08.jpg"]
        assert page.locator("#gallery img").evaluate_all("all => all.map(one => one.alt)") == ["newt/09.jpg"]
        page.get_by_role("button", name="Show those of all classes").click()
        assert len(cells(page, "#mistake-table")) == 5


def test_predictions_of_an_older_run_are_read(browser, page_of, tmp_path):
    run = write_answers(write_run(tmp_path / "run", epochs=1, images=1), old=True)
    with visit(browser, write([run], tmp_path / "numbers.html")) as page:
        assert cells(page, "#mistake-table")[0][:3] == ["image 5", "1", "0"]
        assert page.locator("#gallery").count() == 0
    (run / "config.json").write_text(json.dumps({"label_names": NAMES}))
    with visit(browser, write([run], tmp_path / "names.html")) as page:
        assert cells(page, "#mistake-table")[0][:3] == ["image 5", "dog", "cat"]


def test_a_run_without_a_mistake_says_so(browser, page_of):
    with visit(browser, page_of(answers=[(0, 0, 0.9), (1, 1, 0.8)])) as page:
        assert "100.0 % of 2 images are right" in page.locator("#mistakes .sentence").text_content()
        assert page.locator("#confusion, #mistake-table, #gallery").count() == 0


def test_a_thousand_classes_fit_a_page_and_a_phone(browser, page_of):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 8000)
    guesses = np.where(rng.random(8000) < 0.5, labels, rng.integers(0, 1000, 8000))
    answers = [(int(a), int(b), round(float(p), 4)) for a, b, p in zip(labels, guesses, rng.random(8000), strict=True)]
    answers += [(7, 9, 0.5)] * 12
    path = page_of(answers=answers, names=[f"class {k}, a name of some length" for k in range(1000)], pictures=36)
    assert path.stat().st_size < 1_500_000
    with visit(browser, path, viewport={"width": 360, "height": 740}, is_mobile=True) as page:
        assert page.evaluate("[document.documentElement.scrollWidth, visualViewport.width]") == [360, 360]
        assert page.locator("#confusion").count() == 0
        top = cells(page, "#pair-table")[0]
        assert top[:2] == ["class 7, a name of some length", "class 9, a name of some length"]
        assert int(top[2]) >= 12
        wrong = sum(a != b for a, b, _ in answers)
        assert (
            f"{wrong - 1000:,} mistakes of lower probability are not on this page" in page.locator("#mistakes").text_content()
        )
        assert page.locator("#gallery img").count() == 16
        assert page.evaluate("document.querySelectorAll('*').length") < 4000


def test_classes_of_several_labels_have_their_average_precision(browser, tmp_path):
    run = write_run(tmp_path / "run", epochs=1, images=1)
    (run / "predictions.csv").write_text("set,index,present,predicted,file,present_class,predicted_class\ntest,0,0,0 1,a,b,c\n")
    rows = ["test,0,red,8,4,0.75", "test,1,blue,8,3,0.5", "test,2,green,8,0,"]
    (run / "classes.csv").write_text("\n".join(["set,class,name,images,present,average_precision", *rows]) + "\n")
    with visit(browser, write([run], tmp_path / "run.html")) as page:
        text = page.locator("#mistakes .sentence").text_content()
        assert text == "Mean average precision: 62.5 %. Worst class: blue, 50.0 %."
        assert cells(page, "#class-table") == [
            ["blue", "8", "3", "50.0 %"], ["red", "8", "4", "75.0 %"], ["green", "8", "0", "–"]]  # fmt: skip
        assert page.locator("#confusion").count() == 0


def test_images_with_a_wrong_label_among_several_are_shown(browser, tmp_path):
    run = write_run(tmp_path / "run", epochs=1, images=1)
    facts = json.loads((run / "run.json").read_text())
    metric = {"name": "mean_average_precision", "unit": "%", "better": "higher", "label": "mean average precision"}
    (run / "run.json").write_text(json.dumps(facts | {"task": {"text": "multi_label:threshold=0.6", "metrics": [metric]}}))
    head = "set,index,present,predicted,wrong,loss,file,present_class,predicted_class,wrong_class"
    rows = [
        "test,0,0,0 1,1,0.9,a.jpg,,,",
        "test,1,0 2,0 2,,0.1,b.jpg,,,",
        "test,2,1,2,1 2,2.5,c.jpg,,,",
        "test,3,,2,,3,d.jpg,,,",
    ]
    (run / "predictions.csv").write_text("\n".join([head, *rows]) + "\n")
    rows = [f"test,{k},{name},4,{count},0.5" for k, (name, count) in enumerate((("red", 2), ("blue", 1), ("green", 1)))]
    (run / "classes.csv").write_text("\n".join(["set,class,name,images,present,average_precision", *rows]) + "\n")
    safetensors.numpy.save_file({"test/2": picture()}, run / "mistakes.safetensors")
    with visit(browser, write([run], tmp_path / "run.html")) as page:
        rule = page.locator("#wrong-rule").text_content()
        assert rule == "2 of 4 images are wrong: at least one labelled class is on the wrong side of probability 0.6."
        assert cells(page, "#mistake-table") == [
            ["c.jpg", "blue", "blue", "green", "2.5"], ["a.jpg", "red", "none", "blue", "0.9"]]  # fmt: skip
        assert page.locator("#gallery figcaption").all_text_contents() == ["misses bluesees greenloss 2.5c.jpg"]
        assert "1 more of these mistakes are in the table alone" in page.locator("#mistakes").text_content()


def test_runs_whose_attention_cannot_be_read_have_a_page(browser, tmp_path):
    runs = [write_answers(write_run(tmp_path / name, epochs=2, name=name, images=1)) for name in ("a", "b")]
    for run in runs:
        (run / "readings").rename(tmp_path / f"{run.name}-readings")
    with visit(browser, write(runs, tmp_path / "runs.html")) as page:
        assert "Worst class: newt" in page.locator("#mistakes .sentence").text_content()
        assert page.locator("#accuracy-test").count() == 1
        page.get_by_role("group", name="Run").get_by_label("b", exact=True).check(force=True)
        assert "Worst class: newt" in page.locator("#mistakes .sentence").text_content()
    (tmp_path / "a-readings").rename(runs[0] / "readings")
    with pytest.raises(DataError, match="no reading in b"):
        write(runs, tmp_path / "mixed.html")


def test_names_from_outside_are_text(browser, tmp_path):
    run = write_run(tmp_path / "run", epochs=1, images=1)
    names = [name.replace("\udcff", "") for name in HOSTILE]
    write_answers(run, answers=[(k, (k + 1) % len(names), 0.5) for k in range(len(names))], names=names)
    with visit(browser, write([run], tmp_path / "run.html")) as page:
        page.evaluate("for (const one of document.querySelectorAll('#mistakes button')) one.click()")
        assert page.evaluate("window.hit") is None
        assert page.locator("#mistakes script, #mistakes svg").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser, page_of, scheme):
    with visit(browser, page_of(), color_scheme=scheme) as page:
        assert page.evaluate(FAINT) == []


def test_loss_rate_and_gradient_are_charts(browser, tmp_path):
    run = write_run(tmp_path / "run", epochs=2, images=1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["gradients"] = {"total": 0.5 * line["epoch"], "head.weight": 1.0}
        line["loss_by_update"] = [[600 * (line["epoch"] - 1) + k, 0.001 * k] for k in range(1, 601)]
        line["tests"]["test"]["loss"] = 1.25 / line["epoch"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with visit(browser, write([run], tmp_path / "run.html")) as page:
        for chart, last in (("loss-test", "0.625"), ("learning-rate", "0.001"), ("gradient-norm", "1")):
            page.locator(f"#{chart} summary").click()
            assert cells(page, f"#{chart}")[-1] == ["2", last]
        page.locator("#loss-by-update summary").click()
        first = cells(page, "#loss-by-update")[0]
        assert (first[0], float(first[1])) == ("3", pytest.approx(0.002))  # three updates to a point, 400 points at most


def test_damaged_tables_are_named(tmp_path):
    run = write_answers(write_run(tmp_path / "run", epochs=1, images=1))
    text = (run / "predictions.csv").read_text()
    (run / "predictions.csv").write_text(text.replace("test,3,1,1", "test,3,one,1"))
    with pytest.raises(DataError, match="tables of predictions"):
        write([run], tmp_path / "run.html")
    (run / "predictions.csv").write_text(text)
    (run / "mistakes.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match="pictures of mistakes"):
        write([run], tmp_path / "run.html")
