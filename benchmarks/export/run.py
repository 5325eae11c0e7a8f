"""What do grafts cost in onnxruntime? Plain, SVDA and SPC models, exported by `vitreous export`, timed against the plain host.

    python benchmarks/export/run.py        about 30 minutes on two cores

Each model goes through `vitreous.deploy.export.export`, which proves that the file gives the logits of the model; the
largest difference is in the row. Then onnxruntime runs the files in turns, two threads. Limits: SVDA at most 1.03 of plain;
SPC, 8 to 4 vectors after 11 blocks, at most 1.04 for ViT-Ti/16 and 1.02 for ViT-B/16. Weights are random: they do not change
the work. `--device cuda` needs the package onnxruntime-gpu in place of onnxruntime.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import timm
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from speed_common import Results, arguments  # noqa: E402

from vitreous import graft  # noqa: E402
from vitreous.deploy.export import export  # noqa: E402
from vitreous.mechanism import parse  # noqa: E402

MODELS = {"ViT-Ti/16": ("vit_tiny_patch16_224", 16), "ViT-B/16": ("vit_base_patch16_224", 4)}
GRAFTS = {"SVDA": "svda", "SPC after 11": "spc:after=11"}
LIMITS = {
    ("ViT-Ti/16", "SVDA"): 1.03,
    ("ViT-Ti/16", "SPC after 11"): 1.04,
    ("ViT-B/16", "SVDA"): 1.03,
    ("ViT-B/16", "SPC after 11"): 1.02,
}


def exported(name: str, mechanism: str | None, file: Path) -> float:
    """Write a model as ONNX; returns the largest difference of a logit from the model's own."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    if mechanism is not None:
        graft(model, parse(mechanism))
    return export(model, file, "onnx")["parity"]["largest"]


def runner(file: Path, batch: int, options: argparse.Namespace) -> Callable[[], object]:
    """One pass of a batch of seeded noise through the file."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    provider = "CPUExecutionProvider" if options.device == "cpu" else "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise SystemExit(f"Found an onnxruntime without {provider}. Expected the package onnxruntime-gpu. Install it.")
    session = onnxruntime.InferenceSession(file, settings, providers=[provider])
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).numpy()
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: images})


def arms(
    folder: Path, name: str, mechanism: str, batch: int, options: argparse.Namespace, found: dict[str, float]
) -> dict[str, Callable[[], object]]:
    """Both files of a row, written and opened; what they differ by from their models goes to `found`."""
    made = {}
    for word, text in (("graft", mechanism), ("plain", None)):
        file = folder / f"{name}-{mechanism.partition(':')[0]}-{word}.onnx"
        found[f"parity of {word}"] = exported(name, text, file)
        made[word] = runner(file, batch, options)
    return made


def main() -> None:
    more = {"rounds": {"type": int, "default": 60}, "only": {"default": "", "help": "a part of a cell's name"}}
    options = arguments(__doc__, **more)
    results = Results(HERE, options)
    for (kind, words), limit in LIMITS.items():
        name, batch = MODELS[kind]
        cell, found = f"{kind}, batch {batch}, {words}", {}
        if options.only not in cell:
            continue
        with tempfile.TemporaryDirectory() as folder:
            build = partial(arms, Path(folder), name, GRAFTS[words], batch, options, found)
            row = results.row(f"{words} in onnxruntime", cell, build, count=options.rounds, limit=limit, slack=0.01)
        row["more"] |= found
        results.write()


if __name__ == "__main__":
    main()
