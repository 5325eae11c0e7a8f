"""What is assumed of files and classes, or passed over, is said when they are opened and when they are checked."""

import os
import tarfile

import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets

from data import made
from vitreous.base.errors import DataError
from vitreous.data import open_data
from vitreous.data.problems import order_remark
from vitreous.data.sources.unlabelled import unlabelled
from vitreous.data.validate import check_data


def remarks(spec):
    return " ".join(open_data(str(spec)).remarks)


def kinds(spec):
    return sorted((problem.kind, problem.file) for problem in check_data(str(spec)).problems)


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_other_suffixes_are_counted_and_said(tmp_path, packed):
    files = (
        made.tree() | {f"train/cat/{k}.PSD": b"x" for k in range(3)} | {"train/dog/notes.txt": b"", "train/dog/LICENSE": b""}
    )
    root = made.write(tmp_path / "photos", files | {"train/dog/.hidden.psd": b""})
    if packed:
        with tarfile.open(tmp_path / "photos.tar", "w") as archive:
            archive.add(root, "photos")
        root = tmp_path / "photos.tar"
    line = "Passed over, since their suffix is not that of an image read here: 1 without a suffix, 3 .psd, 1 .txt."
    assert line in remarks(root)
    assert line in unlabelled(root).remarks
    findings = check_data(str(root))
    assert findings.remarks == [line]
    assert [(problem.kind, problem.file, problem.what) for problem in findings.problems] == [
        ("suffix", ".psd", "3 files of an image format that is not read")
    ]


def test_a_folder_of_other_suffixes_alone_says_which(tmp_path):
    made.write(tmp_path, {"a/0.psd": b"", "b/0.psd": b""})
    with pytest.raises(DataError, match=r"no image in .*\.jfif.*2 \.psd"):
        open_data(str(tmp_path))


def test_suffixes_that_are_read_are_no_remark(tmp_path):
    suffixes = enumerate((".jfif", ".jpe", ".mpo", ".JPG"))
    files = {f"{label}/{k}{end}": made.picture(9 * (label == "a") + k, kind="JPEG") for k, end in suffixes for label in "ab"}
    data = open_data(str(made.write(tmp_path, files)))
    assert len(data.train) + len(data.tests["test"]) == 8
    assert data.remarks == ()
    assert check_data(str(tmp_path)).suffixes == {".jfif": 2, ".jpe": 2, ".jpg": 2, ".mpo": 2}


@pytest.mark.parametrize(
    ("classes", "orders"),
    [
        ([str(k) for k in range(12)], ("(0, 1, 10, 11, ...)", "(0, 1, 2, 3, ...)")),
        (["Wolf", "ant"], ("(Wolf, ant, ...)", "(ant, Wolf, ...)")),
        (["ant", "wolf"], None),
        (["00", "01", "10"], None),
    ],
)
def test_an_order_of_classes_that_timm_does_not_have_is_said(tmp_path, classes, orders):
    """Its own reader is asked."""
    made.write(tmp_path, made.tree([f"{part}/{name}" for part in ("train", "val") for name in classes], images=2))
    data = open_data(str(tmp_path))
    assert data.classes == tuple(sorted(classes))
    theirs = find_images_and_targets(str(tmp_path / "train"))[1]
    assert (sorted(theirs, key=theirs.get) == list(data.classes)) == (orders is None)
    assert list(data.remarks) == check_data(str(tmp_path)).remarks
    if orders is None:
        assert data.remarks == ()
    else:
        assert data.remarks[0].startswith(f"Class order: that of texts {orders[0]}, ")
        assert f"natural order {orders[1]}: compare classes by name" in data.remarks[0]


def test_classes_in_an_order_of_their_own_are_no_remark():
    assert order_remark(["b", "a10", "a9"]) == []


ALIKE = {
    "spaces": lambda name, k: f" {name}" if k % 2 else name,
    "case": lambda name, k: name.upper() if k % 2 else name,
    "numbers": lambda name, k: ("2.0", "2")[k % 2] if name == "ant" else "3",
    "zeros": lambda name, k: ("07", "7")[k % 2] if name == "ant" else "8",
}


@pytest.mark.parametrize("form", ALIKE)
def test_labels_that_are_alike_are_said(tmp_path, form):
    made.write(tmp_path, made.tree(("ant", "bee"), images=12))
    lines = [f"{name}/{k}.png,{ALIKE[form](name, k)}" for name in ("ant", "bee") for k in range(12)]
    (tmp_path / "t.csv").write_text("\n".join(["file,label", *lines]))
    pairs = 1 if form in ("numbers", "zeros") else 2
    assert f"Doubtful: class {pairs} (" in remarks(tmp_path / "t.csv")
    assert "differs in case, spaces or the form of a number alone from" in remarks(tmp_path / "t.csv")
    assert [kind for kind, _ in kinds(tmp_path / "t.csv")] == ["class"] * pairs


def test_copies_across_parts_and_classes_and_lone_images_are_said(tmp_path):
    files = made.tree()
    files |= {f"val/cat/copy{k}.png": files[f"train/cat/{k}.png"] for k in range(3)}
    files |= {"train/dog/same.png": files["train/cat/3.png"], "train/cat/again.png": files["train/cat/0.png"]}
    files |= {"train/eel/0.png": made.picture(70), "train/dog/dot.png": made.picture(71, (1, 1))}
    line = remarks(made.write(tmp_path, files))
    assert "leak 3 (val/cat/copy0.png: the same file as 'train/cat/0.png', in train)" in line
    assert "contradiction 1 (train/dog/same.png: the same file as 'train/cat/3.png', of the class 'cat')" in line
    assert "class 1 (eel: one image to train on that can be read)" in line
    assert "size 1 (train/dog/dot.png: one pixel)" in line
    assert "duplicate" not in line
    assert kinds(tmp_path) == sorted([
        *(("leak", f"val/cat/copy{k}.png") for k in range(3)), ("contradiction", "train/dog/same.png"),
        ("duplicate", "train/cat/again.png"), ("class", "eel"), ("size", "train/dog/dot.png"),
    ])  # fmt: skip


def test_sound_files_are_not_doubted(tmp_path):
    made.write(tmp_path, made.tree())
    os.remove(tmp_path / "val/dog/3.png")
    assert open_data(str(tmp_path)).remarks == ()
