"""Axes through views and contractions, against index tensors and torch.einsum."""

from __future__ import annotations

import pytest
import torch

from vitreous.lens.coordinates.contraction import contraction
from vitreous.lens.tap.axes import Axes, on_meta

SHAPE = (2, 6, 5, 7)
CHAINS = {
    "transpose": [(torch.transpose, (1, 2))],
    "heads into the batch": [(torch.reshape, ((12, 5, 7),))],
    "windows apart and together": [(torch.reshape, ((2, 3, 2, 5, 7),)), (torch.reshape, ((6, 2, 5, 7),))],
    "permuted, then reshaped": [
        (torch.permute, ((0, 2, 1, 3),)),
        (torch.reshape, ((10, 42),)),
        (torch.reshape, ((2, 5, 3, 2, 7),)),
    ],
    "one of them": [(torch.select, (1, 3))],
    "a part": [(torch.narrow, (3, 2, 4))],
    "every second": [(torch.Tensor.__getitem__, ((slice(None), slice(None, None, 2), None, slice(1, None)),))],
    "repeated": [(torch.unsqueeze, (1,)), (torch.Tensor.expand, (2, 3, 6, 5, 7))],
}


def viewed(axes, func, x, *args):
    """Axes after func(x, ...); None: they were lost."""
    return axes and axes.after_view(on_meta(func, (x, *args), {}, x, torch.empty(x.shape, device="meta")), x.shape)


def applied(x, chain):
    axes = Axes.of(x.shape)
    for func, args in chain:
        axes = viewed(axes, func, x, *args)
        x = func(x, *args)
    return x, axes


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_axes_say_where_each_entry_came_from(chain):
    x, axes = applied(torch.arange(2 * 6 * 5 * 7).view(SHAPE), chain)
    assert torch.equal(axes.index(range(x.ndim)), x)


def test_a_range_that_begins_and_ends_within_other_axes_is_not_said():
    flat = torch.arange(2 * 6 * 5 * 7).view(12, 5, 7)
    start = viewed(Axes.of(SHAPE), torch.reshape, torch.empty(SHAPE), (12, 5, 7))
    assert viewed(start, torch.narrow, flat, 0, 5, 2) is None
    assert viewed(start, torch.narrow, flat, 0, 6, 2) is not None


def test_random_chains_of_reshapes_and_permutations():
    generator, said = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        x, axes = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5), Axes.of((2, 3, 4, 5))
        for _ in range(4):
            order = torch.randperm(x.ndim, generator=generator).tolist()
            axes = viewed(axes, torch.permute, x, order)
            x = x.permute(order)
            at = int(torch.randint(x.ndim - 1, (), generator=generator)) if x.ndim > 1 else 0
            merge = x.ndim > 1 and bool(torch.randint(2, (), generator=generator))
            if merge:
                shape = (*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
            else:
                divisor = next((d for d in (2, 3, 5) if x.shape[at] % d == 0), 1)
                shape = (*x.shape[:at], x.shape[at] // divisor, divisor, *x.shape[at + 1 :])
            axes = viewed(axes, torch.reshape, x, shape)
            x = x.reshape(shape)
            assert axes is None or torch.equal(axes.index(range(x.ndim)), x)
        said += axes is not None
    assert said > 150


A, B = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6)
CALLS = {
    "matmul": ("matmul", (A, B), {}, A @ B),
    "by keyword": ("matmul", (), {"input": A, "other": B}, A @ B),
    "one batch for both": ("matmul", (A, B[0, 0]), {}, A @ B[0, 0]),
    "bmm": ("bmm", (A[0],), {"mat2": B[0]}, A[0] @ B[0]),
    "baddbmm": ("baddbmm", (torch.zeros(4, 6), A[0], B[0]), {}, A[0] @ B[0]),
    "mm": ("mm", (A[0, 0], B[0, 0]), {}, A[0, 0] @ B[0, 0]),
    "einsum": ("einsum", ("b h i d, b h j d -> b j h i", A, B.mT), {}, torch.einsum("bhid,bhjd->bjhi", A, B.mT)),
    "ellipsis": ("einsum", ("...id,...jd->...ij", A, B.mT[0]), {}, torch.einsum("...id,...jd->...ij", A, B.mT[0])),
    "implicit": ("einsum", ("bhid,bhdj", A, B), {}, torch.einsum("bhid,bhdj", A, B)),
    "as a list": ("einsum", ("bhid,bhdj->bhij", [A, B]), {}, A @ B),
}


@pytest.mark.parametrize(("name", "args", "kwargs", "expected"), CALLS.values(), ids=CALLS)
def test_labels_of_a_contraction_give_its_result(name, args, kwargs, expected):
    c = contraction(name, args, kwargs)
    letter = {label: chr(97 + i) for i, label in enumerate(dict.fromkeys((*c.labels_a, *c.labels_b, *c.labels_out)))}
    equation = "{},{}->{}".format(*("".join(letter[label] for label in own) for own in (c.labels_a, c.labels_b, c.labels_out)))
    torch.testing.assert_close(torch.einsum(equation, c.a, c.b), expected)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("add", (A, A)),
        ("matmul", (A, A[0, 0, 0])),
        ("einsum", ("bii,bj->bij", A[0, :, :, :4], A[0, :, 0])),
        ("einsum", ("ab->ba", A[0, 0])),
    ],
)
def test_other_calls_are_none(name, args):
    assert contraction(name, args, {}) is None
