"""The scattering mixer in a ViT: the formula in complex numbers, its identity, odd sides, other grids, refusals."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from vitreous import Scattering, check, graft, new_parameters
from vitreous.base.errors import HostError, SettingError
from vitreous.layers.dtcwt import analysis, synthesis
from vitreous.mechanisms.mixer.scattering import block_diagonal, even, interpolated

SMALL = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 8, "depth": 4, "num_heads": 2, "num_classes": 5}


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | options).double().eval()


def pictures(height=16, width=24):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mixer_of(**options):
    """One with parameters of order 1, so that no part is lost beside another."""
    mixer = graft(vit(**options), "scattering").blocks[0].attn
    for i, parameter in enumerate(mixer.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    return mixer


@torch.no_grad()
def test_block_diagonal_layer_is_one_real_matrix():
    """[[Wr, -Wi], [Wi, Wr]] of all channels, blocks on its diagonal."""
    weight, bias, real, imaginary = drawn(2, 3, 2, 2), drawn(2, 3, 2), drawn(5, 3, 2), drawn(4, 3, 2)[:1].expand(5, 3, 2)
    wr, wi = (torch.block_diag(*part).T for part in weight)
    matrix = torch.cat([torch.cat([wr, -wi], dim=1), torch.cat([wi, wr], dim=1)])
    expected = torch.cat([real.flatten(1), imaginary.flatten(1)], dim=1) @ matrix.T + bias.flatten()
    found = torch.cat([part.flatten(1) for part in block_diagonal(real, imaginary, weight, bias)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-13)


@torch.no_grad()
def test_mixer_is_the_formula_in_complex_numbers():
    mixer, x = mixer_of(), drawn(2, 4, 6, 8)
    low, real, imaginary = analysis(x)
    z, blocks = torch.complex(real, imaginary), range(4)
    for weight, bias, last in ((mixer.w1, mixer.b1, False), (mixer.w2, mixer.b2, True)):
        w, b = torch.complex(*weight), torch.complex(*bias)
        z = torch.cat([z[..., 2 * k : 2 * k + 2] @ w[k] + b[k] for k in blocks], dim=-1)
        z = z if last else torch.complex(z.real.relu(), z.imag.relu())
    expected = synthesis(low * mixer.low.permute(1, 2, 0), z.real, z.imag)
    torch.testing.assert_close(mixer.mix(x), expected, atol=1e-12, rtol=1e-12)
    for parameter in mixer.parameters():  # each of them counts
        value = parameter.clone()
        parameter.zero_()
        assert not torch.allclose(mixer.mix(x), expected, atol=1e-2)
        parameter.copy_(value)


@torch.no_grad()
def test_gains_of_one_and_layers_that_change_nothing_are_the_identity():
    mixer, x = mixer_of(), drawn(2, 4, 6, 8)
    mixer.low.fill_(1)
    for weight, bias, shift in ((mixer.w1, mixer.b1, 1000.0), (mixer.w2, mixer.b2, -1000.0)):
        weight[0], weight[1] = torch.eye(2).double(), 0
        bias.fill_(shift)  # above all numbers, so that the ReLU lets them through; then away again
    torch.testing.assert_close(mixer.mix(x), x, atol=1e-11, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(3, 5), (4, 5), (3, 6), (1, 1)], ids=str)
def test_odd_sides_repeat_their_last_row_or_column(grid):
    mixer = mixer_of(img_size=(4 * grid[0], 4 * grid[1]))
    x = drawn(1, *grid, 8)
    rows, columns = (n + n % 2 for n in grid)
    longer = x[:, [min(y, grid[0] - 1) for y in range(rows)]][:, :, [min(u, grid[1] - 1) for u in range(columns)]]
    assert torch.equal(even(x), longer)
    assert mixer.low.shape == (8, rows, columns)
    assert mixer.mix(x).shape == x.shape
    assert torch.equal(mixer.mix(x), mixer.mix(longer)[:, : grid[0], : grid[1]])


@pytest.mark.parametrize("size", [(24, 16), (16, 16), (28, 36)], ids=str)
def test_other_image_sizes_interpolate_the_gains(size):
    model = check(graft(vit(dynamic_img_size=True), "scattering"), pictures(*size))
    mixer, grid = model.blocks[0].attn, tuple(n // 4 + n // 4 % 2 for n in size)
    expected = F.interpolate(mixer.low[None], grid, mode="bicubic")[0].permute(1, 2, 0)
    assert torch.equal(mixer.gains(drawn(1, *grid, 8)), expected)
    assert interpolated(mixer.low, (4, 6)) is mixer.low
    before = model(pictures(*size))
    mixer.set_grid(tuple(n // 4 for n in size))
    torch.testing.assert_close(model(pictures(*size)), before)


def test_class_token_gets_nothing():
    model, seen = graft(vit(), "scattering"), []
    model.blocks[0].attn.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(pictures())
    assert (seen[0][:, 0] == 0).all()
    assert (seen[0][:, 1:] != 0).all()
    assert model.blocks[0].attn.reading()["low_pass_gain"].shape == (8, 4, 6)


def test_default_is_the_first_quarter_and_its_parameters_are_counted():
    """(N + 4 D / blocks + 4) D per block; D = 384, 14 x 14 places."""
    model = graft(VisionTransformer(embed_dim=384, num_heads=6, depth=12, device="meta"), Scattering())
    assert [i for i, block in enumerate(model.blocks) if hasattr(block.attn, "low")] == [0, 1, 2]
    assert sum(p.numel() for p in new_parameters(model).values()) == 3 * (196 + 384 + 4) * 384


def test_start():
    mixer = graft(vit(embed_dim=80), "scattering").blocks[0].attn
    assert all(abs(p.std() - 0.02) < 3e-3 for p in mixer.parameters())


def test_bad_input():
    with pytest.raises(SettingError, match=r"blocks=0\. Expected 1 or more"):
        Scattering(blocks=0)
    with pytest.raises(SettingError, match=r"blocks=3 for 8 channels\. Expected a divisor of 8\. Give one, such as 2"):
        graft(vit(), "scattering:blocks=3")
    with pytest.raises(HostError, match=r"reads class tokens, and with scattering no block"):
        graft(vit(), "scattering:layers=0-3")
