"""Queries and keys of unit length: the formula, and the same in few passes over memory.

A vision transformer's attention moves so many numbers for each product that passes over memory are what a mechanism here
costs. On the CPU and in eager mode `unit_rows_in_place` therefore works on the queries and keys where the one product of
the host left them, a few images at a time so that they stay in the cache, and hands back their gradient in that same
layout, which spares the two copies that PyTorch makes of it. Elsewhere `unit` says the same in plain operations, which a
compiler fuses, and which `torch.func`, exporters and whoever watches calls can follow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

EPS = 1e-12  # a shorter row is divided by this: zero rows stay zero
PART = 2**20  # bytes of queries, keys and values per thread that are worked on at a time: half of a usual second cache


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in at least float32: half precision would underflow on small rows. Zero rows stay zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS).reciprocal()


def unit_rows_in_place(packed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(unit(q) * weight, unit(k), v), each (B, H, N, K), of packed (B, N, 3, H, K), which is overwritten.

    weight: (H, K). Needs `watched(packed)` to be False, and that nobody else reads packed afterwards. Differentiable once.
    """
    if torch.is_grad_enabled() and (packed.requires_grad or weight.requires_grad):
        return UnitRows.apply(packed, weight)
    normalize_parts(packed, weight, packed[:, :, 0])
    return heads_first(packed)


def watched(x: Tensor) -> bool:
    """True unless x is a plain CPU tensor in eager mode and full precision, and nobody transforms or watches what is done."""
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

    With u = x / |x|, y = w u and a gradient g of y: that of x is (w g - u <u, w g>) / |x|, that of w is sum u g. Only the
    unit rows, which attention keeps anyway, and the inverse lengths are stored.
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
        grad, grad_weight = torch.empty_like(packed), torch.zeros_like(weight)
        given = (d.transpose(1, 2) for d in (dq, dk, dv))  # (B, N, H, K) each
        heads, tokens = packed.shape[3], packed.shape[1]
        for dq, dk, dv, rows, inv, out in parts(packed, *given, packed[:, :, :2], inverse, grad):
            torch.mul(dq, inv[:, :, 0], out=out[:, :, 0])
            torch.mul(dk, inv[:, :, 1], out=out[:, :, 1])
            out[:, :, 2] = dv
            lengths = inv[:, :, 0].reciprocal().flatten(0, 1).permute(1, 2, 0)  # (H, 1, n N)
            product = rows * out[:, :, :2]  # (n, N, 2, H, K)
            columns = product[:, :, 0].view(len(dq) * tokens, heads, -1).transpose(0, 1)  # (H, n N, K)
            grad_weight += torch.bmm(lengths, columns)[:, 0]
            product[:, :, 0].mul_(weight)
            out[:, :, 0].mul_(weight)
            out[:, :, :2].addcmul_(rows, product.sum(-1, keepdim=True), value=-1)
        return grad, grad_weight


def normalize_parts(packed: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    """Make queries and keys of packed (B, N, 3, H, K) unit rows, and write queries * weight to q (B, N, H, K).

    Returns the inverse lengths (B, N, 2, H, 1).
    """
    inverse = packed.new_empty(*packed.shape[:2], 2, packed.shape[3], 1)
    for rows, inv, out in parts(packed, packed[:, :, :2], inverse, q):
        torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=inv).clamp_min_(EPS).reciprocal_()
        rows.mul_(inv)
        torch.mul(rows[:, :, 0], weight, out=out)
    return inverse


def parts(packed: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors (B, ...) a few images at a time, so many that theirs of packed fill PART bytes per thread."""
    image = max(1, packed[0].numel() * packed.element_size()) if len(packed) else 1
    count = max(1, PART * torch.get_num_threads() // image)
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def heads_first(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3, H, K) -> queries, keys and values (B, H, N, K), all views."""
    return packed.permute(2, 0, 3, 1, 4).unbind(0)
