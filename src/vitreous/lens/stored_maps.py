"""Maps as a part of a reading holds them: float16, each with a scale; batches of them.

And the attention rows of all queries: bytes, each row with a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def joined_maps(batches: Sequence[Mapping[str, np.ndarray]], images: Sequence[int]) -> dict[str, np.ndarray]:
    """Tensors of batches of so many images after one another; NaN where a batch lacks one.

    A batch lacks a map where a probe failed there, or what it is of was not finite.
    """
    first = {name: value for batch in batches for name, value in reversed(batch.items())}

    def of(batch: Mapping[str, np.ndarray], count: int, name: str) -> np.ndarray:
        if name in batch:
            return batch[name]
        like = first[name]
        return np.full((count, *like.shape[1:]), 0 if like.dtype == np.uint8 else np.nan, like.dtype)

    return {name: np.concatenate([of(*batch, name) for batch in zip(batches, images, strict=True)]) for name in first}


def packed(maps: np.ndarray, lead: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps with `lead` leading axes as float16, and the power of two of each as float32.

    The largest value of a map takes the highest place but one, so that float16 reaches down to
    2e-12 of it. Values that are not finite stay so.
    """
    finite = np.where(np.isfinite(maps), np.abs(maps, dtype=np.float32), 0)
    exponent = np.frexp(finite.max(axis=tuple(range(lead, maps.ndim))))[1]
    scale = np.ldexp(np.float32(1), np.clip(exponent - 15, -126, 112))
    return scaled(maps.astype(np.float32), 1 / scale).astype(np.float16), scale


def scaled(maps: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Each map times its own number."""
    return maps * scale.reshape(*scale.shape, *[1] * (maps.ndim - scale.ndim))


def packed_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (..., *grid of two axes), not negative, as bytes and the scale of each as float32.

    A value is byte * scale, wrong by 1/510 of the largest of its row at most. The scale is NaN
    where a row has none, 0 where it is of zeros.
    """
    scale = rows.max(axis=(-2, -1)) / np.float32(255)
    steps = np.divide(rows, scale[..., None, None], where=scale[..., None, None] > 0, out=np.zeros_like(rows))
    return np.rint(np.nan_to_num(steps)).clip(0, 255).astype(np.uint8), scale


def joined_others(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tensors of batches after one another, of those that have them."""
    names = dict.fromkeys(name for batch in batches for name in batch)
    return {name: np.concatenate([batch[name] for batch in batches if name in batch]) for name in names}
