"""Folders and archives: classes by name, splits by content, masks and boxes, and every bad file by its name."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from vitreous.base.errors import DataError
from vitreous.data.decoding import decode
from vitreous.data.sources.archives import list_files
from vitreous.data.sources.folders import image_folder


def picture(value, size=(8, 8), mode="RGB", format="PNG"):
    """The bytes of a picture of noise drawn by `value`."""
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def mask(size=(8, 8)):
    """The bytes of a mask whose left half is foreground."""
    file = io.BytesIO()
    Image.fromarray(np.arange(size[0])[None].repeat(size[1], 0) < size[0] // 2).save(file, "PNG")
    return file.getvalue()


def tree(parts, images=3, suffix=".png"):
    """{name: bytes} of a few pictures for each folder, all different."""
    return {f"{part}/{k}{suffix}": picture(97 * p + k) for p, part in enumerate(parts) for k in range(images)}


def write(root, files):
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return root


def pack(path, files):
    with tarfile.open(path, "w:" + ("" if path.suffix == ".tar" else path.suffix[1:])) as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


SPLIT = ("train/cat", "train/ant", "train/Bee", "val/ant", "val/cat")


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.xz", "tar.gz"])
def test_train_and_val(tmp_path, kind):
    files = tree(SPLIT) | {"train/cat/notes.txt": b"not an image", "train/cat/.hidden.png": b""}
    packed = {f"photos/{name}": raw for name, raw in files.items()}
    path = write(tmp_path / "photos", files) if kind == "folder" else pack(tmp_path / f"photos.{kind}", packed)
    data = image_folder(path, image_size=48)
    assert data.name == "photos"
    assert data.classes == ("Bee", "ant", "cat")
    assert data.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert data.tests["test"].labels.tolist() == [1] * 3 + [2] * 3  # by name: val has no Bee
    assert data.tests["test"].names[3] == "val/cat/0.png"
    expected = np.asarray(Image.open(io.BytesIO(files["val/cat/0.png"])))
    np.testing.assert_array_equal(np.asarray(data.tests["test"].image(3)), expected)
    assert data.image_size == (48, 48)
    assert image_folder(path).image_size == (8, 8)
    assert data.train.mask(0) is None


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation", "Testing"])
def test_names_of_the_test_part(tmp_path, name):
    data = image_folder(write(tmp_path, tree([f"Training/{c}" for c in "ab"] + [f"{name}/{c}" for c in "ab"])))
    assert (len(data.train), list(data.tests)) == (6, ["test"])


def test_val_and_test_are_both_kept(tmp_path):
    data = image_folder(write(tmp_path, tree([f"{part}/{c}" for part in ("train", "valid", "test") for c in "ab"])))
    assert sorted(data.tests) == ["test", "val"]
    assert data.tests["test"].names[0] == "test/a/0.png"


def test_subset_keeps_items(tmp_path):
    data = image_folder(write(tmp_path, tree(SPLIT)))
    part = data.train.subset([8, 0])
    assert (part.names, part.labels.tolist()) == (["train/cat/2.png", "train/Bee/0.png"], [2, 0])
    np.testing.assert_array_equal(np.asarray(part.image(0)), np.asarray(data.train.image(8)))


def test_single_tree_is_split_by_content(tmp_path):
    files = tree(["ant", "bee"], images=20)
    data = image_folder(write(tmp_path / "a", files))
    assert (len(data.train), len(data.tests["test"])) == (32, 8)
    assert np.bincount(data.tests["test"].labels).tolist() == [4, 4]
    held_out = {files[name] for name in data.tests["test"].names}
    renamed = {name.replace("/", "/renamed "): raw for name, raw in reversed(files.items())}
    again = image_folder(write(tmp_path / "b", renamed))
    assert {renamed[name] for name in again.tests["test"].names} == held_out
    copies = files | {name.replace("/", "/copy of "): raw for name, raw in files.items()}
    doubled = image_folder(write(tmp_path / "c", copies))
    assert {copies[name] for name in doubled.tests["test"].names} == held_out  # a copy never trains for its own test
    assert len(doubled.tests["test"]) == 16


@pytest.mark.parametrize(
    "place", ["masks/train/{}", "train/masks/{}"], ids=["masks at the top", "masks beside the class folders"]
)
def test_masks_beside_images(tmp_path, place):
    truth = np.arange(64).reshape(8, 8) % 3 == 0
    file = io.BytesIO()
    Image.fromarray(truth.astype(np.uint8) * 255).save(file, "PNG")
    files = tree(SPLIT, suffix=".jpg") | {place.format("cat/1.png"): file.getvalue()}
    data = image_folder(write(tmp_path, files))
    cat = data.train.names.index("train/cat/1.jpg")
    np.testing.assert_array_equal(data.train.mask(cat), truth)
    assert data.train.mask(cat - 1) is None
    assert len(data.train) == 9


def test_images_and_masks_side_by_side(tmp_path):
    files = {f"set/images/{name}": raw for name, raw in tree("ab").items()}
    files |= {name.replace("images", "masks"): mask() for name in files}
    data = image_folder(pack(tmp_path / "set.tar", files))
    assert data.classes == ("a", "b")
    assert data.train.mask(0).shape == (8, 8)


def test_mask_of_other_size(tmp_path):
    data = image_folder(write(tmp_path, tree(SPLIT) | {"masks/train/Bee/0.png": mask((4, 8))}))
    with pytest.raises(DataError, match="4 x 8 pixels; expected 8 x 8"):
        data.train.mask(0)


def test_boxes(tmp_path):
    table = "split,wnid,label,file,x0,y0,x1,y1\ntrain,ant,0,0.png,1,2,3,7\ntrain,ant,0,0.png,0,0,0,0\n"
    data = image_folder(write(tmp_path, tree(SPLIT) | {"boxes.csv": table.encode()}))
    expected = np.zeros((8, 8), bool)
    expected[2:8, 1:4] = True
    expected[0, 0] = True
    np.testing.assert_array_equal(data.train.mask(3), expected)
    assert data.train.mask(4) is None


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("train,ant,nobody.png,1,1,2,2", "line 2"),
        ("train,ant,0.png,3,1,2,2", "line 2"),
        ("train,ant,0.png,1,1,two,2", "line 2"),
        ("train,ant,0.png,1,1", "line 2"),
    ],
)
def test_bad_boxes(tmp_path, line, found):
    table = f"split,class,file,x0,y0,x1,y1\n{line}\n"
    with pytest.raises(DataError, match=found):
        image_folder(write(tmp_path, tree(SPLIT) | {"boxes.csv": table.encode()}))


def test_box_outside_the_image(tmp_path):
    table = b"file,x0,y0,x1,y1\ntrain/ant/0.png,1,1,8,2\n"
    data = image_folder(write(tmp_path, tree(SPLIT) | {"boxes.csv": table}))
    with pytest.raises(DataError, match="8 x 8 pixels; expected a box inside"):
        data.train.mask(3)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "no image"),
        ({"train/cat/a.txt": b"x"}, "no image"),
        (tree(["only"]), "Found one class, 'only'"),
        (tree(["train/only", "val/only"]), "Found one class, 'only'"),
        (tree(["train/a", "train/b", "val/a", "val/zebra"]), "'zebra' in test but not in train, which has 'a', 'b'"),
        (tree(["train/a", "train/b"]), "Found 'train' at the top"),
        (tree(["val/a", "val/b"]), "Found 'val' at the top"),
        (tree(["train/a", "train/b", "val/a", "valid/a"]), "'val', 'valid' at the top"),
        (tree(["train/a", "train/b", "test/a", "extra/a"]), "'extra', 'test', 'train' at the top"),
        (tree(["a", "b"]) | {"loose.png": picture(0)}, "'loose.png' outside any class"),
        (tree(["train/a", "train/b", "test"]), "'test/0.png' outside any class"),
        (tree(["a", "b"], images=1), "one image in each class"),
        (tree(["no_masks", "masks"]), "`masks` that no image goes with, such as 'masks/0.png'"),
    ],
)
def test_bad_trees_are_named(tmp_path, files, found):
    with pytest.raises(DataError, match=found):
        image_folder(write(tmp_path, files))


def test_class_folder_without_images(tmp_path):
    write(tmp_path, tree(SPLIT))
    (tmp_path / "train" / "dodo").mkdir()
    with pytest.raises(DataError, match=r"dodo' without an image"):
        image_folder(tmp_path)


def test_loop_of_links_is_entered_once(tmp_path):
    write(tmp_path, tree(["a", "b"]))
    os.symlink(tmp_path / "a", tmp_path / "a" / "again")
    assert len(list_files(tmp_path)[0]) == 6
    os.symlink(tmp_path / "b", tmp_path / "c")  # no loop: a folder under a second name
    assert sorted({name[0] for name in list_files(tmp_path)[0]}) == ["a", "b", "c"]


def test_names_that_are_not_text(tmp_path):
    strange = os.fsdecode(b"caf\xe9 <script>")
    data = image_folder(write(tmp_path, tree(["train/a", f"train/{strange}", "test/a"])))
    assert data.classes == ("a", strange)
    (tmp_path / "train" / strange / "bad.png").write_bytes(b"")
    with pytest.raises(DataError) as error:
        image_folder(tmp_path, strict=True)
    assert "caf\\udce9 <script>" in str(error.value)
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("name", ["../a/0.png", "/a/0.png", "a/../../0.png", "C:/a.png", "a\\..\\0.png"])
def test_archive_names_that_lead_out(tmp_path, name):
    with pytest.raises(DataError, match="leads out of the archive"):
        image_folder(pack(tmp_path / "a.tar", tree(["a", "b"]) | {name: picture(0)}))


def test_archive_with_a_link(tmp_path):
    path = pack(tmp_path / "a.tar", tree(["a", "b"]))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("a/9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"'a/9.png' .* a link or a device"):
        image_folder(path)


@pytest.mark.parametrize("kind", ["tar", "tar.xz", "tar.gz", "tar.bz2"])
def test_archive_cut_short(tmp_path, kind):
    path = pack(tmp_path / f"a.{kind}", tree(["a", "b"], images=40))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DataError, match="cannot be read"):
        image_folder(path)


def test_archive_is_not_extracted(tmp_path):
    image_folder(pack(tmp_path / "a.tar.gz", tree(["a", "b"])))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_truncated_image_is_named_when_read(tmp_path):
    files = tree(["train/a", "train/b", "test/a"], suffix=".jpg")
    jpeg = picture(5, (64, 64), format="JPEG")
    data = image_folder(write(tmp_path, files))
    (tmp_path / "train/a/1.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    with pytest.raises(DataError, match=r"'train/a/1.jpg', which cannot be read: .*truncated"):
        data.train[1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_become_the_channels_asked_for(mode, channels):
    format = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    image = decode(picture(1, mode=mode, format=format), "x", channels)
    assert (image.mode, image.size) == ("L" if channels == 1 else "RGB", (8, 8))


def test_exif_orientation_is_applied_once():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    file = io.BytesIO()
    Image.new("RGB", (4, 9)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), "x", 3).size == (9, 4)


def test_decompression_bombs_are_stopped_before_decoding():
    for side in (9_000, 20_000):  # over our limit; over Pillow's, which raises what is no OSError
        file = io.BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        with pytest.raises(DataError, match=r"cannot be read: .*pixels"):
            decode(file.getvalue(), "bomb.png", 3)


def test_tiny_imagenet_boxes(shared_data):
    data = image_folder(shared_data / "tiny-imagenet-boxes" / "tiny_imagenet_32animals.tar.xz")
    assert (len(data.train), len(data.tests["test"]), len(data.classes)) == (16000, 1600, 32)
    assert data.image_size == (64, 64)
    first = data.train.mask(data.train.names.index("train/n01443537/n01443537_1.JPEG"))
    assert np.argwhere(first).min(0).tolist() == [2, 14]  # its line in boxes.csv: 14, 2, 54, 49
    assert np.argwhere(first).max(0).tolist() == [49, 54]
    assert first.sum() == 41 * 48
    grey = sum(data.tests["test"].image(i).mode != "RGB" for i in range(50))
    assert grey == 0
