"""Batches: the fast way gives what the transform gives, order follows the seed, and timm reads the recipe."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from vitreous.base.errors import DataError
from vitreous.data import ArraySamples, Cutouts
from vitreous.data.augmentation import posterized, training_transform
from vitreous.data.decoding import Unreadable
from vitreous.data.preprocess import Preprocess
from vitreous.train.engine import loader as train_inputs
from vitreous.train.engine.loader import Batches, in_memory, loader

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
OWN = Preprocess((3, 16, 16), MEAN, STD)


@pytest.fixture(scope="module")
def images():
    return Cutouts(10, size=16)


def test_whole_batches_equal_single_transforms_bit_for_bit(images):
    batch, labels = next(iter(loader(images, OWN, 10)))
    single = training_transform(OWN)
    expected = torch.stack([single(images.image(i)) for i in range(10)])
    assert torch.equal(batch, expected)
    assert labels.tolist() == images.labels.tolist()


def test_grey_images_without_normalisation_are_pixels_over_255():
    pixels = np.arange(2 * 16 * 16, dtype=np.uint8).reshape(2, 16, 16, 1)
    batch, _ = next(iter(loader(ArraySamples(pixels, [0, 1]), Preprocess((1, 16, 16), (0.0,), (1.0,)), 2)))
    assert torch.equal(batch, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)


def test_other_sizes_are_resized_and_cropped_as_timm_does(images):
    inputs = Preprocess((3, 24, 24), MEAN, STD, crop_pct=0.75)
    assert not in_memory(images, inputs)
    batch, _ = next(iter(loader(images, inputs, 3)))
    theirs = create_transform((3, 24, 24), crop_pct=0.75, interpolation="bicubic", mean=MEAN, std=STD)
    assert torch.equal(batch, torch.stack([theirs(images.image(i)) for i in range(3)]))


def test_flips_are_drawn_by_the_seed_and_change_nothing_else(images):
    plain, _ = next(iter(loader(images, OWN, 10)))
    flipped, _ = next(iter(loader(images, OWN, 10, aug="flip", seed=3)))
    again, _ = next(iter(loader(images, OWN, 10, aug="flip", seed=3)))
    assert torch.equal(flipped, again)
    turned = [torch.equal(f, p.flip(-1)) for f, p in zip(flipped, plain, strict=True)]
    kept = [torch.equal(f, p) for f, p in zip(flipped, plain, strict=True)]
    assert all(t != k for t, k in zip(turned, kept, strict=True))
    assert 0 < sum(turned) < 10


@pytest.mark.parametrize("aug", ["pad", "crop", "rand-m5-n1"])
def test_augmented_images_have_the_right_shape(images, aug):
    batch, _ = next(iter(loader(images, OWN, 10, aug=aug)))
    assert batch.shape == (10, 3, 16, 16)
    assert batch.isfinite().all()


def test_order_follows_the_seed(images):
    def order(seed):
        batches = loader(images, OWN, 4, shuffle=True, seed=seed)
        found = []
        for epoch in (1, 2):
            batches.set_epoch(epoch)
            found.append(torch.cat([labels for _, labels in batches]).tolist())
        return found

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[0] != order(1)[1]  # each epoch anew
    assert sorted(order(1)[0]) == sorted(images.labels.tolist())


def test_even_leaves_the_last_batch_out(images):
    assert [len(x) for x, _ in loader(images, OWN, 4)] == [4, 4, 2]
    assert [len(x) for x, _ in loader(images, OWN, 4, even=True)] == [4, 4]
    assert [len(x) for x, _ in loader(Cutouts(5, size=16), OWN, 64, even=True)] == [4]


def test_workers_give_what_one_process_gives(images):
    inputs = Preprocess((3, 24, 24), MEAN, STD)
    alone, parallel = (next(iter(loader(images, inputs, 5, workers=n)))[0] for n in (0, 1))
    assert torch.equal(alone, parallel)


AUGMENTATIONS = ["none", "flip", "pad", "crop", "rand-m9-mstd0.5-inc1", "augmix-m5-w2", "original-mstd0.5", "v0-mstd0.5"]


@pytest.mark.parametrize("aug", AUGMENTATIONS)
def test_number_of_workers_changes_no_batch(images, aug):
    """Nor do the global states, which stay as they were."""
    inputs, made = Preprocess((3, 24, 24), MEAN, STD), {}
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        random.seed(workers)
        np.random.seed(workers)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        batches = loader(images, inputs, 4, aug=aug, shuffle=True, seed=5, workers=workers)
        for epoch in (1, 2):
            batches.set_epoch(epoch)
            made.setdefault(epoch, []).append(list(batches))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    for first, *others in made.values():
        for other in others:
            assert all(torch.equal(a, b) for x, y in zip(first, other, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(made[1][0][0][0], made[2][0][0][0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("aug", ["flip", "rand-m9-mstd0.5-inc1"])
def test_an_epoch_goes_on_from_any_batch_without_what_came_before(images, aug, workers):
    for size in (16, 24):  # in memory as they are, and transformed one by one
        inputs = Preprocess((3, size, size), MEAN, STD)
        whole = loader(images, inputs, 3, aug=aug, shuffle=True, seed=1)
        whole.set_epoch(7)
        expected = list(whole)
        part = loader(images, inputs, 3, aug=aug, shuffle=True, seed=1, workers=workers)
        for start in (2, 1):
            part.set_epoch(7, start)
            assert len(part) == 4
            for (x, y), (u, v) in zip(part, expected[start:], strict=True):
                assert torch.equal(x, u)
                assert torch.equal(y, v)
        assert len(list(part)) == 4  # from the beginning again


def test_what_is_left_out_is_not_decoded(images):
    seen = []

    class Watched(Cutouts):
        def image(self, i):
            seen.append(i)
            return super().image(i)

    batches = loader(Watched(10, size=16), Preprocess((3, 24, 24), MEAN, STD), 4)
    batches.set_epoch(1, start=2)
    assert len(next(iter(batches))[0]) == 2
    assert seen == [8, 9]


def test_augmentation_of_an_image_depends_on_seed_and_epoch_and_index(images):
    same = ArraySamples(np.repeat(images.images[:1], 4, 0), [0] * 4)

    def made(seed, epoch):
        batches = loader(same, Preprocess((3, 24, 24), MEAN, STD), 4, aug="crop", seed=seed)
        batches.set_epoch(epoch)
        return [x.numpy().tobytes() for x in next(iter(batches))[0]]

    assert len(set(made(0, 1) + made(0, 2) + made(1, 1))) == 12


class Fading(Cutouts):
    """Images of which some cannot be read any more, or only at the second attempt."""

    gone: tuple[int, ...] = ()
    once: tuple[int, ...] = ()

    def image(self, i):
        if i in self.gone:
            raise Unreadable("no such file", "Found ...")
        if i in self.once:
            self.once = tuple(k for k in self.once if k != i)
            raise Unreadable("stale handle", "Found ...")
        return super().image(i)


@pytest.fixture
def fading(monkeypatch):
    monkeypatch.setattr(train_inputs, "PAUSE", 0.01)
    return Fading(10, size=16)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_vanish_are_left_out_of_their_batches_and_told(fading, workers):
    inputs = Preprocess((3, 24, 24), MEAN, STD)
    expected = list(loader(fading, inputs, 4, shuffle=True, seed=1))
    fading.gone, fading.once = (2, 7), (5,)
    batches = loader(fading, inputs, 4, shuffle=True, seed=1, workers=workers)
    found = list(batches)
    assert batches.lost == {2: "no such file", 7: "no such file"}
    assert batches.missing == {2, 7}
    order = [row for _, rows in batches.order for row in rows]
    kept = [k for k, row in enumerate(order) if row not in (2, 7)]
    assert torch.equal(torch.cat([x for x, _ in found]), torch.cat([x for x, _ in expected])[kept])
    assert torch.cat([y for _, y in found]).tolist() == fading.labels[order][kept].tolist()
    assert sum(len(x) for x, _ in found) == 8


def test_batches_that_are_mixed_in_pairs_stay_even(fading):
    fading.gone = (1,)
    assert [len(x) for x, _ in loader(fading, Preprocess((3, 24, 24), MEAN, STD), 4, even=True)] == [2, 4]


def test_a_strict_run_stops_at_the_first_and_any_run_at_a_batch_of_none(fading):
    fading.gone = (1,)
    with pytest.raises(DataError, match=r"'image 1' \(no such file\)"):
        list(loader(fading, Preprocess((3, 24, 24), MEAN, STD), 4, strict=True))
    fading.gone = (4, 5, 6, 7)
    batches = loader(fading, Preprocess((3, 24, 24), MEAN, STD), 4)
    with pytest.raises(DataError, match="4 images that can no longer be read, all of a batch"):
        list(batches)


class Deadly(Cutouts):
    """Image 6 kills the worker that reads it, as often as there are files to take away in the folder."""

    folder: str = ""

    def image(self, i):
        if i == 6 and (left := os.listdir(self.folder)):
            os.unlink(os.path.join(self.folder, left[0]))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(i)


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_is_killed_is_replaced_once(tmp_path, deaths, monkeypatch):
    waiting = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (0.3,))  # seconds until it looks after its workers, in place of 5
    inputs, images = Preprocess((3, 24, 24), MEAN, STD), Deadly(10, size=16)
    images.folder = str(tmp_path)
    expected = list(loader(images, inputs, 2, aug="crop", shuffle=True, seed=2))
    for k in range(deaths):
        (tmp_path / str(k)).touch()
    batches = loader(images, inputs, 2, aug="crop", shuffle=True, seed=2, workers=2)
    if deaths == 2:
        with pytest.raises(DataError, match=r"worker process killed, twice .* Lower --workers"):
            list(batches)
    else:
        assert all(torch.equal(a, b) for x, y in zip(batches, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="no such signal here")
@pytest.mark.parametrize("own", [signal.SIG_DFL, lambda number, frame: None])
def test_the_handler_that_another_loader_left_behind_goes(images, own, monkeypatch):
    """torch's raises in the middle of whatever runs when a worker dies, and stays for the rest of the program."""
    before = signal.signal(signal.SIGCHLD, own)
    try:
        monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
        torch.utils.data._utils.signal_handling._set_SIGCHLD_handler()
        assert signal.getsignal(signal.SIGCHLD) is not own
        assert len(list(loader(images, OWN, 5, aug="crop", workers=1))) == 2
        assert signal.getsignal(signal.SIGCHLD) is own
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, ConnectionRefusedError, FileNotFoundError])
def test_a_worker_that_is_killed_while_it_hands_over_is_replaced(images, error, monkeypatch):
    """What the receiver meets where the sender of a batch is gone before its memory was passed on."""
    kind = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    receive, times = kind._try_get_data, []

    def interrupted(self, *args):
        times.append(self)
        if len(times) == 2:
            raise error
        return receive(self, *args)

    monkeypatch.setattr(kind, "_try_get_data", interrupted)
    expected = list(loader(images, OWN, 2, aug="crop", shuffle=True, seed=2))
    batches = list(loader(images, OWN, 2, aug="crop", shuffle=True, seed=2, workers=2))
    assert times[0] is not times[-1]
    assert all(torch.equal(a, b) for x, y in zip(batches, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, EOFError, FileNotFoundError])
