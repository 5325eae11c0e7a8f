"""Put mechanisms into a model and take them out again; the only code that changes a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.base.errors import GraftError, HostError, NotReached, SettingError
from vitreous.base.text_form import written
from vitreous.hosts.host import family_of, host_of
from vitreous.hosts.token_counts import Count, block_costs, measured_counts, multiply_adds
from vitreous.layers.adoption import REGISTRIES
from vitreous.layers.tensors import convert, digests, parameters, tensors
from vitreous.mechanism import Mechanism, parse

KINDS = REGISTRIES[:3]  # parameters, buffers, modules: what a module owns by name


@dataclass
class Change:
    """One exchanged value.

    Shared: (registry, name) of what both modules own, to be handed back on removal.
    """

    path: str
    old: Any
    new: Any
    shared: tuple[tuple[str, str], ...]


@dataclass
class Graft:
    """The record of one mechanism in one model.

    Digests: of each host tensor as it was, to tell later which changed.
    """

    mechanism: Mechanism
    changes: list[Change]
    digests: dict[str, tuple[int, int]] = field(repr=False)


@dataclass(frozen=True)
class Removal:
    """What `ungraft` took out, and the host tensors whose values changed since (by training,
    loading, conversion).

    An empty `changed` means: the model computes bit for bit what it did before the graft.
    """

    mechanisms: tuple[Mechanism, ...]
    changed: tuple[str, ...]

    def __str__(self) -> str:
        out = ", ".join(map(str, self.mechanisms))
        if not self.changed:
            return f"Removed {out}; the host's tensors are as they were."
        shown = ", ".join(self.changed[:5]) + (", ..." if len(self.changed) > 5 else "")
        return f"Removed {out}; {len(self.changed)} host tensors changed since: {shown}"


def graft(model: nn.Module, *mechanisms: Mechanism | str) -> nn.Module:
    """Put mechanisms into the model, in this order, in place; returns the model.

    A mechanism may be given in its text form ("svda:scale=one"). Atomic: if anything fails the
    model is as before. Graft the bare model, before it is compiled or wrapped. Raises HostError if
    the model is no host for a mechanism, GraftError if it conflicts with one that is there,
    SettingError if a setting does not fit the model.
    """
    bare(model)
    with undo_on_error(model):
        for mechanism in mechanisms:
            if isinstance(mechanism, str):
                mechanism = parse(mechanism)
            if not isinstance(mechanism, Mechanism):
                raise GraftError(
                    f"Found {mechanism!r}. Expected a mechanism such as SVDA(), or its text form 'svda'. "
                    "`vitreous list` shows what there is."
                )
            if mechanism.requires:
                host_of(model).require(mechanism.requires, str(mechanism))
            new = mechanism.changes(model)
            changes = [Change(path, get(model, path), value, shared(get(model, path), value)) for path, value in new.items()]
            record = Graft(mechanism, changes, digests(model))
            grafts(model).append(record)
            done, record.changes = record.changes, []
            for change in done:
                put(model, change)
                record.changes.append(change)
    return model


def ungraft(model: nn.Module, all: bool = False) -> Removal:
    """Take out the last graft (all=True: every one, last first), in place.

    The displaced objects come back.

    Trained, loaded or converted host tensors are kept: they are handed back to the displaced
    modules. Returns what was taken out and which host tensors changed meanwhile. Raises GraftError
    if nothing is grafted, or if a grafted module was replaced by someone else.
    """
    leaving = to_leave(model, all)
    for record in leaving:
        for change in reversed(record.changes):
            restore(model, change)
        grafts(model).remove(record)
    now = digests(model)
    changed = sorted(name for name, digest in leaving[-1].digests.items() if now.get(name) != digest)
    return Removal(tuple(record.mechanism for record in leaving), tuple(changed))


def grafts(model: nn.Module) -> list[Graft]:
    """The grafts in the model, first to last: a plain list.

    It travels with copies and pickles of the model.
    """
    return model.__dict__.setdefault("grafts", [])


def check(model: nn.Module, images: Tensor) -> nn.Module:
    """One probe forward on images (B, C, H, W), in the model's present mode.

    Returns the model.

    Raises NotReached if the pass does not go through every grafted module, GraftError if re-entrant
    checkpointing was switched on around token grafts. Mode, hooks and random state are as before.
    """
    bare(model)
    slots.check_running(model)
    called: set[int] = set()
    expected: list[tuple[Graft, str, nn.Module]] = []
    lost: list[str] = []
    for record in grafts(model):
        for change in record.changes:
            if gone(model, record, change.path):
                continue
            if not same(get(model, change.path, None), change.new) and not covered(model, record, change.path):
                lost.append(f"{record.mechanism}: {change.path} was replaced after grafting")
                continue
            for name, module in fresh(change):
                path = f"{change.path}.{name}".rstrip(".")
                if not covered(model, record, path):  # a displaced module is not called itself, but its steps live on
                    expected.append((record, path, module))
    handles = [module.register_forward_hook(lambda m, *_: called.add(id(m))) for _, _, module in expected]
    try:
        with torch.random.fork_rng(devices={t.device for t in model.parameters() if t.is_cuda}), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    lost += [f"{record.mechanism}: {path} was not called" for record, path, module in expected if id(module) not in called]
    moved = slots.read_out_moved(model) if family_of(model) and grafts(model) else None
    lost += [moved] if moved else []
    if lost:
        raise NotReached(
            "The forward pass does not go through every graft: " + "; ".join(lost) + ". Expected each grafted module to be "
            "called. Take the grafts out, change the model (head, blocks) first, and graft again."
        )
    return model


def plan(model: nn.Module, images: Tensor) -> str:
    """The grafts in order, where each stands, and the tokens of each block, as text.

    The tokens are counted in one pass over images (B, C, H, W), in the model's present mode, with
    all grafts together. The share of multiply-adds is that of the same blocks with every patch in
    every one. Raises HostError for a model without a walk over blocks, SettingError for others than
    such images.
    """
    if not isinstance(model, nn.Module) or not isinstance(images, Tensor) or images.ndim != 4:
        given = f"a {type(model).__name__} and " + (
            f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        )
        raise SettingError(
            f"Found {given}. Expected a model and normalised images (B, C, H, W). Load the model with vitreous.load, and make "
            "images such as torch.zeros(1, 3, 224, 224)."
        )
    lines = []
    for number, record in enumerate(grafts(model), 1):
        blocks: dict[str, list[int]] = {}
        for change in record.changes:
            head, *rest = re.split(r"(\d+)", change.path, maxsplit=1)
            blocks.setdefault("{}".join([head, *rest[1:]]), []).extend(map(int, rest[:1]))
        places = (path.format(written(tuple(sorted(numbers)))) for path, numbers in blocks.items())
        lines.append(f"{number}. {record.mechanism} at {', '.join(places)}")
    counts = measured_counts(model, images)
    lines += [f"tokens in {part}: {runs(getattr(count, part) for count in counts)}" for part in Count._fields]
    try:
        costs = block_costs(model)
    except HostError as error:
        return "\n".join([*lines, f"multiply-adds: not counted. {error}"])
    entering = Count(counts[0].attention, counts[0].attention)
    share = multiply_adds(costs, counts) / multiply_adds(costs, (entering,) * len(counts))
    return "\n".join([*lines, f"multiply-adds in the blocks: {share:.3f} of those with all tokens"])


def runs(numbers: Iterable[int]) -> str:
    """Numbers as text, equal neighbours together: "197 x 3, 140"."""
    groups = ((number, len(list(group))) for number, group in groupby(numbers))
    return ", ".join(f"{number} x {times}" if times > 1 else str(number) for number, times in groups)


def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Fit grafts that start from data (svda:start=import) to images (B, C, H, W).

    Returns the model.
    """
    for record in grafts(model):
        record.mechanism.calibrate(model, images)
    return model


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of parameters that weight decay should leave alone.

    The host's own list, and what its grafts name.
    """
    names = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    last = {word for record in grafts(model) for word in record.mechanism.no_decay}
    return names | {name for name in new_parameters(model) if name.rsplit(".", 1)[-1] in last}


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of all that the grafts brought, in the model's order."""
    mine: set[int] = set()
    for change in (change for record in grafts(model) for change in record.changes):
        handed_on = [getattr(change.new, kind).get(name) for kind, name in change.shared]  # may be loaded tensors by now
        host = {id(p) for value in (change.old, *handed_on) for p in parameters(value)}
        new = get(model, change.path, None) if isinstance(change.new, nn.Parameter) else change.new
        mine |= {id(p) for p in parameters(new)} - host
    return {name: p for name, p in model.named_parameters() if id(p) in mine}


