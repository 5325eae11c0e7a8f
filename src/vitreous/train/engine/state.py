"""The state of a training run on disk: all that the next step depends on.

A run goes on from it as if it had never stopped.

    state/000000123.safetensors    after 123 updates; the one before it stays, too

A file holds tensors and, as JSON in its metadata, everything else, with a SHA-256 sum over both;
nothing of it is pickled. Order and augmentation of the images to come are no part of it: they
follow from (seed, epoch) alone (`loader.Order`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitreous.base.errors import DataError, SettingError, VitreousError
from vitreous.base.files import writable, write
from vitreous.tasks import Objective
from vitreous.train.engine.session import Means, Progress, Session, own_name
from vitreous.train.engine.sharding import gathered, spread, spread_state, whole

FORMAT = 2
READ = ("1", "2")  # formats; 1 has no objective of its own and other names for the progress
FOLDER = "state"
NEWEST = 2  # states that stay: if the last one is damaged, there is the one before
PLAIN = (bool, int, float, str, type(None))


class NotFinite(VitreousError):
    """A loss, gradient or weight is not a finite number.

    update: the number of the step that was not taken, if one was not.
    """

    update: int | None = None


class ValueNotFinite(Exception):
    """Ends a step before it is taken; values: losses and norm of the gradient, one not finite."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values


# -- a run as one structure, and back -------------------------------------------------------------


def capture(session: Session, rng: dict[str, Any] | None = None) -> dict[str, Any]:
    """Collective: all that the next step of the run depends on, whole in each process.

    rng: earlier random states, in place of the present ones. The schedules of the learning rate and
    of modules are no part of it: they follow from `updates`.
    """
    progress = {name: vars(value) if isinstance(value, Means) else value for name, value in vars(session.progress).items()}
    averaged = None if session.ema is None else session.ema.module
    states = session.team.everyone(rng or random_states(session.device))
    return {
        "settings": asdict(session.settings) | {"data": session.settings.data},
        "progress": progress,
        "model": gathered(tensors_of(session.model)),
        "objective": gathered(own_tensors(session.objective)),
        "ema": averaged and gathered(tensors_of(averaged.model)),
        "objective_ema": averaged and gathered(own_tensors(averaged)),
        "optimizer": gathered(session.optimizer.state_dict()),
        "rng": states[0],
        "rng_of_others": states[1:],
    }


def restore(session: Session, state: dict[str, Any]) -> None:
    """Put a run, made from the same settings, into a captured state.

    Raises DataError if it does not fit exactly.
    """
    fill(tensors_of(session.model), state["model"], "model")
    fill(own_tensors(session.objective), state.get("objective", {}), "part of the task beside the model")
    if session.ema is not None:
        fill(tensors_of(session.ema.module.model), state["ema"] or {}, "averaged model")
        fill(own_tensors(session.ema.module), state.get("objective_ema") or {}, "averaged part beside the model")
    try:
        session.optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise unfit(f"an optimizer of another form ({error})") from error
    # torch casts what it loads to the type of the parameter, which could change a step in silence
    if digest(*packed(session.optimizer.state_dict())) != digest(*packed(state["optimizer"])):
        raise unfit(f"an optimizer, {session.settings.opt}, that does not come back as it was")
    spread_state(session.optimizer)
    # format 1 has the progress in two parts
    progress = dict(state["progress"] if "progress" in state else {"updates": state["updates"]} | state["place"])
    for name in ("losses", "norms"):
        means, record = Means(), progress.pop(name)
        means.sums = {key: value.to(session.device) for key, value in record["sums"].items()}
        means.weight = record["weight"]
        progress[name] = means
    session.progress = Progress(**progress)
    states = [state["rng"], *state.get("rng_of_others", ())]
    set_random_states(states[session.team.rank if len(states) == session.team.size else 0], session.device)
    if len(states) != session.team.size:  # allowed with --allow-changes, and then not exact
        seed_apart(session)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, those included that a state_dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def own_tensors(objective: Objective) -> dict[str, Tensor]:
    """`tensors_of` an objective, but for its model and for `fixed` parts."""
    others = ("model", *objective.fixed)
    return {name: tensor for name, tensor in tensors_of(objective).items() if name.split(".")[0] not in others}


@torch.no_grad()
def fill(there: dict[str, Tensor], tensors: dict[str, Tensor], what: str) -> None:
    """Copy tensors into others of the same names, shapes and types."""
    wrong = sorted(set(there) ^ set(tensors))
    wrong += [n for n, t in there.items() if n in tensors and (t.shape, t.dtype) != (tensors[n].shape, tensors[n].dtype)]
    if wrong:
        raise unfit(f"a {what} that differs in {len(wrong)} tensors, the first {wrong[0]}")
    for name, tensor in there.items():
        tensor.copy_(spread(tensors[name], tensor))


def unfit(what: str) -> DataError:
    """The error for a state that is of another run, or of other code."""
    return DataError(
        f"Found {what} in the state of the run. Expected that of its settings. Use the version and the grafts that it was "
        "begun with, or start a new run."
    )


