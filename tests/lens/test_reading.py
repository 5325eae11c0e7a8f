"""Readings on disk and in memory: what is written is what is read, whole or not at all, and by no other."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from lens.explicit import pixels, vit
from vitreous.base.errors import DataError, SettingError, UnknownName
from vitreous.data import Cutouts
from vitreous.lens import reading as module
from vitreous.lens.look import look
from vitreous.lens.reading import Maps, Part, Reading, Writer, read, read_part
from vitreous.lens.stored_maps import packed
from vitreous.lens.tables import as_csv, from_csv, joined
from vitreous.report.reading import ReadingFolder


@pytest.fixture(scope="module")
def made():
    """Four scenes with masks, and curves."""
    return look(vit(), Cutouts(4, size=32, seed=2), curves=2, about={"name": "=mine", "weights": "random"})


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return made.save(tmp_path / "out")


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


# -- what is written is what is read -----------------------------------------------------------------------------------


def test_a_saved_reading_is_read_as_it_was(made, folder):
    again = read(folder)
    for ours, theirs in ((made.table(), again.table()), (made.scores(), again.scores())):
        assert list(ours) == list(theirs)
        for name, column in ours.items():
            np.testing.assert_array_equal(column, theirs[name], err_msg=name)
    assert list(made.maps) == list(again.maps)
    for key in made.maps:
        np.testing.assert_array_equal(made.maps[key], again.maps[key])
        np.testing.assert_array_equal(made.maps.heads(*key), again.maps.heads(*key))
        np.testing.assert_array_equal(made.maps.confidence(*key), again.maps.confidence(*key))
    assert again.images == made.images
    assert again.layers == made.layers
    assert {name: value for name, value in again.facts.items() if name != "summary"} == {
        name: value for name, value in made.facts.items() if name != "summary"
    }
    assert json.dumps(again.curves) == json.dumps(module.without_nan(made.curves))
    for name, column in made.facts["summary"].items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(again.facts["summary"][name], column, rtol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(again.facts["summary"][name], column, err_msg=name)


def test_the_folder_holds_what_the_format_says(made, folder):
    assert {path.name for path in folder.iterdir()} == {
        "reading.json", "table.csv", "table.json", "scores.csv", "summary.csv", "curves.json", "parts",
    }  # fmt: skip
    facts = json.loads((folder / "reading.json").read_text())
    assert (facts["format"], facts["kind"], facts["images"], facts["parts"], facts["chunk"]) == (3, "reading", 4, 1, 16)
    assert facts["random_weights"] is True
    assert facts["settings"]["curves"] == 2
    assert set(facts["versions"]) == {"vitreous", "torch", "timm", "numpy"}
    part = read_part(folder / "parts/00000.safetensors")
    for i in range(4):
        shown = Image.open(io.BytesIO(part.tensors[f"picture/{i}"].tobytes()))
        assert (shown.format, shown.size) == ("JPEG", (24, 16))
        mask = Image.open(io.BytesIO(part.tensors[f"mask/{i}"].tobytes()))
        assert (mask.format, mask.size) == ("PNG", (24, 16))
    assert part.tensors["artifacts/1"].dtype == np.uint8


def test_csv_and_json_agree_with_the_table(made, folder):
    table, lines = made.table(), rows_of(folder / "table.csv")
    columns = json.loads((folder / "table.json").read_text(), parse_constant=lambda name: pytest.fail(name))["columns"]
    assert list(columns) == list(lines[0]) == list(table)
    assert list(table)[:5] == ["layer", "head", "image", "source", "kind"]
    assert len(lines) == len(table["layer"])
    for name, column in table.items():
        cells = [line[name] for line in lines]
        if name in ("source", "kind"):
            assert cells == columns[name] == column.tolist()
        elif name in ("layer", "head", "image"):
            assert [int(cell or -1) for cell in cells] == columns[name] == column.tolist()
        else:
            found = [np.nan if value is None else value for value in columns[name]]
            np.testing.assert_array_equal(found, column)
            np.testing.assert_allclose([float(cell or "nan") for cell in cells], column, rtol=1e-6)
    assert list(made.scores())[:4] == list(rows_of(folder / "scores.csv")[0])[:4] == ["image", "component", "layer", "head"]


def test_equal_readings_are_equal_bytes_and_saving_again_changes_none(made, folder, tmp_path):
    def bytes_of(place: Path) -> dict[str, bytes]:
        return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}

    first = bytes_of(folder)
    for number in range(3):  # the order of a hash table would differ in one of them
        assert bytes_of(made.save(tmp_path / f"again-{number}")) == first
    made.save(folder)
    assert bytes_of(folder) == first
    assert bytes_of(read(folder).save(tmp_path / "copy")) == first


def test_maps_are_asked_for_by_component_layer_and_head(made):
    maps = made.maps
    np.testing.assert_array_equal(maps["foreground_unsigned"], maps["foreground_unsigned", -1])
    np.testing.assert_allclose(maps["attention", 1], maps.heads("attention", 1).mean(1))
    np.testing.assert_array_equal(maps["attention", 1, 1], maps.heads("attention", 1)[:, 1])
    assert maps.heads("u1", 0).shape == (4, 1, 4, 6)
    assert (maps.confidence("rollout", 0) == 1).all()
    assert ("u1", 2) in maps
    assert ("u1", 3) not in maps
    assert len(maps) == len(list(maps)) == len(set(maps))
    with pytest.raises(UnknownName, match="'u9 0'"):
        maps["u9", 0]
    with pytest.raises(UnknownName, match="'u1 7'"):
        maps.confidence("u1", 7)
    for key in (("attention", 1, 2), ("u1", 1, 0)):
        with pytest.raises(SettingError, match=f"head {key[2]} of '{key[0]}'"):
            maps[key]


def test_a_reading_of_nothing_has_no_maps_and_no_table():
    empty = Reading({"layers": []}, [])
    assert (list(empty.maps), empty.table(), empty.scores(), empty.images) == ([], {}, {}, [])
    assert list(Maps([Part({}, [])])) == []


def as_format_2(folder, part="00000"):
    """A part as format 2 had it: maps as float16 without scales."""
    path = folder / f"parts/{part}.safetensors"
    with safe_open(path, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    about = json.loads(tensors.pop("about").tobytes())
    kept = read_part(path)
    tensors = {name: value for name, value in tensors.items() if not name.endswith("/scale")}
    tensors |= {name: kept.map(name).astype(np.float16) for name in kept.maps() if f"{name}/scale" in kept.tensors}
    tensors["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    save_file(tensors, path, metadata=metadata)


def test_readings_of_format_2_open_and_their_looks_go_on(tmp_path):
    for out in ("whole", "old"):
        reading = look(vit(), pixels(18), out=tmp_path / out, noise=0.0)
    as_format_2(tmp_path / "old")
    (tmp_path / "old/parts/00001.safetensors").unlink()
    facts = json.loads((tmp_path / "old/reading.json").read_text())
    (tmp_path / "old/reading.json").write_text(json.dumps(facts | {"format": 2}))
    (tmp_path / "old/reading.json").rename(tmp_path / "reading.json")
    mixed = look(vit(), pixels(18), out=tmp_path / "old", noise=0.0)  # goes on: one part of format 2, one of format 3
    assert "u1/2/scale" not in mixed.parts[0].tensors
    assert "u1/2/scale" in mixed.parts[1].tensors
    ours = ReadingFolder(tmp_path / "old")
    for key in reading.maps:
        np.testing.assert_allclose(mixed.maps.heads(*key), reading.maps.heads(*key), rtol=1e-3, atol=1e-7, err_msg=str(key))
        page = ours.tensors(f"{key[0]}/{key[1]}")
        np.testing.assert_array_equal(page.reshape(mixed.maps.heads(*key).shape), mixed.maps.heads(*key))
    as_format_2(tmp_path / "whole")
    as_format_2(tmp_path / "whole", "00001")
    (tmp_path / "reading.json").rename(tmp_path / "whole/reading.json")
    np.testing.assert_allclose(read(tmp_path / "whole").maps["attention", 1], reading.maps["attention", 1], rtol=1e-3)
    assert ReadingFolder(tmp_path / "whole").count == 18


def test_a_map_whose_mass_is_on_a_sink_keeps_what_is_beside_it(tmp_path):
    """One patch takes nearly all: the order of the others is what the table scores, and what is stored."""
    rng = np.random.default_rng(0)
    small = np.exp(rng.uniform(-24, -16, (2, 3, 6, 5))).astype(np.float32)  # 4e-11 to 1e-7: float16 ends at 6e-8
    small[:, 1, 0, 0] = 1.0
    small[:, 2] = 0.0
    values, scale = packed(small, 2)
    assert (values.dtype, scale.shape) == (np.float16, (2, 3))
    part = Part({"attention/0": values, "attention/0/scale": scale}, [{"image": 0}, {"image": 1}])
    stored = Maps([part], [{"name": "attention", "per_head": True}]).heads("attention", 0)
    np.testing.assert_allclose(stored[:, 0], small[:, 0], rtol=2**-11)
    np.testing.assert_allclose(stored[:, 1], small[:, 1], rtol=0.05)
    assert (stored[:, 1].reshape(2, -1) > 0).all()
    assert np.array_equal(stored[:, 2], small[:, 2])


@pytest.mark.parametrize("values", [[3e38, -1e38, 1e31], [np.nan, np.inf, 2.0], [1e-40, 0.0, -1e-40], [0.25, -0.5, 1.0]])
def test_scales_neither_overflow_nor_lose_what_float16_holds(values):
    maps = np.array([[values]], np.float32)
    halves, scale = packed(maps, 1)
    np.testing.assert_allclose(halves.astype(np.float32) * scale[:, None, None], maps, rtol=1e-3, atol=1e-41)


def test_a_data_frame_needs_pandas(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SettingError, match=r"no pandas.*Expected.*pip install"):
        made.to_pandas()
    monkeypatch.setitem(sys.modules, "pandas", type(sys)("pandas"))
    sys.modules["pandas"].DataFrame = dict
    assert list(made.to_pandas()) == list(made.table())


def test_tables_with_different_columns_are_joined_and_text_survives_a_round_trip():
    first = {"layer": np.array([0, -1]), "component": np.array(["u1", "=cmd()"]), "auroc": np.array([0.25, np.nan])}
    second = {"layer": np.array([2]), "component": np.array(["k1"]), "other": np.array([1.5])}
    both = joined([first, {}, second])
    np.testing.assert_array_equal(both["auroc"], [0.25, np.nan, np.nan])
    np.testing.assert_array_equal(both["other"], [np.nan, np.nan, 1.5])
    text = as_csv(both)
    assert text.splitlines() == ["layer,component,auroc,other", "0,u1,0.25,", ",'=cmd(),,", "2,k1,,1.5"]
    back = from_csv(text)
    np.testing.assert_array_equal(back["layer"], [0, -1, 2])
    np.testing.assert_array_equal(back["other"], both["other"])
    assert joined([]) == {}


# -- whole or not at all, and by no other ------------------------------------------------------------------------------


def test_a_folder_with_something_else_is_refused_and_kept(made, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SettingError, match=r"something in .*Expected a new or empty.*--out"):
        made.save(tmp_path)
    with pytest.raises(SettingError, match=r"mine\.txt"):
        made.save(tmp_path / "mine.txt")
    with pytest.raises(SettingError, match=r"Cannot write|something in"):
        made.save(tmp_path / "mine.txt/below")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_another_reading_is_refused_and_kept(made, folder):
    before = (folder / "table.csv").read_bytes()
    other = look(vit(seed=1), pixels(1))
    with pytest.raises(SettingError, match=r"another reading in .*--out"):
        other.save(folder)
    assert (folder / "table.csv").read_bytes() == before
    assert read(folder).facts["fingerprint"] == made.facts["fingerprint"]


def test_a_full_disk_is_said_and_leaves_no_half_of_a_file(made, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.safetensors.numpy, "save_file", full)
    with pytest.raises(SettingError, match=r"Cannot write .*No space left.*--out"):
        made.save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/parts").iterdir()] == ["fingerprint"]


def test_a_damaged_part_names_itself_and_is_made_again(tmp_path):
    out = tmp_path / "out"
    look(vit(), pixels(18), out=out, noise=0.0)
    part, table = out / "parts/00000.safetensors", (out / "table.csv").read_bytes()
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    for ask in (lambda: read(out).table(), lambda: read(out).maps["u1", 0], lambda: read_part(part)):
        with pytest.raises(DataError, match=r"00000\.safetensors, which cannot be read.*Delete it.*look again"):
            ask()
    part.unlink()
    with pytest.raises(DataError, match=r"no .*00000\.safetensors.*Look again"):
        read(out)
    reading = look(vit(), pixels(18), out=out, noise=0.0)
    assert part.read_bytes() == whole
    assert (out / "table.csv").read_bytes() == table
    assert len(reading.images) == 18


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "parts": "many"}',
        '{"format": 4, "parts": 1}',
        '{"format": 3, "parts": 1}',
    ],
)
def test_a_folder_that_is_no_complete_reading_is_said(folder, content):
    if content is None:
        (folder / "reading.json").unlink()
    else:
        (folder / "reading.json").write_text(content)
    with pytest.raises(DataError, match=r"Found .*Expected .*\. [A-Z]"):
        read(folder)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match="no complete reading"):
        read(tmp_path / "nowhere")


def test_a_writer_makes_nothing_before_the_first_part(tmp_path):
    writer = Writer(tmp_path / "out", "abc")
    assert not (tmp_path / "out").exists()
    writer.add(1, Part({"attention/0": np.zeros((1, 1, 2, 2), np.float16)}, [{"image": 0}], [{"name": "x"}], {"rows": {}}))
    (tmp_path / "out/parts/note.safetensors").write_text("not a part")
    assert Writer(tmp_path / "out", "abc").done == {1}
    part = read_part(writer.path(1))
    assert (part.images, part.skipped, part.findings, part.maps()) == (
        [{"image": 0}], [{"name": "x"}], {"rows": {}}, ["attention/0"],
    )  # fmt: skip
