"""Named sets: their published file formats, against torchvision's readers and files written here byte by byte."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torchvision

from vitreous.base.errors import DataError
from vitreous.data.sources.named import CIFAR10, cifar, fashion_mnist, read_idx

RNG = np.random.default_rng(0)


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(head + array.tobytes())


def make_fashion(folder, suffix=".gz"):
    """Four idx files of 20 and 10 made images; returns the training images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, n in (("t10k", 10), ("train", 20)):
        images, labels = RNG.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10
        write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", labels)
    return images, labels


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_fashion_mnist_files(tmp_path, suffix, below):
    images, labels = make_fashion(tmp_path / below, suffix)
    data = fashion_mnist(tmp_path)
    assert (data.channels, data.image_size, len(data.train), len(data.tests["test"])) == (1, (28, 28), 20, 10)
    np.testing.assert_array_equal(data.train.images[..., 0], images)
    np.testing.assert_array_equal(data.train.labels, labels)
    np.testing.assert_array_equal(data.train.mask(3), images[3] > 0)
    assert data.train[3][0].mode == "L"
    assert data.mean == pytest.approx([images.mean() / 255], abs=1e-4)
    assert data.std == pytest.approx([images.std() / 255], abs=1e-4)


def test_fashion_mnist_equals_torchvision(shared_data, tmp_path):
    (tmp_path / "FashionMNIST").mkdir()
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir()
    for file in (shared_data / "fashion-mnist").glob("*.gz"):
        (raw / file.name.removesuffix(".gz")).write_bytes(gzip.decompress(file.read_bytes()))
    data = fashion_mnist(shared_data / "fashion-mnist")
    for train, ours in ((True, data.train), (False, data.tests["test"])):
        theirs = torchvision.datasets.FashionMNIST(tmp_path, train=train)
        np.testing.assert_array_equal(ours.images[..., 0], theirs.data.numpy())
        np.testing.assert_array_equal(ours.labels, theirs.targets.numpy())
        assert list(data.classes) == theirs.classes
    assert (data.mean, data.std) == ((0.286,), (0.353,))  # the published statistics


def damage_magic(path):
    path.write_bytes(gzip.compress(b"\0\0\x0d\x03" + bytes(100)))


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def damage_short(path):
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[:-1]))


def damage_long(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"x"))


def damage_header_lies(path):
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + bytes(100)))


def damage_count(path):
    write_idx(path, np.zeros((19, 28, 28), np.uint8))


def damage_not_gzip(path):
    path.write_bytes(b"<html>404 not found</html>")


def damage_missing(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (damage_magic, "beginning with 00 00 0d 03"),
        (damage_cut, "cannot be read"),
        (damage_short, "15679 bytes"),
        (damage_long, "more than 15680 bytes"),
        (damage_header_lies, "Found 100 bytes"),
        (damage_count, "19 images .* and 20 labels"),
        (damage_not_gzip, "cannot be read"),
        (damage_missing, "Found no train-images"),
    ],
)
def test_damaged_idx_is_named(tmp_path, damage, found):
    make_fashion(tmp_path)
    damage(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=found):
        fashion_mnist(tmp_path)


def test_idx_labels_out_of_range(tmp_path):
    make_fashion(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.full(20, 10, np.uint8))
    with pytest.raises(DataError, match="labels 10 to 10"):
        fashion_mnist(tmp_path)
    with pytest.raises(DataError, match="2 axes"):
        read_idx(tmp_path / "train-labels-idx1-ubyte.gz", axes=2)


def make_python_cifar(root, reader, monkeypatch, fine):
    """The pickled batches in their true form, 4 images each; torchvision's MD5s are set to those of the made files."""
    folder = root / reader.base_folder
    folder.mkdir()
    names = CIFAR10 if fine == "labels" else tuple(f"class {k}" for k in range(100))
    images = []

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name):
        pixels = RNG.integers(0, 256, (4, 3072), np.uint8)
        images.append(pixels.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1))
        return [name, write(name, {"data": pixels, fine: [0, 1, 2, 9]})]

    monkeypatch.setattr(reader, "train_list", [batch(name) for name, _ in reader.train_list])
    monkeypatch.setattr(reader, "test_list", [batch(name) for name, _ in reader.test_list])
    meta = reader.meta | {"md5": write(reader.meta["filename"], {reader.meta["key"]: list(names)})}
    monkeypatch.setattr(reader, "meta", meta)
    return np.concatenate(images[:-1]), names


