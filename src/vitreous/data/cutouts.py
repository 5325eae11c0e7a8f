"""Cutouts: made scenes, an object of known shape and exact mask on a background that gives its class away, or not."""

from __future__ import annotations

import numpy as np

from vitreous.data.sets import ArraySet, Data, pixel_statistics
from vitreous.errors import SettingError

SPLITS = ("train", "test", "swapped")
CHUNK = 128  # scenes made at once: enough to spread the cost of the calls, few enough to stay in the cache


def disc(u, v):
    return np.hypot(u, v) - 0.85


def square(u, v):
    return np.maximum(abs(u), abs(v)) - 0.75


def triangle(u, v):
    return np.maximum(0.866 * abs(u) + 0.5 * v, -v) - 0.5


def star(u, v):
    """Five points: the plane folded onto one point, of which one edge is left."""
    r, angle = np.hypot(u, v), abs(np.arctan2(u, v) % (0.4 * np.pi) - 0.2 * np.pi)
    return 0.37 * r * np.cos(angle) + 0.93 * r * np.sin(angle) - 0.37


def cross(u, v):
    u, v = abs(u), abs(v)
    return np.minimum(np.maximum(u - 0.95, v - 0.32), np.maximum(u - 0.32, v - 0.95))


def ring(u, v):
    return abs(np.hypot(u, v) - 0.65) - 0.25


def bar(u, v):
    return np.maximum(abs(u) - 1.0, abs(v) - 0.3)


def crescent(u, v):
    return np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v))


# Signed distance to each outline (negative inside, about exact near it), for points in units of the object's radius.
SHAPES = {shape.__name__: shape for shape in (disc, square, triangle, star, cross, ring, bar, crescent)}


class Cutouts(ArraySet):
    """n scenes of size x size RGB pixels, held in memory with their masks.

    Scene i has class i % classes and depends on (size, classes, seed, split, i, correlation) alone. In "train" and
    "test" its background is that of its own class with probability `correlation`, else that of another one; in
    "swapped" always that of another one. Scene i of "swapped" is scene i of "test", object, mask, and noise, with only
    the kind of background exchanged, so that the two are compared in pairs.

    backgrounds: (n,) kind of background of each scene, a class index.
    """

    def __init__(
        self,
        n: int,
        *,
        size: int = 32,
        classes: int = 6,
        seed: int = 0,
        split: str = "train",
        correlation: float = 0.9,
    ):
        _check(n, size, classes, split, correlation)
        labels = np.arange(n) % classes
        self.backgrounds = np.empty(n, np.int64)
        images = np.empty((n, size, size, 3), np.uint8)
        masks = np.empty((n, size, size), bool)
        filters = _texture_filters(size, classes)
        for start in range(0, n, CHUNK):
            part = slice(start, min(start + CHUNK, n))
            draws, noise = _draws(seed, split, range(part.start, part.stop), size)
            self.backgrounds[part] = _backgrounds(draws, labels[part], classes, split, correlation)
            images[part], masks[part] = _scenes(draws, noise, labels[part], self.backgrounds[part], filters)
        super().__init__(images, labels, masks)


def cutouts(
    *,
    size: int = 32,
    classes: int = 6,
    train: int = 8000,
    test: int = 1500,
    correlation: float = 0.9,
    seed: int = 0,
) -> Data:
    """Training scenes and two tests, "test" and "swapped", of the same objects on usual and on exchanged backgrounds."""
    options = dict(size=size, classes=classes, correlation=correlation, seed=seed)
    made = Cutouts(train, split="train", **options)
    mean, std = pixel_statistics(made.images)
    return Data(
        name="cutouts",
        train=made,
        tests={split: Cutouts(test, split=split, **options) for split in ("test", "swapped")},
        classes=tuple(SHAPES)[:classes],
        channels=3,
        image_size=(size, size),
        mean=mean,
        std=std,
    )


def _check(n: int, size: int, classes: int, split: str, correlation: float) -> None:
    if n < 1 or size < 16:
        raise SettingError(f"Found n={n}, size={size}; expected n >= 1 and size >= 16. Ask for more or larger scenes.")
    if not 2 <= classes <= len(SHAPES):
        raise SettingError(f"Found classes={classes}; expected 2 to {len(SHAPES)}, the shapes there are: {', '.join(SHAPES)}.")
    if split not in SPLITS:
        raise SettingError(f"Found split={split!r}; expected one of {', '.join(SPLITS)}. Choose one of them.")
    if not 0 <= correlation <= 1:
        raise SettingError(f"Found correlation={correlation}; expected a probability, 0 to 1. 1 / classes means none.")


