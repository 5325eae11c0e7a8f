"""The page of a bench: what it shows, in a browser and without one."""

from __future__ import annotations

import json
import re

import pytest

from vitreous.base.errors import DataError
from vitreous.report.speed import write

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e"


def made(folder, name: str = "ours") -> dict:
    place = {"mode": "inference", "batch": 4, "image_size": 224}
    row = {
        **place, "arm": name, "failed": None, "peak_mib": 31.4, "parameters": 1234567, "operations": 2_500_000_000,
        "by_kind": {"mm": 2_500_000_000}, "uncounted": [], "latency": {"median": 0.0125, "low": 0.012, "high": 0.013},
        "images_per_second": 320.0, "seconds": [0.0125] * 4,
    }  # fmt: skip
    failed = {**place, "arm": "third", "failed": "out of memory"}
    ratio = {**place, "ours": name, "base": "plain", "median": 1.021, "low": 1.004, "high": 1.04, "rounds": 60}
    found = {
        "format": 1, "name": name, "command": "vitreous bench ours",
        "settings": {"rounds": 60, "dtype": "fp32", "compile": False},
        "machine": {"cores": 2}, "versions": {"torch": "2.15.0"}, "rows": [row, row | {"arm": "plain"}, failed],
        "ratios": [ratio | {"verdict": "no difference"}, ratio | {"base": "other", "verdict": "slower"}],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(found))
    return found


def test_the_same_file_gives_the_same_page_without_the_seconds(tmp_path):
    made(tmp_path)
    first = write(tmp_path, tmp_path / "a.html").read_bytes()
    assert write(tmp_path, tmp_path / "b.html").read_bytes() == first
    assert b"seconds" not in first.split(b'id="data">')[1].split(b"</script>")[0]
    assert b"speed report" in first


def test_names_do_no_harm(tmp_path):
    made(tmp_path, HOSTILE)
    page = write(tmp_path, tmp_path / "a.html").read_text()
    assert "<img" not in page
    assert "\u202e" not in page
    assert len(re.findall("<script", page)) == 2


@pytest.mark.parametrize("text", ["[]", '{"format": 2}', '{"format": 1, "name": "a"}', "no json"])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(DataError):
        write(tmp_path, tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_what_the_page_shows(tmp_path, browser):
    made(tmp_path)
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(write(tmp_path, tmp_path / "report.html").as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    rows = page.locator(".forest li")
    assert rows.count() == 2
    assert rows.nth(0).inner_text().split("\n") == ["inference, batch 4, 224 px", "1.021 [1.004, 1.040]", "no difference"]
    assert rows.nth(1).locator(".verdict").inner_text() == "slower"
    box = {name: rows.nth(1).locator(f".strip .{name}").bounding_box() for name in ("one", "middle", "span")}
    assert box["one"]["x"] < box["span"]["x"] < box["middle"]["x"] < box["span"]["x"] + box["span"]["width"]
    text = page.locator("#numbers").inner_text()
    assert "12 to 13" in text
    assert "1,234,567" in text
    assert "out of memory" in text
    assert "slower in 1" in page.locator("#lead").inner_text()
    assert "2.15.0" in page.locator("#run").inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the numbers"
    page.get_by_label("dark").check(force=True)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert errors == []
    page.close()
