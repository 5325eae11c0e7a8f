"""Readings of format 1: what is said of them is complete, and agrees with what probes say of the same names today."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vitreous.lens.evaluation import BASELINES, SCORES
from vitreous.lens.look import CHUNK
from vitreous.lens.probe import chosen, records
from vitreous.lens.reading import Writer, read, read_part
from vitreous.report import format_1

# Made by the code before format 2 (commit 14e1cc8):
#     look(vit(depth=1, img_size=(8, 12)), Cutouts(2, size=16, seed=2), out="format_1")
# with `vit` of tests/lens/explicit.py and torch 2.15.
OLD = Path(__file__).parent / "format_1"


def test_an_old_reading_opens_with_its_numbers_words_and_maps():
    reading, table = read(OLD), json.loads((OLD / "table.json").read_text())["columns"]
    found = reading.table()
    assert list(found) == list(table)
    for name, column in found.items():
        np.testing.assert_array_equal(column, [np.nan if value is None else value for value in table[name]])
    assert set(found["source"]) == {"attention", "weight", "score"}
    assert reading.maps.heads("attention", 0).shape == (2, 2, 2, 3)
    assert reading.maps["attention", 0, 1].shape == reading.maps["u1", 0].shape == (2, 2, 3)
    assert set(reading.scores()["component"]) >= {"attention", "u1", "foreground", "centre"}
    assert reading.measures["attention_entropy"]["unit"] == "nats"
    lines = (OLD / "scores.csv").read_text().splitlines()
    assert lines[0].split(",") == list(reading.scores())


def test_an_old_reading_can_be_saved_and_is_then_of_format_2(tmp_path):
    read(OLD).save(tmp_path / "new")
    assert json.loads((tmp_path / "new/reading.json").read_text())["format"] == 2
    for name in ("table.csv", "table.json", "scores.csv", "summary.csv"):
        assert (tmp_path / "new" / name).read_bytes() == (OLD / name).read_bytes()
    part = read_part(tmp_path / "new/parts/00000.safetensors")
    assert part.tables["rows"]["words"]["source"] == ["attention", "learned", "weight", "score"]


def test_parts_of_an_interrupted_old_look_are_gone_on_from(tmp_path):
    (tmp_path / "parts").mkdir()
    for path in (OLD / "parts").iterdir():
        (tmp_path / "parts" / path.name).write_bytes(path.read_bytes())
    writer = Writer(tmp_path, (OLD / "parts/fingerprint").read_text())
    findings = read_part(writer.path(0)).findings
    assert (writer.done, CHUNK) == ({0}, 16)
    assert findings["choices"] == {"u/0": "unit", "k/0": "unit"}
    assert findings["details"]["k1/0"] == {"rule": "attention", "rows": "unit"}
    assert [layer["name"] for layer in findings["layers"]] == ["blocks.0.attn"]


def test_what_it_says_of_a_name_is_what_is_said_of_it_today():
    """Until a probe changes what it measures; then the name's meaning in format 1 stays here alone."""
    upgraded = format_1.upgraded(json.loads((OLD / "reading.json").read_text()))
    probes = chosen(None)
    today = {name: asdict(record) for name, record in records(probes, "measures").items()}
    for record in upgraded["measures"]:
        explained = {"explains"} if record["name"].endswith("_paper") else set()
        assert {key for key, value in record.items() if value != today[record["name"]][key]} <= explained, record["name"]
    sources = {name: asdict(record) for name, record in records(probes, "sources").items()}
    assert all(record == sources[record["name"]] for record in upgraded["sources"])
    assert [record["label"] for record in upgraded["scores"]] == [record.label for record in SCORES]
    assert [record["label"] for record in upgraded["baselines"]] == [record.label for record in BASELINES]
    components = records(probes, "components")
    assert all(record["label"] == components[record["name"]].label for record in upgraded["components"])
