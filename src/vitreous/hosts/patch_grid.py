"""Another grid of patches for a host: the sizes that its patch embedding states, and its positions."""

from __future__ import annotations

import math
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import nn

from vitreous.base.errors import GraftError, SettingError


def regridded(model: nn.Module, patch: tuple[int, int], mechanism: str) -> dict[str, Any]:
    """Changes after which patches are (height, width) = `patch` pixels large; the size of images stays.

    For a mechanism that makes such patches itself. Positions are resampled to the new grid, bicubic and with an antialiasing
    filter; those of class and register tokens stay. Raises GraftError where other grafts are in the model, some of which are
    made for the grid; SettingError where such patches do not fill the image.
    """
    if earlier := [record.mechanism for record in getattr(model, "grafts", ())]:
        raise GraftError(
            f"{earlier[0]} is in the model, and may be made for its grid of patches, which {mechanism} changes. Expected a "
            f"model without grafts. Take them out (vitreous.ungraft), and graft {mechanism} first."
        )
    embed = model.patch_embed
    if any(side % part for side, part in zip(embed.img_size, patch, strict=True)):
        raise SettingError(
            f"Found patches of {patch[0]} x {patch[1]} pixels in images of {embed.img_size[0]} x {embed.img_size[1]}. Expected "
            f"sides that divide those of the image. Give {mechanism} such patches, or the model another img_size."
        )
    grid = tuple(side // part for side, part in zip(embed.img_size, patch, strict=True))
    changes = {"patch_size": tuple(patch), "grid_size": grid, "num_patches": math.prod(grid)}
    changes = {f"patch_embed.{name}": value for name, value in changes.items()}
    if model.pos_embed is not None:
        host, extra = model.pos_embed, 0 if model.no_embed_class else model.num_prefix_tokens
        positions = resample_abs_pos_embed(host.detach(), list(grid), list(embed.grid_size), extra)
        changes["pos_embed"] = nn.Parameter(positions.clone(), requires_grad=host.requires_grad)
    return changes
