"""One way in: what is recognised, what is refused, and the part that a limit leaves."""

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from vitreous.base.errors import DataError, SettingError, UnknownName, VitreousError
from vitreous.data import ArraySamples, OpenOnce, open_data, quarantine
from vitreous.data.samples import balanced, pixel_statistics


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("ant", "bee"):
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            for k in range(4):
                pixels = rng.integers(0, 256, (6, 9, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / label / f"{k}.png")
    return tmp_path / "photos"


def test_cutouts_with_options():
    data = open_data("cutouts:size=24,classes=4,train=40,test=8,correlation=0.5", seed=7)
    assert (len(data.train), len(data.tests["swapped"]), data.image_size) == (40, 8, (24, 24))
    again = open_data("cutouts:classes=4,train=40,test=8,correlation=0.5", seed=7, image_size=24)
    np.testing.assert_array_equal(again.train.images, data.train.images)
    other = open_data("cutouts:size=24,classes=4,train=40,test=8,correlation=0.5", seed=8)
    assert not np.array_equal(other.train.images, data.train.images)


@pytest.mark.parametrize("options", [{}, {"image_size": 12}])
def test_opened_once_it_is_for_each_seed_what_it_would_have_been(photos, monkeypatch, options):
    decoded, examined = [], quarantine.examined
    monkeypatch.setattr(quarantine, "examined", lambda *given: (decoded.append(given[1]), examined(*given))[1])
    opening = OpenOnce()
    for seed, limit in [(0, 4), (1, 4), (2, None), (3, 2)]:
        once = opening(str(photos), seed=seed, limit=limit, **options)
        assert len(decoded) == len(set(decoded)) == 16
        found = open_data(str(photos), seed=seed, limit=limit, **options)
        del decoded[16:]
        assert once.train.names == found.train.names
        assert (once.image_size, once.mean, once.quarantined) == (found.image_size, found.mean, found.quarantined)
    made = "cutouts:size=16,train=12,test=4"
    for seed in (0, 1, 1):
        np.testing.assert_array_equal(opening(made, seed=seed).train.images, open_data(made, seed=seed).train.images)
    assert opening(str(photos), image_size=24).image_size == (24, 24)


def test_a_folder_by_its_path(photos):
    data = open_data(str(photos), image_size=48)
    assert (data.name, data.classes, data.image_size) == ("photos", ("ant", "bee"), (48, 48))
    assert open_data(str(photos)).image_size == (6, 9)
    data.train.transform = create_transform(48, mean=data.mean, std=data.std)
    assert data.train[0][0].shape == (3, 48, 48)


@pytest.mark.parametrize("count", [10, 100])
def test_cifar_classes_are_counted(photos, count):
    with pytest.raises(DataError, match=f"Found 2 classes .* expected the {count} of cifar{count}"):
        open_data(f"cifar{count}:{photos}")


def test_idx_files_by_their_path(shared_data):
    data = open_data(str(shared_data / "fashion-mnist"), limit=100, seed=1)
    assert data.name == "fashion-mnist"
    assert np.bincount(data.train.labels).tolist() == [10] * 10
    assert len(data.tests["test"]) == 10_000
    assert data.classes[9] == "Ankle boot"


def test_idx_files_of_another_set_are_not_called_clothes(tmp_path):
    for stem, n in (("train", 12), ("t10k", 6)):
        images, labels = np.zeros((n, 4, 5), np.uint8), np.arange(n, dtype=np.uint8) % 3
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(k.to_bytes(4, "big") for k in array.shape)
            (tmp_path / f"{stem}-{kind}-ubyte").write_bytes(head + array.tobytes())
    data = open_data(str(tmp_path))
    assert (data.name, data.classes, data.image_size) == (tmp_path.name, ("0", "1", "2"), (4, 5))
    assert open_data(f"fashion-mnist:{tmp_path}").classes[0] == "T-shirt/top"  # as its user says


@pytest.mark.parametrize(
    ("spec", "error", "found"),
    [
        ("cutout", UnknownName, "Did you mean 'cutouts'"),
        ("fashion_mnist", UnknownName, "Did you mean 'fashion-mnist'"),
        ("imagenet", UnknownName, "path of a folder"),
        ("", UnknownName, "data set ''"),
        ("cutouts:sise=32", UnknownName, "Did you mean 'size'"),
        ("cutouts:seed=1", UnknownName, "setting of its own"),
        ("cutouts:size=big", SettingError, "Found 'size=big'"),
        ("cutouts:size", SettingError, "Found 'size'"),
        ("cutouts:size=8", SettingError, "size 8"),
        ("cifar10", DataError, "Write cifar10:FOLDER"),
        ("cifar10:/no/such/place", DataError, "Found nothing at '/no/such/place'"),
        ("/no/such/place", DataError, "Found nothing at '/no/such/place'"),
    ],
)
def test_what_is_refused(spec, error, found):
    with pytest.raises(error, match=found):
        open_data(spec)


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "a.tar").write_bytes(b"not a tar")
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    for name in ("a.zip", "a.tar", "a.npz"):
        with pytest.raises(DataError, match="expected"):
            open_data(str(tmp_path / name))


def test_sizes_that_contradict():
    with pytest.raises(SettingError, match="expected one size"):
        open_data("cutouts:size=32", image_size=48)
    with pytest.raises(SettingError, match="image_size=0"):
        open_data("cutouts", image_size=0)


@pytest.mark.parametrize("limit", [3, 7, 20, 1000])
def test_balanced_takes_the_classes_in_turn(limit):
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [50, 30, 4]))
    chosen = balanced(labels, limit, seed=2)
    counts = np.bincount(labels[chosen], minlength=3)
    assert len(set(chosen)) == len(chosen) == min(limit, len(labels))
    wanted = [0, 0, 0]  # deal one to each class that has any left, until the limit
    while sum(wanted) < min(limit, len(labels)):
        least = min((w for w, have in zip(wanted, (50, 30, 4), strict=True) if w < have))
        wanted[next(k for k, have in enumerate((50, 30, 4)) if wanted[k] == least and least < have)] += 1
    assert sorted(counts - wanted) in ([0, 0, 0], [-1, 0, 1])  # which class has the odd one out is drawn
    np.testing.assert_array_equal(chosen, balanced(labels, limit, seed=2))
    assert set(balanced(labels, 3, seed=2)) <= set(chosen)


def test_limit_below_the_classes():
    with pytest.raises(VitreousError, match="each of the 6 classes"):
        open_data("cutouts:train=60,test=6", limit=5)


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_equal_numpy(channels):
    images = np.random.default_rng(0).integers(0, 200, (5, 7, 6, channels), np.uint8)
    mean, std = pixel_statistics(images)
    assert mean == pytest.approx((images / 255).mean((0, 1, 2)), abs=1e-4)
    assert std == pytest.approx((images / 255).std((0, 1, 2)), abs=1e-4)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 4), (3, 8, 8, 3)])
def test_arrays_that_are_no_images(shape):
    with pytest.raises(DataError, match="expected"):
        ArraySamples(np.zeros(shape, np.uint8), [0] * 4)
