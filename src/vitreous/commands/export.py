"""`vitreous export`: a model's file, and the proof that it computes the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from tyro import conf

from vitreous.commands import Command
from vitreous.commands._arguments import ModelOptions, TrainedModel


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """A model as a file that runs without Vitreous, proved to compute the same.


      onnx          one file for onnxruntime and others, with class names and how to prepare images
      torch-export  one .pt2 file for torch.export.load
      timm          a folder for timm.create_model("local-dir:..."), mechanisms taken out

    Beside the file stands PATH.json (in a folder: export.json): the largest difference of logits,
    size, versions. Beyond the tolerance nothing is left.

    examples:
      vitreous export runs/photos --to onnx --out photos.onnx --images new-photos/
      vitreous export runs/photos --to onnx --precision int8 --out photos.onnx
      vitreous export runs/photos --to timm --out photos-plain
    """

    usage: ClassVar[str] = "RUN"

    model: TrainedModel
    to: Literal["onnx", "torch-export", "timm"]
    """onnx | torch-export | timm."""
    out: str
    """File to write (timm: folder); it must be new, and appears whole or not at all."""
    images: tuple[str, ...] = ()
    """Images, folders or archives, of which the first 16 are compared, beside seeded noise."""
    tolerance: float = 1e-4
    """Largest difference of a logit that counts as the same."""
    precision: Literal["float", "half", "int8"] = "float"
    """Of an ONNX file: half the size, or a quarter with int8 weights of linear layers.
    Its classes are compared with those of the float file."""
    fold: bool = False
    """Write what adapters of linear layers (lora) learned into the weights: with --to timm a plain
    folder that computes the same."""
    source: conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    json: bool = False
    """Say what was done as one JSON object, for programs."""

    def run(self) -> None:
        from vitreous.base.files import check_new
        from vitreous.data.sources.unlabelled import check_paths
        from vitreous.deploy.export import export

        check_new(Path(self.out))
        check_paths(self.images)
        opening: list[str] = []
        model = self.source.open(self.model, opening.append)
        options = {"images": self.images, "tolerance": self.tolerance, "precision": self.precision}
        options |= {"fold": self.fold}
        report = export(model, self.out, self.to, **options)
        report["remarks"] = [*opening, *report["remarks"]]
        print(json.dumps(report, indent=2) if self.json else "\n".join(report_lines(report, self.out)))


def report_lines(report: dict[str, Any], path: str) -> list[str]:
    """The report for people."""
    parity = report["parity"]
    kinds = {"seeded": "seeded images of noise", "given": "given images"}
    here = [(parity[kind], words) for kind, words in kinds.items() if kind in parity]
    compared = [f"{part['largest']:.2g} over {part['images']} {words}" for part, words in here]
    lines = [f"Parity: largest difference of logits {', '.join(compared)} (tolerance {parity['tolerance']:g})"]
    if report["batch"] != "any":
        lines.append(f"One image at a time: a batch of any size cannot be exported ({report['batch_reason']})")
    if report.get("folded"):
        lines.append(f"Folded into the weights: {', '.join(report['folded'])}.")
    if without := report.get("without_mechanisms"):
        lines.append(
            f"Taken out: {', '.join(report['mechanisms'])}, with {without['parameters']:,} parameters. The network keeps the "
            "weights that it learned beside them."
        )
        lines += [
            f"Without: logits differ by up to {without[kind]['largest']:.2g}; {without[kind]['same_class']} of "
            f"{without[kind]['images']} {words} keep their class"
            for kind, words in kinds.items()
            if kind in without
        ]
    lines += [
        f"{report['precision']}: {part['same_class']} of {part['images']} {words} have the class of the float file; logits "
        f"differ by up to {part['largest']:.2g}"
        for kind, words in kinds.items()
        if (part := report.get("agreement", {}).get(kind))
    ]
    lines += report["remarks"]
    opset = f", opset {report['opset']}" if "opset" in report else ""
    batch = "any batch size" if report["batch"] == "any" else "batch size 1"
    lines.append(f"Done: {path} ({report['bytes'] / 1e6:,.1f} MB{opset}, {batch})")
    return lines