# -- the parts ------------------------------------------------------------------------------------


def penalties(model: nn.Module) -> dict[str, Tensor]:
    """{name: scalar}: what the modules' own `penalties()` give, summed over modules.

    Each is weighted as its module says.
    """
    total: dict[str, Tensor] = {}
    for module in model.modules():
        if hasattr(module, "penalties"):
            for name, value in module.penalties().items():
                total[name] = total[name] + value if name in total else value
    return total


def bare(model: nn.Module) -> None:
    """Raise HostError for a wrapper: a graft belongs into the model inside.

    Graft before it is wrapped.
    """
    inner = next((name for name in ("_orig_mod", "module", "model") if isinstance(getattr(model, name, None), nn.Module)), None)
    if isinstance(model, torch.jit.ScriptModule):
        raise HostError("The model is scripted (torch.jit). Expected an ordinary module. Graft before scripting.")
    if not isinstance(model, nn.Module):
        raise HostError(f"Found a {type(model).__name__}. Expected a torch.nn.Module. Create one with timm.create_model.")
    if inner and family_of(model) is None:
        raise HostError(
            f"The model is wrapped: {type(model).__name__} around .{inner}. Expected the bare model. Graft it before it is "
            f"compiled, distributed, averaged or cut into features, or graft the one inside (model.{inner})."
        )


