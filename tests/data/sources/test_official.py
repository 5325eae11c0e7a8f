"""Published fine-grained sets: miniature copies of their archives, read as the big ones would be."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.io
from PIL import Image

from data.made import encoded, picture, write
from vitreous.base.errors import DataError
from vitreous.data.decoding import Cropped, decode
from vitreous.data.open import open_data
from vitreous.data.sources.official import LAYOUTS, list_official
from vitreous.data.sources.unlabelled import unlabelled
from vitreous.data.validate import check_data
from vitreous.train.records.reproducibility import manifest

BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross")


def text(lines) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def votes() -> np.ndarray:
    """How many of five annotators marked each pixel (12, 16), in fifths of white, and by nobody all five."""
    counts = np.zeros((12, 16), np.uint8)
    counts[2:10, 2:14], counts[3:9, 4:12], counts[5:7, 6:10] = 1, 3, 4
    return counts * 51


def make_cub(root, beside: bool = False):
    """Four birds; the masks of three in segmentations/, in the folder or beside it."""
    names = [f"{BIRDS[k // 2]}/Bird_{k}_{k}.jpg" for k in range(4)]
    files = {f"CUB_200_2011/images/{name}": picture(k, kind="JPEG") for k, name in enumerate(names)}
    lists = {
        "images": [f"{k + 1} {name}" for k, name in enumerate(names)],
        "classes": [f"{k + 1} {name}" for k, name in enumerate(BIRDS)],
        "image_class_labels": ["1 1", "2 1", "3 2", "4 2"],
        "train_test_split": ["1 1", "2 0", "3 1", "4 0"],
        "bounding_boxes": ["1 1.0 1.0 5.0 5.0", "2 1.0 1.0 5.0 5.0", "3 1.0 1.0 5.0 5.0", "4 2.0 3.5 14.0 9.0"],
    }
    files |= {f"CUB_200_2011/{name}.txt": text(lines) for name, lines in lists.items()}
    where = "" if beside else "CUB_200_2011/"
    greys = Image.fromarray(votes())
    for mode, name in zip(("L", "LA", "RGB"), names, strict=False):  # the archive has greys of several kinds
        files[f"{where}segmentations/{name[:-4]}.png"] = encoded(greys.convert(mode))
    return write(root, files)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_cub(tmp_path, beside, inside):
    make_cub(tmp_path, beside)
    data = open_data(f"cub-200-2011:{tmp_path / 'CUB_200_2011' if inside else tmp_path}")
    assert (data.name, data.classes, data.quarantined) == ("cub-200-2011", BIRDS, ())
    assert data.train.names == [f"{BIRDS[0]}/Bird_0_0.jpg", f"{BIRDS[1]}/Bird_2_2.jpg"]
    assert data.tests["test"].names == [f"{BIRDS[0]}/Bird_1_1.jpg", f"{BIRDS[1]}/Bird_3_3.jpg"]
    assert data.train.labels.tolist() == data.tests["test"].labels.tolist() == [0, 1]
    for mask in (data.train.mask(0), data.train.mask(1), data.tests["test"].mask(0)):
        np.testing.assert_array_equal(mask, votes() >= 3 * 51)
    box = data.tests["test"].mask(1)  # without a segmentation; it reaches half a pixel below the image
    assert box[3:, 2:].all()
    assert box.sum() == 9 * 14


def test_cub_masks_serve_a_look_at_its_images(tmp_path):
    top = make_cub(tmp_path) / "CUB_200_2011"
    certain = votes()
    certain[5, 6] = 255  # five votes in one pixel alone
    (top / f"segmentations/{BIRDS[0]}/Bird_1_1.png").write_bytes(encoded(Image.fromarray(certain)))
    images = unlabelled(top / "images", top / "segmentations")
    np.testing.assert_array_equal(images.mask(1), certain > 127)


def test_a_damaged_segmentation_is_a_problem_of_its_own(tmp_path):
    top = make_cub(tmp_path) / "CUB_200_2011"
    path = top / f"segmentations/{BIRDS[0]}/Bird_0_0.png"
    path.write_bytes(path.read_bytes()[:60])
    problems = [problem for problem in check_data(f"cub-200-2011:{top}").problems if problem.kind == "mask"]
    assert [problem.file for problem in problems] == [f"segmentations/{BIRDS[0]}/Bird_0_0.png"]
    assert "cannot be" in problems[0].what


@pytest.mark.parametrize(
    ("file", "lines", "expected"),
    [
        ("train_test_split", None, r"no train_test_split.txt in .*as the archive has it"),
        ("train_test_split", ["1 1", "2 0", "3 1", "4 2"], "'2' for image 4 .* 1 or 0"),
        ("image_class_labels", ["1 1", "2 1", "3 2"], "no line '4' in image_class_labels.txt"),
        ("image_class_labels", ["1 1", "2 1", "3 2", "4 7"], "no line '7' in classes.txt"),
        ("bounding_boxes", ["4 2 3 left 9"], r"box \['2', '3', 'left', '9'\]"),
        ("bounding_boxes", ["4 2 3"], "'4 2 3' in line 1 .* 5 cells"),
        ("images", ["1 ../../away.jpg"], "away.jpg', which leads out"),
    ],
)
def test_cub_with_a_list_that_does_not_fit(tmp_path, file, lines, expected):
    path = make_cub(tmp_path) / "CUB_200_2011" / f"{file}.txt"
    path.unlink() if lines is None else path.write_bytes(text(lines))
    with pytest.raises(DataError, match=expected):
        list_official("cub-200-2011", tmp_path)


def make_aircraft(root):
    """Variants with spaces and slashes in their names; red images above a black banner of 20 rows."""
    image = np.zeros((40, 30, 3), np.uint8)
    image[:20, :, 0] = 255
    parts = {
        "train": ["0000001 A340-300", "0000002 F/A-18"],
        "val": ["0000003 Eurofighter Typhoon", "0000004 A340-300"],
        "test": ["0000005 F/A-18", "0000006 Eurofighter Typhoon", "0000007 A340-300"],
    }
    data = "fgvc-aircraft-2013b/data"
    files = {f"{data}/images_variant_{part}.txt": text(lines) for part, lines in parts.items()}
    files[f"{data}/variants.txt"] = text(["F/A-18", "A340-300", "Eurofighter Typhoon"])
    files[f"{data}/images_box.txt"] = text(f"000000{k} 3 5 30 39" for k in range(1, 8))
    for k in range(1, 8):
        image[0, 0] = k
        files[f"{data}/images/000000{k}.jpg"] = encoded(Image.fromarray(image), "JPEG", quality=95)
    return write(root, files)


def test_aircraft(tmp_path):
    make_aircraft(tmp_path)
    data = open_data(f"fgvc-aircraft:{tmp_path}")
    assert data.classes == ("A340-300", "Eurofighter Typhoon", "F/A-18")
    assert [len(data.train), len(data.tests["test"])] == [4, 3]
    assert data.train.labels.tolist() == [0, 2, 1, 0]
    assert any("Class order" in line and "itself has F/A-18, A340-300" in line for line in data.remarks)
    for i in range(4):
        pixels = np.asarray(data.train.image(i)).astype(int)
        assert pixels.shape == (20, 30, 3)  # without the banner
        assert pixels[4:16, :, 0].min() > 200
        expected = np.zeros((20, 30), bool)
        expected[4:, 2:] = True  # pixels are counted from 1, and the box reached into the banner
        np.testing.assert_array_equal(data.train.mask(i), expected)
    assert data.image_size == (20, 30)
    image = tmp_path / "fgvc-aircraft-2013b/data/images/0000001.jpg"
    assert manifest(data)[0] == ("train", "0000001.jpg", "0", f"{image.stat().st_size} bytes")


def test_an_image_of_nothing_but_its_banner_is_quarantined(tmp_path):
    top = make_aircraft(tmp_path)
    flat = encoded(Image.new("RGB", (30, 20)), "JPEG")
    (top / "fgvc-aircraft-2013b/data/images/0000004.jpg").write_bytes(flat)
    data = open_data(f"fgvc-aircraft:{top}")
    assert [(bad.file, bad.reason) for bad in data.quarantined] == [
        ("0000004.jpg", "it has 20 rows of pixels, of which the last 20 do not count")
    ]
    with pytest.raises(DataError, match="last 20 do not count"):
        decode(Cropped(top / "fgvc-aircraft-2013b/data/images/0000004.jpg", 20), "0000004.jpg", 3)


CARS = ("AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012")


def records(entries, kinds):
    """What MATLAB stores of an array of structs."""
    table = np.zeros((1, len(entries)), [(name, object) for name in kinds])
    for k, entry in enumerate(entries):
        table[0, k] = tuple(entry[name] for name in kinds)
    return table


def make_cars(root, layout: str):
    """Two cars to train on and two to test, in the layout with a devkit or with one file of annotations."""
    root.mkdir(parents=True, exist_ok=True)
    kinds = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class"]
    entries = [{"bbox_x1": 3, "bbox_y1": 2, "bbox_x2": 17, "bbox_y2": 12, "class": 2 - k % 2, "test": k // 2} for k in range(4)]
    names = np.array([CARS], dtype=object)
    if layout == "one file":
        for k, entry in enumerate(entries, start=1):
            entry["relative_im_path"] = f"car_ims/00000{k}.jpg"
        annotations = records(entries, ["relative_im_path", *kinds, "test"])
        scipy.io.savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": names})
        return write(root, {f"car_ims/00000{k}.jpg": picture(k, kind="JPEG") for k in range(1, 5)})
    for k, entry in enumerate(entries):
        entry["fname"] = f"0000{k % 2 + 1}.jpg"
    (root / "devkit").mkdir()
    scipy.io.savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    for file, some, more in (
        ("devkit/cars_train_annos.mat", entries[:2], ["class"]),
        ("devkit/cars_test_annos.mat", entries[2:], []),
        (f"{layout}cars_test_annos_withlabels.mat", entries[2:], ["class"]),
    ):
        scipy.io.savemat(root / file, {"annotations": records(some, [*kinds[:4], *more, "fname"])})
    files = {f"cars_{part}/0000{k}.jpg": picture(10 * k + len(part), kind="JPEG") for part in ("train", "test") for k in (1, 2)}
    return write(root, files)


@pytest.mark.parametrize("layout", ["one file", "", "devkit/"])
def test_cars(tmp_path, layout):
    make_cars(tmp_path / "stanford_cars", layout)
    data = open_data(f"stanford-cars:{tmp_path}")
    assert data.classes == CARS
    assert data.train.labels.tolist() == data.tests["test"].labels.tolist() == [1, 0]
    folder = "car_ims/00000" if layout == "one file" else "cars_train/0000"
    assert data.train.names == [f"{folder}1.jpg", f"{folder}2.jpg"]
    mask = data.train.mask(0)
    assert mask[1:, 2:].all()
    assert mask.sum() == 11 * 14  # one column reached beyond the image


def test_cars_without_the_labels_of_the_test_part(tmp_path):
    top = make_cars(tmp_path, "")
    (top / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DataError, match=r"no cars_test_annos_withlabels\.mat.*as the archive has it"):
        list_official("stanford-cars", top)
    (top / "devkit/cars_test_annos.mat").rename(top / "cars_test_annos_withlabels.mat")
    with pytest.raises(DataError, match=r"no class in the annotations of .*use cars_test_annos_withlabels\.mat"):
        list_official("stanford-cars", top)
    (top / "devkit/cars_train_annos.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(DataError, match=r"cars_train_annos\.mat', in which annotations cannot be read"):
        list_official("stanford-cars", top)


def test_cars_with_classes_of_another_archive(tmp_path):
    top = make_cars(tmp_path, "")
    scipy.io.savemat(top / "devkit/cars_meta.mat", {"class_names": np.array([CARS[:1]], dtype=object)})
    with pytest.raises(DataError, match=r"class 2 of 'cars_train/00001.jpg'; expected 1 to 1"):
        list_official("stanford-cars", top)


def make_food(root):
    """Two dishes; files that no list names are no part of the set, and one training image is cut short."""
    files = {
        f"food-101/images/{dish}/{k}.jpg": picture(k, kind="JPEG") for dish in ("apple_pie", "steak") for k in range(10, 14)
    }
    files = {name: picture(i, kind="JPEG") for i, name in enumerate(files)}
    files["food-101/images/steak/11.jpg"] = files["food-101/images/steak/11.jpg"][:200]
    files |= {
        "food-101/meta/train.txt": text(["apple_pie/10", "apple_pie/11", "steak/10", "steak/11", "steak/404"]),
        "food-101/meta/test.txt": text(["apple_pie/12", "steak/12"]),
        "food-101/images/.DS_Store": b"",
    }
    return write(root, files)


def test_food(tmp_path):
    data = open_data(f"food-101:{make_food(tmp_path)}")
    assert data.classes == ("apple_pie", "steak")
    assert data.train.names == ["apple_pie/10.jpg", "apple_pie/11.jpg", "steak/10.jpg"]
    assert data.tests["test"].names == ["apple_pie/12.jpg", "steak/12.jpg"]
    assert [bad.file for bad in data.quarantined] == ["steak/11.jpg", "steak/404.jpg"]
    assert data.train.mask(0) is None


def test_food_with_lists_that_do_not_fit(tmp_path):
    top = make_food(tmp_path)
    (top / "food-101/meta/test.txt").write_bytes(text(["apple_pie"]))
    with pytest.raises(DataError, match=r"'apple_pie' in meta/test\.txt; expected a class and a number"):
        list_official("food-101", top)
    (top / "food-101/meta/test.txt").write_bytes(text(["steak/10"]))
    with pytest.raises(DataError, match=r"'steak/10\.jpg' twice"):
        list_official("food-101", top)


def test_data_check_reads_official_layouts(tmp_path):
    findings = check_data(f"cub-200-2011:{make_cub(tmp_path / 'birds')}")
    assert findings.problems == [p for p in findings.problems if p.kind == "class"]  # of one image each, as made
    assert findings.masks == 4
    assert findings.notes == {}
    assert findings.counts == {"train": dict.fromkeys(BIRDS, 1), "test": dict.fromkeys(BIRDS, 1)}
    planes = check_data(f"fgvc-aircraft:{make_aircraft(tmp_path / 'planes')}")
    assert planes.sizes == [(30, 20)] * 3
    assert {problem.kind for problem in planes.problems} <= {"class"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_that_holds_something_else(tmp_path, name):
    write(tmp_path, {"cat/1.png": picture(1)})
    with pytest.raises(DataError, match=f"Found no .* in .*layout of {name}.*Unpack it"):
        open_data(f"{name}:{tmp_path}")


@pytest.mark.parametrize("make", [make_cub, make_aircraft, make_food, partial(make_cars, layout="one file")])
def test_a_path_alone_is_recognised_by_the_layout(tmp_path, make):
    data = open_data(str(make(tmp_path)))
    assert data.name in LAYOUTS
    assert check_data(str(tmp_path)).name == data.name
