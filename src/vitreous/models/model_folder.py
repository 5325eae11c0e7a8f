"""Models on disk, in timm's own layout, with the mechanisms that were grafted.

    model.safetensors    weights, under the model's own names
    config.json          timm's: architecture, arguments, class names, preparation of images
    mechanisms.json      grafts in text form, in order

A folder without grafts is one that `timm.create_model("local-dir:FOLDER", pretrained=True)` and
transformers' `AutoModelForImageClassification` build and load. With grafts they would build the
network without them and give other logits, so that config.json names an architecture which they
refuse; `vitreous.load` reads both, also folders that older versions wrote under timm's name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from timm.models._hub import _parse_model_cfg, save_config_for_hf
from timm.models._pretrained import PretrainedCfg
from torch import nn

from vitreous.base.errors import DataError, UnknownName
from vitreous.base.files import read_json, write
from vitreous.grafting import graft, grafts
from vitreous.mechanism import Mechanism, parse
from vitreous.models.classes import MULTI_LABEL, multi_label, set_multi_label
from vitreous.models.create import adapt, build
from vitreous.models.hub import has_prefix, local_folder
from vitreous.models.untrusted import check_config, check_mechanisms, check_network, no_larger_than
from vitreous.models.weights import fill, read_weights

FORMAT = 1
WEIGHTS, CONFIG, MECHANISMS = "model.safetensors", "config.json", "mechanisms.json"
PICKLE = "pytorch_model.bin"  # of older folders of timm
FILES = ((CONFIG,), (WEIGHTS, PICKLE), (MECHANISMS, ""))  # that a repository of the hub is read for
GRAFTED = " with grafts: open this folder with vitreous.load"  # behind the architecture's name; other readers quote it


def save(model: nn.Module, folder: str | Path, *, classes: Sequence[str] = (), inputs: dict[str, Any] | None = None) -> None:
    """Write the three files into the folder; an interrupted save leaves each old file whole.

    classes: name of each label. inputs: mean, std, input_size, crop_pct, interpolation with which
    it was trained (`Preprocess.config`), if they are not those the model came with.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recorded = {"format": FORMAT, "mechanisms": [record.mechanism.full_text() for record in grafts(model)]}
    write(folder / MECHANISMS, lambda path: path.write_text(json.dumps(recorded, indent=2) + "\n"))
    extra = {"label_names": list(classes)} if classes else {}
    if multi_label(model):
        extra["problem_type"] = MULTI_LABEL
    write(folder / CONFIG, lambda path: write_config(model, path, extra, inputs))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    places = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    for name, tensor in tensors.items():  # tied weights, which the format does not hold, are written once per name
        tensors[name] = tensor.clone() if places[tensor.untyped_storage().data_ptr()] > 1 else tensor
    write(folder / WEIGHTS, lambda path: safetensors.torch.save_file(tensors, path, metadata={"format": "pt"}))


def load(
    folder: str | Path,
    *,
    classes: Sequence[str] = (),
    channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    foreign: bool = False,
    **arguments: Any,
) -> nn.Module:
    """The model of a folder, grafts included, every weight in its place, in eval mode.

    folder: one that `save`, training, timm or transformers' TimmWrapper wrote, or a repository of
    the hub in timm's words, "hf-hub:OWNER/NAME".

    classes: ask for these; a new classifier is made where number or recorded names differ.
    channels, image_size (height, width): ask for others than recorded. foreign: import recorded
    mechanisms of other packages, which runs their code. arguments: more for the network, such as
    drop_path_rate.

    Raises DataError for files that cannot be read or do not fit, UnknownName for an architecture
    timm does not know.
    """
    folder = local_folder(folder, FILES)
    config = read_json(folder / CONFIG)
    mechanisms = read_mechanisms(folder, foreign)
    if not mechanisms and str(config.get("architecture")).endswith(GRAFTED):
        raise DataError(
            f"Found {folder / CONFIG} of a model with grafts, and no record of them. Expected {MECHANISMS} beside it. Get that "
            "file again, from the same source."
        )
    if channels is not None:
        arguments["in_chans"] = channels
    name, arguments = network_of(folder, config, arguments)
    pickled = (folder / PICKLE).is_file() and not (folder / WEIGHTS).is_file()
    tensors = read_weights(folder / (PICKLE if pickled else WEIGHTS))
    check_network(tensors, str(folder), name, **arguments)
    with no_larger_than(tensors, str(folder)):
        model = build(name, **arguments)
        graft(model, *mechanisms)
    fill(model, tensors, str(folder))
    set_multi_label(model, config.get("problem_type") == MULTI_LABEL)
    return adapt(model, classes, image_size)


