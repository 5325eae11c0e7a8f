"""Unit rows against loops in float64: values, gradients, zero rows, and when the way in place is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import BaseTorchFunctionMode

from vitreous.layers import unit_norm
from vitreous.layers.unit_norm import heads_first, needs_plain_ops, unit, unit_rows_in_place

B, N, H, K = 3, 5, 2, 8


def given(dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(B, N, 3, H, K, generator=generator, dtype=dtype)
    return packed.requires_grad_(), torch.randn(H, K, generator=generator, dtype=dtype).requires_grad_()


def loops(packed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty(B, H, N, K, dtype=packed.dtype) for _ in range(3))
    for b in range(B):
        for n in range(N):
            for h in range(H):
                row_q, row_k, row_v = packed[b, n, :, h].detach()
                q[b, h, n] = row_q / sum(x * x for x in row_q).sqrt() * weight[h].detach()
                k[b, h, n] = row_k / sum(x * x for x in row_k).sqrt()
                v[b, h, n] = row_v
    return q, k, v


def composed(packed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by PyTorch's own normalisation."""
    q, k, v = heads_first(packed)
    return F.normalize(q, dim=-1) * weight[:, None], F.normalize(k, dim=-1), v


@pytest.fixture(params=[1, 2**20], ids=["image by image", "at once"], autouse=True)
def part(request, monkeypatch):
    monkeypatch.setattr(unit_norm, "PART", request.param)


@pytest.mark.parametrize("learning", [True, False])
def test_equals_the_loops(learning):
    packed, weight = given()
    with torch.set_grad_enabled(learning):
        found = unit_rows_in_place(packed.clone(), weight)
    for a, b in zip(found, loops(packed, weight), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    assert found[0].requires_grad == learning


def test_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(lambda p, w: unit_rows_in_place(p.clone(), w), given())


@pytest.mark.parametrize("zero", ["row", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_that_of_the_composition_also_at_zeros(zero, dtype):
    grads = []
    for way in (unit_rows_in_place, composed):
        packed, weight = given(dtype)
        with torch.no_grad():
            if zero == "row":
                packed[1, 2, 0, 1] = packed[0, 0, 1, 0] = 0
            else:
                weight[0, 3] = 0
        out = way(packed.clone(), weight)
        generator = torch.Generator().manual_seed(5)
        sum((o * torch.randn(o.shape, generator=generator, dtype=dtype)).sum() for o in out).backward()
        assert all(o.isfinite().all() for o in out)
        assert packed.grad.isfinite().all()
        grads.append((packed.grad, weight.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_is_refused():
    packed, weight = given()
    loss = unit_rows_in_place(packed.clone(), weight)[0].square().sum()
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_what_learns_gets_a_gradient_and_nothing_is_lost_without_images():
    packed, weight = given()
    unit_rows_in_place(packed.detach().clone(), weight)[0].sum().backward()
    assert weight.grad is not None
    assert [tuple(t.shape) for t in unit_rows_in_place(torch.zeros(0, N, 3, H, K), torch.ones(H, K))] == [(0, H, N, K)] * 3


def test_unit_rows_of_half_precision_are_taken_in_single():
    x = torch.full((2, 4), 1e-7, dtype=torch.float16)
    assert unit(x).dtype == torch.float32
    torch.testing.assert_close(unit(x), torch.full((2, 4), 0.5))
    assert torch.equal(unit(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_who_watches_is_noticed():
    x = torch.zeros(2)
    assert not needs_plain_ops(x)
    assert needs_plain_ops(x.half())
    assert needs_plain_ops(x.to("meta"))
    assert needs_plain_ops(torch.nn.Parameter(x))
    with BaseTorchFunctionMode():
        assert needs_plain_ops(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert needs_plain_ops(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(needs_plain_ops(row)) or row)(torch.zeros(2, 2))
    torch.jit.trace(lambda row: seen.append(needs_plain_ops(row)) or row, x, check_trace=False)
    torch.compile(lambda row: row + needs_plain_ops(row), backend="eager", fullgraph=True)(x)
    assert all(seen)
