"""`signs`: the sign convention of singular vectors, for tokens and for maps."""

from __future__ import annotations

import torch
from torch import Tensor

UNSURE = 0.01  # |cosine| below which a rule leaves the sign to the next one


def signs(u: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors +-1 for the columns of u (B, N, R), and how sure they are; both (B, R).

    The second result is |cosine| with the first rule's direction, 0 to 1.
    reference: a number per token, (N,) or (B, N); entries that are not finite count as zero. The
    rules in turn, each where its |cosine| with u_i reaches UNSURE:
    1. the reference minus its mean over the tokens, so that only differences between tokens count;
       left out if None;
    2. the sum of u_i: the token u_i^T X then lies along the mean token, since
       <u_i^T X, sum_j x_j> = s_i^2 sum_j u_ji. On raw features it is nearly a constant of the
       block; the customary largest entry depends on single tokens;
    3. the sum of the cubes of u_i, for centred features, whose u_i sum to zero.
    None depends on the order of the tokens or the basis of the features. Rules 2 and 3 make signs
    agree between images; which sign is the foreground only a reference can tell. A mirror-symmetric
    u_i has no sign: it stays as computed.
    """
    squares = u.square()
    lengths = torch.linalg.vector_norm(squares, dim=1).clamp_min(1e-30)
    cosines = [u.sum(1) / u.shape[1] ** 0.5, (squares * u).sum(1) / lengths]
    if reference is not None:
        # NaN marks tokens without a value, such as prefix tokens
        reference = torch.where(reference.isfinite(), reference, 0.0).to(u).expand(u.shape[:2])
        w = reference - reference.mean(1, keepdim=True)
        w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-30)
        cosines.insert(0, (w[:, None] @ u)[:, 0])
    score = cosines[-1]
    for cosine in reversed(cosines[:-1]):
        score = torch.where(cosine.abs() >= UNSURE, cosine, score)
    return torch.where(score < 0, -1.0, 1.0).to(u), cosines[0].abs().clamp_max(1.0)
