"""Data sets with a name, from their published files: Fashion-MNIST, CIFAR-10, CIFAR-100."""

from __future__ import annotations

import gzip
import hashlib
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torchvision

from vitreous.base.errors import DataError
from vitreous.data.samples import ArraySamples, Data, pixel_statistics
from vitreous.data.sources.archives import is_archive
from vitreous.data.sources.folders import image_folder

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FASHION_LABELS = "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"  # sha256 of the test labels
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
READERS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
BINARY = {  # name: (train files, test file, label bytes before the pixels, of which the last one counts, classes)
    "cifar10": ([f"data_batch_{k}.bin" for k in range(1, 6)], "test_batch.bin", 1, 10),
    "cifar100": (["train.bin"], "test.bin", 2, 100),
}


def fashion_mnist(path: Path, *, download: bool = False) -> Data:
    """Fashion-MNIST from its four idx files, .gz or plain, in the folder or in its
    FashionMNIST/raw; masks are pixel > 0.
    """
    if download and not has_idx(path):
        _download(torchvision.datasets.FashionMNIST, path)
    return _data("fashion-mnist", _idx_sets(path), FASHION)


def idx_folder(path: Path) -> Data:
    """Any set in idx files named like MNIST's, whose labels tell Fashion-MNIST apart.

    The files do not say what they hold.
    """
    sets = _idx_sets(path)
    if hashlib.sha256(sets["test"].labels.astype(np.uint8).tobytes()).hexdigest() == FASHION_LABELS:
        return _data("fashion-mnist", sets, FASHION)
    count = max(images.labels.max(initial=0) for images in sets.values()) + 1
    return _data(path.resolve().name, sets, tuple(str(label) for label in range(count)))


def _idx_sets(path: Path) -> dict[str, ArraySamples]:
    sets = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        image_file, label_file = (_idx_file(path, f"{stem}-{kind}") for kind in ("images-idx3", "labels-idx1"))
        images, labels = read_idx(image_file, axes=3), read_idx(label_file, axes=1)
        if len(images) != len(labels):
            raise DataError(
                f"Found {len(images)} images in {str(image_file)!r} and {len(labels)} labels in "
                f"{str(label_file)!r}; expected as many of each. Fetch both again."
            )
        sets[part] = ArraySamples(images[..., None], labels, images > 0)
    return sets


def has_idx(path: Path) -> bool:
    """Whether a folder holds idx files under the names that MNIST gave them."""
    return any(next(folder.glob("train-images*idx3-ubyte*"), None) for folder in _idx_folders(path) if folder.is_dir())