def write_config(model: nn.Module, path: Path, extra: dict[str, Any], inputs: dict[str, Any] | None) -> None:
    """Write timm's config.json, in the form that transformers reads too.

    The number of classes stands beside the arguments, not among them, where transformers would give
    it twice.
    """
    save_config_for_hf(model, path, model_config=extra, data_config=inputs)
    config = json.loads(path.read_text())
    config.get("model_args", {}).pop("num_classes", None)
    if grafts(model):
        config["architecture"] += GRAFTED
    path.write_text(json.dumps(config, indent=2))


def network_of(folder: Path, config: dict[str, Any], arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name of the network that a config.json describes, and all arguments to build it.

    arguments: in place of those recorded. Raises DataError, UnknownName.
    """
    name, path = str(config.get("architecture")).removesuffix(GRAFTED)[:100], folder / CONFIG
    if "architecture" not in config and isinstance(config.get("model_type"), str):
        kind = ", ".join(map(str, config.get("architectures") or [])) or config["model_type"]
        raise DataError(
            f"Found {path} of a network of transformers ({kind[:100]}), which is not timm's. Expected a folder of timm's, "
            "Vitreous or transformers' TimmWrapper. In Python, open it with transformers and give the model to vitreous.look."
        )
    if not timm.is_model(name):
        raise UnknownName(name, f"architecture in {path}", timm.list_models())
    config = {key: value for key, value in config.items() if value is not None} | {"architecture": name}
    check_config(config, path)
    inputs, _, recorded = _parse_model_cfg(config, {"file": str(folder), "source": "local-dir"})
    names = {field.name for field in fields(PretrainedCfg)}
    inputs = {key: value for key, value in inputs.items() if key in names}
    recorded = {key: value for key, value in recorded.items() if key != "pretrained"}  # its weights are in the folder
    if registered := timm.get_pretrained_cfg(name):  # older folders do not say that the network is made for one size
        inputs.setdefault("fixed_input_size", registered.fixed_input_size)
    return name, {"pretrained_cfg": inputs, "pretrained_model_args": dict(recorded), **recorded, **arguments}


def is_folder(source: str) -> bool:
    """Whether it is the path of a folder, and not a name of timm's.

    Raises DataError for a path that is not there.
    """
    if Path(source).is_dir() or has_prefix(source):
        return True
    if os.sep in source or "/" in source:
        raise DataError(
            f"Found no folder {source}. Expected one with {CONFIG} and {WEIGHTS}, or a name of timm's. Check the path; "
            f"a repository of the hub is hf-hub:{source}."
        )
    return False


def read_mechanisms(folder: str | Path, foreign: bool = False) -> list[Mechanism]:
    """The mechanisms recorded in a folder; none where there is no record (a folder of timm's)."""
    path = local_folder(folder, FILES) / MECHANISMS
    if not path.exists():
        return []
    recorded = read_json(path)
    texts = recorded.get("mechanisms")
    whole = isinstance(texts, list) and all(isinstance(text, str) and len(text) < 1000 for text in texts)
    if recorded.get("format") != FORMAT or not whole:
        raise DataError(
            f"Found {path} in another form (format {recorded.get('format')!r}). Expected format {FORMAT} with a list of "
            "texts. Read it with the version of Vitreous that wrote it."
        )
    strangers = [text for text in texts if "." in text.partition(":")[0]]
    if strangers and not foreign:
        raise DataError(
            f"Found {strangers[0]!r} in {path}, a mechanism of another package. Expected ours only, since importing it "
            "runs its code. If you trust that package, ask for it with --foreign (in Python: foreign=True)."
        )
    mechanisms = [parse(text, foreign=foreign) for text in texts]
    check_mechanisms(mechanisms, path)
    return mechanisms
