"""`vitreous data check` finds what was planted, and nothing else."""

import json

import numpy as np
import pytest

from data import made
from vitreous.base.errors import DataError
from vitreous.commands.cli import main
from vitreous.data.validate import check_data


def found(spec, **options):
    return sorted((problem.kind, problem.file) for problem in check_data(str(spec), **options).problems)


def mask(shape=(12, 16), value=255):
    return made.encoded(made.Image.fromarray(np.full(shape, value, np.uint8)))


@pytest.fixture
def planted(tmp_path):
    """A folder with one of each fault, and what a check shall say."""
    files = made.tree()
    copied = made.encoded(made.Image.open(made.io.BytesIO(files["train/cat/0.png"])), "BMP")  # other bytes, the same pixels
    files |= {
        "train/cat/copy.bmp": copied,
        "val/cat/copy.png": files["train/cat/1.png"],
        "train/dog/copy.png": files["train/cat/2.png"],
        "train/cat/cut.png": made.picture(80)[:100],
        "train/Dog/0.png": made.picture(81),
        "train/eel/0.png": b"",
        "val/fox/0.png": made.picture(82),
        "masks/train/cat/0.png": mask(),
        "masks/train/cat/1.png": mask((4, 4)),
        "masks/train/cat/2.png": mask(value=0),
        "masks/train/cat/3.png": b"",
        "masks/train/cat/nobody.png": mask(),
        "boxes.csv": b"split,class,file,x0,y0,x1,y1\ntrain,dog,0.png,0,0,99,2\ntrain,dog,9.png,0,0,1,1\n",
    }
    (tmp_path / "photos/train/gnu").mkdir(parents=True)
    return made.write(tmp_path / "photos", files), sorted([
        ("duplicate", "train/cat/copy.bmp"),
        ("leak", "val/cat/copy.png"),
        ("contradiction", "train/dog/copy.png"),
        ("unreadable", "train/cat/cut.png"),
        ("unreadable", "train/eel/0.png"),
        ("class", "Dog"),  # one image
        ("class", "Dog"),  # dog
        ("class", "eel"),
        ("structure", "photos"),  # fox is not in train
        ("mask", "masks/train/cat/1.png"),
        ("mask", "masks/train/cat/2.png"),
        ("mask", "masks/train/cat/3.png"),
        ("mask", "masks/train/cat/nobody.png"),
        ("box", "train/dog/0.png"),
        ("box", "boxes.csv, line 3"),
        ("empty", "train/gnu"),
    ])  # fmt: skip


def test_what_was_planted_is_found_and_no_more(planted):
    folder, expected = planted
    assert found(folder) == expected


def test_a_sound_folder_has_no_problems(tmp_path, capsys):
    folder = made.write(tmp_path / "photos", made.tree() | {"masks/train/cat/0.png": mask()})
    findings = check_data(str(folder))
    assert findings.problems == []
    assert findings.counts == {"train": {"cat": 4, "dog": 4}, "val": {"cat": 4, "dog": 4}}
    assert (findings.sizes, findings.masks) == ([(16, 12)] * 3, 1)
    assert main(["data", "check", str(folder)]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out


def test_exit_codes_and_json(planted, tmp_path, capsys):
    folder, expected = planted
    assert main(["data", "check", str(folder), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert sorted((problem["kind"], problem["file"]) for problem in said["problems"]) == expected
    assert said["images"] == 23
    assert main(["data", "check", str(folder)]) == 1
    assert "leak 1" in capsys.readouterr().out
    (tmp_path / "nothing").mkdir()
    for words in (["check", str(tmp_path / "nowhere")], ["check", str(tmp_path / "nothing")], ["chekc", "x"], ["check"]):
        assert main(["data", *words]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_structure_and_tables_are_problems_not_mistakes(tmp_path):
    loose = made.write(tmp_path / "a", made.tree() | {"extra/cat/0.png": made.picture(9), "train/loose.png": made.picture(8)})
    assert found(loose) == [("structure", "extra, train, val"), ("structure", "train/loose.png")]
    made.write(tmp_path / "b", made.tree(("x", "y")))
    lines = [f"{name}/{k}.png,{name},{'train' if k else 'test'}" for name in "xy" for k in range(4)]
    table = tmp_path / "b" / "table.csv"
    table.write_text("\n".join(["file,label,split", *lines, "../a/train/cat/0.png,x,train", "x/1.png,y,train"]))
    assert found(table) == [("table", "line 10"), ("table", "line 11")]
    assert [kind for kind, _ in found(table, outside=True)] == ["leak", "table"]  # the pixels of x/0.png


def test_names_cannot_write_to_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that the table breaks no name
    files = made.tree() | {"train/cat/\x1b]0;owned\x07[red].png": b""}
    assert main(["data", "check", str(made.write(tmp_path, files))]) == 1
    out = capsys.readouterr().out
    assert "\x1b]0" not in out
    assert r"train/cat/\x1b]0;owned\x07[red].png" in out


def test_a_table_of_bad_lines_alone_says_what_is_bad_about_them(tmp_path):
    (tmp_path / "table.csv").write_text("file,label\n/etc/hosts,a\n../x.png,b\n")
    with pytest.raises(DataError, match=r"no image with a class .*line 2 .*'/etc/hosts', which leads out of the table"):
        check_data(str(tmp_path / "table.csv"))
