"""Files of weights: the table of a checkpoint that is read, and its names as a model's.

Checkpoints of other trainers hold averaged weights beside the raw ones, further tables, and
names with a prefix of the module that held the network. What is chosen here is said by `say`.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

from vitreous.base.errors import DataError, SettingError, brief
from vitreous.grafting import grafts
from vitreous.models.untrusted import check_archive

Tensors = dict[str, Tensor]
Say = Callable[[str], Any]
TABLES = {  # in timm's order of preference: `timm.models.load_state_dict`
    "state_dict_ema": "averaged weights",
    "model_ema": "averaged weights",
    "state_dict": "weights",
    "model": "weights",
}
LISTED = 20  # names in a message on what was loaded in part


def read_weights(path: Path, table: str | None = None, say: Say = lambda text: None) -> Tensors:
    """{name: tensor} of a .safetensors file, or a pickle (.pth, .pt, .bin) of tensors alone.

    table: the key of the table to read, where a checkpoint has several; else averaged weights
    come before others, as in timm. Raises DataError.
    """
    if not path.is_file():
        raise DataError(f"Found no file {path}. Expected weights as .safetensors (or .pth). Check the path.")
    try:
        if path.suffix == ".safetensors":
            return clean_state_dict(safetensors.torch.load_file(path))
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's train script writes its arguments so
            content = load_pickle(path)
    except Exception as error:  # what a damaged or hostile file can raise is not foreseeable
        reason = brief(error, without="weights_only")  # the line in which torch advises to turn it off
        raise DataError(
            f"Found {path}, which cannot be read safely: {reason}. Expected a whole .safetensors file, or a pickle of tensors "
            "alone. Get it again, or convert it."
        ) from error
    tensors, keys = content, []
    while table is not None or not is_table(tensors):
        key = table_key(tensors, table, path)
        if key is None:
            raise DataError(f"Found {path} without a plain table of tensors. Expected {{name: tensor}}. Save a state_dict.")
        tensors, table = tensors[key], None
        keys.append(key)
    if keys:
        say(f"Weights: the {TABLES.get(keys[-1], 'weights')} under {' / '.join(keys)} in {path.name}.")
    return clean_state_dict(tensors)


def check_file_options(weights: str | Path | None, table: str | None, partial: bool) -> None:
    """Raise SettingError for options of a file of weights without one."""
    if weights is None and (table or partial):
        raise SettingError(
            f"Found {'--weights-table' if table else '--partial-weights'} without --weights. Expected a file whose weights it "
            "is about. Give --weights PATH, or leave it out."
        )


def load_pickle(path: Path) -> Any:
    """`torch.load` of tensors alone; the error names the objects that are in the way."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        try:
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # it lists those of whole archives alone
            objects = []
        if objects:
            raise pickle.UnpicklingError(f"it holds {first_items(sorted(objects), 4)} beside tensors") from error
        raise


def table_key(content: Any, table: str | None, path: Path) -> str | None:
    """The key of the table of weights; None where there is none.

    Raises DataError for several, or where the one that was asked for is not there.
    """
    if not isinstance(content, dict):
        return None
    known = next((key for key in TABLES if isinstance(content.get(key), dict)), None)
    tables = [key for key, value in content.items() if isinstance(key, str) and isinstance(value, dict) and is_table(value)]
    if table is not None and table not in tables:
        raise DataError(
            f"Found no table of tensors under {table!r} in {path}. Expected one of {', '.join(tables) or '(none)'}. Give its "
            "key with --weights-table, or leave that out."
        )
    if table or known or len(tables) < 2:
        return table or known or next(iter(tables), None)
    raise DataError(
        f"Found {len(tables)} tables of weights in {path}: {first_items(tables, 8)}. Expected one, or a key that timm prefers. "
        "Choose with --weights-table KEY."
    )


def is_table(content: Any) -> bool:
    """Whether it is {name: tensor}, with at least one."""
    return isinstance(content, dict) and bool(content) and all(isinstance(k, str) and is_plain(v) for k, v in content.items())


