"""Hyena in a ViT: the layer and its kernel as loops, directions, both starts, other grids, layers, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from vitreous import Hyena, check, graft, new_parameters
from vitreous.base.errors import HostError, SettingError
from vitreous.mechanisms.mixer.hyena import place_features, resampled, window

SMALL = {"img_size": (12, 16), "patch_size": 4, "embed_dim": 4, "depth": 4, "num_heads": 2, "num_classes": 5}
DIRECTIONS = ("standard", "seq", "4dir", "4dirp")


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | options).double().eval()


def pictures(height=12, width=16):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mixer_of(block=0, large=True, **settings):
    """One with parameters so large that no part is lost beside another."""
    mixer = graft(vit(), Hyena(width=5, **settings)).blocks[block].attn
    if large:
        for i, parameter in enumerate(mixer.parameters()):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    return mixer


def kernel_as_loops(mixer, grid, factor):
    """k (H, W, D), place by place, with plain numbers."""
    rows, columns = (resampled(mixer.z, n).tolist() for n in grid)
    frequency, (*layers, last) = mixer.frequency.tolist(), mixer.mlp
    k = torch.zeros(*grid, 4, dtype=torch.float64)
    for i in range(grid[0]):
        for j in range(grid[1]):
            h = rows[i] + columns[j]
            for layer in layers:
                sums = [sum(w * a for w, a in zip(row, h, strict=True)) for row in layer.weight.tolist()]
                h = [math.sin(f * (s + b)) for f, s, b in zip(frequency, sums, layer.bias.tolist(), strict=True)]
            for c, row in enumerate(last.weight.tolist()):
                rate = math.log(100) * (1 / 1.5 + (1 / 0.3 - 1 / 1.5) * c / 3)
                t = i / (grid[0] - 1) + j / (grid[1] - 1)
                k[i, j, c] = sum(w * a for w, a in zip(row, h, strict=True)) * math.exp(-rate * t) * factor
    return k


@torch.no_grad()
@pytest.mark.parametrize("start", ["paper", "even"])
def test_kernel_as_loops(start):
    """The paper's is divided by the sides of the doubled picture; here 2 sqrt(3 * 4)."""
    mixer = mixer_of(start=start)
    factor = {"paper": 1 / (2 * math.sqrt(12)), "even": 1}[start]
    torch.testing.assert_close(
        mixer.kernel((3, 4), torch.float64), kernel_as_loops(mixer, (3, 4), factor), atol=1e-12, rtol=1e-12
    )


@torch.no_grad()
def test_layer_as_loops():
    """Short convolution, gate, long convolution by its direct sum, gate; each parameter counts."""
    mixer, x = mixer_of(directions="standard"), drawn(1, 3, 4, 4)
    u, short = mixer.project(x)[0], torch.zeros(3, 4, 12, dtype=torch.float64)
    for y in range(3):
        for z in range(4):
            short[y, z] = mixer.short.bias
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    if 0 <= y + a < 3 and 0 <= z + b < 4:
                        short[y, z] += mixer.short.weight[:, 0, 1 + a, 1 + b] * u[y + a, z + b]
    x0, x1, v = short[..., :4], short[..., 4:8], short[..., 8:]
    v, kernel = v * x1, kernel_as_loops(mixer, (3, 4), 1 / (2 * math.sqrt(12)))
    out = mixer.skip * v
    for y in range(3):
        for z in range(4):
            out[y, z] += sum(kernel[a, b] * v[y - a, z - b] for a in range(y + 1) for b in range(z + 1))
    expected = mixer.proj(out * x0)
    torch.testing.assert_close(mixer.mix(x)[0], expected, atol=1e-11, rtol=1e-11)
    for name, parameter in mixer.named_parameters():
        value = parameter.clone()
        parameter.zero_()
        assert not torch.allclose(mixer.mix(x)[0], expected, atol=1e-4), name
        parameter.copy_(value)


def reach(mixer, at):
    """The places (3, 4) whose v moves the long convolution's outcome at one place."""
    v = drawn(1, 3, 4, 4).requires_grad_()
    kernel = mixer.kernel((3, 4), torch.float64).detach()
    mixer.long(v, kernel)[0, at[0], at[1]].sum().backward()
    return v.grad[0].abs().sum(-1) > 1e-12


def test_directions():
    """One quadrant; the opposite one in blocks of even number; all four."""
    rows, columns = torch.arange(3)[:, None], torch.arange(4)
    behind, ahead = (rows <= 1) & (columns <= 2), (rows >= 1) & (columns >= 2)
    assert torch.equal(reach(mixer_of(directions="standard"), (1, 2)), behind)
    assert torch.equal(reach(mixer_of(directions="seq", block=0), (1, 2)), ahead)
    assert torch.equal(reach(mixer_of(directions="seq", block=1), (1, 2)), behind)
    for name in ("4dir", "4dirp"):
        assert reach(mixer_of(directions=name), (1, 2)).all()