def to_leave(model: nn.Module, all: bool) -> list[Graft]:
    """The records of the last graft, or of all, last first; GraftError if they cannot go."""
    bare(model)
    present = grafts(model)
    if not present:
        raise GraftError("This model has no graft. Expected at least one. See vitreous.grafts(model).")
    leaving = list(reversed(present if all else present[-1:]))
    check_removable(model, leaving)
    return leaving


def check_removable(model: nn.Module, leaving: list[Graft]) -> None:
    """Raise GraftError if a path does not hold what its graft put there.

    It is called before anything is moved.
    """
    after: dict[str, Any] = {}  # what each path will hold once the later grafts are out
    for record in leaving:
        for change in reversed(record.changes):
            found = held(model, after, change.path)
            if not same(found, change.new):
                raise GraftError(
                    f"{change.path} no longer holds what {record.mechanism} put there, but a {type(found).__name__}. "
                    "Expected the graft's own module, so that the exchange can be undone. Put it back, or build the "
                    "model anew and load its weights."
                )
            after[change.path] = change.old


def held(model: nn.Module, after: dict[str, Any], path: str) -> Any:
    """What a path holds once `after`, {path: what stands there}, has come back."""
    owner = path
    while owner and owner not in after:
        owner = owner.rpartition(".")[0]
    return get(after.get(owner, model), path[len(owner) :].lstrip("."), None)


def same(found: Any, value: Any) -> bool:
    """True for a module itself, and for an equal number or tuple (of a copied model).

    Of a parameter the shape is enough: conversion may make it anew (torch's flag).
    """
    if isinstance(value, nn.Parameter):
        return isinstance(found, nn.Parameter) and found.shape == value.shape
    return found is value or (not isinstance(value, nn.Module) and type(found) is type(value) and found == value)


@contextmanager
def undo_on_error(model: nn.Module) -> Iterator[None]:
    """Leave the model as it was if the body raises."""
    had, there = "grafts" in model.__dict__, len(grafts(model))
    try:
        yield
    except BaseException:
        for record in reversed(grafts(model)[there:]):
            for change in reversed(record.changes):
                restore(model, change)
            grafts(model).remove(record)
        raise
    finally:
        if not grafts(model) and not had:
            del model.__dict__["grafts"]


def get(model: nn.Module, path: str, *default: Any) -> Any:
    """The value at a dotted path.

    Raises HostError if the path is not there and no default is given.
    """
    value: Any = model
    for name in path.split(".") if path else ():
        value = getattr(value, name, default[0] if default else MISSING)
        if value is MISSING:
            raise HostError(f"The model has no {path}. Expected a timm ViT's attribute names. Use another host.")
    return value