def _draws(seed: int, split: str, items: range, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All randomness of some scenes: 24 numbers in [0, 1) and 2 spectra of white noise for each.

    Every scene has a stream of its own, which its number selects; "swapped" reads the streams of "test".
    """
    draws = np.empty((len(items), 24))  # (n, 24)
    noise = np.empty((len(items), 2, size, size, 2))  # real and imaginary part last
    stream = ("train", "test", "test")[SPLITS.index(split)]
    for row, item in enumerate(items):
        random = np.random.Generator(np.random.Philox(key=[seed, ("train", "test").index(stream)], counter=[0, 0, 0, item]))
        random.random(out=draws[row])
        random.random(out=noise[row])
    noise -= 0.5
    return draws, noise.view(np.complex128)[..., 0]  # (n, 2, size, size)


def _backgrounds(draws, labels, classes: int, split: str, correlation: float) -> np.ndarray:
    """Kind of background (n,): the own class's or, the same one in "test" and "swapped", another's."""
    other = (labels + 1 + (draws[:, 0] * (classes - 1)).astype(int)) % classes
    return other if split == "swapped" else np.where(draws[:, 1] < correlation, labels, other)


def _texture_filters(size: int, kinds: int) -> np.ndarray:
    """Amplitude 1 / f^a over frequencies (kinds, size, size); each kind has its own fall-off and direction of grain."""
    kind = np.arange(kinds)[:, None, None]
    angle = np.pi * kind / kinds
    exponent = EX0 + EXD * (kind % 3)
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    f = np.hypot(ST * along, across / ST**.5)  # 2.0 and 0.7: streaks about three times as long as wide
    f[:, 0, 0] = np.inf  # no constant part: the mean colour is set apart
    return f**-exponent


def _fields(noise: np.ndarray, filters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two independent textures of mean 0 and variance 1, each (n, size, size), from complex noise and its amplitudes."""
    spectrum = noise * filters
    field = np.fft.ifft2(spectrum)
    power = np.sqrt((field.real**2 + field.imag**2).mean((1, 2), keepdims=True) / 2)
    return field.real / power, field.imag / power


def _paint(fields, hue: np.ndarray, value: np.ndarray, contrast: float, saturation) -> np.ndarray:
    """Textures as colours (n, 3, size, size) about 0 to 1: one varies the brightness, the other the hue. hue, value: (n,)."""
    phase = 2 * np.pi * (hue[:, None] - np.arange(3) / 3)  # (n, 3)
    tint = value[:, None] * (1 + saturation * np.cos(phase))
    turn = -TURN * np.sin(phase)
    colour = tint[:, :, None, None] * (1 + contrast * fields[0][:, None])
    return colour + turn[:, :, None, None] * fields[1][:, None]


def _scenes(draws, noise, labels, backgrounds, filters) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, size, size, 3) uint8 and masks (n, size, size) of scenes; outside the mask is background alone."""
    kinds, size = filters.shape[:2]
    hue = (backgrounds + HUEJ * (draws[:, 2] + draws[:, 3] - 1)) / kinds
    scene = _paint(_fields(noise[:, 0], filters[backgrounds]), hue, BGV + 0.15 * draws[:, 4], BGC, BGS)
    own_texture = (draws[:, 5] * kinds).astype(int)  # drawn, like the colour: only the shape tells the object's class
    value = OBV + 0.15 * draws[:, 6]
    thing = _paint(_fields(noise[:, 1], filters[own_texture]), draws[:, 7], value, OBC, 0.3)

    radius = size * (RMIN + (RMAX-RMIN) * draws[:, 8])
    y, x = (radius + (size - 2 * radius) * draws[:, k] for k in (9, 10))
    angle = ROT * (2*draws[:, 11]-1)
    grid = np.arange(size) + 0.5
    dy = (grid[:, None] - y[:, None, None]) / radius[:, None, None]
    dx = (grid[None] - x[:, None, None]) / radius[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    depth = np.empty_like(u)  # of a pixel below the outline, in pixels
    for label in np.unique(labels):
        of = labels == label
        depth[of] = -list(SHAPES.values())[label](u[of], v[of]) * radius[of, None, None]
    cover = np.clip(depth, 0, 1)[:, None]  # edges fade inwards, so that no pixel outside is touched
    rim = 0.55 + 0.45 * np.clip(depth / 2.0, 0, 1)[:, None]
    scene += cover * (thing * rim - scene)
    pixels = (np.clip(scene, 0, 1) * 255).round().astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1), depth > 0

HUEJ, RMIN, RMAX, ST, EX0, EXD, TURN, BGC, BGS, BGV, OBV, OBC, ROT = 1.5, 0.3, 0.4, 1.3, 1.4, 0.1, 0.04, 0.15, 0.45, 0.25, 0.75, 0.12, 0.5
