"""Tables of images: classes by name, parts or a split by content, boxes, and nothing outside the table's folder."""

import os

import numpy as np
import pytest

from data import made
from vitreous.base.errors import DataError
from vitreous.data import ClassSet, open_data
from vitreous.data.object_boxes import read_boxes
from vitreous.data.validate import check_data


def table(root, text, name="table.csv"):
    (root / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return str(root / name)


@pytest.fixture
def photos(tmp_path):
    made.write(tmp_path / "set", {f"images/{k}.png": made.picture(k) for k in range(12)})
    return tmp_path / "set"


def rows(*lines, head="file,label,split"):
    return "\n".join([head, *lines]) + "\n"


PARTS = [f"images/{k}.png,{'cat' if k % 2 else 'dog'},{'training' if k < 8 else 'Valid'}" for k in range(12)]


def test_parts_and_classes_by_name(photos):
    data = open_data(table(photos, "\ufeff" + rows(*PARTS)))
    assert (data.name, data.classes) == ("table", ("cat", "dog"))
    assert data.train.labels.tolist() == [1, 0] * 4
    assert data.tests["test"].names == [f"images/{k}.png" for k in range(8, 12)]
    np.testing.assert_array_equal(np.asarray(data.train.image(3)), made.pixels(3))


def test_without_parts_it_is_split_by_content(photos):
    lines = [line.rpartition(",")[0] for line in PARTS]
    data = open_data(table(photos, rows(*lines, head="file,label")))
    assert (len(data.train), len(data.tests["test"])) == (10, 2)
    same = open_data(table(photos, rows(*[f"{line}," for line in reversed(lines)]), "other.csv"))
    assert same.tests["test"].names[::-1] == data.tests["test"].names


def test_boxes_and_masks(photos):
    made.write(photos, {"m/0.png": made.encoded(made.Image.fromarray(np.eye(12, 16, dtype=np.uint8) * 255))})
    head = "file,label,split,x0,y0,x1,y1,mask"
    lines = [f"{line},,,,," for line in PARTS[3:]]
    lines += ["images/0.png,dog,train,,,,,m/0.png", "images/1.png,cat,train,1,2,3,4,", "images/1.png,cat,train,0,0,0,0,"]
    data = open_data(table(photos, rows(*lines, head=head)))
    masks = {name: data.train.mask(i) for i, name in enumerate(data.train.names)}
    expected = np.zeros((12, 16), bool)
    expected[2:5, 1:4] = expected[0, 0] = True
    np.testing.assert_array_equal(masks["images/1.png"], expected)
    np.testing.assert_array_equal(masks["images/0.png"], np.eye(12, 16, dtype=bool))
    assert masks["images/3.png"] is None


def test_files_that_are_not_there_are_quarantined(photos):
    data = open_data(table(photos, rows(*PARTS, "images/99.png,cat,train", "%2e%2e/x.png,dog,train")))
    assert [(bad.file, bad.label, bad.split, bad.reason) for bad in data.quarantined] == [
        ("images/99.png", "cat", "train", "no such file or directory"),
        ("%2e%2e/x.png", "dog", "train", "no such file or directory"),
    ]


OUT = ["../secret.png", "images/../../secret.png", "{root}/secret.png", "images/link.png", "way/secret.png", "C:\\secret.png",
       "..\\secret.png", "\\\\server\\share\\x.png"]  # fmt: skip


@pytest.mark.parametrize("name", OUT)
def test_paths_that_lead_outside_are_refused(photos, name):
    made.write(photos.parent, {"secret.png": made.picture(50)})
    os.symlink(photos.parent / "secret.png", photos / "images/link.png")
    os.symlink(photos.parent, photos / "way")
    spec = table(photos, rows(*PARTS, f"{name.format(root=photos.parent)},cat,train"))
    with pytest.raises(DataError, match=r"line 14 of .*leads out of the table's folder.*--outside"):
        open_data(spec)
    if "\\" not in name:
        assert len(open_data(spec, outside=True).train) == 9


def test_a_table_written_on_windows_is_read(photos):
    made.write(photos, {"masks/0.png": made.encoded(made.Image.new("L", (16, 12), 255))})
    lines = [line.replace("/", "\\") for line in PARTS]
    data = open_data(table(photos, rows(*lines)))
    assert data.train.names == open_data(table(photos, rows(*PARTS))).train.names
    head = ["file,label,mask", *(f"images\\{k}.png,{'cat' if k % 2 else 'dog'},masks\\0.png" for k in range(8))]
    samples = open_data(table(photos, "\r\n".join(head))).train
    assert samples.mask(0).all()
    boxes = read_boxes(b"file,x0,y0,x1,y1\nimages\\0.png,1,2,3,4\n", {"images/0.png"})
    assert boxes == {"images/0.png": [(1, 2, 3, 4)]}


def test_paths_inside_may_go_up_and_down(photos):
    assert len(open_data(table(photos, rows(*PARTS, "images/../images/./0.png,cat,train"))).train) == 9


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([*PARTS, "images/0.png,dog"], "line 14 .* more or fewer cells"),
        ([*PARTS, "images/0.png,dog,train,1"], "line 14 .* more or fewer cells"),
        ([*PARTS, ",dog,train"], "line 14 .* lacks a file or a label"),
        ([*PARTS, "images/0.png,,train"], "line 14 .* lacks a file or a label"),
        ([*PARTS, "images/x.png,dog,tarin"], "line 14 .* the split 'tarin'"),
        ([*PARTS, "images/0.png,dog,train"], "line 14 .* once more"),
        ([*PARTS, "images/0.png,cat,train"], "line 14 .* another label or split"),
        ([*PARTS, "images/x.png,dog,"], "1 lines .* without a split"),
        ([*PARTS, "images/x.png,eel,val"], "'eel' in test but not in train, which has 'cat', 'dog'"),
        ([], "no image in"),
        (PARTS[:8], "the parts 'train' in"),
        ([f"images/{k}.png,cat,{part}" for k, part in enumerate(["train", "val"])], "Found one class, 'cat'"),
    ],
)
def test_bad_lines_are_named(photos, lines, found):
    with pytest.raises(DataError, match=found):
        open_data(table(photos, rows(*lines)))


