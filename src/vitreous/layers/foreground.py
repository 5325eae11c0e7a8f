"""A direction of features that points at the subject: its formulas, for mechanisms.

`lens.direction` says what they rest on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreous.base.errors import MaskError
from vitreous.layers.geometry import centre_prior
from vitreous.layers.stream import TokenState

TINY = 1e-12  # a shorter vector counts as none


def towards_centre(rows: Tensor, bump: Tensor) -> Tensor:
    """w (D,) = mean over images of Z^T c, which points at what tends to be central: subjects.

    rows: Z (B, P, D), unit and centred (`unit_rows`). bump: c, (P,) or (B, P). Images with values
    that are not finite count for nothing.
    """
    each = (bump[..., None, :] @ rows).squeeze(-2)  # (B, D)
    finite = each.isfinite().all(-1, keepdim=True)
    return torch.where(finite, each, 0).sum(0) / finite.sum().clamp_min(1)


def along_direction(rows: Tensor, direction: Tensor) -> Tensor:
    """z (B, P): Zw of rows Z (B, P, D), of mean 0 and variance 1 over the patches.

    Only the direction of w (D,) counts; 0 where there is none yet.
    """
    along = rows @ direction  # (B, P), mean 0 as rows are centred
    return along * (rows.shape[1] ** 0.5 / torch.linalg.vector_norm(along, dim=1, keepdim=True).clamp_min(TINY))


def place_bump(state: TokenState, rows: Tensor, mechanism: str) -> Tensor:
    """The bump at the centre of the image (`centre_prior`) at each present patch.

    (P,), or (B, P) where some were merged. Raises MaskError, with the name of the mechanism, where
    places are not known.
    """
    if state.grid is None:
        raise MaskError(
            f"Found {rows.shape[1]} tokens whose places in the images are not known. Expected a token for each place, for the "
            f"bump of {mechanism}. Switch off what drops patches before the blocks (patch_drop_rate)."
        )
    bump = centre_prior(state.grid).to(rows).repeat(state.groups)
    if state.assignment is None:
        return bump
    places = F.pad(bump, (state.prefix, 0))[None, :, None].expand(len(rows), -1, -1)
    return state.assignment.gather(places)[:, state.prefix :, 0]
