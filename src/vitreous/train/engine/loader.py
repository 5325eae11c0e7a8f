"""Batches of samples, in memory or decoded by worker processes: `Order`, `cut`, `Loader`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vitreous.base.errors import DataError
from vitreous.base.processes import ALONE, Team
from vitreous.data import ArraySamples, Samples
from vitreous.data.augmentation import training_transform
from vitreous.data.decoding import Unreadable
from vitreous.data.preprocess import Preprocess
from vitreous.data.timeouts import DriveGone
from vitreous.train.engine.signals import held_back, leave_to_parent
from vitreous.train.engine.workers import child_signals_as_they_are, kill, kill_at_exit, tells_of_a_death, worker_killed

ORDER, FLIP, AUGMENT, DRAW = range(4)  # what a draw is for: first part of its key
NO_DRIVE = "the drive does not answer"
PAUSE = 0.5  # seconds before a file that cannot be read is tried again


class Order(Sampler[tuple[int, np.ndarray]]):
    """Batches of one epoch as (epoch, indices); the order follows from (seed, epoch).

    even: leave out a last batch that is not full, and the odd image of a set smaller than a batch.
    epoch, start: what the next iteration yields, and from which batch on; the batches before it are
    left out, the others stay what they are. team: the processes that the batches are for; shuffled
    ones are cut over them, others are dealt out whole.
    """

    def __init__(
        self, count: int, batch_size: int, *, shuffle: bool = False, even: bool = False, seed: int = 0, team: Team = ALONE
    ):
        self.batch_size = min(batch_size, count - count % 2) if even else batch_size
        self.count, self.shuffle, self.even, self.seed = count, shuffle, even, seed
        self.team, self.epoch, self.start = team, 0, 0

    def numbers(self) -> range:
        """Of the batches in a whole epoch that this process sees, or sees a part of."""
        count = self.count // self.batch_size if self.even else -(-self.count // self.batch_size)
        return range(count) if self.shuffle else range(self.team.rank, count, self.team.size)

    def __len__(self) -> int:
        return len(self.numbers())

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        drawn = np.random.default_rng((ORDER, self.seed, self.epoch))
        order = drawn.permutation(self.count) if self.shuffle else np.arange(self.count)
        batches = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in self.numbers()[self.start :]]
        return iter([(self.epoch, cut(rows, self.team) if self.shuffle else rows) for rows in batches])


def cut(rows: np.ndarray, team: Team) -> np.ndarray:
    """What one process takes of a batch: as much of its front as of its back.

    Mixup pairs the first image with the last, and so on inwards; so it pairs within a part what it
    would pair in the whole.
    """
    half = -(-len(rows) // 2)
    low, high = (half * number // team.size for number in (team.rank, team.rank + 1))
    return np.concatenate([rows[low:high], rows[max(len(rows) - high, high) : len(rows) - low]])


def rejoined(parts: Sequence[Tensor]) -> Tensor:
    """The batch that `cut` cut into these parts."""
    fronts = [part[: -(-len(part) // 2)] for part in parts]
    backs = [part[-(-len(part) // 2) :] for part in parts]
    return torch.cat([*fronts, *reversed(backs)])


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Seed the global states that torchvision and timm draw from, by the key alone.

    These are torch's on the CPU, Python's and NumPy's. They are put back afterwards, so that
    nothing else depends on which process augments an image, or when.
    """
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    try:
        torch.default_generator.manual_seed(seeds[0])  # torch.manual_seed would reseed devices as well
        random.seed(seeds[1])
        np.random.seed(seeds[2])
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class Batches(Dataset):
    """Images in memory that need no resizing, a whole batch normalised at once.

    Indices to (B, C, H, W), labels (B); bit for bit what `Preprocess` makes of one image after the
    other. flip: mirror half of them, drawn by (seed, epoch, index).
    """

    def __init__(self, images: ArraySamples, inputs: Preprocess, flip: bool, seed: int):
        self.pixels, self.target = images.images, images.target  # (n, H, W, C) uint8, n targets
        self.inputs, self.flip, self.seed = inputs, flip, seed

    def __len__(self) -> int:
        return len(self.target)

    def __getitems__(self, batch: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor, dict[int, str]]:
        epoch, rows = batch
        x = self.inputs.normalize(self.pixels[rows])
        if self.flip:
            # drawn for the whole set: an image is mirrored alike in any batch and process
            chosen = torch.from_numpy(np.random.default_rng((FLIP, self.seed, epoch)).random(len(self))[rows] < 0.5)
            x[chosen] = x[chosen].flip(-1)
        return x, self.target.take(rows), {}


