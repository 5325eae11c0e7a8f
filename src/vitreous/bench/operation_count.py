"""How much arithmetic a computation asks for, whichever kernels do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
QUIET = ("prim", "prims", "profiler")  # namespaces that compute nothing
UNKNOWN = {  # products and decompositions that nothing here counts
    "_cdist_forward", "_cdist_backward", "_trilinear", "addbmm", "geqrf", "ormqr", "cholesky_inverse", "triangular_solve",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "_cudnn_rnn",
}  # fmt: skip


@dataclass(frozen=True)
class Operations:
    """Floating-point operations; a multiply-add counts two.

    by_kind: {operator: operations}, whose sum is total. uncounted: products, decompositions,
    transforms and operators of other libraries that ran, but have no formula: where there are any,
    total is a lower bound.
    """

    total: int
    by_kind: dict[str, int]
    uncounted: tuple[str, ...]


def operations(act: Callable[[], object]) -> Operations:
    """Run `act` once, uncompiled, and count what it and any backward pass in it ask for.

    Counted are products of matrices, convolutions, attention in every form, Fourier transforms and
    decompositions; not sums, element-wise functions, softmax and norms. Attention costs two
    products forward and four backward, fused or written out: that a fused kernel makes its scores a
    second time is not counted. Iterations cost what the text books give them (Golub and Van Loan
    2013, Matrix Computations, 4th ed., 4.2, 5.2, 8.3, 8.6; Fourier transforms 5 n log2 n).
    """
    with Counter() as counter:
        act()
    return Operations(sum(counter.by_kind.values()), dict(sorted(counter.by_kind.items())), tuple(sorted(counter.uncounted)))


class Counter(TorchDispatchMode):
    """Counts operations by torch's formulas, or those below where torch's are missing or off."""

    def __init__(self):
        super().__init__()
        self.by_kind: dict[str, int] = {}
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, operator = kwargs or {}, getattr(func, "overloadpacket", func)
        formula = FORMULAS.get(operator)
        if formula is None and operator not in flop_registry and isinstance(func, torch._ops.OpOverload):
            with self:  # what is made of other operators, as whole ones arrive in inference mode
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        namespace, _, name = str(operator).rpartition(".")
        if formula is not None:
            count = formula(*tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), (out, *args)), **kwargs)
        elif operator in flop_registry:
            count = flop_registry[operator](*args, **kwargs, out_val=out)
        else:
            count = 0
            foreign = namespace != "aten" and namespace not in QUIET
            if foreign or name in UNKNOWN or name.startswith(("_fft_", "linalg_", "_linalg_", "mkldnn_")):
                self.uncounted.add(str(operator))
        if count:
            self.by_kind[name] = self.by_kind.get(name, 0) + int(count)
        return out


# -- formulas: the shapes of what came out and went in, and the other arguments as they are -------


def attention(out, query, key, value, *rest, **options) -> int:
    """Two products, query by key and weights by value; masks spare nothing."""
    *batch, tokens, width = query
    return 2 * math.prod(batch) * tokens * key[-2] * (width + value[-1])


def attention_backward(out, gradient, query, key, value, *rest, **options) -> int:
    return 2 * attention(out, query, key, value)


def convolution_backward(out, gradient, x, weight, bias, stride, padding, dilation, transposed, *rest, **options) -> int:
    """As much as forward for the gradient of the input, and for that of the weight.

    Groups stay as they are.
    """
    needed = rest[-1]
    places = x if transposed else gradient
    return 2 * (needed[0] + needed[1]) * places[0] * math.prod(places[2:]) * math.prod(weight)


def svd(out, x, full_matrices=False, *rest, **options) -> int:
    """The cheaper of Golub-Reinsch and R-SVD.

    Singular values alone count as much: torch computes vectors while watched.
    """
    *batch, m, n = *x[:-2], max(x[-2:]), min(x[-2:])
    if full_matrices:
        routes = (4 * m**2 * n + 8 * m * n**2 + 9 * n**3, 4 * m**2 * n + 22 * n**3)
    else:
        routes = (14 * m * n**2 + 8 * n**3, 6 * m * n**2 + 20 * n**3)
    return math.prod(batch) * min(routes)


def qr(out, x, mode="reduced", **options) -> int:
    """Householder: R by reflectors, as much again for a thin Q, more for a square one."""
    *batch, m, n = x
    small = min(m, n)
    r = 4 * m * n * small - 2 * (m + n) * small**2 + 4 * small**3 / 3
    square = 4 * (m**2 * small - m * small**2 + small**3 / 3)
    q = {"r": 0, "reduced": 2 * m * small**2 - 2 * small**3 / 3, "complete": square}[mode]
    return math.prod(batch) * round(r + q)


def eigh(out, x, *rest, **options) -> int:
    """Symmetric QR with vectors, 9 n^3; values alone count as much, as in `svd`."""
    return math.prod(x[:-2]) * 9 * x[-1] ** 3


def cholesky(out, x, **options) -> int:
    return math.prod(x[:-2]) * round(x[-1] ** 3 / 3)


def triangular(out, a, b, **options) -> int:
    """n^2 operations for each right-hand side."""
    return math.prod(out) * a[-1]


def solve_twice(out, *operands, **options) -> int:
    """Two triangular solves with an n x n factor; the solution is (..., n, right-hand sides)."""
    solution = out if isinstance(out[0], int) else out[0]
    return 2 * math.prod(solution) * solution[-2]


def lu(out, a, **options) -> int:
    return math.prod(a[:-2]) * round(2 * a[-1] ** 3 / 3)


def solve(out, a, b, **options) -> int:
    columns = 1 if len(b) == len(a) - 1 else b[-1]
    return lu(out, a) + 2 * math.prod(a) * columns


def inverse(out, a, **options) -> int:
    return 2 * math.prod(a) * a[-1]


def fourier(complex_points: bool, inverse_real: bool = False) -> Callable[..., int]:
    def count(out, x, dim: Sequence[int], *rest, **options) -> int:
        whole = out if inverse_real else x
        points = math.prod(whole[d] for d in dim)
        return round((5 if complex_points else 2.5) * math.prod(whole) * math.log2(max(points, 1)))

    return count


def of_vectors(out, *operands, **options) -> int:
    """A matrix by a vector, or a vector by one: twice the numbers of the larger operand."""
    return 2 * max(math.prod(x) for x in operands if isinstance(x, tuple))


def nothing(*operands, **options) -> int:
    return 0


KINDS = ("efficient_attention", "flash_attention", "flash_attention_for_cpu", "cudnn_attention", "fused_attention_overrideable")
FORMULAS: dict[object, Callable[..., int]] = {
    **{getattr(aten, f"_scaled_dot_product_{kind}"): attention for kind in KINDS},
    **{getattr(aten, f"_scaled_dot_product_{kind}_backward"): attention_backward for kind in KINDS},
    aten.convolution_backward: convolution_backward,
    aten._linalg_svd: svd,
    aten.linalg_qr: qr,
    aten._linalg_eigh: eigh,
    aten.linalg_cholesky_ex: cholesky,
    aten.linalg_solve_triangular: triangular,
    aten.cholesky_solve: solve_twice,
    aten.linalg_lu_solve: solve_twice,
    aten.linalg_lu_factor_ex: lu,
    aten._linalg_solve_ex: solve,
    aten.linalg_inv_ex: inverse,
    aten._fft_c2c: fourier(True),
    aten._fft_r2c: fourier(False),
    aten._fft_c2r: fourier(False, inverse_real=True),
    **dict.fromkeys((aten.mv, aten.dot, aten.addmv, aten.vdot), of_vectors),
    **dict.fromkeys((aten._linalg_check_errors, aten.linalg_vector_norm, aten.linalg_cross), nothing),
}
