"""The formats that a model is written in, each with a runner of its file.

A writer takes the model (eval mode, on the CPU), a path and the metadata that go into the file; it
returns what the report adds about the file. A runner takes the path and gives logits for pixels: it
reads the file as its users will, without Vitreous.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import re
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from vitreous.base.errors import DataError, HostError, SettingError, brief
from vitreous.data.preprocess import Preprocess
from vitreous.grafting import grafts, ungraft
from vitreous.models import model_folder
from vitreous.models.weights import first_items

PROTOBUF = 2_000_000_000  # bytes of weights; an .onnx file, which is one protobuf message, ends at 2 GiB
EXAMPLES = 2  # images in the batch that is traced: of one, an exporter could take the batch for a constant
IMAGES, LOGITS = "images", "logits"  # names of input and output in an ONNX file
Metadata = dict[str, Any]
Run = Callable[[Tensor], Tensor]


# -- torch.export ---------------------------------------------------------------------------------


def exported(model: nn.Module) -> tuple[torch.export.ExportedProgram, Metadata]:
    """The model as a program of any batch size, or where that cannot be, of one image.

    With it which of the two, and why. Raises HostError for a model that torch.export cannot follow.
    """
    size = Preprocess.of_model(model).input_size
    try:
        program = traced(model, torch.zeros(EXAMPLES, *size), {0: torch.export.Dim("batch")})
        return program, {"batch": "any"}
    except Exception as error:  # what a tracer can raise is not foreseeable
        reason = brief(error)
    try:
        return traced(model, torch.zeros(1, *size), None), {"batch": 1, "batch_reason": reason}
    except Exception as error:
        raise HostError(
            f"torch.export cannot follow this {type(model).__name__}: {brief(error)}. Expected a model without steps that "
            "depend on the data. Take its mechanisms out with --to timm, or choose another network."
        ) from error


def traced(model: nn.Module, images: Tensor, dynamic: dict | None) -> torch.export.ExportedProgram:
    """The program of a model; regions with an autocast of their own become plain steps.

    Such regions cannot be read back from a file. dynamic: the axes whose size is left open.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (images,), dynamic_shapes=None if dynamic is None else (dynamic,))
        if any(isinstance(module, torch.fx.GraphModule) for module in list(program.graph_module.modules())[1:]):
            program = program.run_decompositions({})
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names files of this machine
    return program


def write_program(model: nn.Module, path: Path, metadata: Metadata) -> Metadata:
    """A .pt2 file of `torch.export.save`, with the metadata as extra file vitreous.json."""
    program, batch = exported(model)
    file = io.BytesIO()  # by its path it would have to end in .pt2 while it is not whole yet
    torch.export.save(program, file, extra_files={"vitreous.json": json.dumps(metadata)})
    path.write_bytes(file.getbuffer())
    return batch


def run_program(path: Path) -> Run:
    program = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda pixels: program(pixels)


# -- ONNX -----------------------------------------------------------------------------------------


