"""Operations against counts by hand: loops that do the arithmetic and count it, and closed forms of a whole network."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitreous import graft
from vitreous.bench.operation_count import operations


def test_a_product_is_what_a_loop_counts():
    rows, inner, columns = 3, 4, 5
    count = sum(2 for _ in range(rows) for _ in range(columns) for _ in range(inner))  # one multiplication, one addition
    found = operations(lambda: torch.rand(rows, inner) @ torch.rand(inner, columns))
    assert (found.total, found.by_kind, found.uncounted) == (count, {"mm": count}, ())


def vit_by_hand(batch: int, tokens: int, width: int, depth: int, hidden: int, patch: int, classes: int) -> dict[str, int]:
    """Multiply-adds of a plain ViT's forward pass, part by part; tokens with the class token."""
    block = tokens * width * 3 * width + tokens * width * width + 2 * tokens * width * hidden
    attention = 2 * tokens * tokens * width  # all heads together
    return {
        "embed": batch * (tokens - 1) * 3 * patch * patch * width,
        "blocks": batch * depth * block,
        "attention": batch * depth * attention,
        "head": batch * width * classes,
    }


@pytest.fixture(params=[True, False], ids=["fused", "explicit"])
def fused(request):
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(True)


def small(**settings) -> nn.Module:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**(shape | settings))


HAND = {"batch": 2, "tokens": 17, "width": 24, "depth": 2, "hidden": 96, "patch": 8, "classes": 7}


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
def test_forward_of_a_small_vit(fused, mode):
    model, x = small().eval(), torch.rand(2, 3, 32, 32)
    with getattr(torch, {"grad": "enable_grad"}.get(mode, mode))():
        found = operations(lambda: model(x))
    assert found.total == 2 * sum(vit_by_hand(**HAND).values())
    assert found.uncounted == ()