@torch.no_grad()
def test_four_directions_of_equal_weight_turn_with_the_picture():
    mixer, v = mixer_of(directions="4dir"), drawn(1, 3, 4, 4)
    kernel = mixer.kernel((3, 4), torch.float64)
    for axes in ((1,), (2,), (1, 2)):
        assert not torch.allclose(mixer.long(v.flip(axes), kernel), mixer.long(v, kernel).flip(axes))
    mixer.blend.fill_(0.25)
    for axes in ((1,), (2,), (1, 2)):
        torch.testing.assert_close(mixer.long(v.flip(axes), kernel), mixer.long(v, kernel).flip(axes))
    full, ways = mixer_of(directions="4dirp"), mixer.long(v, kernel)
    full.blend.copy_(torch.cat([0.25 * torch.eye(4)] * 4, dim=1))
    torch.testing.assert_close(full.long(v, kernel), ways, atol=1e-13, rtol=1e-13)


def test_the_first_patch_sees_next_to_nothing_in_one_direction():
    """So a head that reads `x[:, 0]` of a model without class token, as the released one does, is no read-out."""
    x = drawn(1, 3, 4, 4).requires_grad_()
    mixer_of(directions="standard").mix(x)[0, 0, 0].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 1e-10  # what is left is rounding of the transforms
    assert seen[:2, :2].all()
    assert not seen[2:].any()
    assert not seen[:, 2:].any()


def test_number_of_parameters():
    """As counted from the authors' layer: width 192 and 384, 14 x 14 patches."""
    for width, count in ((192, 175_338), (384, 636_714)):
        model = graft(VisionTransformer(embed_dim=width, num_heads=6, depth=2, device="meta"), Hyena(layers=(0,)))
        assert sum(p.numel() for p in new_parameters(model).values()) == count


@torch.no_grad()
def test_starts():
    """The paper's division leaves the long convolution next to nothing beside d * v, and start=even a share."""
    shares, v = {}, torch.randn(1, 14, 14, 192, generator=torch.Generator().manual_seed(0))
    for start in ("paper", "even"):
        model = VisionTransformer(embed_dim=192, num_heads=3, depth=2)
        mixer = graft(model, Hyena(start=start, directions="standard")).blocks[0].attn
        shares[start] = mixer.long(v, mixer.kernel((14, 14), torch.float32)).norm() / (mixer.skip * v).norm()
    assert 0.002 < shares["paper"] < 0.01
    torch.testing.assert_close(shares["even"], 28 * shares["paper"])
    assert torch.equal(mixer.z, place_features(14))
    assert (mixer.z[:, 1] - 1).abs().max() < 1e-6
    assert mixer.z[:, 2].abs().max() < 1e-3


def test_features_and_window_of_other_grids():
    z = place_features(5)
    assert resampled(z, 5) is z
    torch.testing.assert_close(resampled(z, 9)[:, 0], torch.linspace(0, 1, 9))
    torch.testing.assert_close(resampled(z, 1)[0], z[0])
    slowest, fastest = window((4, 13), 2, z).unbind(-1)
    torch.testing.assert_close(slowest[0, -1], torch.tensor(0.01 ** (1 / 1.5)))
    torch.testing.assert_close(fastest[-1, 0], torch.tensor(0.01 ** (1 / 0.3)))


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("size", [(12, 16), (16, 12), (28, 36), (4, 4)], ids=str)
def test_any_image_size(directions, size):
    """Without new parameters; the same kernel function on each grid."""
    model = graft(vit(dynamic_img_size=True), Hyena(width=5, directions=directions))
    check(model, pictures(*size))
    fixed = graft(vit(), Hyena(width=5, directions=directions))
    fixed.set_input_size(size)
    torch.testing.assert_close(fixed(pictures(*size)), model(pictures(*size)), atol=1e-4, rtol=1e-4)


def test_default_is_the_papers_hybrid():
    """Blocks 0 to 6 of 12; those of even number turned."""
    model = graft(vit(depth=12), "hyena:width=3")
    hyenas = [i for i, block in enumerate(model.blocks) if hasattr(block.attn, "short")]
    assert hyenas == [0, 1, 2, 3, 4, 5, 6]
    assert [i for i in hyenas if model.blocks[i].attn.turned] == [0, 2, 4, 6]


def test_class_token_gets_nothing_and_the_kernel_can_be_drawn():
    model, seen = graft(vit(), Hyena(width=5, directions="standard")), []
    mixer = model.blocks[0].attn
    mixer.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(pictures())
    assert (seen[0][:, 0] == 0).all()
    assert (seen[0][:, 1:] != 0).all()
    assert not mixer.linear
    kernel = mixer.reading()["kernel"]
    assert kernel.shape == (4, 7, 7)
    torch.testing.assert_close(kernel[:, 3:, 3:].movedim(0, -1), mixer.kernel((4, 4), torch.float64).detach())
    assert (kernel[:, :3] == 0).all()
    turned = mixer_of(directions="seq").reading()["kernel"]
    assert (turned[:, 4:] == 0).all()
    assert (turned[:, :4, :4] != 0).all()


def test_bad_input():
    with pytest.raises(SettingError, match=r"width=0\. Expected 1 or more"):
        Hyena(width=0)
    with pytest.raises(SettingError, match="directions"):
        Hyena(directions="two")
    with pytest.raises(HostError, match=r"reads class tokens, and with hyena no block"):
        graft(vit(), "hyena:layers=0-3")
