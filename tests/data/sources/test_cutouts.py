"""Made scenes: the same on every machine and in every order, masks exact, backgrounds correlated as asked."""

import hashlib

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from vitreous.base.errors import SettingError
from vitreous.data import Cutouts
from vitreous.data.sources.cutouts import SHAPES, _backdrops, _draws, _filters, cutouts


def digest(scenes):
    return hashlib.sha256(scenes.images.tobytes() + scenes.masks.tobytes()).hexdigest()[:16]


def test_golden_scenes():
    assert digest(Cutouts(6)) == "2cb003411a2d9a8f"
    assert digest(Cutouts(6, size=49, classes=8, seed=3, split="swapped")) == "2b90d20a99c40be2"


@pytest.mark.parametrize("size", [16, 33])
def test_a_scene_does_not_depend_on_the_others(size):
    many = Cutouts(300, size=size, seed=5)  # more than are made at once
    few = Cutouts(130, size=size, seed=5)
    np.testing.assert_array_equal(many.images[:130], few.images)
    np.testing.assert_array_equal(many.masks[:130], few.masks)
    np.testing.assert_array_equal(many.backgrounds[:130], few.backgrounds)
    np.random.seed(0)  # the global state is neither read nor moved
    state = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(Cutouts(5, size=size, seed=5).images, few.images[:5])
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_seeds_and_splits_differ():
    made = [Cutouts(12), Cutouts(12, seed=1), Cutouts(12, split="test"), Cutouts(12, split="test", seed=1)]
    assert len({digest(scenes) for scenes in made}) == 4


class Remade(torch.utils.data.Dataset):
    """Scene i, made anew wherever it is asked for."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return np.asarray(Cutouts(i + 1, seed=2).image(i)).copy()


def test_worker_processes_make_the_same():
    loader = torch.utils.data.DataLoader(Remade(), batch_size=2, num_workers=2, multiprocessing_context="spawn")
    made = torch.cat(list(loader)).numpy()
    np.testing.assert_array_equal(made, Cutouts(4, seed=2).images)


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_a_loader_fetches_batches():
    scenes = Cutouts(10)
    scenes.transform = to_tensor
    images, labels = next(iter(torch.utils.data.DataLoader(scenes, batch_size=8)))
    assert (images.shape, labels.tolist()) == ((8, 3, 32, 32), [0, 1, 2, 3, 4, 5, 0, 1])
    assert scenes.__getitems__([3])[0][0].equal(images[3])


@pytest.mark.parametrize("size", [16, 32, 64])
def test_outside_the_mask_is_background_alone(size):
    scenes = Cutouts(48, size=size, classes=8, split="test")
    draws, noise = _draws(0, "test", range(48), size)
    behind = _backdrops(draws, noise, scenes.backgrounds, _filters(size, 8))
    behind = (np.clip(behind, 0, 1) * 255).round().transpose(0, 2, 3, 1)
    differs = (scenes.images != behind).any(3)
    assert not (differs & ~scenes.masks).any()
    assert differs[scenes.masks].mean() > 0.95  # inside there is an object, up to the palest pixels of its rim


@pytest.mark.parametrize("size", [32, 96])
def test_objects_stand_inside_and_are_of_a_size(size):
    masks = Cutouts(240, size=size, classes=8).masks
    border = masks[:, 0].any(1) | masks[:, -1].any(1) | masks[:, :, 0].any(1) | masks[:, :, -1].any(1)
    assert border.mean() < 0.1  # no object is cut off, few touch the edge
    share = masks.mean((1, 2))
    assert share.min() > 0.04
    assert share.max() < 0.45


def test_masks_have_the_areas_of_the_shapes():
    """Against areas by hand, as shares of a square of the object's radius; the radius is read back from the draws."""
    side = 0.32
    areas = {
        "disc": np.pi * 0.85**2, "square": 1.5**2, "triangle": 3 * 3**0.5 * 0.5**2,
        "cross": 4 * 0.95 * side * 2 - 4 * side**2, "ring": np.pi * (0.9**2 - 0.4**2), "bar": 2 * 0.6,
    }  # fmt: skip
    scenes = Cutouts(160, size=128, classes=8)
    radius = 128 * (0.3 + 0.1 * _draws(0, "train", range(160), 128)[0][:, 8])
    measured = scenes.masks.sum((1, 2)) / radius**2
    for label, name in enumerate(SHAPES):
        if name in areas:
            np.testing.assert_allclose(measured[scenes.labels == label], areas[name], rtol=0.03, err_msg=name)


