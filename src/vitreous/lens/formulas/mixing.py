"""Mixing maps: which place of a module's input moves which place of its output, measured.

f is a module as a function of tokens, (B, N, D) -> (B, M, E), each image by itself. A mixing map
E (M, N) >= 0 says how far output i moves with input j; its rows, divided by their sums (`shares`),
compare with the rows of attention. They are another thing than attention: on a softmax attention of
random weights, shares of `influence` and the mean attention correlate by about 0.5.

    unit_response   exact, of affine f: unit vectors at every place
    response        forward passes alone: each token in turn replaced by another one
    influence       backward passes: the size of the Jacobian between two places
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitreous.lens.formulas.row_statistics import Distances, Points, RowBlock, RowStatistics
from vitreous.lens.tap.attention_call import Buffers

Function = Callable[[Tensor], Tensor]
MEASURES = {
    "attention_entropy": "mixing_entropy",
    "effective_tokens": "mixing_places",
    "mean_distance": "mixing_distance",
    "attention_width": "mixing_width",
}


def response(f: Function, x: Tensor, size: float | None = None, probes: int = 1, seed: int = 0, *,
             fill: Tensor | None = None, chunk: int = 64) -> Tensor:  # fmt: skip
    """|f(x with token j changed)_i - f(x)_i| of one image x (1, N, D), as (M, N) float32.

    size: None removes token j: `fill` (D,), by default the mean of all tokens, stands in its place.
    Else size times random signs are added to it, and the root mean square of `probes` draws is
    taken. N passes of f (times probes), `chunk` images in each.
    """
    fill = x[0].mean(0) if fill is None else fill
    draws = [None] if size is None else list(signs((probes, *x.shape[1:]), seed))
    total: Tensor | float = 0.0
    for draw in draws:
        moved = fill.expand_as(x[0]) if draw is None else x[0] + size * draw.to(x)
        total = total + torch.cat([distance(f, x, moved, columns) for columns in chunks(x.shape[1], chunk)]).square()
    return (total / len(draws)).sqrt().mT


def distance(f: Function, x: Tensor, moved: Tensor, columns: Tensor) -> Tensor:
    """(n, M): how far outputs move when each of n tokens in turn is its row of `moved` (N, D).

    The unchanged image is in the same batch, since rounding may depend on the size of a batch.
    """
    images = x.repeat(1 + len(columns), 1, 1)
    images[torch.arange(1, len(images)), columns] = moved[columns]
    # one alone goes without it, for modules in which an image depends on its batch mates
    y = torch.cat([f(images[:1]), f(images[1:])]).float() if len(columns) == 1 else f(images).float()
    return torch.linalg.vector_norm(y[1:] - y[:1], dim=-1)


def unit_response(f: Function, x: Tensor, probes: int = 2, seed: int = 0, *, chunk: int = 64) -> tuple[Tensor, float]:
    """The size of each block of the matrix of an affine f, (M, N), and how far draws differ.

    f(x) = A x + b; E_ij^2 estimates the squared Frobenius norm of A_ij (E, D), by the mean over
    unit vectors with random signs at place j, and is it where channels are not mixed (A_ij
    diagonal): then two draws agree, and the second result, their largest relative difference, is 0
    but for rounding.
    """
    zero = torch.zeros_like(x)
    draws = [
        torch.cat([distance(f, zero, draw.to(x), columns) for columns in chunks(x.shape[1], chunk)]).mT
        for draw in signs((probes, *x.shape[1:]), seed)
    ]
    total = sum(draw.square() for draw in draws)
    return (total / probes).sqrt(), relative(draws[0], draws[-1])


def influence(f: Function, x: Tensor, probes: int = 1, seed: int = 0, *, chunk: int = 64) -> Tensor:
    """Estimates of the Frobenius norm of dy_i / dx_j, y = f(x): (B, N, D) -> (B, M, N).

    E_ij^2 is the mean over `probes` draws of random signs s at place i of |dy_i/dx_j^T s|^2; exact
    with one probe where the Jacobian of a pair of places is diagonal, else 37, 19, 10, 5 % off with
    1, 4, 16, 64 probes on a softmax attention. M passes forward and back of f for each probe.
    """
    return torch.stack([influence_of_image(f, image[None], probes, seed, chunk) for image in x])


def influence_of_image(f: Function, x: Tensor, probes: int, seed: int, chunk: int) -> Tensor:
    with torch.no_grad():
        shape = f(x.clone()).shape[1:]  # (M, E)
    total = x.new_zeros(shape[0], x.shape[1], dtype=torch.float32)
    for draw in signs((probes, *shape), seed):
        for rows in chunks(shape[0], chunk):
            with torch.enable_grad():
                images = x.repeat(len(rows), 1, 1).requires_grad_()
                y = f(images * 1)  # a leaf may not be changed in place
                y = y[torch.arange(len(rows)), rows] * draw.to(y)[rows]
                gradient = torch.autograd.grad(y.sum(), images)[0]
            total[rows] += gradient.float().square().sum(-1)
    return (total / probes).sqrt()


def gradient_error(f: Function, x: Tensor, seed: int = 0, directions: int = 8) -> float:
    """How far gradients of f at x (1, N, D) are from its true small changes; 0: they agree.

    Between random directions v and u: <grad <u, f>, v> beside (<u, f(x + hv)> - <u, f(x - hv)>) /
    2h. Binary and spiking modules, whose gradients are made up (straight-through, surrogate), come
    to about 1.
    """
    step = 1e-3 * float(x.float().square().mean().sqrt().clamp(min=1e-6))
    true, by_gradient = [], []
    for v, draw in zip(signs((directions, *x.shape), seed), range(directions), strict=True):
        with torch.enable_grad():
            image = x.clone().requires_grad_()
            y = f(image * 1)
            u = signs((1, *y.shape), seed + 1000 + draw)[0].to(y)
            gradient = torch.autograd.grad((y * u).sum(), image, allow_unused=True)[0]
        v = v.to(x)
        with torch.no_grad():
            change = (f(x + step * v).double() - f(x - step * v).double()) * u.double()
        true.append(float(change.sum()) / (2 * step))
        by_gradient.append(0.0 if gradient is None else float((gradient.double() * v.double()).sum()))
    true, by_gradient = torch.tensor(true), torch.tensor(by_gradient)
    return float((true - by_gradient).norm() / torch.stack([true.norm(), by_gradient.norm()]).amax().clamp(min=1e-30))


def affine_error(f: Function, x: Tensor, seed: int = 0) -> tuple[float, float]:
    """How far f is from affine, and from linear, on random tokens scaled like x (1, N, D).

    |f(a + b) + f(0) - f(a) - f(b)| and |f(a + b) - f(a) - f(b)| over the largest |f|.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn((2, *x.shape[1:]), generator=generator).to(x) * x.float().std().clamp(min=1e-6).to(x)
    both, first, second, zero = f(torch.stack([a + b, a, b, torch.zeros_like(a)])).double()
    scale = both.abs().amax().clamp(min=1e-30)
    rest = both - first - second
    return float(((rest + zero).abs().amax()) / scale), float(rest.abs().amax() / scale)


