"""Models on disk, in timm's own layout, with the mechanisms that were grafted.

    model.safetensors    weights, under the model's own names
    config.json          timm's: architecture, arguments, class names, preparation of images
    mechanisms.json      grafts in text form, in order

A folder without grafts is one that `timm.create_model("local-dir:FOLDER", pretrained=True)` builds
and loads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from timm.models._hub import save_config_for_hf
from torch import nn

from vitreous.base.errors import DataError, UnknownName
from vitreous.base.files import read_json, write
from vitreous.grafting import graft, grafts
from vitreous.mechanism import Mechanism, parse
from vitreous.models.classes import MULTI_LABEL, multi_label, set_multi_label
from vitreous.models.create import adapt, build
from vitreous.models.untrusted import check_config, check_mechanisms, check_network, no_larger_than
from vitreous.models.weights import fill, read_weights

FORMAT = 1
WEIGHTS, CONFIG, MECHANISMS = "model.safetensors", "config.json", "mechanisms.json"


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
    write(folder / CONFIG, lambda path: save_config_for_hf(model, path, model_config=extra, data_config=inputs))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
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

    classes: ask for these; a new classifier is made where number or recorded names differ.
    channels, image_size (height, width): ask for others than recorded. foreign: import recorded
    mechanisms of other packages, which runs their code. arguments: more for the network, such as
    drop_path_rate.

    Raises DataError for files that cannot be read or do not fit, UnknownName for an architecture
    timm does not know.
    """
    folder = Path(folder)
    mechanisms = read_mechanisms(folder, foreign)
    tensors = read_weights(folder / WEIGHTS)
    config = read_json(folder / CONFIG)
    name = str(config.get("architecture"))[:100]
    if not timm.is_model(name):
        raise UnknownName(name, f"architecture in {folder / CONFIG}", timm.list_models())
    check_config(config, folder / CONFIG)
    if channels is not None:
        arguments["in_chans"] = channels
    check_network(tensors, str(folder), f"local-dir:{folder}", **arguments)
    with no_larger_than(tensors, str(folder)):
        model = build(f"local-dir:{folder}", **arguments)
        graft(model, *mechanisms)
    fill(model, tensors, str(folder))
    set_multi_label(model, config.get("problem_type") == MULTI_LABEL)
    return adapt(model, classes, image_size)


def is_folder(source: str) -> bool:
    """Whether it is the path of a folder, and not a name of timm's.

    Raises DataError for a path that is not there.
    """
    if Path(source).is_dir():
        return True
    if os.sep in source or "/" in source:
        raise DataError(
            f"Found no folder {source}. Expected one with {CONFIG} and {WEIGHTS}, or a name of timm's. Check the path."
        )
    return False


def read_mechanisms(folder: Path, foreign: bool = False) -> list[Mechanism]:
    """The mechanisms recorded in a folder; none where there is no record (a folder of timm's)."""
    path = folder / MECHANISMS
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
