"""Queries and keys of unit length: the formula, and the same in few passes over memory.

A vision transformer's attention moves so many numbers for each product that passes over memory are
the main cost of a mechanism here. On the CPU and in eager mode `unit_rows_in_place` therefore works
on the queries and keys where the one product of the host wrote them, a few images at a time so that
they stay in the cache, and returns their gradient in that same layout, which spares the two copies
that PyTorch makes of it. Elsewhere `unit` computes the same in plain operations, which a compiler
fuses, and which `torch.func`, exporters and function modes can follow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

EPS = 1e-12  # a shorter row is divided by this: zero rows stay zero
# Factor and length of the rows of values, whose gradient must not change: r <r, g> / n^2 is then 0,
# and no denormal.
FAR = 1e30
PART = 2**20  # bytes of queries, keys and values per thread that are worked on at a time: half of a usual second cache


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in at least float32; zero rows stay zero.

    Half precision would underflow on small rows.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS).reciprocal()


def unit_rows_in_place(packed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(unit(q) * weight, unit(k), v), each (B, H, N, K), of packed (B, N, 3, H, K).

    packed is overwritten. weight: (H, K). Needs `needs_plain_ops(packed)` to be False, and no other
    reader of packed afterwards. Differentiable once.
    """
    if torch.is_grad_enabled() and (packed.requires_grad or weight.requires_grad):
        return UnitRows.apply(packed, weight)
    normalize_parts(packed, weight, packed[:, :, 0])
    return heads_first(packed)


def needs_plain_ops(x: Tensor) -> bool:
    """True unless x is a plain CPU tensor in full precision, in eager mode, untransformed.

    Transforms, tracers and function modes must get every operation, which in-place work would hide.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack() > 0
        or type(x) is not Tensor
        or x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or torch.is_autocast_enabled("cpu")
    )


class UnitRows(Function):
    """`unit_rows_in_place` with its gradient.

    With u = x / |x|, y = w u and a gradient g of y: that of x is (w g - u <u, w g>) / |x|, that of
    w is sum u g. Only the unit rows, which attention keeps anyway, and the inverse lengths are
    stored.
    """

    @staticmethod
    def forward(ctx, packed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.empty_like(packed[:, :, 0], memory_format=torch.contiguous_format)  # the gradient needs the unit rows too
        inverse = normalize_parts(packed, weight, q)
        ctx.save_for_backward(packed, inverse, weight)
        _, k, v = heads_first(packed)
        return q.transpose(1, 2), k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        packed, inverse, weight = ctx.saved_tensors
        dq, dk, dv = (d.transpose(1, 2) for d in (dq, dk, dv))  # (B, N, H, K) each
        grad_weight = (packed[:, :, 0] * dq).sum((0, 1))
        grads = torch.empty_like(packed)
        torch.mul(dq, weight, out=grads[:, :, 0])
        grads[:, :, 1], grads[:, :, 2] = dk, dv
        lengths = torch.ones_like(inverse)
        lengths[:, :, 2] = FAR
        # Weight norm's gradient in one kernel: f / n (g - r <r, g> / n^2) for rows r of length n
        # and a factor f.
        rows, grads, lengths, factors = (t.view(-1, t.shape[-1]) for t in (packed, grads, lengths, inverse))
        grad, _ = torch.ops.aten._weight_norm_interface_backward(grads, rows, factors, lengths, 0)
        return grad.view_as(packed), grad_weight


def normalize_parts(packed: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    """Make queries and keys of packed (B, N, 3, H, K) unit rows; write queries * weight to q.

    q: (B, N, H, K). Returns the inverse lengths (B, N, 3, H, 1), FAR for the values.
    """
    inverse = packed.new_full((*packed.shape[:-1], 1), FAR)
    image = max(1, packed[0].numel() * packed.element_size()) if len(packed) else 1
    count = max(1, PART * torch.get_num_threads() // image)
    for rows, inv, out in zip(*(t.split(count) for t in (packed[:, :, :2], inverse[:, :, :2], q)), strict=True):
        torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=inv).clamp_min_(EPS).reciprocal_()
        rows.mul_(inv)
        torch.mul(rows[:, :, 0], weight, out=out)
    return inverse


def heads_first(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3, H, K) -> queries, keys and values (B, H, N, K), all views."""
    return packed.permute(2, 0, 3, 1, 4).unbind(0)
