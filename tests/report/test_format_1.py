"""Readings of format 1: what is said of them is complete, and agrees with what probes say of the same names today."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lens.explicit import vit
from vitreous.data import Cutouts
from vitreous.lens.evaluation import BASELINES, SCORES
from vitreous.lens.look import CHUNK, look
from vitreous.lens.probe import chosen, records
from vitreous.lens.reading import FORMAT, Writer, read, read_part
from vitreous.report import format_1
from vitreous.report.page import write
from vitreous.report.unsigned import with_unknown_signs

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


def test_the_same_model_and_images_give_the_numbers_and_maps_of_the_old_reading():
    old, new = read(OLD), look(vit(depth=1, img_size=(8, 12)), Cutouts(2, size=16, seed=2))
    theirs, ours = old.table(), new.table()
    for name, column in theirs.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(ours[name], column, rtol=1e-3, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(ours[name], column, err_msg=name)
    named = {("foreground", -1): ("foreground_unsigned", -1)}  # until format 3, also without a sign
    assert {named.get(key, key) for key in old.maps} == set(new.maps)
    for key in old.maps:
        if key[0] == "foreground":
            continue  # with a single block, its output was taken for that of its attention
        ours = new.maps.heads(*named.get(key, key))
        np.testing.assert_allclose(ours, old.maps.heads(*key), atol=4e-3, err_msg=str(key))
    theirs, ours = ({record["name"]: record.get("rule") for record in one.facts["components"]} for one in (old, new))
    assert {named.get((name, -1), (name,))[0]: rule for name, rule in theirs.items()} == ours | {"foreground_unsigned": None}


def test_an_old_foreground_map_without_a_direction_has_no_sign(tmp_path):
    """Which side of it is the subject was never known; with a direction it stays what it was."""
    reading = read(OLD)
    assert reading.maps.confidence("foreground", -1).tolist() == [0, 0]
    data = json.loads(re.search(r'id="data">(.*?)</script>', write([OLD], tmp_path / "old.html").read_text(), re.S)[1])
    page = data["sources"][0]["readings"][0]
    for components in (reading.facts["components"], page["components"]):
        (record,) = [record for record in components if record["name"] == "foreground"]
        assert (record["label"], record["signed"], record["rule"]) == ("Foreground or background", True, None)
    assert page["maps"]["foreground/-1"]["confidence"] == [0, 0]
    known = [{"name": "foreground", "label": "Foreground", "rule": "direction and class attention"}]
    assert with_unknown_signs(known) == known


def test_old_and_new_readings_stand_side_by_side_on_a_page(tmp_path):
    look(vit(depth=1, img_size=(8, 12)), Cutouts(2, size=16, seed=2), probes="attention_rows", out=tmp_path / "new")
    text = write([OLD, tmp_path / "new"], tmp_path / "both.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    labels = {record["name"]: record["label"] for record in data["words"]["measures"]}
    assert labels["attention_entropy"] == "Attention entropy"
    assert labels["effective_rank_paper"] == "Effective rank, paper's form"
    old, new = (source["readings"][0] for source in data["sources"])
    assert set(new["table"]["columns"]) < set(old["table"]["columns"])
    assert new["maps"] == {}


def test_an_old_reading_can_be_saved_and_is_then_of_the_format_of_today(tmp_path):
    read(OLD).save(tmp_path / "new")
    assert json.loads((tmp_path / "new/reading.json").read_text())["format"] == FORMAT
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
    # a record of before does not say how a page draws its rows, which is by layer
    assert all({"form": "layers"} | record == sources[record["name"]] for record in upgraded["sources"])
    assert [record["label"] for record in upgraded["scores"]] == [record.label for record in SCORES]
    assert [record["label"] for record in upgraded["baselines"]] == [record.label for record in BASELINES]
    components = records(probes, "components")
    assert all(record["label"] == components[record["name"]].label for record in upgraded["components"])
