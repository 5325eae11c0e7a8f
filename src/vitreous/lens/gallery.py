"""The maps of a batch: what each layer's sight comes to as pictures, signed where the sign is known."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from vitreous.base.errors import HostError
from vitreous.lens.direction import Direction
from vitreous.lens.foreground import Foreground, References, foreground_of, references, wanted
from vitreous.lens.formulas.maps import artifacts, signed, singular_maps
from vitreous.lens.layer_features import Sight

TOKENS, KEYS = 3, 1  # singular vectors shown of the residual stream (u1, u2, u3) and of the keys (k1)
# Rows of the vectors: of keys, centred unit rows find more at every layer (AUROC 0.96 against 0.91 at layer 8 of ViT-Tiny/16,
# 80 ECSSD images of even position, with the better sign).
ROWS = {"u": "auto", "k": "unit"}
ABOUT = {
    "attention": "attention of the class token to the patches, head by head; without a class token, the attention received",
    "rollout": "attention followed through all layers up to this one (Abnar and Zuidema 2020)",
    "u": "left singular vector of the residual stream after the block, positive where the object is",
    "k": "left singular vector of the keys, brought to unit length and centred, positive where the object is",
    "artifacts": "tokens of more than four times the median norm, which hold no picture of their place",
    "foreground": "where the subject is, found without masks",
}


def about(component: str) -> str:
    """What a component is, for people."""
    return ABOUT.get(component) or ABOUT[component[0]]


class Gallery:
    """Collects the maps of one batch: `add` each sight as soon as it is complete, then `finish`.

    rows: {"u/6": "raw" or "unit"}, as the first batch decided; filled here. layers: how many attentions there are.
    maps: {"attention/6": (B, H, rows, cols), "u1/6": (B, rows, cols), ...}; confidence: {"u1/6": (B,)}; rules: {"u1/6": by
    which reference it was signed}; notes: what could not be made, and why.
    """

    def __init__(self, layers: int, direction: Direction | None, rows: dict[str, str]):
        self.direction, self.rows = direction, rows
        self.needed = set(wanted(layers, direction)[0])
        self.sights: list[Sight] = []
        self.vectors: dict[str, tuple[Tensor, tuple[int, int]]] = {}  # {"u/6": (B, R, P) unsigned, grid}
        self.maps: dict[str, Tensor] = {}
        self.confidence: dict[str, Tensor] = {}
        self.rules: dict[str, str] = {}
        self.notes: list[str] = []

    def add(self, sight: Sight) -> None:
        """Take in one layer; features that nothing needs later are let go."""
        layer = sight.layer
        if sight.attention is not None:
            self.maps[f"attention/{layer}"] = sight.attention.unflatten(-1, sight.grid)
        if sight.rollout is not None:
            self.maps[f"rollout/{layer}"] = sight.rollout.unflatten(-1, sight.token_grid or sight.grid)
        if sight.tokens is not None:
            self.maps[f"artifacts/{layer}"] = artifacts(sight.tokens)[0].unflatten(-1, sight.token_grid)
        for letter, features, grid, rank in (
            ("u", sight.tokens, sight.token_grid, TOKENS),
            ("k", sight.keys, sight.grid, KEYS),
        ):
            if features is not None and min(features.shape[1:]) > rank:
                name = f"{letter}/{layer}"
                u, _, self.rows[name] = singular_maps(features, rank, rows=self.rows.get(name, ROWS[letter]))
                self.vectors[name] = (u, grid)
        for letter, name in (("k", "keys"), ("o", "output"), ("x", "tokens")):
            if (layer, letter) not in self.needed:
                setattr(sight, name, None)
        self.sights.append(sight)

    def finish(self) -> Foreground | None:
        """Sign the singular vectors and make the foreground map, if the model shows what that needs."""
        found, foreground = None, None
        try:
            found = references(self.sights, self.direction)
            foreground = foreground_of(found)
            self.maps["foreground/-1"] = foreground.maps
        except HostError as error:
            self.notes.append(f"No foreground map, and no signs: {error}")
        for name, (u, grid) in self.vectors.items():
            self._sign(name, u, grid, found)
        return foreground

    def _sign(self, name: str, u: Tensor, grid: tuple[int, int], found: References | None) -> None:
        letter, layer = name.split("/")
        turned = signed(u, **({} if found is None else found.on(grid)))
        for number in range(u.shape[1]):
            key = f"{letter}{number + 1}/{layer}"
            self.maps[key] = turned.maps[:, number].unflatten(-1, grid)
            self.confidence[key] = turned.confidence[:, number]
            self.rules[key] = turned.rule

    def tensors(self) -> dict[str, np.ndarray]:
        """Maps and confidences as a part of a reading holds them: float16, marks as uint8."""
        found = {}
        for name, value in self.maps.items():
            kind = torch.uint8 if value.dtype == torch.bool else torch.float16
            found[name] = value.detach().to("cpu", kind).numpy()
        found |= {f"{name}/confidence": value.detach().cpu().float().numpy() for name, value in self.confidence.items()}
        return found


def stacked(parts: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tensors of several batches as those of one."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