def test_training_step_of_a_small_vit(fused):
    """Each product has two on the way back, but for the embedding, whose input needs no gradient."""
    model, x = small().train(), torch.rand(2, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
        optimizer.step()

    parts = vit_by_hand(**HAND)
    found = operations(step)
    assert found.total == 2 * (3 * sum(parts.values()) - parts["embed"])
    assert found.uncounted == ()


def test_vit_tiny_is_the_known_number():
    """2.51 G operations (1.26 G multiply-adds, attention included); 2.15 G without attention's own products."""
    with torch.device("meta"):
        model, x = timm.create_model("vit_tiny_patch16_224").eval(), torch.rand(1, 3, 224, 224)
    hand = vit_by_hand(batch=1, tokens=197, width=192, depth=12, hidden=768, patch=16, classes=1000)
    total = operations(lambda: model(x)).total
    assert total == 2 * sum(hand.values())
    assert (round(total / 1e9, 2), round((total - 2 * hand["attention"]) / 1e9, 2)) == (2.51, 2.15)


def test_torch_differs_only_in_the_scores_that_a_fused_kernel_makes_again():
    q = torch.rand(2, 3, 17, 8, requires_grad=True)

    def act():
        F.scaled_dot_product_attention(q, q, q).sum().backward()

    with FlopCounterMode(display=False) as torchs:
        act()
    assert torchs.get_total_flops() - operations(act).total == 2 * 2 * 3 * 17 * 17 * 8


@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"stride": 2, "bias": False}], ids=str)
def test_convolution_forward_and_backward_with_groups(options):
    conv = nn.Conv2d(4, 8, 3, **options)
    x = torch.rand(2, 4, 9, 9, requires_grad=True)
    side = 7 if options.get("stride", 1) == 1 else 4
    forward = 2 * 2 * side * side * 8 * (4 // options.get("groups", 1)) * 9
    assert operations(lambda: conv(x)).total == forward
    assert operations(lambda: conv(x).sum().backward()).total == 3 * forward


# -- decompositions: loops that do the work and count it -----------------------------------------------------------------


def cholesky_by_hand(n: int) -> int:
    """Operations of the loops: every square root, division, multiplication and subtraction."""
    count = 0
    for j in range(n):
        count += 2 * j + 1
        for _ in range(j + 1, n):
            count += 2 * j + 1
    return count


def triangular_by_hand(n: int, columns: int) -> int:
    return sum(2 * i + 1 for _ in range(columns) for i in range(n))


def householder_by_hand(m: int, n: int) -> int:
    """R alone: each reflector is applied to the columns that are left, two operations twice per number."""
    count = 0
    for k in range(min(m, n)):
        count += 4 * (m - k) * (n - k - 1) + 3 * (m - k)
    return count


@pytest.mark.parametrize("n", [40, 80])
def test_decompositions_are_near_what_loops_count(n):
    """The formulas are leading terms: within 10 % of the loops at these sizes."""
    a = torch.rand(n, n)
    positive = a @ a.mT + n * torch.eye(n)
    found = operations(lambda: torch.linalg.cholesky(positive)).total
    assert found == pytest.approx(cholesky_by_hand(n), rel=0.1)
    found = operations(lambda: torch.linalg.solve_triangular(positive, a[:, :5], upper=True)).total
    assert found == triangular_by_hand(n, 5)
    for m, columns in ((n, n), (3 * n, n), (n, 3 * n)):
        found = operations(lambda m=m, columns=columns: torch.linalg.qr(torch.rand(m, columns), mode="r")).total
        assert found == pytest.approx(householder_by_hand(m, columns), rel=0.1)


def test_decompositions_by_their_formulas():
    x, batch = torch.rand(4, 30, 8), 4
    square = x.mT @ x + torch.eye(8)
    assert operations(lambda: torch.linalg.svd(x, full_matrices=False)).total == batch * (6 * 30 * 64 + 20 * 512)
    assert operations(lambda: torch.linalg.svd(x.mT, full_matrices=False)).total == batch * (6 * 30 * 64 + 20 * 512)
    assert operations(lambda: torch.linalg.qr(x)).total == batch * round(4 * 30 * 64 - 4 * 512 / 3)
    assert operations(lambda: torch.linalg.eigh(square)).total == batch * 9 * 512
    full = 4 * 900 * 8 + min(8 * 30 * 64 + 9 * 512, 22 * 512)
    assert operations(lambda: torch.linalg.svd(x)).total == batch * full
    assert operations(lambda: torch.linalg.solve(square, x.mT)).total == batch * (round(2 * 512 / 3) + 2 * 64 * 30)
    assert operations(lambda: torch.linalg.inv(square)).total == batch * 2 * 512
    factor = torch.linalg.cholesky(square)
    assert operations(lambda: torch.cholesky_solve(x.mT, factor)).total == batch * 2 * 64 * 30


def test_fourier_transforms():
    x = torch.rand(3, 16, 8)
    whole = 5 * 3 * 128 * math.log2(128)
    assert operations(lambda: torch.fft.fft2(x.to(torch.complex64))).total == whole
    assert operations(lambda: torch.fft.rfft2(x)).total == whole / 2
    half = torch.fft.rfft2(x)
    assert operations(lambda: torch.fft.irfft2(half)).total == whole / 2
    assert operations(lambda: torch.fft.fft(x.to(torch.complex64), dim=1)).total == 5 * 3 * 128 * math.log2(16)


def test_a_graft_is_counted_with_its_decompositions():
    plain, grafted = small(), graft(small(), "spc:after=1,tokens=4")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before, after = operations(lambda: plain(x)), operations(lambda: grafted(x))
    assert after.uncounted == ()
    assert after.total != before.total


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda x: torch.linalg.eig(x[0]), ("aten.linalg_eig",)),
        (lambda x: torch.cdist(x, x), ("aten._cdist_forward",)),
        (lambda x: torch.geqrf(x), ("aten.geqrf",)),
        (lambda x: torch.addbmm(x[0], x, x), ("aten.addbmm",)),
        (lambda x: F.bilinear(x, x, x), ("aten._trilinear",)),
        (lambda x: nn.LSTM(4, 3)(x), ("aten.mkldnn_rnn_layer",)),
    ],
)
def test_what_has_no_formula_is_named(act, named):
    found = operations(lambda: act(torch.rand(4, 4, 4)))
    assert (found.total, found.uncounted) == (0, named)
