"""The page as a file: one, self-contained, the same for the same folders, small, and clear about folders that are not whole."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from report.made import MEASURES, Made, value, write_reading, write_run
from vitreous.base.errors import DataError
from vitreous.report import page
from vitreous.report.page import write


class Parts(html.parser.HTMLParser):
    """Elements with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self.inside = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = "data" if tag == "script" and dict(attrs).get("type") else tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        self.texts[self.inside] = self.texts.get(self.inside, "") + data

    def data(self) -> dict:
        return json.loads(self.texts["data"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two readings and three runs."""
    root = tmp_path_factory.mktemp("folders")
    write_reading(root / "a", Made(title="first", notes=["a note"]))
    write_reading(root / "b", Made(title="second", looker=(1, 0)))
    for name in ("plain", "SVDA", "SVD-ViT"):
        write_run(root / name, epochs=2, name=name)
    return root


def read(path: Path) -> Parts:
    return Parts(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("names", "sources", "readings"),
    [
        (["a"], 1, 1),
        (["a", "b"], 2, 1),
        (["plain"], 1, 3),
        (["plain", "SVDA", "SVD-ViT"], 3, 3),
        (["plain/readings/epoch-001"], 1, 1),
    ],
)
def test_every_kind_of_folder_makes_one_page(folder, tmp_path, names, sources, readings):
    out = write([folder / name for name in names], tmp_path / "new" / "report.html")
    assert out == tmp_path / "new" / "report.html"
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    data = read(out).data()
    assert [len(source["readings"]) for source in data["sources"]] == [readings] * sources


def test_the_numbers_of_the_page_are_those_of_the_folder(folder, tmp_path):
    reading = read(write([folder / "a"], tmp_path / "r.html")).data()["sources"][0]["readings"][0]
    columns = reading["table"]["columns"]
    rows = {tuple(row[:4]): dict(zip(columns, row[4:], strict=True)) for row in reading["table"]["rows"]}
    of_head = [value("mean_distance", 1, 2, image) for image in range(6)]
    assert rows["attention", "token", 1, 2]["mean_distance"][0] == pytest.approx(sum(of_head) / 6, rel=1e-4)
    assert rows["attention", "token", 1, 2]["mean_distance"][2] == 6
    learned = pytest.approx(value("effective_rank", 3, 0, -1), rel=1e-4)
    assert rows["weight", "token", 3, 0]["effective_rank"] == [learned, None, 0]
    assert rows["attention", "token", 2, -1]["rank_collapse"] is not None
    assert rows["attention", "token", 2, -1]["angular_alignment"] is None
    single = dict(zip(columns, reading["each"]["values"]["attention/token/1/2/4"], strict=True))
    assert single["mean_distance"] == pytest.approx(value("mean_distance", 1, 2, 4), rel=1e-3)
    assert set(columns) == set(MEASURES)
    assert reading["artifacts"] == [[0, 0], [1, 0], [2, 0], [3, pytest.approx(100 * 7 / 196, rel=1e-3)]]
    assert ["attention", 2, 1, "energy_inside", 0.71, 0.68, 0.76, 6] in reading["summary"]
    assert ["centre", -1, -1, "energy_inside", 0.41, 0.38, 0.46, 6] in reading["summary"]
    assert reading["notes"] == ["a note"]


def test_a_strict_policy_names_the_only_script_and_style(folder, tmp_path):
    parts = read(write([folder / "a"], tmp_path / "r.html"))
    policy = next(a["content"] for tag, a in parts.tags if tag == "meta" and "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for rule, tag in (("script-src", "script"), ("style-src", "style")):
        assert sum(name == tag and not attributes for name, attributes in parts.tags) == 1
        digest = hashlib.sha256(parts.texts[tag].encode()).digest()
        assert rules[rule] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}


def test_nothing_is_loaded_and_nothing_inline_could_run(folder, tmp_path):
    out = write([folder / "a", folder / "b"], tmp_path / "r.html")
    parts = read(out)
    for tag, attributes in parts.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    text = re.sub(r"http://www\.w3\.org/2000/svg", "", out.read_text())
    assert not re.search(r"https?://|//\w+\.\w+/|@import|url\(", text)
    dangers = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "fetch(", "XMLHttp")
    for danger in dangers:
        assert danger not in parts.texts["script"]


AGAIN = """
import sys, types
from pathlib import Path
package = sys.modules["vitreous"] = types.ModuleType("vitreous")  # the report alone, without what the package imports
package.__path__ = [sys.argv[3]]
from vitreous.report.page import write
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
write([folder / "a", folder / "b"], out / "readings.html")
write([folder / "plain", folder / "SVDA"], out / "runs.html")
assert "torch" not in sys.modules
"""


def test_equal_folders_give_equal_bytes(folder, tmp_path):
    """Whatever the hash seed, the locale, the time zone and the place of the folders; and without any model code."""
    shutil.copytree(folder, tmp_path / "elsewhere")
    first = [write([folder / "a", folder / "b"], tmp_path / "readings.html")]
    first.append(write([folder / "plain", folder / "SVDA"], tmp_path / "runs.html"))
    for seed, zone, language in (("1", "Asia/Tokyo", "C"), ("77", "UTC", "C.UTF-8")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": language}
        package = str(Path(page.__file__).parents[1])
        command = [sys.executable, "-c", AGAIN, str(tmp_path / "elsewhere"), str(tmp_path / seed), package]
        subprocess.run(command, env=environment, check=True)
        for one in first:
            assert (tmp_path / seed / one.name).read_bytes() == one.read_bytes()


def test_64_images_of_a_large_model_fit_in_15_megabytes(tmp_path):
    extra = ("rollout", "u1", "u2", "u3", "k1", "k2", "artifacts")
    write_reading(tmp_path / "b", Made(title="vit_base_patch16_224", images=70, layers=12, heads=12, extra=extra))
    out = write([tmp_path / "b"], tmp_path / "r.html")
    reading = read(out).data()["sources"][0]["readings"][0]
    assert out.stat().st_size <= 15e6
    assert (reading["shown"], reading["count"], len(reading["images"])) == (64, 70, 64)
    assert len(reading["maps"]) == 12 * 8 + 1
    assert all(row[7] == 70 for row in reading["summary"])  # numbers are of all images
    two = write([tmp_path / "b", tmp_path / "b"], tmp_path / "two.html")
    assert two.stat().st_size <= 15e6


def test_the_limit_lowers_the_number_of_images(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 300_000)
    out = write([folder / "a"], tmp_path / "r.html")
    assert out.stat().st_size <= 300_000
    assert 1 <= read(out).data()["sources"][0]["readings"][0]["shown"] < 6


def test_a_picture_goes_in_once(folder, tmp_path):
    data = read(write([folder / "plain", folder / "SVDA"], tmp_path / "r.html")).data()
    assert len(data["pictures"]) == len(set(data["pictures"])) == 8  # four pictures and four masks, of six readings


def test_the_last_image_lies_in_another_part(tmp_path):
    write_reading(tmp_path / "a", Made(images=5, chunk=2))
    reading = read(write([tmp_path / "a"], tmp_path / "r.html")).data()["sources"][0]["readings"][0]
    assert [image["name"] for image in reading["images"]] == [f"photo-0{i}.jpg" for i in range(5)]
    assert len({image["picture"] for image in reading["images"]}) == 5


def test_random_weights_are_stamped(folder, tmp_path):
    write_reading(tmp_path / "random", Made(random=True))
    said = "Random weights: these maps say nothing about a trained model"
    assert said in write([tmp_path / "random"], tmp_path / "r.html").read_text().split("<script")[0]
    assert said not in write([folder / "a"], tmp_path / "r.html").read_text().split("<script")[0]


def test_a_reading_without_masks_images_or_curves_makes_a_page(tmp_path):
    write_reading(tmp_path / "bare", Made(masks=False, curves=False))
    reading = read(write([tmp_path / "bare"], tmp_path / "r.html")).data()["sources"][0]["readings"][0]
    assert (reading["scores"], reading["summary"], reading["curves"]) == (None, [], [])
    write_reading(tmp_path / "none", Made(images=0, masks=False, curves=False))
    assert read(write([tmp_path / "none"], tmp_path / "r.html")).data()["sources"][0]["readings"][0]["shown"] == 0


# --- folders that are not whole ---------------------------------------------------------------------------------------


def spoil_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_no_facts(folder: Path) -> None:
    (folder / "reading.json").unlink()


def spoil_half_facts(folder: Path) -> None:
    text = (folder / "reading.json").read_text()
    (folder / "reading.json").write_text(text[: len(text) // 2])


def spoil_list(folder: Path) -> None:
    (folder / "reading.json").write_text("[1]")


def spoil_format(folder: Path) -> None:
    facts = json.loads((folder / "reading.json").read_text())
    (folder / "reading.json").write_text(json.dumps(facts | {"format": 9}))


def spoil_part(folder: Path) -> None:
    part = folder / "parts" / "00000.safetensors"
    part.write_bytes(part.read_bytes()[:2000])


def spoil_missing_part(folder: Path) -> None:
    (folder / "parts" / "00001.safetensors").unlink()


def spoil_no_table(folder: Path) -> None:
    (folder / "table.json").unlink()


def spoil_table_columns(folder: Path) -> None:
    (folder / "table.json").write_text('{"columns": {"layer": [1, 2], "head": [1]}}')


def spoil_table_words(folder: Path) -> None:
    table = json.loads((folder / "table.json").read_text())
    table["columns"]["angular_alignment"][0] = "much"
    (folder / "table.json").write_text(json.dumps(table))


def spoil_summary(folder: Path) -> None:
    text = (folder / "summary.csv").read_text()
    (folder / "summary.csv").write_text(text[: text.rindex(",")])


def spoil_scores(folder: Path) -> None:
    (folder / "scores.csv").write_text("image,component\n0,attention\n")


def spoil_curves(folder: Path) -> None:
    (folder / "curves.json").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_nothing_there, "no such folder"),
        (spoil_no_facts, "neither reading.json nor run.json"),
        (spoil_half_facts, "no JSON"),
        (spoil_list, "Found a list in"),
        (spoil_format, "Found format 9"),
        (spoil_part, "00000.safetensors"),
        (spoil_missing_part, "4 of 6 images"),
        (spoil_no_table, "table.json"),
        (spoil_table_columns, "unlike length"),
        (spoil_table_words, "does not fit format 3"),
        (spoil_summary, "unlike length"),
        (spoil_scores, "does not fit format 3"),
        (spoil_curves, "curves.json"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_broken_reading_is_refused_and_the_old_page_stays(tmp_path, spoil, said):
    folder, out = write_reading(tmp_path / "a", Made(chunk=4)), tmp_path / "report.html"
    out.write_text("the old page")
    spoil(folder)
    with pytest.raises(DataError) as error:
        write([folder], out)
    assert said in str(error.value)
    assert "Expected" in str(error.value)
    assert out.read_text() == "the old page"
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_without_readings_half_metrics_and_mixed_folders_are_refused(folder, tmp_path):
    run = write_run(tmp_path / "run", epochs=1)
    (run / "metrics.jsonl").write_text('{"epoch": 1, "los')
    with pytest.raises(DataError, match="line 1 is no JSON"):
        write([run], tmp_path / "r.html")
    shutil.rmtree(run / "readings")
    with pytest.raises(DataError, match="no reading of any epoch"):
        write([run], tmp_path / "r.html")
    with pytest.raises(DataError, match="readings and runs together"):
        write([folder / "a", folder / "plain"], tmp_path / "r.html")
    with pytest.raises(DataError, match="Found no folder"):
        write([], tmp_path / "r.html")


def test_a_run_that_diverged_has_a_page(tmp_path):
    run = write_run(tmp_path / "run", epochs=1)
    (run / "metrics.jsonl").write_text('{"epoch": 1, "losses": {"total": NaN}, "tests": {"test": {"accuracy": Infinity}}}\n')
    (metrics,) = read(write([run], tmp_path / "r.html")).data()["sources"][0]["metrics"]
    assert metrics == {"epoch": 1, "losses": {"total": None}, "tests": {"test": {"accuracy": None}}}
    (run / "metrics.jsonl").write_text("")
    assert read(write([run], tmp_path / "r.html")).data()["sources"][0]["metrics"] == []


def test_equal_names_are_told_apart_by_their_folders(tmp_path):
    runs = [write_run(tmp_path / at / "plain", epochs=1, images=1) for at in ("one", "two")]
    readings = [write_reading(tmp_path / name, Made(images=1)) for name in ("a", "b")]
    for folders, names in (
        (runs, ["plain (one/plain)", "plain (two/plain)"]),
        (readings, ["vit_made (a)", "vit_made (b)"]),
        ([runs[0], runs[0]], ["plain (plain)"] * 2),
    ):
        data = read(write(folders, tmp_path / "r.html")).data()
        assert [source["name"] for source in data["sources"]] == names


def test_an_epoch_that_is_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", epochs=2)
    (run / "readings" / "epoch-002" / "reading.json").unlink()
    (run / "readings" / "epoch-000.csv").write_text("epoch\n")
    assert read(write([run], tmp_path / "r.html")).data()["sources"][0]["epochs"] == [0, 1]


def test_many_epochs_are_thinned_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("vitreous.report.folders.EPOCHS", 3)
    run = write_run(tmp_path / "run", epochs=6, images=1)
    source = read(write([run], tmp_path / "r.html")).data()["sources"][0]
    assert (source["epochs"], source["leftOut"]) == ([0, 3, 6], 4)
