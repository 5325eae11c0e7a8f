"""Several processes that work as one: their ranks, and what they exchange.

They are started by torchrun, on one machine or several.

`ALONE` is a process on its own, for which nothing here waits or sends, so that callers need not
ask.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from vitreous.base.errors import SettingError, VitreousError

T = TypeVar("T")
GONE = (  # what gloo, NCCL and torch's store say, in lower case; their own faults, such as no memory, have other words
    "closed by peer", "likely closed", "reset by peer", "connection refused", "broken pipe", "pair closure", "remote peer",
    "remote process exit", "communicator was aborted", "timed out", "timeout after", "nccl timeout", "operation timeout",
    "socket timeout", "connect timeout",
)  # fmt: skip


class Lost(VitreousError):
    """Another process of the team has gone."""


@dataclass(frozen=True)
class Team:
    """The processes of one job.

    rank: this one's number, from 0. size: how many. local: its number on this machine. What is
    said to be collective must be called in every process.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """True for the one process that writes files and prints."""
        return self.rank == 0

    def console(self, console: Console) -> Console:
        """The console in the first process; in the others one that shows nothing."""
        return console if self.first else Console(quiet=True, force_terminal=False)

    def device(self, device: torch.device) -> torch.device:
        """This process's own device of that type.

        Raises SettingError where there are too few, or one was chosen for all.
        """
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise SettingError(
                f"Found --device {device} for {self.size} processes. Expected cpu or cuda, of which each process takes "
                "its own. Leave the number out."
            )
        if self.local >= (count := torch.cuda.device_count()):
            raise SettingError(
                f"Found {count} GPUs for process {self.local + 1} on this machine. Expected one for each. Start torchrun with "
                f"--nproc-per-node {count}, or give --device cpu."
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def total(self, value: Tensor) -> Tensor:
        """Collective: the sum over all processes."""
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value

    def most(self, value: int) -> int:
        """Collective: the largest number of all processes."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def count(self, value: int) -> int:
        """Collective: the sum of whole numbers over all processes."""
        return int(self.total(torch.tensor(value)))

    def tell(self, value: T) -> T:
        """Collective: the value of the first process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def everyone(self, value: T) -> list[T]:
        """Collective: the value of each process, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: T) -> list[T]:
        """Collective: the value of each process, in order, in the first; nothing in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def in_turn(self, values: list[T]) -> list[T]:
        """Collective: in the first process items that were dealt out one by one, in their order.

        Nothing in the others.
        """
        nothing = object()
        rounds = zip_longest(*self.gather(values), fillvalue=nothing)
        return [value for turn in rounds for value in turn if value is not nothing]

    def same(self, tensors: list[Tensor]) -> None:
        """Collective: overwrite the tensors of all processes by those of the first."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor.detach(), src=0)

    def first_does(self, work: Callable[[], T]) -> T:
        """Collective: the result of work in the first process; a VitreousError in it ends all."""
        with self.together():
            result = work() if self.first else None
        return self.tell(result)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Collective: a VitreousError in the body of one process ends all.

        It is raised where it was; the others leave with 2.
        """
        error = None
        try:
            yield
        except VitreousError as caught:
            error = caught
        failed = self.everyone(error is not None)
        if any(failed):
            self.fail(error, failed.index(True))

    def fail(self, error: VitreousError | None, speaker: int = 0) -> None:
        """End all processes with an error that each knows: raised in one, since once is enough.

        The others leave with 2.
        """
        if self.rank == speaker and error is not None:
            raise error
        raise SystemExit(2)


ALONE = Team()


def launched() -> Team:
    """This process's place in the job, from torchrun's variables; not connected yet."""
    if not dist.is_torchelastic_launched():
        return ALONE
    return Team(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextmanager
def connected(device: torch.device) -> Iterator[Team]:
    """The processes that torchrun started, connected; `ALONE` without torchrun.

    Over gloo, and over NCCL for tensors on CUDA. Raises Lost in what is done meanwhile if another
    process has gone.
    """
    team = launched()
    if team.size == 1 or dist.is_initialized():  # the latter where one job is part of another
        yield team
        return
    team.device(device)
    with naming_the_lost():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with naming_the_lost():
            yield team
    finally:
        dist.destroy_process_group()


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Raise Lost for an error of torch that another process has gone."""
    try:
        yield
    except RuntimeError as error:
        size = dist.get_world_size() if dist.is_initialized() else launched().size
        if size == 1 or not any(word in str(error).lower() for word in GONE):
            raise
        text = str(error).strip().partition("\n")[0]
        raise Lost(
            f"Found another process of this job gone, or silent for too long ({text[:150]}). Expected all "
            f"{size} to work together. Its own message is above, if it had one; a killed one has none, and "
            "torchrun names it below. Start the same number again: `torchrun ... vitreous resume RUN` after train, the same "
            "--out for look."
        ) from error
