"""Cutouts: made scenes, an object of known shape and mask on a background.

The background gives the class away, or not.
"""

from __future__ import annotations

import numpy as np

from vitreous.base.errors import SettingError
from vitreous.data.samples import ArraySamples, Data, pixel_statistics

SPLITS = ("train", "test", "swapped")
CHUNK = 128  # scenes made at once: enough to spread the cost of the calls, few enough to stay in the cache
# How far a background's hue strays, in steps between kinds. Past 1/2 the hues of two kinds overlap,
# so that a model gains by reading background and shape together. Tuned on a plain ViT alone: it
# shall do well, and fall when they disagree.
HUES = 1.75


def disc(u, v):
    return np.hypot(u, v) - 0.85


def square(u, v):
    return np.maximum(abs(u), abs(v)) - 0.75


def triangle(u, v):
    return np.maximum(0.866 * abs(u) - 0.5 * v, v) - 0.5


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


# Signed distance to each outline (negative inside, true near it), for points in units of the
# object's radius; v is down.
SHAPES = {shape.__name__: shape for shape in (disc, square, triangle, star, cross, ring, bar, crescent)}


class Cutouts(ArraySamples):
    """n scenes of size x size RGB pixels, made at once and held in memory with their masks.

    Scene i has class i % classes and depends on (size, classes, seed, split, correlation, i) alone,
    never on n. In "train" and "test" its background is that of its own class with probability
    `correlation`, else that of another one; in "swapped" always that of another one. Scene i of
    "swapped" is scene i of "test", the same object in the same place and the same noise, with only
    the kind of background exchanged: the two tests compare in pairs.

    backgrounds: (n,) kind of background of each scene, as a class index.
    """

    def __init__(
        self, n: int, *, size: int = 32, classes: int = 6, seed: int = 0, split: str = "train", correlation: float = 1.0
    ):
        _check(n, size, classes, seed, split, correlation)
        labels = np.arange(n) % classes
        self.backgrounds = np.empty(n, np.int64)
        images = np.empty((n, size, size, 3), np.uint8)
        masks = np.empty((n, size, size), bool)
        filters = _filters(size, classes)
        for start in range(0, n, CHUNK):
            part = slice(start, min(start + CHUNK, n))
            draws, noise = _draws(seed, split, range(part.start, part.stop), size)
            kinds = self.backgrounds[part] = _kinds(draws, labels[part], classes, split, correlation)
            scenes = _backdrops(draws, noise, kinds, filters)  # (n, 3, size, size)
            masks[part] = _put_objects(scenes, draws, noise, labels[part], filters)
            images[part] = (np.clip(scenes, 0, 1) * 255).round().transpose(0, 2, 3, 1)
        super().__init__(images, labels, masks)


def cutouts(
    *, size: int = 32, classes: int = 6, train: int = 10000, test: int = 1500, correlation: float = 1.0, seed: int = 0
) -> Data:
    """Training scenes, and two tests of the same objects.

    "test" is on usual, "swapped" on exchanged backgrounds.
    """
    options = {"size": size, "classes": classes, "correlation": correlation, "seed": seed}
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


def _check(n: int, size: int, classes: int, seed: int, split: str, correlation: float) -> None:
    if n < 1 or size < 16 or seed < 0:
        raise SettingError(
            f"Found {n} scenes of size {size}, seed {seed}; expected at least 1 of at least 16 pixels, and a seed of 0 "
            "or more. Ask for more or larger scenes."
        )
    if not 2 <= classes <= len(SHAPES):
        raise SettingError(f"Found classes={classes}; expected 2 to {len(SHAPES)}: {', '.join(SHAPES)}. Ask for one of these.")
    if split not in SPLITS:
        raise SettingError(f"Found split={split!r}; expected one of {', '.join(SPLITS)}. Choose one of them.")
    if not 0 <= correlation <= 1:
        raise SettingError(f"Found correlation={correlation}; expected a probability. Ask for 0 to 1; 1 / classes is none.")