def read_idx(path: Path, axes: int) -> np.ndarray:
    """A uint8 array of so many axes from an idx file: two zero bytes, type 8, the axes, their
    lengths (big-endian), data.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
                raise DataError(
                    f"Found {str(path)!r} beginning with {head[:4].hex(' ')}; expected 00 00 08 0{axes}, an "
                    f"idx file of bytes with {axes} axes. Fetch the file again."
                )
            shape = tuple(np.frombuffer(head, ">u4", offset=4).tolist())
            data = file.read(min(math.prod(shape), 1 << 33) + 1)  # never what a false header asks for
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"Found {str(path)!r}, which cannot be read ({error}); expected a whole idx file. "
            "It may be cut short: fetch it again."
        ) from error
    if len(data) != math.prod(shape):
        more = "more than " if len(data) > math.prod(shape) else ""
        raise DataError(
            f"Found {more}{min(len(data), math.prod(shape))} bytes in {str(path)!r}; expected "
            f"{math.prod(shape)} as its header says, {shape}. Fetch the file again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape).copy()  # bytes cannot be written to


def _idx_folders(path: Path) -> tuple[Path, ...]:
    return path, path / "FashionMNIST" / "raw"


def _idx_file(path: Path, stem: str) -> Path:
    names = [stem + end for end in ("-ubyte", "-ubyte.gz")]
    for folder in _idx_folders(path):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise DataError(
        f"Found no {' or '.join(names)} in {str(path)!r} or its FashionMNIST/raw; expected the four idx files "
        "of Fashion-MNIST. Give their folder, or download=True to fetch them."
    )


def cifar(name: str, path: Path, *, image_size: int | None = None, download: bool = False) -> Data:
    """CIFAR-10 or CIFAR-100 from Python or binary files, an .npz, or images.

    name: "cifar10" or "cifar100". Images are a tree or a tar.

    Python batches are pickles and can run code, so they are read only if they are the published
    files, by their MD5.
    """
    if path.suffix == ".npz":
        data = cifar_npz(name, path)
    elif is_archive(path) or (path.is_dir() and cifar_kind(path) is None and not download):
        data = image_folder(path, image_size=image_size)
    elif found := _binary_folder(name, path):
        data = _cifar_binary(name, found)
    else:
        data = _cifar_python(name, path, download)
    count = BINARY[name][3]
    if len(data.classes) != count:
        raise DataError(
            f"Found {len(data.classes)} classes in {str(path)!r}; expected the {count} of {name}. "
            "Give the path alone to read it as a set of your own."
        )
    return data


def cifar_kind(path: Path) -> str | None:
    """Name "cifar10" or "cifar100" where a folder holds its published files, Python or binary.

    Else None.
    """
    for name, reader in READERS.items():
        first = reader.train_list[0][0]
        if (path / reader.base_folder).is_dir() or (path.name == reader.base_folder and (path / first).is_file()):
            return name
        if _binary_folder(name, path):
            return name
    return None


def cifar_npz(name: str, path: Path) -> Data:
    """Arrays x_train, y_train, x_test, y_test and the names in `classes`.

    Images are (n, H, W, 1 or 3) uint8.
    """
    keys = ("x_train", "y_train", "x_test", "y_test", "classes")
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := set(keys) - set(file.files):
                raise DataError(
                    f"Found the arrays {', '.join(sorted(file.files))} in {str(path)!r}; expected also "
                    f"{', '.join(sorted(missing))}. Save the file with all five."
                )
            arrays = {key: file[key] for key in keys}
    except (OSError, ValueError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"Found {str(path)!r}, which cannot be read ({error}); expected a whole .npz file of plain arrays. "
            "Save it again, without Python objects."
        ) from error
    sets = {part: ArraySamples(arrays[f"x_{part}"], arrays[f"y_{part}"].ravel()) for part in ("train", "test")}
    return _data(name, sets, tuple(str(label) for label in arrays["classes"]))


def _binary_folder(name: str, path: Path) -> Path | None:
    first = BINARY[name][0][0]
    folder = "cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary"
    return next((where for where in (path, path / folder) if (where / first).is_file()), None)


def _cifar_binary(name: str, path: Path) -> Data:
    """Records of 1 or 2 label bytes and 3 x 32 x 32 pixels.

    CIFAR-10 has one label, CIFAR-100 two: coarse, fine.
    """
    train_files, test_file, label_bytes, count = BINARY[name]
    labels_file = path / ("batches.meta.txt" if name == "cifar10" else "fine_label_names.txt")
    sets = {}
    try:
        classes = tuple(filter(None, map(str.strip, labels_file.read_text().splitlines())))
        for part, names in (("train", train_files), ("test", [test_file])):
            raw = np.concatenate([np.fromfile(path / file, np.uint8) for file in names])
            records = raw.reshape(-1, label_bytes + 3072)
            images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            sets[part] = ArraySamples(np.ascontiguousarray(images), records[:, label_bytes - 1])
    except (OSError, ValueError) as error:
        raise DataError(
            f"Found {str(path)!r}, which cannot be read as {name} ({error}); expected {labels_file.name} and "
            f"whole records of {label_bytes + 3072} bytes. Unpack the archive again."
        ) from error
    return _data(name, sets, classes[:count])


def _cifar_python(name: str, path: Path, download: bool) -> Data:
    reader = READERS[name]
    root = path.parent if path.name == reader.base_folder else path
    if download:
        _download(reader, root)
    try:
        parts = {part: reader(root, train=part == "train") for part in ("train", "test")}
    except RuntimeError as error:  # torchvision: a file is missing, or its MD5 is not the published one
        raise DataError(
            f"Found no {reader.base_folder} in {str(root)!r} whose files are the published ones (by MD5); expected them, "
            "since a pickle of unknown origin can run code when it is read. Unpack the archive again, use the binary "
            "version, or download=True."
        ) from error
    return _data(name, {part: ArraySamples(s.data, s.targets) for part, s in parts.items()}, tuple(parts["train"].classes))


def _download(reader, root: Path) -> None:
    try:
        reader(str(root), download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise DataError(
            f"Found no way to download {reader.__name__} to {str(root)!r} ({error}); expected a network and room "
            "on the disk. Fetch the files by other means and give their folder."
        ) from error


def _data(name: str, sets: dict[str, ArraySamples], classes: tuple[str, ...]) -> Data:
    for part, images in sets.items():
        if not len(images) or images.labels.min() < 0 or images.labels.max() >= len(classes):
            labels = f"labels {images.labels.min()} to {images.labels.max()}" if len(images) else "no image"
            raise DataError(
                f"Found {labels} in the {part} part of {name}; expected labels 0 to {len(classes) - 1}. "
                "Check that the files belong to this set."
            )
    train = sets["train"]
    mean, std = pixel_statistics(train.images)
    return Data(
        name=name,
        train=train,
        tests={"test": sets["test"]},
        classes=classes,
        channels=train.channels,
        image_size=train.images.shape[1:3],
        mean=mean,
        std=std,
    )
