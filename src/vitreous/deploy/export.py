"""Export: a model as a file that others run, and the proof that it computes the same."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitreous.base.environment import versions
from vitreous.base.errors import DataError, GraftError, HostError, SettingError
from vitreous.base.files import check_new, writable, write, write_text
from vitreous.data.preprocess import Preprocess
from vitreous.data.problems import order_remark, shown
from vitreous.deploy import formats
from vitreous.folding import fold as fold_grafts
from vitreous.grafting import check, grafts, new_parameters
from vitreous.models.classes import activation, names_of
from vitreous.models.load import logits_of, open_images, prepared

FORMAT = 1
SEEDED = 4  # images of normal noise, as one batch, and the first of them alone
GIVEN = 16  # at most, of the images given
FORMATS = Literal["onnx", "torch-export", "timm"]
PRECISIONS = Literal["float", "half", "int8"]
TAGS = {  # of a mechanism: without it, the format cannot hold the model, and why
    "onnx": ("onnx", "it uses operators that ONNX does not have"),
    "torch-export": ("static_shapes", "its number of tokens depends on the image"),
}


def export(
    model: nn.Module,
    path: str | Path,
    to: FORMATS,
    *,
    images: Sequence[str | Path] = (),
    tolerance: float = 1e-4,
    precision: PRECISIONS = "float",
    fold: bool = False,
) -> dict[str, Any]:
    """Write the model (eval mode, on the CPU) in the format `to`; returns its report.

    The file is read back as its users will read it and compared on seeded noise and on `images`;
    parity["largest"] is the largest difference of a logit. precision: of an ONNX file; its parity
    is that of the float file, with which report["agreement"] compares the narrow one. fold: write
    what the grafts compute into the host's weights (`vitreous.fold`), on a copy; parity is with the
    model as it was given. Raises DataError beyond the tolerance, and leaves nothing then;
    HostError, GraftError for models that cannot be written, or not be folded.
    """
    path, is_folder = Path(path), to == "timm"
    report_path = path / "export.json" if is_folder else path.with_name(path.name + ".json")
    for new in (path,) if is_folder else (path, report_path):
        check_new(new)
    if not 0 < tolerance < 1:
        raise SettingError(f"Found --tolerance {tolerance}. Expected more than 0, and below 1. Give for example 1e-4.")
    if precision != "float" and to != "onnx":
        raise SettingError(
            f"Found --precision {precision} for {to}. Expected it for onnx, whose runtime has half and int8. Leave it out."
        )
    if to == "onnx":
        formats.check_onnx()
    given = model
    if fold:
        model = folded(model)
    check_mechanisms(model, to)
    check_precision(model)
    metadata = metadata_of(model) | ({} if precision == "float" else {"precision": precision})
    samples = samples_of(model, images)
    check(model, samples["seeded"][:1])
    report = {"format": FORMAT, "to": to, **metadata, "remarks": order_remark(metadata["classes"]) if metadata["named"] else []}
    report |= {"folded": [str(record.mechanism) for record in grafts(given)]} if fold else {}

    def write_report(place: Path) -> None:
        write_text(place, json.dumps(report, indent=2) + "\n")

    def writer(temporary: Path) -> None:
        write_model, reader = formats.WRITERS[to]
        report.update(write_model(model, temporary, metadata))
        reference = formats.plain(model)[0] if is_folder and not fold else given
        run = reader(temporary)
        report["parity"] = parity(reference, run, samples, report["batch"], tolerance)
        if precision != "float":
            formats.narrow(temporary, precision)
            report["agreement"] = agreement(run, reader(temporary), samples, report["batch"])
        if is_folder and grafts(model):
            report["without_mechanisms"] = removal_effect(model, reference, samples)
        report["bytes"] = sum(file.stat().st_size for file in (temporary.iterdir() if is_folder else [temporary]))
        if is_folder:
            write_report(temporary / report_path.name)
        else:
            report["sha256"] = hashlib.sha256(temporary.read_bytes()).hexdigest()

    with writable(path):
        if is_folder:
            write_whole_folder(path, writer)
            return report
        write(path, writer)
        try:
            write_report(report_path)
        except BaseException:
            path.unlink()  # a file without its report would pass for one that was compared
            raise
    return report


def folded(model: nn.Module) -> nn.Module:
    """A copy in which every graft is folded into the host. Raises GraftError if one cannot be."""
    copied = copy.deepcopy(model)
    fold_grafts(copied, all=True)
    return copied


def check_mechanisms(model: nn.Module, to: str) -> None:
    """Raise GraftError for a mechanism that the format cannot hold, by its tags."""
    if to not in TAGS:
        return
    tag, reason = TAGS[to]
    wrong = [str(record.mechanism) for record in grafts(model) if not getattr(record.mechanism, tag)]
    if wrong:
        raise GraftError(
            f"Found {', '.join(wrong)} in the model, whose tag says {tag} = False: {reason}. Expected mechanisms that can be "
            f"written as {to}. Take them out with --to timm, or choose another format."
        )


def check_precision(model: nn.Module) -> None:
    """Raise HostError for a model in another precision than the images it is compared on."""
    others = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if others:
        raise HostError(
            f"Found parameters of {', '.join(sorted(others))}. Expected torch.float32, in which files are compared. "
            "Export model.float()."
        )


def metadata_of(model: nn.Module) -> dict[str, Any]:
    """What a file says of its model: classes in the order of logits, preparation, mechanisms."""
    inputs = Preprocess.of_model(model)
    if inputs is None:
        raise HostError(f"Found a {type(model).__name__} without a pretrained_cfg. Expected a timm model. Train one first.")
    return {
        "architecture": str(model.pretrained_cfg.get("architecture", type(model).__name__)),
        "classes": (classes := names_of(model)),
        "probabilities": activation(model, len(classes)),
        "named": bool(model.pretrained_cfg.get("label_names")),
        **inputs.config(),
        "mechanisms": [str(record.mechanism) for record in grafts(model)],
        "versions": versions(),
    }


def samples_of(model: nn.Module, images: Sequence[str | Path]) -> dict[str, Tensor]:
    """Pixels to compare on: "seeded" noise and, where there are some, "given" images.

    Each (B, C, h, w). Raises DataError.
    """
    size = Preprocess.of_model(model).input_size
    samples = {"seeded": torch.randn(SEEDED, *size, generator=torch.Generator().manual_seed(0))}
    if images:
        batch = next(prepared(open_images(model, images), GIVEN))
        broken = next((image for image in batch if image.pixels is None), None)
        if broken is not None:
            raise DataError(
                f"Found {shown(broken.name)}, which cannot be read: {shown(broken.reason)}. Expected whole images to compare "
                "on. Leave it out."
            )
        samples["given"] = torch.stack([image.pixels for image in batch])
    return samples


def parity(model: nn.Module, run: Callable, samples: dict[str, Tensor], batch: str | int, tolerance: float) -> dict[str, Any]:
    """Largest difference of logits between model and file per kind of sample.

    Raises DataError beyond the tolerance.
    """
    result: dict[str, Any] = {"tolerance": tolerance, "largest": 0.0}
    for kind, pixels in samples.items():
        parts = [pixels, pixels[:1]] if batch == "any" else list(pixels.split(1))
        differences = [(logits_of(run, part) - logits_of(model, part)).abs().max().item() for part in parts]
        result[kind] = {"images": len(pixels), "largest": max(differences)}
        result["largest"] = max(result["largest"], max(differences))
    if result["largest"] > tolerance:
        raise DataError(
            f"The file computes other logits than the model: the largest difference is {result['largest']:.3g}. Expected at "
            f"most {tolerance:g}. Nothing was written. Choose another format, or a --tolerance that you can answer for."
        )
    return result


def agreement(wide: Callable, narrow: Callable, samples: dict[str, Tensor], batch: str | int) -> dict[str, Any]:
    """How far logits and classes of a narrow file are from those of the float file."""
    result = {}
    for kind, pixels in samples.items():
        parts = [pixels] if batch == "any" else pixels.split(1)
        one, other = (torch.cat([logits_of(run, part) for part in parts]) for run in (wide, narrow))
        same = int((one.argmax(1) == other.argmax(1)).sum())
        result[kind] = {"images": len(pixels), "largest": (one - other).abs().max().item(), "same_class": same}
    return result


def removal_effect(model: nn.Module, host: nn.Module, samples: dict[str, Tensor]) -> dict[str, Any]:
    """What goes with the mechanisms: their parameters, and how far logits and classes change."""
    added = new_parameters(model)
    changes: dict[str, Any] = {"parameters": sum(p.numel() for p in added.values()), "tensors": len(added)}
    for kind, pixels in samples.items():
        with_them, without = logits_of(model, pixels), logits_of(host, pixels)
        same = (with_them.argmax(1) == without.argmax(1)).sum().item()
        largest = (with_them - without).abs().max().item()
        changes[kind] = {"images": len(pixels), "largest": largest, "same_class": same}
    return changes


def write_whole_folder(path: Path, writer: Callable[[Path], None]) -> None:
    """Let `writer` fill a temporary folder beside `path`, and give it that name in one step."""
    temporary = path.with_name(path.name + ".partial")
    if temporary.exists():
        raise SettingError(f"Found {temporary}, left by an export that was killed. Expected none. Delete it.")
    temporary.mkdir()
    try:
        writer(temporary)
        temporary.rename(path)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(temporary)