@pytest.mark.parametrize("correlation", [0.0, 0.25, 0.7, 1.0])
def test_backgrounds_are_correlated_as_asked(correlation):
    n, classes = 1200, 4
    scenes = Cutouts(n, size=16, classes=classes, correlation=correlation)
    own = (scenes.backgrounds == scenes.labels).sum()
    assert scipy.stats.binomtest(int(own), n, correlation).pvalue > 1e-3
    step = (scenes.backgrounds - scenes.labels) % classes
    if correlation < 1:  # the others are equally likely
        assert scipy.stats.chisquare(np.bincount(step, minlength=classes)[1:]).pvalue > 1e-3


def test_swapped_has_the_same_objects_on_other_backgrounds():
    test, swapped = (Cutouts(240, split=split, correlation=0.8) for split in ("test", "swapped"))
    np.testing.assert_array_equal(test.masks, swapped.masks)
    np.testing.assert_array_equal(test.labels, swapped.labels)
    assert (swapped.backgrounds != swapped.labels).all()
    solid = scipy.ndimage.binary_erosion(test.masks, np.ones((1, 3, 3)), iterations=2)  # no fading edge
    assert solid.any((1, 2)).mean() > 0.9
    np.testing.assert_array_equal(test.images[solid], swapped.images[solid])
    already = test.backgrounds != test.labels  # a scene that was unusual in the usual test stays as it was
    assert already.any()
    np.testing.assert_array_equal(test.images[already], swapped.images[already])
    changed = (test.images != swapped.images).any(3)[~already]
    assert changed[~test.masks[~already]].mean() > 0.9


def test_colour_does_not_tell_the_class():
    """The mean colour of the object, and so a rule on it, is distributed alike in all classes."""
    scenes = Cutouts(900, classes=3, size=32)
    colours = np.array([image[mask].mean(0) for image, mask in zip(scenes.images, scenes.masks, strict=True)])
    hue = np.arctan2(colours[:, 1] - colours[:, 2], colours[:, 0] - colours[:, 1])
    for other in (1, 2):
        assert scipy.stats.ks_2samp(hue[scenes.labels == 0], hue[scenes.labels == other]).pvalue > 1e-3


def test_textures_fall_off_with_frequency():
    """The power of a backdrop's brightness over the radius of frequency is a falling power law, about f^-2.9 (2 a)."""
    draws, noise = _draws(0, "train", range(200), 64)
    grey = _backdrops(draws, noise, np.zeros(200, int), _filters(64, 6)).sum(1)
    power = (abs(np.fft.fft2(grey)) ** 2).mean(0)
    f = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None]) * 64
    rings = [power[(f >= r) & (f < r + 1)].mean() for r in range(2, 24)]
    slope = scipy.stats.linregress(np.log(np.arange(2.5, 24.5)), np.log(rings)).slope
    assert slope == pytest.approx(-2.8, abs=0.15)  # kind 0: a = 1.4


def test_data():
    data = cutouts(size=20, classes=3, train=30, test=12, seed=4)
    assert data.classes == ("disc", "square", "triangle")
    assert {name: len(images) for name, images in data.tests.items()} == {"test": 12, "swapped": 12}
    assert (data.channels, data.image_size) == (3, (20, 20))
    pixels = data.train.images.reshape(-1, 3) / 255
    assert data.mean == pytest.approx(pixels.mean(0), abs=1e-4)
    assert data.std == pytest.approx(pixels.std(0), abs=1e-4)


@pytest.mark.parametrize(
    "change", [{"n": 0}, {"size": 15}, {"classes": 1}, {"classes": 9}, {"split": "val"}, {"correlation": 1.5}, {"seed": -1}]
)
def test_settings_out_of_range(change):
    with pytest.raises(SettingError, match=r"^Found .* expected .*\. (Ask|Choose)"):
        Cutouts(**({"n": 4} | change))