@pytest.mark.parametrize("box", ["3,1,2,2", "0,0,two,2", "-1,0,2,2", "1,1,,"])
def test_bad_boxes_are_named(photos, box):
    head = "file,label,split,x0,y0,x1,y1"
    with pytest.raises(DataError, match=r"line 2 .* the box '"):
        open_data(table(photos, rows(f"{PARTS[0]},{box}", head=head)))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("name;label\na;b\n", "the columns 'name;label'"),
        ("file,label,file\na,b,c\n", "each once"),
        ("", "Found the columns  in"),
        ("file,label\n" + "x" * 200_000 + ",cat\n", "no table"),
        ("file,label\na\0b.png,cat\n", "zero byte|no table|NUL"),
    ],
)
def test_what_is_no_table_is_said(photos, text, found):
    with pytest.raises(DataError, match=found):
        open_data(table(photos, text))


def test_names_that_are_not_text_are_found(photos):
    strange = os.fsdecode(b"images/caf\xe9.png")
    made.write(photos, {strange: made.picture(60)})
    assert strange in open_data(table(photos, rows(*PARTS, f"{strange},cat,train"))).train.names


# -- sets of classes ---------------------------------------------------------------------------------------------------

SETS = [f"images/{k}.png,{int(k % 2 == 0)},{1 if k in (1, 2, 9) else ''},{'0.0' if k else '1.0'}" for k in range(12)]
SET_HEAD = "file,label:dog,label:young cat,label:cow"


def test_a_column_for_each_class_gives_sets_of_classes(photos):
    parts = [f"{line},{'train' if k < 8 else 'test'}" for k, line in enumerate(SETS)]
    data = open_data(table(photos, rows(*parts, head=SET_HEAD + ",split")))
    assert data.classes == ("dog", "young cat", "cow")  # in the order of the columns
    assert isinstance(data.train.target, ClassSet)
    nan = float("nan")
    np.testing.assert_array_equal(data.train.target.values[:4], [[1, nan, 1], [0, 1, 0], [1, 1, 0], [0, nan, 0]])
    np.testing.assert_array_equal(data.tests["test"].target.values, [[1, nan, 0], [0, 1, 0], [1, nan, 0], [0, nan, 0]])


def test_sets_of_classes_are_split_by_content_class_by_class(photos):
    data = open_data(table(photos, rows(*SETS, head=SET_HEAD)))
    again = open_data(table(photos, rows(*reversed(SETS), head=SET_HEAD), "other.csv"))
    assert data.tests["test"].names == again.tests["test"].names[::-1]
    # strata by their rarest class: cow {0} keeps its one image, young cat {1, 2, 9}, dog {4, 6, 8, 10}, none {3, 5, 7, 11}
    assert "images/0.png" in data.train.names
    groups = [{1, 2, 9}, {4, 6, 8, 10}, {3, 5, 7, 11}]
    held = {int(name.split("/")[1][:-4]) for name in data.tests["test"].names}
    assert [len(held & group) for group in groups] == [1, 1, 1]


def test_sets_of_classes_are_checked_class_by_class(photos):
    (photos / "images" / "0.png").write_bytes(b"")
    path = table(photos, rows(*SETS, head=SET_HEAD))
    with pytest.raises(DataError, match=r"no image that can be read of 'cow' to train on, such as 'images/0.png'"):
        open_data(path)
    problems = {(problem.kind, problem.file) for problem in check_data(path).problems}
    assert problems == {("unreadable", "images/0.png"), ("class", "cow")}
    quarantined = open_data(table(photos, rows(*[line.rpartition(",")[0] for line in SETS], head=SET_HEAD.rpartition(",")[0])))
    assert [(bad.file, bad.label) for bad in quarantined.quarantined] == [("images/0.png", "dog")]


@pytest.mark.parametrize(
    ("head", "line", "match"),
    [
        ("file,label,label:dog", "images/0.png,cat,1", r"column label and 'label:dog'.*Take one"),
        ("file,label:dog,label:dog", "images/0.png,1,1", "each once"),
        ("file,label:", "images/0.png,1", "label:NAME"),
        ("file,dog,cat", "images/0.png,1,0", "label:NAME"),
        ("file,label:dog,label:cat", "images/0.png,1,-1", r"line 2 .*'-1' for label:cat. Expected 1 \(present\)"),
        ("file,label:dog,label:cat", "images/0.png,,", "nothing is known of its classes"),
        ("file,label:dog,label:cat", ",1,0", "lacks a file"),
        ("file,label:dog,label:cat", "images/0.png,1,0\nimages/0.png,1,", "once more, with another label"),
    ],
)
def test_a_table_of_sets_that_is_not_clear_is_refused(photos, head, line, match):
    with pytest.raises(DataError, match=match):
        open_data(table(photos, rows(line, head=head)))
