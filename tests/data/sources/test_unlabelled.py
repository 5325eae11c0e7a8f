"""Images to look at: every form in which they come, in order, with names, masks and boxes; mistakes said."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from vitreous.base.errors import DataError
from vitreous.data import PictureSamples
from vitreous.data.sources.unlabelled import unlabelled

STRANGE = 'it\'s a <script>alert(1)</script> "cat" (1).png'


def picture(seed: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """width 12, height 8, random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def folder(tmp_path):
    """b.png, a.png, sub/c.png."""
    (tmp_path / "photos/sub").mkdir(parents=True)
    for seed, name in enumerate(("b.png", "a.png", "sub/c.png")):
        picture(seed).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_files_come_in_the_order_given_and_folders_sorted(folder):
    files = unlabelled([folder / "b.png", str(folder / "a.png")])
    assert files.names == ["b.png", "a.png"]
    assert same(files.image(0), picture(0))
    assert same(files.image(1), picture(1))
    assert unlabelled(folder).names == ["a.png", "b.png", "sub/c.png"]
    assert unlabelled([str(folder)]).names == unlabelled(folder).names
    assert len(unlabelled(folder / "a.png")) == 1


def test_equal_names_are_numbered(folder):
    found = unlabelled([folder / "a.png", folder / "a.png", folder])
    assert found.names == ["a.png", "a.png (2)", "a.png (3)", "b.png", "sub/c.png"]
    assert same(found.image(1), picture(1))