MISSING = object()


def owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return (get(model, parent) if parent else model), name


def put(model: nn.Module, change: Change) -> None:
    """Write a new value at its path, in the device, dtype and mode of what it displaces."""
    parent, name = owner(model, change.path)
    if callable(getattr(type(parent), name, None)):
        raise GraftError(
            f"{change.path} is a method of {type(parent).__name__}: a module put there would be saved and trained, but "
            "never called. Expected a child module or an attribute. Use another slot."
        )
    if isinstance(change.new, nn.Module):
        known = {id(t) for t in tensors(change.old)}
        like = next((t for t in (*tensors(change.old), *model.parameters()) if t.is_floating_point()), None)
        for module in change.new.modules():
            convert(module, like, known)
        mode = change.old.training if isinstance(change.old, nn.Module) else model.training
        for _, module in fresh(change):
            module.training = mode
    write(parent, name, change.new)


def restore(model: nn.Module, change: Change) -> None:
    """Give the displaced value back its place, with the tensors as they are now."""
    parent, name = owner(model, change.path)
    old, new = change.old, change.new
    if isinstance(old, nn.Module) and isinstance(new, nn.Module):
        like = next((t for t in (*tensors(new), *model.parameters()) if t.is_floating_point()), None)
        kept = {id(t) for t in tensors(new)}
        for kind, key in change.shared:
            if key in getattr(new, kind):
                getattr(old, kind)[key] = getattr(new, kind)[key]
        alive = {id(m) for m in new.modules()}
        for module in old.modules():
            convert(module, like, kept)
            if id(module) not in alive:
                module.training = new.training
    elif isinstance(old, nn.Parameter):
        old.data = old.data.to(getattr(parent, name))  # which conversion may have made anew
    if not isinstance(old, (nn.Module, nn.Parameter)):
        delattr(parent, name)  # else None stays behind among the modules
    write(parent, name, old)


def write(parent: nn.Module, name: str, value: Any) -> None:
    if isinstance(parent, (nn.Sequential, nn.ModuleList)) and name.isdigit():
        parent[int(name)] = value
        return
    setattr(parent, name, value)


def shared(old: Any, new: Any) -> tuple[tuple[str, str], ...]:
    """(registry, name) of what old and new both hold under the same name: parameters, buffers,
    children, and flags.

    Flags are plain public attributes (registry `__dict__`), such as the image size that
    `set_input_size` changes.
    """
    if not (isinstance(old, nn.Module) and isinstance(new, nn.Module)):
        return ()
    return tuple(
        (kind, name)
        for kind in (*KINDS, "__dict__")
        for name, value in getattr(old, kind).items()
        if value is not None and getattr(new, kind).get(name) is value
        if kind != "__dict__" or not (name.startswith("_") or name == "training")
    )


def fresh(change: Change) -> list[tuple[str, nn.Module]]:
    """(name, module) of the modules in a change that the host did not have.

    Plain containers left out.
    """
    if not isinstance(change.new, nn.Module):
        return []
    old = {id(m) for m in change.old.modules()} if isinstance(change.old, nn.Module) else set()
    containers = (nn.ModuleList, nn.ModuleDict)
    return [(n, m) for n, m in change.new.named_modules() if id(m) not in old and not isinstance(m, containers)]


def covered(model: nn.Module, record: Graft, path: str) -> bool:
    """True if a later graft displaced what this one put at `path`, in good order (it then runs
    inside the later one).
    """
    return any(change.path == path for change in later_changes(model, record))


def gone(model: nn.Module, record: Graft, path: str) -> bool:
    """True if a later graft displaced a module around `path`, and holds something else inside."""
    around = ((change, path.removeprefix(f"{change.path}.")) for change in later_changes(model, record))
    return any(
        inner != path and not same(get(change.new, inner, None), get(change.old, inner, None)) for change, inner in around
    )


def later_changes(model: nn.Module, record: Graft) -> Iterator[Change]:
    """The changes of all grafts that came after this one, in order."""
    later = grafts(model)[grafts(model).index(record) + 1 :]
    return (change for other in later for change in other.changes)
