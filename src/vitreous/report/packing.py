"""Contents of a page: maps as bytes, numbers with few digits, harmless text."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from typing import Any

import numpy as np

LEVELS = 254  # a cell is 0 to 254; for signed maps 127 is zero
MISSING = 255  # a place without a value

INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]|\\(?=[\\xu])")


def quantised(maps: np.ndarray, signed: bool) -> str:
    """Base64 of maps (..., h, w), each on its own range.

    First (low, high) of each as little-endian float32, then the bytes.

    A value is low + byte / 254 * (high - low), so the error is at most 1/508 of the range. Signed
    maps have the range -m to m, m the largest magnitude, so that zero is exact. A place that is not
    finite becomes byte 255.
    """
    cells = maps.reshape(-1, maps.shape[-2] * maps.shape[-1]).astype(np.float32)
    finite = np.isfinite(cells)
    low = np.where(finite, cells, np.inf).min(axis=1)
    high = np.where(finite, cells, -np.inf).max(axis=1)
    empty = ~finite.any(axis=1)
    low[empty] = high[empty] = 0
    if signed:
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    span = np.where(high > low, high - low, 1)[:, None]
    levels = np.rint((np.where(finite, cells, 0) - low[:, None]) / span * LEVELS).clip(0, LEVELS)
    if signed:
        levels[high <= low] = LEVELS // 2  # a map of zeros
    levels = np.where(finite, levels, MISSING).astype(np.uint8)
    return base64.b64encode(np.stack([low, high], axis=1).astype("<f4").tobytes() + levels.tobytes()).decode("ascii")


def plain(array: np.ndarray) -> str:
    """Base64 of the array's bytes."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def deflated(*arrays: np.ndarray) -> str:
    """Base64 of the arrays' bytes after one another, compressed (RFC 1950)."""
    return base64.b64encode(zlib.compress(b"".join(array.tobytes() for array in arrays))).decode("ascii")


def number(value: Any, digits: int = 5) -> float | int | None:
    """A number for the page: a few digits, None for what is missing or not finite."""
    if value is None or isinstance(value, bool) or not math.isfinite(value):
        return None
    rounded = float(f"{float(value):.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def legible(value: Any) -> Any:
    """The same text, or tree of texts, with invisible characters written out.

    Control, direction and broken characters.

    They become \\x1b or \\u202e; a space at either end becomes U+2420. Two different names stay
    different. Numbers that JSON does not know become None.
    """
    if isinstance(value, str):
        text = INVISIBLE.sub(_written_out, value)
        inner = text.strip(" ")
        lead = len(text) - len(text.lstrip(" ")) if inner else len(text)
        return "␠" * lead + inner + "␠" * (len(text) - lead - len(inner))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {legible(str(key)): legible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [legible(item) for item in value]
    return value


def _written_out(match: re.Match) -> str:
    character = match[0]
    if character == "\\":
        return "\\\\"
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element.

    No character could end the element or begin a comment or an entity. Keys are sorted and all
    beyond ASCII is escaped (U+2028 and U+2029 among it), so equal values give equal bytes.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def picture(data: bytes) -> str:
    """A data: address of JPEG or PNG bytes; of nothing else, whatever it says it is."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif data.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    else:
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