def reach(matrix: Tensor) -> float:
    """The largest movement of a place by another over that of any; (M, N) with M != N: 1."""
    if matrix.shape[0] != matrix.shape[1]:
        return 1.0
    others = matrix - matrix.diag().diag()
    return float(others.amax() / matrix.amax().clamp(min=1e-30))


def shares(matrix: Tensor) -> Tensor:
    """A mixing map (..., M, N) with rows that sum to 1; a row that nothing moves stays 0."""
    total = matrix.sum(-1, keepdim=True)
    return matrix / total.masked_fill(total == 0, 1)


def measures(share: Tensor, points: Points, cover: Tensor | None = None) -> dict[str, Tensor]:
    """Measures of shares (B, M, N), each (B,), means over the rows that something moves.

    mixing_entropy, mixing_places (1 / sum of squares), mixing_distance and mixing_width in pixels:
    as `RowStatistics` has them for attention. mixing_foreground: share of the mass on places that
    is on the object; cover (B, N): share of each place that a mask covers, NaN for tokens without a
    place and images without a mask.

    points: (y, x) in pixels of outputs (M, 2) and inputs (N, 2), NaN for tokens without a place.
    """
    queries, keys = (side.double()[None, None] for side in points)
    block = RowBlock(
        slice(0, share.shape[1]), share[:, None, None].float().contiguous(), None, False, True, (queries, keys), Buffers(),
        Distances(),
    )  # fmt: skip
    statistics = RowStatistics()
    statistics.add(block)
    heads, _ = statistics.values()
    values = {new: heads[old][:, 0] for old, new in MEASURES.items()}
    if cover is not None:
        there = cover.isfinite()[:, None]
        mass = torch.where(there, share, 0)
        on_object = (mass * cover.nan_to_num()[:, None]).sum(-1) / mass.sum(-1)
        values["mixing_foreground"] = on_object.nanmean(-1)
    return values


def signs(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random signs, float32, by a seed."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((a - b).abs().amax() / torch.stack([a.abs().amax(), b.abs().amax()]).amax().clamp(min=1e-30))


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """Numbers 0 to count - 1, at most `size` at once."""
    yield from torch.arange(count).split(max(1, size))