class Prepared(Dataset):
    """Images sent through a transform one by one, drawn by (seed, epoch, index).

    A batch is (B, C, H, W), labels (B), and {index: reason} of images that could not be read, not
    even after a pause; they are left out of it. even: then one more image is left out where the
    others would be odd in number.
    """

    def __init__(self, images: Samples, change: Callable, seed: int, even: bool = False):
        self.images, self.change, self.seed, self.even = images, change, seed, even

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, batch: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor, dict[int, str]]:
        epoch, rows = batch
        made, lost = self.attempt(epoch, rows.tolist())
        if lost:  # once more: a drive in the network may have been away for a moment
            time.sleep(PAUSE)
            again, lost = self.attempt(epoch, list(lost))
            made |= again
        readable = [i for i in rows.tolist() if i in made]
        readable = readable[: len(readable) // 2 * 2] if self.even else readable
        x = torch.stack([made[i] for i in readable]) if readable else torch.empty(0)
        return x, self.images.target.take(readable), lost

    def attempt(self, epoch: int, indices: list[int]) -> tuple[dict[int, Tensor], dict[int, str]]:
        """Tensors by index of the images that can be read, and the reasons why others cannot."""
        made, lost = {}, {}
        for i in indices:
            try:
                image = self.images.image(i)
            except Unreadable as error:
                lost[i] = error.reason
                continue
            except DriveGone:  # every further file would wait for as long, and be lost as well
                return {}, dict.fromkeys(indices, NO_DRIVE)
            with drawn_from(AUGMENT, self.seed, epoch, i):
                made[i] = self.change(image)
        return made, lost


class Loader:
    """Batches of (B, C, H, W) float32 and labels (B) int64; as long as a whole epoch.

    Each iteration is of epoch 0, or that of `set_epoch`; what it yields follows from (seed, epoch),
    whatever the number of workers. Images that can no longer be read are left out of their batches:
    lost {index: reason} holds those of all iterations, missing (a set of indices) those of the last
    one. strict: the first of them raises DataError. A worker process that is
    killed is replaced once in an iteration, then DataError is raised.
    """

    def __init__(self, images: Samples, batches: Dataset, order: Order, workers: int = 0, strict: bool = False):
        self.images, self.batches, self.order, self.workers, self.strict = images, batches, order, workers, strict
        self.lost: dict[int, str] = {}
        self.missing: set[int] = set()
        self.open()

    def open(self) -> None:
        """(Re)start the worker processes, if any, when next iterated."""
        self.source = DataLoader(
            self.batches,
            batch_sampler=self.order,
            collate_fn=as_it_is,
            num_workers=self.workers,
            worker_init_fn=leave_to_parent,
            persistent_workers=self.workers > 0 and self.order.shuffle,  # test sets would keep theirs through training
            generator=torch.Generator().manual_seed(self.order.seed),  # else an iteration draws from the global state
        )

    def close(self) -> None:
        """End the worker processes, if any; a later iteration starts new ones."""
        self.open()  # a DataLoader ends its workers when it is dropped

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Let iterations be of this epoch, and the next one begin at batch `start`.

        Those before it are not decoded.
        """
        self.order.epoch, self.order.start = epoch, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, start = self.order.epoch, self.order.start
        self.missing = set()
        # no generator itself, so that workers start now and not at the first `next`
        return self.delivered(self.begin(epoch, start), epoch, start)

    def begin(self, epoch: int, start: int) -> Iterator:
        self.order.epoch, self.order.start = epoch, start
        with child_signals_as_they_are(), held_back():
            batches = iter(self.source)
        kill_at_exit(batches)
        self.order.start = 0  # what begins in the middle is one iteration; the next is whole again
        return batches

    def delivered(self, batches: Iterator, epoch: int, at: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from number `at` on; if a worker is killed, from the one that it owed."""
        killed = False
        while at < len(self):
            try:
                images, labels, lost = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                if not (self.workers and tells_of_a_death(error)):
                    raise
                kill(batches._workers)
                if killed:
                    raise worker_killed(self.workers) from error
                killed = True
                self.open()
                batches = self.begin(epoch, at)
                continue
            at += 1
            self.note(lost, len(images))
            yield images, labels

    def note(self, lost: dict[int, str], left: int) -> None:
        """Remember what was lost; raise DataError if strict, or if nothing of a batch is left."""
        self.lost |= lost
        self.missing |= set(lost)
        # where a batch is cut over processes, others may have some of it: `Step` asks them all
        shared = self.order.shuffle and self.order.team.size > 1
        if lost and (self.strict or not (left or shared)):
            self.refuse_lost(lost, "" if left else ", all of a batch")

    def refuse_lost(self, lost: dict[int, str] | None = None, whole: str = ", all of a batch among them") -> None:
        """Raise DataError for these lost images, or for all that this process has lost, if any."""
        lost = self.lost if lost is None else lost
        if lost:
            i, reason = next(iter(lost.items()))
            raise DataError(
                f"Found {len(lost)} images that can no longer be read{whole}, the first {self.name(i)!r} ({reason}). Expected "
                "them where they were at the start. See that the files are back, then resume the run."
            )

    def name(self, i: int) -> str:
        """The name of an image, or its number where it has none."""
        names = getattr(self.images, "names", None)
        return names[i] if names else f"image {i}"


def loader(
    images: Samples,
    inputs: Preprocess,
    batch_size: int,
    *,
    aug: str | None = None,
    shuffle: bool = False,
    even: bool = False,
    seed: int = 0,
    workers: int = 0,
    strict: bool = False,
    team: Team = ALONE,
    views: Callable[[Callable], Callable] | None = None,
) -> Loader:
    """Batches of the images, in an order that (seed, epoch) draws if shuffled.

    See `Order` for even, `Task.views` for views, `Loader` for the rest. Images in memory of the
    right size are not sent through workers.
    """
    order = Order(len(images), batch_size, shuffle=shuffle, even=even, seed=seed, team=team)
    if views is None and in_memory(images, inputs) and aug in (None, "none", "flip"):
        return Loader(images, Batches(images, inputs, aug == "flip", seed), order)
    change = training_transform(inputs, aug)
    return Loader(images, Prepared(images, views(change) if views else change, seed, even), order, workers, strict)


def in_memory(images: Samples, inputs: Preprocess) -> bool:
    """True if the pixels lie in memory in the very size that the network takes."""
    return isinstance(images, ArraySamples) and images.images.shape[1:3] == inputs.input_size[1:] and inputs.crop_pct == 1.0


def as_it_is(batch: tuple) -> tuple:
    """A collate function for what `__getitems__` has made a batch of already."""
    return batch
