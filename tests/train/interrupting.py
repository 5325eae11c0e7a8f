"""Runs in processes of their own that die, stop or fill the disk at a chosen moment, and what must be equal afterwards."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vitreous.models import model_folder
from vitreous.train import run as ENTRY
from vitreous.train.engine import loop, resume, step
from vitreous.train.engine.prepare import prepare
from vitreous.train.records.run_folder import Run, read_metrics

NAN = float("nan")
TIMED = ("seconds", "images_per_second")
APART = ("run.json", "summary.md", "metrics.jsonl", "report.html")  # with times in them


def in_child(work: Callable[[], Any]) -> int:
    """Run in a forked process; returns its exit code, or the signal that killed it as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])


def in_team(work: Callable[[int], Any], size: int = 2, seconds: float = 60) -> list[int]:
    """Run `work(rank)` in so many forked processes that find themselves as if torchrun had started them; their exit codes.

    Those that are not done in time are killed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}

    def launched(rank: int) -> None:
        os.environ.update({name: str(value) for name, value in ({"RANK": rank, "LOCAL_RANK": rank} | common).items()})
        work(rank)

    left = {forked(lambda rank=rank: launched(rank)): rank for rank in range(size)}
    codes, end = [0] * size, time.monotonic() + seconds
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[left.pop(child)] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return codes


def forked(work: Callable[[], Any]) -> int:
    """The number of a forked process that does this and ends with the exit code that a program would have."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except SystemExit as done:
        code = done.code or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(monkeypatch: pytest.MonkeyPatch, update: int, act: Callable[[], Any]) -> None:
    """Do something in the middle of an update."""
    original = step.add_gradients

    def struck(session, *batch):
        if session.progress.updates + 1 == update:
            act()
        return original(session, *batch)

    monkeypatch.setattr(step, "add_gradients", struck)


def breaking(monkeypatch, change, at=(5,)):
    """Let `change(session)`, at the start of these updates, break the model for as long as they last."""
    for module in (ENTRY, resume):

        def prepared(settings, *others, **options):
            session = prepare(settings, *others, **options)
            change(session, lambda: session.progress.updates + 1 in at and session.model.training)
            return session

        monkeypatch.setattr(module, "prepare", prepared)


def output(name, value):
    """Put a value into the output of a module."""

    def change(session, now):
        def hook(module, inputs, out):
            return out.clone().index_fill_(0, torch.tensor([1]), value) if now() else None

        for objective in filter(None, (session.objective, session.whole)):
            objective.model.get_submodule(name).register_forward_hook(hook)

    return change


class Moments:
    """Counts the moments at which a run may be cut off, and does something at one of them.

    They are: before and after every optimizer step, in the middle of every write of tensors, before and after every sync and
    rename, in the middle of every line of metrics, before the tests, the look and the saved model of an epoch.
    """

    def __init__(self, monkeypatch, at: int | None = None, act: Callable[[], None] = die):
        self.count, self.at, self.act, self.patch = 0, at, act, monkeypatch
        self.around(torch.optim.AdamW, "step")
        self.around(os, "fsync")
        self.around(os, "replace")
        self.around(loop, "test")
        self.around(loop, "look")
        self.around(model_folder, "save")
        self.halfway_in_tensors()
        self.halfway_in_metrics()

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()

    def around(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments, **options):
            self.tick()
            found = original(*arguments, **options)
            self.tick()
            return found

        self.patch.setattr(owner, name, counted)

    def halfway_in_tensors(self) -> None:
        original = safetensors.torch.save_file

        def halved(tensors, path, metadata=None):
            original(tensors, path, metadata)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            self.tick()
            Path(path).write_bytes(whole)

        self.patch.setattr(safetensors.torch, "save_file", halved)

    def halfway_in_metrics(self) -> None:
        original = Run.log

        def halved(run, metrics):
            path = run.folder / "metrics.jsonl"
            before = path.read_bytes() if path.exists() else None
            original(run, metrics)
            whole = path.read_bytes()
            path.write_bytes(whole[: (len(before or b"") + len(whole)) // 2])
            self.tick()
            path.write_bytes(whole)

        self.patch.setattr(Run, "log", halved)


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a finished run folder that must not depend on interruptions: bytes by name, and metrics without times."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in APART
    }
    numbers = [{name: value for name, value in line.items() if name not in TIMED} for line in read_metrics(folder)]
    return found | {"metrics": numbers}


def differing(a: Path, b: Path) -> list[str]:
    """Names of what differs between two finished run folders."""
    one, two = contents(a), contents(b)
    return [name for name in sorted({*one, *two}) if one.get(name) != two.get(name)]


def limit_files(size: int) -> None:
    """Let this process write no file beyond so many bytes: a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