def random_states(device: torch.device) -> dict[str, Any]:
    """The random states that a step draws from: torch's, the device's, NumPy's and Python's."""
    name, keys, *rest = np.random.get_state()
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*of_device(device))
    return {"torch": torch.get_rng_state(), "device": own, "numpy": [name, keys.tolist(), *rest], "python": random.getstate()}


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if states["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], *of_device(device))
    np.random.set_state(tuple(states["numpy"]))
    random.setstate(states["python"])


def seed_apart(session: Session) -> None:
    """Let dropout and drop path differ between processes.

    NumPy's state, from which mixup draws for the whole batch, stays the same in all.
    """
    if session.team.rank:
        words = np.random.SeedSequence((session.settings.seed, session.team.rank, session.progress.updates)).generate_state(1)
        torch.manual_seed(int(words[0]))


def of_device(device: torch.device) -> tuple[torch.device, ...]:
    """The argument by which torch picks one of several devices; Apple's is always one."""
    return () if device.type == "mps" else (device,)


def check_finite(objective: Objective, what: str = "model") -> None:
    """Raise NotFinite if a weight is not finite, or a buffer (a mask may be infinite) is NaN."""
    bad = [name for name, p in objective.named_parameters() if not whole(torch.isfinite(p).all())]
    bad += [name for name, b in objective.named_buffers() if b.is_floating_point() and torch.isnan(b).any()]
    if bad:
        raise NotFinite(
            f"Found {len(bad)} tensors of the {what} that are not finite, the first {own_name(bad[0])}. Expected finite "
            "weights; these were not saved. Go on from the last good state, with a lower --lr or --clip-grad 1."
        )


# -- files ----------------------------------------------------------------------------------------


class States:
    """The saved states of a run folder."""

    def __init__(self, folder: Path):
        self.folder = folder / FOLDER
        self.latest: int | None = None  # updates of the state that was written last

    def save(self, session: Session) -> None:
        """Collective: write the state, if it is a new one, and drop all but the two newest.

        The first process writes. Raises NotFinite, and SettingError where it cannot be written; the
        earlier states stay then.
        """
        if self.latest == session.progress.updates:
            return
        check_finite(session.objective)
        if session.ema is not None:
            check_finite(session.ema.module, "averaged model")
        self.latest, content = session.progress.updates, capture(session)
        if not session.team.first:
            return
        with writing(self.folder.parent):
            self.folder.mkdir(exist_ok=True)
            write_state(self.folder / f"{session.progress.updates:09d}.safetensors", content)
            sync_folder(self.folder)  # before older ones go, so that a loss of power leaves one
            for path in self.paths()[NEWEST:]:
                path.unlink()

    def load(self, say: Callable[[str], Any]) -> dict[str, Any] | None:
        """The newest state that is whole; None if none was ever saved.

        Damaged ones are reported and renamed. Raises DataError if there are only damaged ones.
        """
        for path in self.paths():
            try:
                return read_state(path)
            except DataError as error:
                say(f"{error} It is put aside as {path.stem}.damaged, and the one before it is tried.")
                with writing(self.folder.parent):
                    os.replace(path, path.with_suffix(".damaged"))
        if list(self.folder.glob("*.damaged")):
            raise DataError(
                f"Found only damaged states in {self.folder}. Expected a whole one. Start a new run; the model after the last "
                f"finished epoch, if one was finished, can be its start: --model {self.folder.parent}."
            )
        return None

    def paths(self) -> list[Path]:
        """The files, newest first."""
        return sorted(self.folder.glob("*.safetensors"), reverse=True)

    def clear(self) -> None:
        """Remove all, the newest last, so that a run that is killed meanwhile can still go on."""
        if self.folder.is_dir():
            for path in [*self.folder.glob("*.damaged"), *self.folder.glob("*.partial"), *reversed(self.paths())]:
                path.unlink()
            with suppress(OSError):  # something of the user's is in it
                self.folder.rmdir()


def write_state(path: Path, content: Any) -> None:
    """Write tensors and plain values as a .safetensors file, whole or not at all."""
    tree, tensors = packed(content)
    metadata = {"format": str(FORMAT), "state": tree, "sha256": digest(tree, tensors)}
    write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


def read_state(path: Path) -> Any:
    """The structure that `write_state` wrote; DataError if a single bit of the file differs."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        if metadata.get("format") not in READ:
            raise ValueError(f"format {metadata.get('format')}")
        if metadata["sha256"] != digest(metadata["state"], tensors):
            raise ValueError("its sum does not agree")
        return unpack(json.loads(metadata["state"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"Found the state {path} damaged ({reason[:100]}). Expected a whole file, format {FORMAT}.") from error


def digest(tree: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the text and over name, type, shape and bytes of every tensor."""
    checksum = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        checksum.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()


def packed(content: Any) -> tuple[str, dict[str, Tensor]]:
    """A structure as JSON text and the tensors that it refers to by number."""
    tensors: dict[str, Tensor] = {}
    return json.dumps(pack(content, tensors)), tensors


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested dicts, lists and tuples as JSON with their kinds; tensors go into `tensors`.

    The keys of a dict may be any plain values: an optimizer's are numbers, which JSON would turn
    into text.
    """
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().contiguous().clone()  # the file allows no shared memory
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [pack(item, tensors) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) in PLAIN:
        return value
    raise SettingError(
        f"Found a {type(value).__name__} in the state of the run, which cannot be kept exactly. Expected tensors, numbers and "
        "text. Choose another --opt."
    )


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The reverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dtype":
        return getattr(torch, inner)
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in inner)
    return {unpack(key, tensors): unpack(item, tensors) for key, item in inner}


def writing(folder: Path) -> AbstractContextManager:
    """`writable` for a run folder, in which a run that could not write goes on later."""
    return writable(folder, f"What was whole is kept: make room, then `vitreous resume {folder}`.")


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a loss of power, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
