"""What does the training loop cost beside forward, backward and step? ViT-Tiny, on made images, FashionMNIST and JPEG files.

    python benchmarks/training_throughput/run.py --data ../shared/data        about 25 minutes on two cores

    bare       zero_grad, forward, loss, backward and step by hand, on batches that are tensors already
    decode     JPEG files to such batches by the run's own loader, nothing else
    vitreous   the steps of `vitreous train` as it takes them (`train.engine.loop.steps`): batches made, loss and gradients
               checked, their norms and the losses logged, clipping, schedule

Both sides build model, optimizer and data by the same settings. What is in memory: throughput at least 0.97 of bare. Files:
time at most 1.05 of bare plus decode, which run one after the other. A round is a step of every arm.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from speed_common import Results, arguments  # noqa: E402

from vitreous.train import TrainSettings  # noqa: E402
from vitreous.train.engine.loop import steps  # noqa: E402
from vitreous.train.engine.prepare import prepare  # noqa: E402
from vitreous.train.engine.session import Session  # noqa: E402
from vitreous.train.records.run_folder import Run  # noqa: E402

CLASSES, TESTS = 10, 20


def job_of(options, data: str, **settings) -> Session:
    """A session ready to train; so many epochs that a run of the benchmark never ends them."""
    return prepare(TrainSettings(data=data, epochs=10_000, clip_grad=1.0, device=options.device, **settings))


def whole_loop(session: Session) -> Iterator[None]:
    """The steps of one epoch after the other."""
    run = Run(Path(tempfile.gettempdir()) / "never-written")  # only a step that is not finite would be
    session.model.train()
    while True:
        yield from steps(session, run)
        session.progress = session.progress.next_epoch()


def bare_loop(session: Session, batches: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """The same model and optimizer, by hand, on a few batches over and over."""
    session.model.train()
    while True:
        for images, labels in batches:
            session.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(session.model(images), labels).backward()
            session.optimizer.step()
            yield


def loaded(session: Session) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other."""
    for epoch in range(10**6):
        session.train.set_epoch(epoch)
        yield from session.train


def each(moves: Iterator) -> Callable[[], object]:
    """One move at each call."""
    return lambda: next(moves)


def arms(options, name: str, data: str, **settings) -> dict[str, Callable[[], object]]:
    ours, by_hand = (job_of(options, data, **settings) for _ in range(2))
    ready = [tuple(part.to(by_hand.device) for part in batch) for batch in islice(loaded(by_hand), 2)]
    bare = each(bare_loop(by_hand, ready))
    found = {"vitreous": each(whole_loop(ours))}
    if name != "files":
        return found | {"bare": bare}
    decode = each(loaded(by_hand))
    return found | {"bare + decode": lambda: (bare(), decode()), "bare": bare, "decode": decode}


def unpack(archive: Path, folder: Path) -> None:
    """The photographs of an archive as train/CLASS/NAME.jpg and test/CLASS/NAME.jpg, dealt out to a few classes."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        for i, member in enumerate(members):
            place = folder / ("test" if i < TESTS else "train") / f"class-{i % CLASSES}" / f"{i:03d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(tar.extractfile(member).read())


def main() -> None:
    options = arguments(__doc__, data={"type": Path, "required": True}, rounds={"type": int, "default": 60})
    results = Results(HERE, options)

    def row(name: str, cell: str, data: str, limit: float, goal: str, **settings) -> None:
        results.row(
            "Training steps per second" if goal == "at least" else "Training from JPEG files",
            cell,
            lambda: arms(options, name, data, **settings),
            count=options.rounds,
            limit=limit,
            goal=goal,
        )

    row("made", "ViT-Ti/16, made images 224 px, batch 16", "cutouts:train=64,test=16,size=224", 0.97, "at least", batch_size=16)
    words = {"batch_size": 64, "model_kwargs": ("patch_size=4",)}
    fashion = str(options.data / "fashion-mnist")
    row("fashion-mnist", "ViT-Ti/4, FashionMNIST in memory, batch 64", fashion, 0.97, "at least", **words)
    with tempfile.TemporaryDirectory() as folder:
        unpack(options.data / "imagenet1k-samples" / "imagenet_500_224px.tar", Path(folder))
        row("files", "ViT-Ti/16, JPEG files 224 px, batch 16", folder, 1.05, "at most", batch_size=16, aug="crop")


if __name__ == "__main__":
    main()
