"""Maps as a part of a reading holds them: float16, each with a scale; batches of them."""

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
