"""The page of speeds agrees with the stored results, whatever they are; rows are stored part by part."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from vitreous.bench.timing import ratio

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import page  # noqa: E402
import speed_common  # noqa: E402


def test_the_page_agrees_with_the_stored_results():
    assert (BENCHMARKS / "speed.md").read_text() == page.page(BENCHMARKS), "run `python benchmarks/page.py`"


def test_every_stored_row_has_what_the_page_needs():
    for folder in BENCHMARKS.iterdir():
        for result in page.stored(folder).values() if folder.is_dir() else ():
            assert {"machine", "commit", "command", "device", "threads"} <= set(result)
            for row in result["rows"]:
                assert row["goal"] in ("at most", "at least")
                assert len(row["seconds"][row["ours"]]) == len(row["seconds"][row["base"]]) >= 2


def test_a_page_without_results(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text('{"rows": [{"accuracy": 1}]}')
    assert "No results are stored yet." in page.page(tmp_path)


BASE = [1.0, 1.0, 1.1, 1.1] * 5


def row(factor: float, **more) -> dict:
    seconds = {"ours": [factor * value for value in BASE], "plain": BASE}
    filled = {"claim": "A step", "cell": "small", "ours": "ours", "base": "plain", "seconds": seconds, "limit": 1.05}
    return filled | {"goal": "at most", "slack": 0.01, "reason": "", "more": {}} | more


def written(folder: Path, rows: list[dict], name: str = "result.json", device: str = "cpu", **more) -> str:
    (folder / "speed_of_it").mkdir(exist_ok=True)
    machine = {"processor": "A processor", "cores": "2", "python": "3.11", "torch": "2.15", "timm": "1.0"}
    facts = {"machine": machine, "commit": "abc1234", "command": "python run.py", "device": device, "threads": 2}
    (folder / "speed_of_it" / name).write_text(json.dumps({**facts, "rows": rows, **more}))
    return page.page(folder)


def test_what_is_met_and_what_falls_short_with_its_reason(tmp_path):
    text = written(tmp_path, [row(1.055), row(1.07, cell="large", reason="The cache is too small.")])
    assert "| small | 1.11 s | 1.05 s | 1.055 [1.055, 1.055] | 20 | at most 1.05, slack 0.01 | met |" in text
    assert "| 1.070 [1.070, 1.070] | 20 | at most 1.05, slack 0.01 | falls short |" in text
    assert "- large: falls short. The cache is too small." in text
    assert f"| geometric mean | | | {math.sqrt(1.055 * 1.07):.3f} [" in text
    assert "commit abc1234; CPU, 2 threads; A processor, 2 cores; python 3.11, torch 2.15, timm 1.0." in text
    assert "**The GPU half is open**: it was never run. `python run.py --device cuda` measures it." in text


def test_what_times_do_not_say_stands_under_their_table(tmp_path):
    text = written(tmp_path, [row(1.0), row(1.0, claim="B")], notes={"B": "Both are right."})
    assert text.index("### A step") < text.index("### B") < text.index("Both are right.")


def test_an_interval_that_reaches_beyond_the_limit_is_open(tmp_path):
    seconds = [1.0, 1.0, 1.1, 1.1] * 4 + [1.3, 1.3, 1.0, 1.0]
    text = written(tmp_path, [row(1, seconds={"ours": seconds, "plain": [1.0] * 20}, slack=0.0)])
    assert "| open |" in text
    assert "- small: open. No reason is stored." in text


def test_a_speed_up_is_turned_round(tmp_path):
    rows = [
        row(0.4, goal="at least", limit=2.0),
        row(0.6, goal="at least", limit=2.0, cell="large"),
        row(1, claim="B", limit=None),
    ]
    means = [{"claim": "A step", "limit": 2.0, "goal": "at least", "reason": "One cell."}]
    text = written(tmp_path, rows, means=means)
    assert "plain / ours (times as fast)" in text
    assert "2.500 [2.500, 2.500] | 20 | at least 2, slack 0.01 | met |" in text
    assert "1.667 [1.667, 1.667] | 20 | at least 2, slack 0.01 | falls short |" in text
    assert "| geometric mean | | | 2.041 [2.041, 2.041] | | at least 2 | met |" in text
    assert "| small | 1.05 s | 1.05 s | 1.000 [1.000, 1.000] | 20 |  |  |" in text


def test_a_gpu_half_that_was_run_is_not_open(tmp_path):
    written(tmp_path, [row(1.0)])
    text = written(tmp_path, [row(1.0)], "result-cuda.json", "NVIDIA X")
    assert "GPU half is open" not in text
    assert "### A step, NVIDIA X" in text


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "some" / "run.py")])
    return argparse.Namespace(device="cpu")


def test_rows_are_stored_part_by_part_and_not_timed_again(tmp_path, options, monkeypatch, capsys):
    monkeypatch.setattr(speed_common, "PART", 4)
    calls = []

    def build():
        calls.append("built")
        return {"ours": lambda: calls.append("ours"), "plain": lambda: None if len(calls) < 12 else stop()}

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speed_common.Results(tmp_path, options).row("A", "b", build, count=8, limit=1.1)
    stored = json.loads((tmp_path / "result.json").read_text())
    assert len(stored["rows"][0]["seconds"]["ours"]) == 4
    results = speed_common.Results(tmp_path, options)
    fine = {"ours": lambda: None, "plain": lambda: None}
    results.row("A", "b", lambda: fine, count=8, limit=1.1, reason="So it is.")
    found = results.row("A", "b", pytest.fail, count=8, limit=1.2, more={"seen": 1})
    assert {len(values) for values in found["seconds"].values()} == {8}
    assert (found["limit"], found["more"], found["ours"], found["base"]) == (1.2, {"seen": 1}, "ours", "plain")
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == [found]
    results.mean("A", limit=2.0)
    assert json.loads((tmp_path / "result.json").read_text())["means"][0]["limit"] == 2.0
    again = ratio(found["seconds"]["ours"], found["seconds"]["plain"])
    assert f"A, b: {again.median:.3f} [" in capsys.readouterr().out


def test_rounds_of_two_commits_name_both_and_of_two_machines_are_refused(tmp_path, options, monkeypatch):
    fine = {"ours": lambda: None, "plain": lambda: None}
    for number, name in enumerate(("abc1234", "def5678", "def5678"), 1):
        monkeypatch.setattr(speed_common, "commit", lambda name=name: name)
        (tmp_path / "speed_of_it").mkdir(exist_ok=True)
        found = speed_common.Results(tmp_path / "speed_of_it", options).row("A", "b", lambda: fine, count=4 * number)
    assert found["commit"] == "abc1234, def5678"
    assert "commit abc1234, def5678; CPU" in page.page(tmp_path)
    before = (tmp_path / "speed_of_it" / "result.json").read_bytes()
    monkeypatch.setattr(speed_common, "machine", lambda: {"processor": "Another"})
    with pytest.raises(SystemExit, match="from another machine, version or number of threads"):
        speed_common.Results(tmp_path / "speed_of_it", options)
    assert (tmp_path / "speed_of_it" / "result.json").read_bytes() == before


def test_facts_of_a_result(tmp_path, options):
    facts = speed_common.Results(tmp_path, options).facts
    assert facts["command"] == "python benchmarks/some/run.py"
    assert facts["device"] == "cpu"
    head = ["git", "-C", str(BENCHMARKS), "rev-parse", "--short", "HEAD"]
    assert facts["commit"].rstrip("+") == subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