def test_what_a_worker_stumbles_on_is_not_taken_for_its_death(error, monkeypatch):
    def broken(self, i):
        raise error("of its own")

    monkeypatch.setattr(Cutouts, "image", broken)
    batches = loader(Cutouts(4, size=16), Preprocess((3, 16, 16), (0, 0, 0), (1, 1, 1)), 2, aug="crop", workers=1)
    with pytest.raises(error, match="of its own"):
        next(iter(batches))


def test_posterize_may_be_asked_for_no_bits_at_all():
    """As timm asks at the highest magnitude, where Pillow 13 raises."""
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    change = training_transform(Preprocess((3, 4, 4), MEAN, STD), "rand-m10-inc1")
    assert np.asarray(posterized(image, 0)).max() == 128
    operations = [op for step in change.transforms for op in getattr(step, "ops", [])]
    (op,) = (op for op in operations if op.name == "PosterizeIncreasing")
    op.prob, op.magnitude_std = 1.0, 0
    assert np.asarray(op(image)).max() == 128


def test_batches_do_not_write_to_the_images(images):
    before = images.images.copy()
    Batches(images, OWN, True, 0).__getitems__((0, np.arange(3)))
    assert np.array_equal(images.images, before)
    assert isinstance(images.image(0), Image.Image)


def test_workers_never_get_the_signals_of_their_group(monkeypatch):
    """Neither Ctrl-C nor SIGTERM, blocked from before a worker's first line; the parent gets them as before."""

    def told(self, i):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, []) >= {signal.SIGINT, signal.SIGTERM}
        return Image.new("RGB", (16, 16), "white" if blocked else "black")

    monkeypatch.setattr(Cutouts, "image", told)
    batches = loader(Cutouts(4, size=16), Preprocess((3, 16, 16), (0, 0, 0), (1, 1, 1)), 2, aug="crop", workers=1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert next(iter(batches))[0].min() == 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
