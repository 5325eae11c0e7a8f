"""Signs of singular vectors: the caller's reference, then the sum, then the cubes."""

from __future__ import annotations

import pytest
import torch

from vitreous.layers.signs import UNSURE, signs
from vitreous.layers.spectral import leading_subspace, unit_rows


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_by_hand():
    u = torch.tensor([[[0.6], [-0.8], [0.0]]])
    factor, confidence = signs(u)  # the sum is -0.2, the cosine with ones 0.2 / sqrt(3)
    assert factor.item() == -1
    assert confidence.item() == pytest.approx(0.2 / 3**0.5)
    factor, confidence = signs(u, torch.tensor([5.0, 2.0, 2.0]))  # centred: 2, -1, -1
    assert factor.item() == 1
    assert confidence.item() == pytest.approx((1.2 + 0.8) / 6**0.5)
    factor, _ = signs(u, torch.tensor([3.0, 3.0, 3.0]))  # says nothing: the sum decides
    assert factor.item() == -1
    assert signs(torch.zeros(1, 3, 1))[0].item() == 1


@pytest.mark.parametrize("shape", [(20,), (3, 20)])
def test_a_reference_decides(shape):
    x, reference = noise(3, 20, 14), noise(*shape, seed=1)
    found = leading_subspace(x, 4, sign=reference)
    centred = (reference - reference.mean(-1, keepdim=True)).expand(3, 20)
    cosine = (found.U * centred[:, :, None]).sum(1) / centred.norm(dim=1)[:, None]
    decided = cosine.abs() >= UNSURE
    assert (cosine[decided] > 0).all()
    close(found.info.sign_confidence, cosine.abs())
    other = leading_subspace(x, 4, sign=-reference)
    close(torch.where(decided[:, None], -found.U, found.U), other.U)
    close(found.U * found.S[:, None] @ found.V.mT, other.U * other.S[:, None] @ other.V.mT)
    shifted = leading_subspace(x, 4, sign=reference + 7)
    close(found.U, shifted.U)


def test_without_a_reference_the_sum_decides_then_the_cubes():
    x = noise(3, 20, 14) + 0.3
    found = leading_subspace(x, 4)
    total = found.U.sum(1)
    assert (total[found.info.sign_confidence >= UNSURE] > 0).all()
    close(found.info.sign_confidence, total.abs() / 20**0.5)
    rows = unit_rows(x)
    found = leading_subspace(rows, 4)
    assert (found.info.sign_confidence < 1e-4).all()
    assert (found.U.pow(3).sum(1) > 0).all()
    useless = leading_subspace(rows, 4, sign=torch.full((20,), torch.nan))
    close(found.U, useless.U)


def test_signs_do_not_hang_on_the_sketch_or_the_sign_of_the_features():
    x = noise(4, 30, 20) + 0.5
    found = [leading_subspace(x, 1, sketch=noise(20, 9, seed=seed), power=20) for seed in range(3)]
    for other in found[1:]:
        close(found[0].U, other.U, 1e-4)
    close(found[0].U, leading_subspace(-x, 1, power=20).U, 1e-4)
