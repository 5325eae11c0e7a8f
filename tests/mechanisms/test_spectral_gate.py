"""The spectral gate in a ViT: the formula token by token, its layers, its prefix, other grids, the authors' names."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

from vitreous import SpectralGate, check, graft, new_parameters
from vitreous.base.errors import HostError
from vitreous.layers.fourier import kernel_of

SMALL = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 8, "depth": 6, "num_heads": 2, "num_classes": 5}


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | options).double().eval()


def pictures(height=12, width=20):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_block_filters_its_patches_and_leaves_the_class_token_alone():
    """By the formula of a discrete Fourier transform written out, on a grid of 3 x 5."""
    model = graft(vit(), "spectral_gate")
    mixer, seen = model.blocks[0].attn, {}
    mixer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    model(pictures())
    x, y = seen["x"][:, 1:].unflatten(1, (3, 5)), seen["y"][:, 1:].unflatten(1, (3, 5))
    full = torch.fft.fft2(kernel_of(torch.view_as_complex(mixer.complex_weight.detach()), (3, 5)), dim=(0, 1))
    rows, columns = torch.arange(3).double(), torch.arange(5).double()
    turn = rows.outer(rows)[:, None, :, None] / 3 + columns.outer(columns)[None, :, None] / 5  # (u, v, y, x)
    wave = torch.exp(-2j * torch.pi * turn)
    spectrum = torch.einsum("uvyx,byxc->buvc", wave, x + 0j)
    expected = torch.einsum("uvyx,buvc->byxc", wave.conj(), spectrum * full).real / 15
    torch.testing.assert_close(y, expected, atol=1e-14, rtol=1e-12)
    assert y.abs().max() > 1e-2
    assert (seen["y"][:, 0] == 0).all()


def test_default_is_the_first_third():
    """The paper's 4 of 12."""
    for depth, mixed in ((12, [0, 1, 2, 3]), (6, [0, 1]), (2, [0])):
        model = graft(vit(depth=depth), "spectral_gate")
        assert [i for i, block in enumerate(model.blocks) if hasattr(block.attn, "complex_weight")] == mixed


def test_number_of_parameters():
    """2 * 14 * 8 * 384 per block at 224 pixels, as in SpectFormer of that width."""
    model = graft(VisionTransformer(embed_dim=384, num_heads=6, depth=3, device="meta"), "spectral_gate")
    assert sum(p.numel() for p in new_parameters(model).values()) == 2 * 14 * 8 * 384


def test_start():
    weight = graft(vit(embed_dim=200), "spectral_gate").blocks[0].attn.complex_weight
    assert abs(weight.std() - 0.02) < 1e-3
    assert abs(weight.mean()) < 1e-3


def test_all_blocks_of_a_host_that_reads_its_class_token_are_refused():
    """Its answer would be the same for all images; a head that pools over patches may have them."""
    with pytest.raises(HostError, match=r"reads class tokens, and with spectral_gate no block .*reset_classifier"):
        graft(vit(), "spectral_gate:layers=0-5")
    model = check(graft(vit(global_pool="avg"), "spectral_gate:layers=0-5"), pictures())
    assert model(pictures()).std(0).min() > 1e-4


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (16, 16), (28, 36)], ids=str)
def test_other_image_sizes_keep_the_kernel(size):
    """One bright patch in the middle gets the same neighbours on every grid that has room for the kernel."""
    model = graft(vit(dynamic_img_size=True), "spectral_gate")
    check(model, pictures(*size))
    mixer = model.blocks[0].attn
    rows, columns = size[0] // 4, size[1] // 4
    picture = torch.zeros(1, rows, columns, 8, dtype=torch.float64)
    picture[0, rows // 2, columns // 2] = 1
    kernel = mixer.mix(picture)[0]
    own = torch.fft.fftshift(kernel_of(torch.view_as_complex(mixer.complex_weight.detach()), (3, 5)), dim=(0, 1))
    for y in range(-1, 2):
        for x in range(-2, 3):
            if abs(x) <= (columns - 1) // 2:
                torch.testing.assert_close(kernel[rows // 2 + y, columns // 2 + x], own[1 + y, 2 + x], atol=1e-14, rtol=1e-12)
    fixed = graft(vit(), "spectral_gate")
    fixed.set_input_size(size)
    torch.testing.assert_close(fixed(pictures(*size)), model(pictures(*size)), atol=1e-4, rtol=1e-4)


def test_is_linear_and_says_what_it_does():
    mixer = graft(vit(), "spectral_gate").blocks[1].attn
    a, b = torch.randn(2, 1, 3, 5, 8, dtype=torch.float64)
    assert mixer.linear
    torch.testing.assert_close(mixer.mix(a) + mixer.mix(b), mixer.mix(a + b), atol=1e-14, rtol=1e-12)
    reading = mixer.reading()
    assert {name: tuple(value.shape) for name, value in reading.items()} == {
        "kernel": (8, 3, 5),
        "frequency_response": (8, 3, 5),
        "radial_response": (8, 2),
    }
    one = torch.zeros(1, 3, 5, 8, dtype=torch.float64)
    one[0, 1, 2] = 1
    torch.testing.assert_close(reading["kernel"].movedim(0, -1), mixer.mix(one)[0], atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(
        mixer.mix(torch.ones(1, 3, 5, 8).double())[0, 0, 0].abs(), reading["frequency_response"][:, 1, 2]
    )


def test_weights_of_the_authors_go_in_by_their_names():
    model = graft(vit(), SpectralGate())
    theirs = {"blocks.0.filter.complex_weight": 1, "blocks.4.attn.qkv.weight": 2, "filter.x": 3}
    assert SpectralGate().renamed(theirs) == {"blocks.0.attn.complex_weight": 1, "blocks.4.attn.qkv.weight": 2, "filter.x": 3}
    assert "blocks.0.attn.complex_weight" in model.state_dict()


def test_bad_input():
    with pytest.raises(HostError, match=r"blocks\.0 is a ParallelScalingBlock, whose attention and MLP halves"):
        graft(vit(block_fn=ParallelScalingBlock), "spectral_gate")