def write_onnx(model: nn.Module, path: Path, metadata: Metadata) -> Metadata:
    """An ONNX file; metadata as its own, text as it is and the rest as JSON.

    Raises HostError beyond what one file can hold.
    """
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > PROTOBUF:
        raise HostError(
            f"Found {size / 1e9:.1f} GB of weights. Expected up to {PROTOBUF / 1e9:.0f} GB, which is what one ONNX file can "
            "hold. Choose --to torch-export."
        )
    program, batch = exported(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = torch.onnx.export(program, dynamo=True, input_names=[IMAGES], output_names=[LOGITS], verbose=False)
    except Exception as error:  # of the exporter's own kinds, which change from release to release
        raise HostError(
            f"torch.onnx cannot write this {type(model).__name__}: {brief(error)}. Expected operators that ONNX has. "
            "Choose --to torch-export, or take mechanisms out with --to timm."
        ) from error
    graph = out.model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()  # names of our modules, which no runtime needs
    if batch["batch"] == "any":
        symbol = str(graph.inputs[0].shape[0])
        for value in [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]:
            renamed(value, symbol)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    out.model.metadata_props.update(texts)
    file = io.BytesIO()
    out.save(file)
    path.write_bytes(file.getbuffer())
    packages = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    return batch | {"opset": out.model.opset_imports[""], "versions": metadata["versions"] | packages}


def narrow(path: Path, precision: str) -> None:
    """Rewrite an ONNX file in "half" precision, or with "int8" weights of matrix products.

    Images and logits stay float32. int8: one scale per output channel; activations get theirs while
    it runs. Raises HostError where onnxruntime cannot do it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(path)
    texts = {entry.key: entry.value for entry in model.metadata_props}
    del model.graph.value_info[:]  # shapes of the old graph, which the new one would contradict
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice of onnxruntime's to prepare the graph, which the exporter has done
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if precision == "half":
                onnx.save(convert_float_to_float16(model, keep_io_types=True), path)
            else:
                products = ["MatMul", "Gemm"]
                quantize_dynamic(model, path, op_types_to_quantize=products, per_channel=True, weight_type=QuantType.QInt8)
    except Exception as error:  # of a converter that meets graphs its authors never thought of
        raise HostError(
            f"onnxruntime cannot write this model in {precision}: {brief(error)}. Expected operators that it can narrow. Leave "
            "--precision out."
        ) from error
    finally:
        logging.disable(disabled)
    narrowed = onnx.load(path)
    if precision == "int8" and not any(node.op_type == "MatMulInteger" for node in narrowed.graph.node):
        raise HostError(
            "Found no product of matrices in the model that int8 could be used for. Expected linear layers. Leave --precision "
            "out."
        )
    onnx.helper.set_model_props(narrowed, texts)
    onnx.save(narrowed, path)


def renamed(value: Any, symbol: str) -> None:
    """Call the exporter's symbol of the batch size by its name."""
    for axis, dim in enumerate(value.shape or ()):
        if not isinstance(dim, int) and (text := str(dim)) != "None":
            value.shape[axis] = re.sub(rf"\b{re.escape(symbol)}\b", "batch", text)


def run_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; what it says of its own optimising helps nobody
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(np.asarray(session.run([LOGITS], {IMAGES: pixels.numpy()})[0]))


def check_onnx() -> None:
    """Raise SettingError unless the packages of the extra are there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SettingError(
            f"Found no package {error.name or 'onnx'}. Expected the extra for ONNX files. Install it: "
            'pip install "vitreous[onnx]"'
        ) from error


# -- timm -----------------------------------------------------------------------------------------


def plain(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy without grafts, and the names of host tensors that a graft had replaced.

    Ungrafting makes those anew, so that nobody trained them.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    host = copy.deepcopy(model)
    if grafts(host):
        ungraft(host, all=True)
    return host, [name for name, value in host.state_dict().items() if shapes.get(name) != tuple(value.shape)]


def write_folder(model: nn.Module, folder: Path, metadata: Metadata) -> Metadata:
    """timm's own layout: model.safetensors and config.json, class names within.

    Raises DataError if host weights are gone.
    """
    host, gone = plain(model)
    if gone:
        mechanisms = ", ".join(str(record.mechanism) for record in grafts(model))
        raise DataError(
            f"Found {mechanisms} in the model, which took the place of {first_items(gone, 4)}: the plain network would have "
            "random numbers there. Expected mechanisms that keep the host's weights. Choose --to onnx or torch-export, which "
            "keep the mechanisms."
        )
    model_folder.save(host, folder, classes=metadata["classes"] if metadata["named"] else ())
    (folder / model_folder.MECHANISMS).unlink()
    return {"batch": "any"}


def run_folder(folder: Path) -> Run:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda pixels: model(pixels)


WRITERS: dict[str, tuple[Callable[[nn.Module, Path, Metadata], Metadata], Callable[[Path], Run]]] = {
    "onnx": (write_onnx, run_onnx),
    "torch-export": (write_program, run_program),
    "timm": (write_folder, run_folder),
}