@pytest.mark.parametrize(
    ("name", "reader", "fine"),
    [
        ("cifar10", torchvision.datasets.CIFAR10, "labels"),
        ("cifar100", torchvision.datasets.CIFAR100, "fine_labels"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_python(tmp_path, monkeypatch, name, reader, fine, inside):
    images, classes = make_python_cifar(tmp_path, reader, monkeypatch, fine)
    data = cifar(name, tmp_path / reader.base_folder if inside else tmp_path)
    np.testing.assert_array_equal(data.train.images, images)
    assert data.train.labels.tolist() == [0, 1, 2, 9] * (len(images) // 4)
    assert (data.classes, data.channels, data.image_size) == (classes, 3, (32, 32))


def test_cifar_pickle_of_unknown_origin_does_not_run(tmp_path, monkeypatch):
    make_python_cifar(tmp_path, torchvision.datasets.CIFAR10, monkeypatch, "labels")
    trace = tmp_path / "it ran"

    class Payload:
        def __reduce__(self):
            return open, (str(trace), "w")

    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataError, match="can run code"):
        cifar("cifar10", tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "folder", "label_bytes", "files", "names_file"),
    [
        (
            "cifar10",
            "cifar-10-batches-bin",
            1,
            [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"],
            "batches.meta.txt",
        ),
        ("cifar100", "cifar-100-binary", 2, ["train.bin", "test.bin"], "fine_label_names.txt"),
    ],
)
def test_cifar_binary(tmp_path, name, folder, label_bytes, files, names_file):
    (tmp_path / folder).mkdir()
    pixels = RNG.integers(0, 256, (len(files), 3, 3072), np.uint8)
    for file, part in zip(files, pixels, strict=True):
        records = b"".join(bytes([7] * (label_bytes - 1) + [k]) + part[k].tobytes() for k in range(3))
        (tmp_path / folder / file).write_bytes(records)
    count = 10 if name == "cifar10" else 100
    (tmp_path / folder / names_file).write_text("\n".join(f"class{k}" for k in range(count)) + "\n\n")
    data = cifar(name, tmp_path)
    assert data.train.labels.tolist() == [0, 1, 2] * (len(files) - 1)
    for channel in range(3):  # planes: red first, rows after one another
        assert data.train.images[1, 2, 5, channel] == pixels[0, 1, channel * 1024 + 2 * 32 + 5]
    (tmp_path / folder / files[0]).write_bytes(records[:-1])
    with pytest.raises(DataError, match="whole records"):
        cifar(name, tmp_path)


def write_npz(path, **change):
    arrays = (
        dict(
            x_train=RNG.integers(0, 256, (20, 32, 32, 3), np.uint8),
            y_train=np.arange(20) % 10,
            x_test=RNG.integers(0, 256, (10, 32, 32, 3), np.uint8),
            y_test=np.arange(10),
            classes=np.array(CIFAR10),
        )
        | change
    )
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def test_cifar_npz(tmp_path):
    arrays = write_npz(tmp_path / "a.npz")
    data = cifar("cifar10", tmp_path / "a.npz")
    np.testing.assert_array_equal(data.tests["test"].images, arrays["x_test"])
    np.testing.assert_array_equal(np.asarray(data.train.image(7)), arrays["x_train"][7])
    assert data.train.labels.tolist() == arrays["y_train"].tolist()
    assert data.classes == CIFAR10


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"y_test": None}, "expected also y_test"),
        ({"y_train": np.arange(19) % 10}, "20 images and 19 labels"),
        ({"x_train": np.zeros((20, 32, 32, 3), np.float32)}, "float32"),
        ({"classes": np.array(CIFAR10, object)}, "plain arrays"),
        ({"classes": np.array(["a", "b"])}, "labels 0 to 9"),
        ({"y_train": np.arange(20) - 5}, "labels -5 to 14"),
    ],
)
def test_bad_npz_is_named(tmp_path, change, found):
    write_npz(tmp_path / "a.npz", **change)
    with pytest.raises(DataError, match=found):
        cifar("cifar10", tmp_path / "a.npz")


def test_cut_npz_is_named(tmp_path):
    write_npz(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot be read"):
        cifar("cifar10", tmp_path / "a.npz")


def test_cifar_real_files(shared_data):
    data = cifar("cifar10", shared_data / "cifar10" / "cifar10_5k2k.npz")
    assert data.classes == CIFAR10
    assert np.bincount(data.train.labels).tolist() == [500] * 10
    assert np.bincount(data.tests["test"].labels).tolist() == [200] * 10


def test_download_without_a_network_says_so(tmp_path, monkeypatch):
    import urllib.error
    import urllib.request

    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DataError, match="no way to download FashionMNIST"):
        fashion_mnist(tmp_path, download=True)
    with pytest.raises(DataError, match="no way to download CIFAR100"):
        cifar("cifar100", tmp_path, download=True)