def is_plain(value: Any) -> bool:
    """Whether it is a dense tensor in memory: not sparse, quantized or meta."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta


# -- into a model ---------------------------------------------------------------------------------


def fill(model: nn.Module, tensors: Tensors, where: str, *, partial: bool | None = None, say: Say = lambda text: None) -> None:
    """Load the tensors, all and exactly.

    Names of other projects are converted where timm can do it for this architecture, a prefix that
    all names have is left out, and the first convolution is adapted to another number of channels
    as timm does. partial: load what fits, and list what does not; None where a caller does not
    offer it. where: the file or folder, for errors.

    Raises DataError with every name and shape that differs.
    """
    wanted = model.state_dict()
    tensors, prefix, changed = renamed(model, tensors, wanted, where)
    first = model.pretrained_cfg.get("first_conv")
    for name in [f"{conv}.weight" for conv in ([first] if isinstance(first, str) else first or ())]:
        if name in tensors and name in wanted and tensors[name].shape[1:2] != wanted[name].shape[1:2]:
            tensors = tensors | {name: adapt_input_conv(wanted[name].shape[1], tensors[name])}
    misfits = {name: text for name in tensors.keys() & wanted if (text := misfit(name, tensors[name], wanted[name]))}
    absent, spare = [name for name in wanted if name not in tensors], [name for name in tensors if name not in wanted]
    differences = [f"missing {name}" for name in absent] + [f"unexpected {name}" for name in spare]
    differences += [misfits[name] for name in wanted if name in misfits]
    if prefix:
        say(f"Weights: the names in {Path(where).name} begin with {prefix!r}, which is left out.")
    if changed:
        say(f"Weights: {changed} of {len(tensors)} tensors have other names here than in the code of the mechanism's authors.")
    if not differences:
        model.load_state_dict(tensors)
        return
    fitting = {name: tensors[name] for name in wanted if name in tensors and name not in misfits}
    if partial and fitting:
        model.load_state_dict(fitting, strict=False)
        say(
            f"Weights: {len(fitting)} of the model's {len(wanted)} tensors are from {Path(where).name}."
            + f" New: {first_items([*absent, *misfits], LISTED)}." * bool(absent or misfits)
            + f" Left out: {first_items(spare, LISTED)}." * bool(spare)
        )
        return
    beside = f", without the prefix {prefix!r} of all names" if prefix else ""
    raise DataError(
        f"The weights in {where} do not fit the model. Found {len(differences)} differences{beside}: "
        + first_items(differences, 8)
        + ". Expected the same names and shapes. Use the architecture, arguments and grafts that they were saved with"
        + (", or load what fits, which is then listed, with --partial-weights." if partial is False and fitting else ".")
    )


def load_weights(
    model: nn.Module, path: str | Path, *, table: str | None = None, partial: bool = False, say: Say = print
) -> nn.Module:
    """Load a file of weights into a model with its grafts; returns the model.

    Names of timm, of a trainer, and of the code of the mechanisms' authors are understood. table,
    partial: of `read_weights` and `fill`, which also raise. say: called with a line on what was
    read, renamed and left out.
    """
    fill(model, read_weights(Path(path), table, say), str(path), partial=partial, say=say)
    return model


def renamed(model: nn.Module, tensors: Tensors, wanted: Tensors, where: str) -> tuple[Tensors, str, int]:
    """The tensors under names nearest to the model's, and the prefix that was left out.

    Also how many have been renamed from the code of the authors of a mechanism, or of our network.

    Raises DataError where timm's conversion fails and no other names come near.
    """
    prefix = common_prefix(tensors, wanted)
    choices = [(tensors, "")]
    without = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if prefix and len(without) == len(tensors):
        choices.append((without, prefix))
    failure = None
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert and not grafts(model) and all(set(names) != set(wanted) for names, _ in choices):
        for names, left_out in list(choices):
            try:
                choices.append((convert(dict(names), model), left_out))
            except Exception as error:  # a conversion meets names that its author never thought of
                failure = error
    plain = len(choices)
    for names, left_out in choices[:plain]:
        for owner in (model, *(record.mechanism for record in grafts(model))):
            names = owner.renamed(names) if hasattr(owner, "renamed") else names
        choices.append((names, left_out))
    nearest = min(range(len(choices)), key=lambda i: misfits_of(choices[i][0], wanted))
    best = choices[nearest]
    if failure and not set(best[0]) & set(wanted):
        raise DataError(
            f"Found weights in {where} under names that timm cannot convert ({brief(failure)}). "
            f"Expected those of {type(model).__name__}. Choose the model that the weights belong to."
        ) from failure
    names, left_out = best
    before = {name.removeprefix(left_out) for name in tensors}
    return names, left_out, len(names.keys() - before) if nearest >= plain else 0


def misfits_of(tensors: Tensors, wanted: Tensors) -> int:
    """How many names are on one side alone, or hold another shape."""
    return len(tensors.keys() ^ wanted.keys()) + sum(
        tensors[name].shape != wanted[name].shape for name in tensors.keys() & wanted.keys()
    )


def common_prefix(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands before most of the wanted names; "" if they stand there as they are, or not."""
    wanted, counts = set(wanted), Counter({"": 0})
    for name in names:
        parts = name.split(".")
        counts.update(".".join([*parts[:k], ""]) for k in range(1, len(parts)) if ".".join(parts[k:]) in wanted)
        counts[""] += name in wanted
    best = max(counts, key=counts.get)
    return best if 2 * counts[best] > len(wanted) else ""


def misfit(name: str, tensor: Tensor, value: Tensor) -> str:
    """How a tensor differs from the model's in shape or kind; "" if it does not."""
    if tensor.shape != value.shape:
        return f"{name} has shape {tuple(tensor.shape)}, expected {tuple(value.shape)}"
    if tensor.is_floating_point() != value.is_floating_point():
        return f"{name} holds {tensor.dtype}, expected {value.dtype}"
    return ""


def first_items(items: list[str], most: int) -> str:
    """The first items, and how many more there are."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