def test_an_archive_is_read_as_its_folder(folder, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(folder, ".")
    found = unlabelled(tmp_path / "photos.tar")
    assert found.names == ["a.png", "b.png", "sub/c.png"]
    assert same(found.image(2), picture(2))


def test_strange_names_are_kept_as_they_are(tmp_path):
    picture(5).save(tmp_path / STRANGE.replace("/", "∕"))
    assert unlabelled(tmp_path).names == [STRANGE.replace("/", "∕")]


def test_what_a_camera_and_an_animation_hold_is_seen_as_people_see_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    picture(0).save(tmp_path / "turned.png", exif=exif)
    first, second = picture(1).convert("P"), picture(2).convert("P")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second], duration=50)
    picture(3).convert("L").save(tmp_path / "grey.png")
    Image.fromarray((np.arange(96, dtype=np.uint16) * 600).reshape(8, 12)).save(tmp_path / "deep.png")
    files = [tmp_path / name for name in ("turned.png", "moving.gif", "grey.png", "deep.png")]
    found = unlabelled(files)
    assert same(found.image(0), picture(0).rotate(-90, expand=True))
    assert same(found.image(1), first.convert("RGB"))
    assert same(found.image(2), picture(3).convert("L").convert("RGB"))
    assert np.array_equal(np.asarray(found.image(3))[..., 1], (np.arange(96) * 600 // 256).reshape(8, 12))
    opened = unlabelled([Image.open(path) for path in files])  # the same images when they are opened first
    assert isinstance(opened, PictureSamples)
    assert opened.names == [f"image {i}" for i in range(4)]
    assert all(same(opened.image(i), found.image(i)) for i in range(4))


def test_pictures_keep_masks_and_names_in_a_part_of_them():
    masks = [np.eye(3, dtype=bool), None, np.ones((3, 3), bool)]
    part = PictureSamples([picture(i) for i in range(3)], ["a", "b", "c"], masks).subset([2, 0])
    assert part.names == ["c", "a"]
    assert part.mask(0) is masks[2]
    assert same(part.image(1), picture(0))
    assert PictureSamples([picture(0)]).mask(0) is None


def test_masks_in_the_folder_and_boxes_are_found(folder):
    (folder / "masks/sub").mkdir(parents=True)
    mask = np.arange(96).reshape(8, 12) % 5 == 0
    Image.fromarray(mask).save(folder / "masks/sub/c.png")
    (folder / "boxes.csv").write_text("file,x0,y0,x1,y1\na.png,2,1,4,6\na.png,0,0,0,0\n")
    found = unlabelled(folder)
    assert found.names == ["a.png", "b.png", "sub/c.png"]  # the mask is no image
    assert np.array_equal(found.mask(2), mask)
    assert found.mask(1) is None
    box = np.zeros((8, 12), bool)
    box[1:7, 2:5] = box[0, 0] = True
    assert np.array_equal(found.mask(0), box)


def test_masks_in_another_folder_go_by_name(folder, tmp_path):
    picture(4).save(folder / "d (1).png")
    (tmp_path / "truth/sub").mkdir(parents=True)
    for name, value in (("b.png", 0), ("sub/c.png", 255), ("d (1).png", 255), ("nobody.png", 0)):
        Image.new("L", (12, 8), value).save(tmp_path / "truth" / name)
    (tmp_path / "truth/b.csv").write_text("not a mask")
    found = unlabelled([folder, folder / "b.png"], tmp_path / "truth")
    masks = {name: found.mask(i) for i, name in enumerate(found.names)}
    assert masks["a.png"] is None
    assert [int(masks[name].sum()) for name in ("b.png", "b.png (2)", "sub/c.png", "d (1).png")] == [0, 0, 96, 96]
    table = tmp_path / "table.csv"
    table.write_text("file,x0,y0,x1,y1\nsub/c.png,0,0,11,0\n")
    assert unlabelled(folder, table).mask(3).sum() == 12


def test_a_table_of_boxes_names_files_beside_it_and_may_hold_more(folder):
    """Of a data set with one table for all parts, one part or class is looked at."""
    lines = ["split,class,file,x0,y0,x1,y1", "val,sub,c.png,0,0,1,0", "train,sub,c.png,9,9,9,9"]
    (folder.parent / "boxes.csv").write_text("\n".join(lines).replace("val,", folder.name + ",") + "\n")
    for given in (folder, folder / "sub", folder / "sub/c.png"):
        found = unlabelled(given, folder.parent / "boxes.csv")
        at = [i for i, name in enumerate(found.names) if name.endswith("c.png")]
        assert [found.mask(i).sum() for i in at] == [2]
        assert all(found.mask(i) is None for i in range(len(found)) if i not in at)
    (folder.parent / "boxes.csv").write_text("file,x0,y0,x1,y1\nnobody.png,0,0,1,1\n")
    with pytest.raises(DataError, match=r"no mask in .*boxes\.csv.* for any of"):
        unlabelled(folder, folder.parent / "boxes.csv")


def test_a_broken_file_stops_no_other(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG but no more")
    raw = io.BytesIO()
    picture(7, (200, 200)).save(raw, "JPEG")
    (folder / "cut.jpg").write_bytes(raw.getvalue()[:2000])
    found = unlabelled(folder)
    for name in ("broken.png", "cut.jpg"):
        with pytest.raises(DataError, match=f"'{name}'.*Expected.*Replace"):
            found.image(found.names.index(name))
    assert same(found.image(0), picture(1))


def test_mistakes_are_said(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    picture(0).save(tmp_path / "others/z.png")
    for given, masks, said in (
        ([], None, "no images"),
        (tmp_path / "empty", None, "no image in .*empty"),
        ("no/such/cat.jpg", None, "no/such/cat.jpg.*Check the path"),
        ([folder, "no/such"], None, "no/such"),
        ([picture(0), folder / "a.png"], None, "PIL images and paths"),
        ([np.zeros((8, 12, 3))], None, "ndarray.*PIL"),
        (None, None, "NoneType"),
        (folder, tmp_path / "others", "no mask in .*others.*Rename"),
        (folder, tmp_path / "empty", "no image in .*empty"),
        (folder, tmp_path / "nowhere", "nowhere.*--masks"),
        (picture(0), tmp_path / "others", "masks for PIL"),
    ):
        with pytest.raises(DataError, match=said):
            unlabelled(given, masks)


def test_a_mask_of_another_size_names_both(folder, tmp_path):
    (tmp_path / "truth").mkdir()
    Image.new("L", (5, 4), 255).save(tmp_path / "truth/a.png")
    found = unlabelled(folder / "a.png", tmp_path / "truth")
    with pytest.raises(DataError, match=r"'a\.png' of 5 x 4 pixels; expected 12 x 8"):
        found.mask(0)