def _draws(seed: int, split: str, items: range, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All random numbers of some scenes: (n, 12) in [0, 1) and 2 spectra of white noise.

    The spectra are (n, 2, size, size).

    Every scene has a stream of its own, which its number selects; "swapped" reads the streams of
    "test".
    """
    draws = np.empty((len(items), 12))
    noise = np.empty((len(items), 2, size, size, 2))  # real and imaginary part last
    for row, item in enumerate(items):
        random = np.random.Generator(np.random.Philox(key=[seed, split == "train"], counter=[0, 0, 0, item]))
        random.random(out=draws[row])
        random.random(out=noise[row])
    return draws, (noise - 0.5).view(np.complex128)[..., 0]


def _kinds(draws, labels, classes: int, split: str, correlation: float) -> np.ndarray:
    """Kind of background (n,): the own class's, or another's.

    The other is the same one in "test" and "swapped".
    """
    other = (labels + 1 + (draws[:, 0] * (classes - 1)).astype(int)) % classes
    return other if split == "swapped" else np.where(draws[:, 1] < correlation, labels, other)


def _filters(size: int, kinds: int) -> np.ndarray:
    """Amplitudes 1 / f^a over frequencies (kinds, size, size); each kind has a fall-off and a
    direction of grain.
    """
    kind = np.arange(kinds)[:, None, None]
    angle, exponent = np.pi * kind / kinds, 1.4 + 0.1 * (kind % 3)
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    f = np.hypot(1.3 * along, 0.88 * across)  # grain half as long again as wide
    f[:, 0, 0] = np.inf  # no constant part: the mean colour is set apart
    return f**-exponent


def _textures(noise: np.ndarray, filters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two independent textures (n, size, size) of mean 0 and variance 1.

    They are the parts of one complex inverse transform.
    """
    field = np.fft.ifft2(noise * filters)
    field /= np.sqrt((field.real**2 + field.imag**2).mean((1, 2), keepdims=True) / 2)
    return field.real, field.imag


def _paint(textures, hue: np.ndarray, value: np.ndarray, contrast: float, saturation: float) -> np.ndarray:
    """Colours (n, 3, size, size), about 0 to 1; hue, value: (n,).

    One texture varies the brightness, one the hue.
    """
    phase = 2 * np.pi * (hue[:, None] - np.arange(3) / 3)  # (n, 3)
    tint = value[:, None] * (1 + saturation * np.cos(phase))
    colour = tint[:, :, None, None] * (1 + contrast * textures[0][:, None])
    colour -= 0.04 * np.sin(phase)[:, :, None, None] * textures[1][:, None]
    return colour


def _backdrops(draws, noise, kinds, filters) -> np.ndarray:
    """Scenes without their objects (n, 3, size, size).

    Hue, fall-off and grain come with the kind.
    """
    hue = (kinds + HUES * (draws[:, 2] + draws[:, 3] - 1)) / len(filters)
    return _paint(_textures(noise[:, 0], filters[kinds]), hue, 0.25 + 0.15 * draws[:, 4], contrast=0.15, saturation=0.45)


def _put_objects(scenes, draws, noise, labels, filters) -> np.ndarray:
    """Paint the objects into `scenes`; returns their masks (n, size, size).

    Colour and texture are drawn: only shape tells.
    """
    size = scenes.shape[-1]
    texture = _textures(noise[:, 1], filters[(draws[:, 5] * len(filters)).astype(int)])
    paint = _paint(texture, draws[:, 6], 0.75 + 0.15 * draws[:, 7], contrast=0.12, saturation=0.3)

    radius = size * (0.3 + 0.1 * draws[:, 8])
    y, x = radius + (size - 2 * radius) * draws[:, 9], radius + (size - 2 * radius) * draws[:, 10]
    turn = 0.5 * (2 * draws[:, 11] - 1)  # radians: things stand about upright
    place = np.arange(size) + 0.5
    dy, dx = (((place - c[:, None]) / radius[:, None]) for c in (y, x))  # (n, size)
    cos, sin = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    u = cos * dx[:, None, :] + sin * dy[:, :, None]  # (n, size, size)
    v = cos * dy[:, :, None] - sin * dx[:, None, :]
    depth = np.empty_like(u)  # of each pixel below the outline, in pixels
    for label, shape in enumerate(SHAPES.values()):
        of = labels == label
        depth[of] = -shape(u[of], v[of]) * radius[of, None, None]

    cover = np.clip(depth, 0, 1)[:, None]  # edges fade inwards, so that no pixel outside is touched
    rim = 0.55 + 0.45 * np.clip(depth / 2, 0, 1)[:, None]
    scenes += cover * (paint * rim - scenes)
    return depth > 0
