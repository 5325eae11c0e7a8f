"""Checks of model folders from untrusted sources: config.json and the size of the network.

Weights come as .safetensors, whose header the reader checks against the file before any tensor is
made, or as a pickle that is read with `weights_only=True`; JSON is read by `base.files.read_json`.
Checked here: numbers that no network has, and an architecture that is far larger than the weights
beside it, which would fill the memory before anyone compares them.
"""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_parameter_registration_hook

from vitreous.base.errors import DataError
from vitreous.base.text_form import settings
from vitreous.mechanism import Mechanism

LARGEST = 100_000  # of a number in an architecture's arguments, and in a mechanism's settings but for seeds
CLASSES = 1_000_000
SIDE = 10_000  # pixels
TIMES = 4  # a network may make so many times the parameters that are there: layers are made anew while it is fitted
SLACK = 64  # and so many parameters more, of a thousand numbers each
CONSTANTS = 1 << 27  # numbers in buffers, which a file of weights may leave out: half a gigabyte
HEADERS = 16 << 20  # bytes of an archive beside its tensors
MODES = ("center", "squash", "border")
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")  # of transformers
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")


def check_config(config: dict[str, Any], path: Path) -> None:
    """Raise DataError unless a config.json has the types and ranges that timm and we rely on."""
    inner = config.get("pretrained_cfg", config)
    arguments, names = config.get("model_args", {}), config.get("label_names")
    if not isinstance(inner, dict) or not isinstance(arguments, dict):
        raise wrong(path, "pretrained_cfg or model_args", inner if not isinstance(inner, dict) else arguments, "an object")
    for key, value in arguments.items():
        for number in numbers(value):
            if not abs(number) <= LARGEST:
                raise wrong(path, key, number, f"at most {LARGEST:,}")
    checks = {
        "input_size": ("three whole numbers, channels and pixels", is_size),
        "mean": ("numbers, one per channel", is_vector),
        "std": ("numbers above 0, one per channel", lambda value: is_vector(value) and min(value) > 0),
        "crop_pct": ("a number above 0, at most 10", lambda value: is_number(value) and 0 < value <= 10),
        "crop_mode": (f"one of {', '.join(MODES)}", lambda value: value in MODES),
        "interpolation": (f"one of {', '.join(INTERPOLATIONS)}", lambda value: value in INTERPOLATIONS),
        "num_classes": (f"a whole number up to {CLASSES:,}", lambda value: is_whole(value, 0, CLASSES)),
        "label_names": ("a list of texts", is_names),
        "problem_type": (f"one of {', '.join(PROBLEMS)}", lambda value: value in PROBLEMS),
    }
    for record in (inner, config):
        for key, (expected, fits) in checks.items():
            if record.get(key) is not None and not fits(record[key]):
                raise wrong(path, key, record[key], expected)
    for key in ("mean", "std"):
        if inner.get(key) and len(inner[key]) not in (1, 3, (inner.get("input_size") or [3])[0]):
            raise wrong(path, key, inner[key], "one number per channel")
    names, count = names or inner.get("label_names"), config.get("num_classes", inner.get("num_classes"))
    if names and count and len(names) != count:
        raise wrong(path, "label_names", f"{len(names)} names", f"{count}, one for each class")


def check_mechanisms(mechanisms: Sequence[Mechanism], path: Path) -> None:
    """Raise DataError for a setting that would ask for more tensors than any model has."""
    for mechanism in mechanisms:
        for name in settings(type(mechanism)):
            value = getattr(mechanism, name)
            for number in value if isinstance(value, tuple) else (value,):
                if name != "seed" and isinstance(number, int | float) and not abs(number) <= LARGEST:
                    raise wrong(path, f"{mechanism.name}:{name}", number, f"at most {LARGEST:,}")


def check_archive(path: Path) -> None:
    """Raise ValueError for an archive whose contents are far larger than the file.

    Weights can hardly be compressed, so that such a file is made to fill the memory.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
        if total > 4 * path.stat().st_size + HEADERS:
            raise ValueError(f"unpacked it would have {total:,} bytes")


def check_network(tensors: dict[str, Tensor], where: str, name: str, **arguments: Any) -> None:
    """Build timm's network without memory for its weights, as a rehearsal.

    Raises DataError if it is far larger than these tensors. Other errors are left to the true
    build, whose messages name what to do.
    """
    try:
        with no_larger_than(tensors, where), torch.device("meta"):
            timm.create_model(name, **arguments)
    except DataError:
        raise
    except Exception:
        return


@contextmanager
def no_larger_than(tensors: dict[str, Tensor], where: str) -> Iterator[None]:
    """In the body, a network that outgrows these weights raises DataError while it is built.

    That is one with far more parameters, or huge buffers.
    """
    parameters, total = TIMES * (len(tensors) + SLACK), TIMES * (sum(map(Tensor.numel, tensors.values())) + 1000 * SLACK)
    made: Counter[str] = Counter()

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        made[kind] += 1
        made[f"numbers in {kind}"] += tensor.numel()
        if made["parameter"] > parameters or made["numbers in parameter"] > total or made["numbers in buffer"] > CONSTANTS:
            raise DataError(
                f"The weights in {where} do not fit the model. Found a far larger network described beside them. Expected the "
                "same names and shapes. Get config.json, mechanisms.json and the weights again, from one source."
            )

    handles = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- the parts ------------------------------------------------------------------------------------


def numbers(value: Any) -> Iterator[float]:
    """Every number in a tree of lists and objects."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(is_whole(side, 1, SIDE) for side in value)


def is_vector(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= SIDE and all(is_number(item) and abs(item) < 1e6 for item in value)


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and len(name) <= 1000 for name in value)


def wrong(path: Path, key: str, value: Any, expected: str) -> DataError:
    return DataError(f"Found {key} = {repr(value)[:100]} in {path}. Expected {expected}. Get the file again, or mend it.")
